//! Who sends what when around the ring: pure, and walked exhaustively by its tests.
//!
//! A collective is a number of steps. In step `t` every rank sends one stretch of the elements to the next rank and
//! receives one from the previous rank, and what it receives in step `t` is what it sends in step `t + 1`. That one
//! property is what lets [`crate::ring`] run all steps as one continuous byte stream: bytes go out as soon as the
//! bytes that they depend on have come in, and no step waits for another.
//!
//! Reducing and gathering, `n = 4`, rank 1 (parts are numbered by the rank that owns them):
//! ```text
//! step      0    1    2  |  3    4    5
//! sends     p0   p3   p2 |  p1   p0   p3      part (rank - 1 - step) mod n
//! receives  p3   p2   p1 |  p0   p3   p2      part (rank - 2 - step) mod n
//!           fold fold last  place ...         after the last fold the part that this rank owns is whole
//! ```

use std::ops::Range;

use reknit_membership::ids::{Rank, WorldSize};

/// The rank that `rank` receives from.
pub(crate) fn before(rank: Rank, size: WorldSize) -> Rank {
    Rank(if rank.0 == 0 { size.0 - 1 } else { rank.0 - 1 })
}

/// The rank that `rank` sends to.
pub(crate) fn following(rank: Rank, size: WorldSize) -> Rank {
    Rank(if rank.0 + 1 == size.0 { 0 } else { rank.0 + 1 })
}

/// The stretch of `len` elements that `rank` owns in a world of `size`: the parts are in rank order, without gaps, and
/// their lengths differ by one at most, the longer ones first.
///
/// # Panics
/// If `rank` is not a rank of a world of `size`.
pub fn part(len: usize, size: WorldSize, rank: Rank) -> Range<usize> {
    assert!(rank.0 < size.0, "{rank:?} is not in a world of {size:?}");
    let (size, rank) = (size.0 as usize, rank.0 as usize);
    let (each, longer) = (len / size, len % size);
    let start = rank * each + rank.min(longer);
    start..start + each + usize::from(rank < longer)
}

/// What a collective does with the elements, as far as the order of sending is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Reduce every part at its owner, then gather all parts everywhere.
    AllReduce,
    /// Reduce every part at its owner.
    ReduceScatter,
    /// Gather all parts everywhere.
    AllGather,
    /// Hand all elements of one rank around.
    Broadcast {
        /// Whose elements.
        root: Rank,
    },
    /// Move no elements at all.
    Barrier,
}

/// What to do with what a step receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Combine it with this rank's input.
    Fold,
    /// Combine it with this rank's input, which makes the part whole.
    FoldLast,
    /// It is final: put it in its place.
    Place,
}

/// The whole plan of one collective for one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Schedule {
    pattern: Pattern,
    len: usize,
    size: u32,
    rank: u32,
}

impl Schedule {
    /// The plan of `rank` for a collective over `len` elements.
    pub(crate) fn new(pattern: Pattern, len: usize, size: WorldSize, rank: Rank) -> Schedule {
        assert!(rank.0 < size.0, "{rank:?} is not in a world of {size:?}");
        Schedule { pattern, len, size: size.0, rank: rank.0 }
    }

    /// How many steps there are. Never fewer than `n - 1`: a control word needs as many to get around, and this is
    /// also why nobody can finish a collective before everybody has entered it.
    pub(crate) fn steps(&self) -> usize {
        let around = self.size as usize - 1;
        match self.pattern {
            Pattern::AllReduce => 2 * around,
            Pattern::ReduceScatter | Pattern::AllGather | Pattern::Broadcast { .. } | Pattern::Barrier => {
                around
            }
        }
    }

    /// The elements that are sent in `step`.
    pub(crate) fn sent(&self, step: usize) -> Range<usize> {
        self.sent_by(self.rank, step)
    }

    /// The elements that are received in `step`: what the previous rank sends in it.
    pub(crate) fn received(&self, step: usize) -> Range<usize> {
        self.sent_by(back(self.rank, 1, self.size), step)
    }

    /// What happens to the elements that are received in `step`.
    pub(crate) fn action(&self, step: usize) -> Action {
        let folds = match self.pattern {
            Pattern::AllReduce | Pattern::ReduceScatter => self.size as usize - 1,
            Pattern::AllGather | Pattern::Broadcast { .. } | Pattern::Barrier => 0,
        };
        match step + 1 {
            next if next < folds => Action::Fold,
            next if next == folds => Action::FoldLast,
            _ => Action::Place,
        }
    }

    /// Whether step 0 sends this rank's untouched input; otherwise what it sends lies in the output already.
    pub(crate) fn starts_from_input(&self) -> bool {
        match self.pattern {
            Pattern::AllReduce | Pattern::ReduceScatter => true,
            Pattern::AllGather | Pattern::Broadcast { .. } | Pattern::Barrier => false,
        }
    }

    fn sent_by(&self, rank: u32, step: usize) -> Range<usize> {
        let part_of = |rank| part(self.len, WorldSize(self.size), Rank(rank));
        match self.pattern {
            Pattern::AllReduce | Pattern::ReduceScatter => part_of(back(rank, step + 1, self.size)),
            Pattern::AllGather => part_of(back(rank, step, self.size)),
            // The elements are `step` ranks away from their root, and move on from there.
            Pattern::Broadcast { root } if back(rank, step, self.size) == root.0 => 0..self.len,
            Pattern::Broadcast { .. } | Pattern::Barrier => 0..0,
        }
    }
}

/// The rank that is `by` places before `rank`.
fn back(rank: u32, by: usize, size: u32) -> u32 {
    let by = u32::try_from(by % size as usize).expect("a remainder of a u32 is a u32");
    (rank + size - by) % size
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: std::ops::RangeInclusive<u32> = 1..=16;
    const LENS: [usize; 7] = [0, 1, 2, 15, 16, 17, 100];

    fn patterns(size: u32) -> Vec<Pattern> {
        let broadcasts = (0..size).map(|root| Pattern::Broadcast { root: Rank(root) });
        [Pattern::AllReduce, Pattern::ReduceScatter, Pattern::AllGather, Pattern::Barrier]
            .into_iter()
            .chain(broadcasts)
            .collect()
    }

    /// Every pattern, world size and length; each time the plans of all ranks.
    fn for_every_plan(check: impl Fn(Pattern, usize, &[Schedule])) {
        for size in SIZES {
            for pattern in patterns(size) {
                for len in LENS {
                    let plans: Vec<_> =
                        (0..size).map(|r| Schedule::new(pattern, len, WorldSize(size), Rank(r))).collect();
                    check(pattern, len, &plans);
                }
            }
        }
    }

    /// Rule C-11.
    #[test]
    fn the_parts_cover_everything_once_and_differ_by_one_at_most() {
        for size in SIZES {
            for len in LENS {
                let parts: Vec<_> = (0..size).map(|r| part(len, WorldSize(size), Rank(r))).collect();
                let mut at = 0;
                for part in &parts {
                    assert_eq!(part.start, at, "{parts:?}");
                    at = part.end;
                }
                assert_eq!(at, len);
                let shortest = parts.iter().map(ExactSizeIterator::len).min();
                assert!(parts[0].len() - shortest.unwrap() <= 1, "{parts:?}");
            }
        }
    }

    #[test]
    fn what_is_received_is_what_the_previous_rank_sends() {
        for_every_plan(|pattern, len, plans| {
            for (rank, plan) in plans.iter().enumerate() {
                let prev = &plans[(rank + plans.len() - 1) % plans.len()];
                assert_eq!(plan.steps(), prev.steps());
                for step in 0..plan.steps() {
                    assert_eq!(
                        plan.received(step),
                        prev.sent(step),
                        "{pattern:?} len {len} rank {rank} step {step}"
                    );
                }
            }
        });
    }

    #[test]
    fn what_is_sent_is_what_came_in_one_step_before() {
        for_every_plan(|pattern, len, plans| {
            for (rank, plan) in plans.iter().enumerate() {
                for step in 1..plan.steps() {
                    let (sent, came) = (plan.sent(step), plan.received(step - 1));
                    assert!(sent.is_empty() || sent == came, "{pattern:?} len {len} rank {rank} step {step}");
                }
            }
        });
    }

    /// Runs a plan on sets: each element of each rank is the set of the ranks whose input is in it.
    #[test]
    fn every_element_ends_with_every_input_once_where_it_belongs() {
        for_every_plan(|pattern, len, plans| {
            let n = plans.len();
            let size = WorldSize(n as u32);
            let own = |rank: usize| 1u32 << rank;
            let all: u32 = (1 << n) - 1;
            let mut output: Vec<Vec<u32>> = (0..n)
                .map(|rank| match pattern {
                    Pattern::AllGather => {
                        let mine = part(len, size, Rank(rank as u32));
                        (0..len).map(|i| if mine.contains(&i) { own(rank) } else { 0 }).collect()
                    }
                    Pattern::Broadcast { root } if root.0 as usize == rank => vec![own(rank); len],
                    _ => vec![0; len],
                })
                .collect();
            for step in 0..plans[0].steps() {
                let flying: Vec<Vec<u32>> = plans
                    .iter()
                    .enumerate()
                    .map(|(rank, plan)| match step == 0 && plan.starts_from_input() {
                        true => vec![own(rank); plan.sent(step).len()],
                        false => output[rank][plan.sent(step)].to_vec(),
                    })
                    .collect();
                for (rank, plan) in plans.iter().enumerate() {
                    let came = &flying[(rank + n - 1) % n];
                    let to = &mut output[rank][plan.received(step)];
                    for (to, came) in to.iter_mut().zip(came) {
                        match plan.action(step) {
                            Action::Fold | Action::FoldLast => {
                                assert_eq!(came & own(rank), 0, "{pattern:?}: input {rank} is in it twice");
                                *to = came | own(rank);
                                let whole = *to == all;
                                assert_eq!(
                                    whole,
                                    plan.action(step) == Action::FoldLast,
                                    "{pattern:?} {plan:?}"
                                );
                            }
                            Action::Place => *to = *came,
                        }
                    }
                }
            }
            if n == 1 {
                return;
            }
            for (rank, output) in output.iter().enumerate() {
                match pattern {
                    Pattern::AllReduce => assert!(output.iter().all(|set| *set == all)),
                    Pattern::ReduceScatter => {
                        assert!(output[part(len, size, Rank(rank as u32))].iter().all(|set| *set == all));
                    }
                    Pattern::AllGather => {
                        for owner in 0..n {
                            assert!(
                                output[part(len, size, Rank(owner as u32))].iter().all(|s| *s == own(owner))
                            );
                        }
                    }
                    Pattern::Broadcast { root } => assert!(output.iter().all(|s| *s == own(root.0 as usize))),
                    Pattern::Barrier => assert_eq!(plans[rank].sent(0), 0..0),
                }
            }
        });
    }

    #[test]
    fn there_are_steps_enough_for_a_word_to_get_around() {
        for_every_plan(|pattern, _, plans| {
            assert!(plans.iter().all(|plan| plan.steps() >= plans.len() - 1), "{pattern:?}");
        });
    }
}
