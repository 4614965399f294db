//! Whether a history of one job's record could have come from one register: from a store that does one thing after the
//! other, each at some instant between its call and its answer.
//!
//! The register holds a revision, a value, and the greatest epoch that has written or read it: who reads as a leader
//! leads, and nobody before it can write any more. It takes a save only if the revision is the expected one and no later
//! leader was there; each save gives it a greater revision. A save whose outcome nobody knows may have been taken at any
//! instant after its call, or never. One that is said to be refused may have been taken all the same before the answer:
//! it was sent again, because the first answer did not come, and what refused it the second time was its own success.
//! After that answer it is not taken any more.
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
    /// The greatest that has written or read.
    epoch: u64,
}

impl<'a> Register<'a> {
    /// What the register may be after the operation, if that could have had its outcome here.
    fn after(self, act: &'a Act) -> [Option<Register<'a>>; CHOICES] {
        match act {
            Act::Save { expected, value, epoch, outcome, .. } => {
                let least = self.revision.least().max(*expected);
                let revision = match outcome {
                    Outcome::Saved(revision) => Revision::Is(*revision),
                    Outcome::Conflict | Outcome::NotLeader | Outcome::Unknown => Revision::After(least),
                };
                let is_newer = !matches!(revision, Revision::Is(revision) if revision <= least);
                let is_taken = self.revision.may_be(*expected) && *epoch >= self.epoch && is_newer;
                let taken = is_taken.then_some(Register { revision, value, epoch: *epoch });
                let is_refused = match outcome {
                    Outcome::Saved(_) | Outcome::Unknown => false,
                    Outcome::Conflict => self.revision != Revision::Is(*expected),
                    Outcome::NotLeader => true,
                };
                [is_refused.then_some(self), taken]
            }
            Act::Load { revision, value, epoch } => {
                let is_so = self.revision.may_be(*revision) && self.value == value;
                let (revision, epoch) = (Revision::Is(*revision), self.epoch.max(*epoch));
                [is_so.then_some(Register { revision, epoch, ..self }), None]
            }
        }
    }
}

/// In how many ways an operation can have had its outcome.
const CHOICES: usize = 2;

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
    let mut order: Vec<Choice<'_>> = Vec::new();
    let mut answers_left = operations.iter().filter(|operation| operation.returned_us.is_some()).count();
    let (mut ordered, mut stuck) = (0, pending.open());
    let (mut at, mut first_way) = (pending.first(), 0);
    while answers_left > 0 {
        if let Entry::Call { operation, answer } = pending.entries[at] {
            taken.flip(operation);
            let ways = register.after(&operations[operation].act).into_iter().enumerate().skip(first_way);
            first_way = 0;
            let mut unseen = ways.filter_map(|(way, after)| Some((way, after?)));
            if let Some((way, after)) = unseen.find(|(_, after)| seen.insert((taken.clone(), *after))) {
                if seen.len() > CONFIGURATIONS_MAX {
                    return Err(Violation::GaveUp);
                }
                order.push(Choice { call: at, answer, operation, way, before: register });
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
        let Some(Choice { call, answer, operation, way, before }) = order.pop() else {
            let stuck = stuck.into_iter().map(|operation| operations[operation].clone()).collect();
            return Err(Violation::NoOrder { ordered, stuck });
        };
        pending.put_back(call, answer);
        answers_left += usize::from(answer.is_some());
        register = before;
        taken.flip(operation);
        (at, first_way) = (call, way + 1);
    }
    Ok(())
}

/// An operation that was put next, where it was in the list, in which way it was done, and the register before it.
struct Choice<'a> {
    call: usize,
    answer: Option<usize>,
    operation: usize,
    way: usize,
    before: Register<'a>,
}

#[cfg(test)]
mod tests;
