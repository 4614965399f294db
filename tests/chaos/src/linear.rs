//! Whether a history of one job's record could have come from one register: from a store that does one thing after the
//! other, each at some instant between its call and its answer.
//!
//! The register holds a revision, a value, and the greatest epoch that has written it. It takes a save only if the
//! revision is the expected one and no later leader has written; each save gives it a greater revision. A save whose
//! outcome nobody knows may have been taken at any instant after its call, or never.
//!
//! The search is that of Wing and Gong (1993) with Lowe's memory of configurations (2017): take any operation that
//! began before the first answer that is still missing, see whether the register allows it, go on; step back when stuck;
//! never look twice at the same set of operations with the same state.

use std::collections::HashSet;
use std::fmt;

use crate::history::{Act, Operation, Outcome};

/// How many configurations are looked at before the search is given up.
const CONFIGURATIONS_MAX: usize = 2_000_000;

/// Why a history is not one of a register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// There is no order.
    NoOrder {
        /// How many operations can be put into an order at most.
        ordered: usize,
        /// Which cannot come next after them, of those that had to.
        stuck: Vec<Operation>,
    },
    /// There are too many orders to look at.
    GaveUp,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::NoOrder { ordered, stuck } => {
                write!(f, "no register gives these answers: after {ordered} operations none of these fits:")?;
                stuck.iter().try_for_each(|operation| write!(f, "\n  {operation:?}"))
            }
            Violation::GaveUp => write!(f, "more than {CONFIGURATIONS_MAX} configurations"),
        }
    }
}

/// What is known of the register's revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Revision {
    Is(u64),
    /// A save was taken whose answer nobody has seen.
    After(u64),
}

impl Revision {
    fn may_be(self, revision: u64) -> bool {
        match self {
            Revision::Is(is) => is == revision,
            Revision::After(least) => revision > least,
        }
    }

    fn least(self) -> u64 {
        match self {
            Revision::Is(is) => is,
            Revision::After(least) => least,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Register<'a> {
    revision: Revision,
    value: &'a str,
    /// The greatest that has written.
    epoch: u64,
}

impl<'a> Register<'a> {
    /// The register after the operation, if that could have had its outcome here.
    fn after(self, act: &'a Act) -> Option<Register<'a>> {
        match act {
            Act::Save { expected, value, epoch, outcome, .. } => {
                if *outcome == Outcome::Conflict {
                    return (self.revision != Revision::Is(*expected)).then_some(self);
                }
                let least = self.revision.least().max(*expected);
                let revision = match outcome {
                    Outcome::Saved(revision) => Revision::Is(*revision),
                    Outcome::Conflict | Outcome::Unknown => Revision::After(least),
                };
                let is_newer = !matches!(revision, Revision::Is(revision) if revision <= least);
                let is_taken = self.revision.may_be(*expected) && *epoch >= self.epoch && is_newer;
                is_taken.then_some(Register { revision, value, epoch: *epoch })
            }
            Act::Load { revision, value } => (self.revision.may_be(*revision) && self.value == value)
                .then_some(Register { revision: Revision::Is(*revision), ..self }),
        }
    }
}

/// The calls and answers that are not in the order yet, as a list that gives and takes back in constant time.
struct Pending {
    /// By position: the operation, and where its answer is, if this is a call that has one.
    entries: Vec<Entry>,
    next: Vec<usize>,
    before: Vec<usize>,
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    Call {
        operation: usize,
        answer: Option<usize>,
    },
    Answer,
    /// Before the first and after the last.
    End,
}

impl Pending {
    fn new(operations: &[Operation]) -> Pending {
        let calls = operations.iter().enumerate().map(|(index, o)| (o.called_us, false, index));
        let answers =
            operations.iter().enumerate().filter_map(|(index, o)| Some((o.returned_us?, true, index)));
        let mut events: Vec<(u64, bool, usize)> = calls.chain(answers).collect();
        // What happens in the same microsecond may have been in either order: calls first allows both.
        events.sort_unstable();
        let mut entries = vec![Entry::End];
        let mut call_at = vec![0; operations.len()];
        for (_, is_answer, operation) in events {
            if !is_answer {
                call_at[operation] = entries.len();
                entries.push(Entry::Call { operation, answer: None });
                continue;
            }
            let position = entries.len();
            entries.push(Entry::Answer);
            entries[call_at[operation]] = Entry::Call { operation, answer: Some(position) };
        }
        entries.push(Entry::End);
        let (next, before) =
            ((1..=entries.len()).collect(), (0..entries.len()).map(|at| at.saturating_sub(1)).collect());
        Pending { entries, next, before }
    }

    fn first(&self) -> usize {
        self.next[0]
    }

    fn unlink(&mut self, at: usize) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = next;
        self.before[next] = before;
    }

    fn link(&mut self, at: usize) {
        let (before, next) = (self.before[at], self.next[at]);
        self.next[before] = at;
        self.before[next] = at;
    }

    fn take(&mut self, call: usize, answer: Option<usize>) {
        self.unlink(call);
        answer.into_iter().for_each(|answer| self.unlink(answer));
    }

    fn put_back(&mut self, call: usize, answer: Option<usize>) {
        answer.into_iter().for_each(|answer| self.link(answer));
        self.link(call);
    }

    /// The calls before the first answer.
    fn open(&self) -> Vec<usize> {
        let mut open = Vec::new();
        let mut at = self.first();
        while let Entry::Call { operation, .. } = self.entries[at] {
            open.push(operation);
            at = self.next[at];
        }
        open
    }
}

/// A set of operations.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Taken(Vec<u64>);

impl Taken {
    fn flip(&mut self, operation: usize) {
        self.0[operation / 64] ^= 1 << (operation % 64);
    }
}

/// Checks the operations on one job's record, from its beginning.
///
/// # Errors
/// If no order of them is one of a register.
pub fn check(operations: &[Operation]) -> Result<(), Violation> {
    let mut pending = Pending::new(operations);
    let mut register = Register { revision: Revision::Is(0), value: "", epoch: 0 };
    let mut taken = Taken(vec![0; operations.len().div_ceil(64)]);
    let mut seen: HashSet<(Taken, Register<'_>)> = HashSet::new();
    // What was taken, the register before it, and where in the list it was.
    let mut order: Vec<(usize, Option<usize>, Register<'_>)> = Vec::new();
    let mut answers_left = operations.iter().filter(|operation| operation.returned_us.is_some()).count();
    let (mut ordered, mut stuck) = (0, pending.open());
    let mut at = pending.first();
    while answers_left > 0 {
        if let Entry::Call { operation, answer } = pending.entries[at] {
            let after = register.after(&operations[operation].act);
            taken.flip(operation);
            if let Some(after) = after
                && seen.insert((taken.clone(), after))
            {
                if seen.len() > CONFIGURATIONS_MAX {
                    return Err(Violation::GaveUp);
                }
                order.push((at, answer, register));
                register = after;
                pending.take(at, answer);
                answers_left -= usize::from(answer.is_some());
                if order.len() > ordered {
                    (ordered, stuck) = (order.len(), pending.open());
                }
                at = pending.first();
            } else {
                taken.flip(operation);
                at = pending.next[at];
            }
            continue;
        }
        // An answer is due, and nothing that could come before it fits: the last choice was wrong.
        let Some((call, answer, before)) = order.pop() else {
            let stuck = stuck.into_iter().map(|operation| operations[operation].clone()).collect();
            return Err(Violation::NoOrder { ordered, stuck });
        };
        pending.put_back(call, answer);
        answers_left += usize::from(answer.is_some());
        register = before;
        if let Entry::Call { operation, .. } = pending.entries[call] {
            taken.flip(operation);
        }
        at = pending.next[call];
    }
    Ok(())
}

#[cfg(test)]
mod tests;
