//! What a rank still has of a step whose world broke, and who computes the rest of it in the next one.
//!
//! Who had its gradients when another was lost has them still: a collective that fails leaves what it was given as it was.
//! So the ranks of the next world first tell each other for which positions of the step they have gradients, and only the
//! others are shared out. Each rank then adds what it computes to what it has, and the mean is over exactly the step's
//! samples, as if nothing had happened:
//! ```text
//! a world of 4    a: 0..3   b: 3..6   c: 6..9   d: 9..12      d is lost in the all-reduce
//! a world of 3    a: 0..3   b: 3..6   c: 6..9                 kept
//!                 a: 9      b: 10     c: 11                   computed
//! ```
//! Which rank keeps what is decided from what all have said, by all alike; so it does not matter who has heard of which
//! world before, and who comes back with numbers that another has computed meanwhile drops its own.

use std::any::Any;
use std::ops::{Deref, DerefMut, Range};

use reknit_collectives::{Buffer, Element};

use crate::order::share;

/// Some of a step's positions, counted from its first one.
pub(crate) type Stretch = Range<u64>;

/// How many stretches one rank's numbers can be for. With every further world there may be some more; who has too many
/// begins anew.
const STRETCHES_MAX: usize = 8;

/// How many numbers a rank says to the others.
pub(crate) const RECORD_LEN: usize = 1 + 2 * STRETCHES_MAX;

/// What one rank says to the others: how many stretches, then where each begins and ends.
pub(crate) type Record = [i64; RECORD_LEN];

/// The numbers that a rank has added up for a step that is not committed.
pub(crate) struct Kept {
    /// Which step, counted from zero.
    pub(crate) step: u64,
    /// For which of its positions: in order, and with gaps between them.
    pub(crate) stretches: Vec<Stretch>,
    numbers: Box<dyn Any + Send + Sync>,
}

/// Where they lie.
pub(crate) enum Numbers<T: Element> {
    InBuffer(Buffer<T>),
    Copied(Vec<T>),
}

impl<T: Element> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Numbers::InBuffer(buffer) => buffer,
            Numbers::Copied(numbers) => numbers,
        }
    }
}

impl<T: Element> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Numbers::InBuffer(buffer) => buffer,
            Numbers::Copied(numbers) => numbers,
        }
    }
}

impl Kept {
    /// These numbers, for these positions of that step.
    pub(crate) fn new<T: Element>(step: u64, stretches: Vec<Stretch>, numbers: Numbers<T>) -> Kept {
        Kept { step, stretches, numbers: Box::new(numbers) }
    }

    /// The numbers, if they are of that type.
    pub(crate) fn numbers<T: Element>(&self) -> Option<&[T]> {
        self.numbers.downcast_ref::<Numbers<T>>().map(|numbers| &numbers[..])
    }
}

/// What a rank says that has these stretches; nothing if they are too many.
pub(crate) fn record(stretches: &[Stretch]) -> Record {
    let mut record = [0; RECORD_LEN];
    if stretches.len() <= STRETCHES_MAX {
        record[0] = stretches.len() as i64;
        for (pair, stretch) in record[1..].as_chunks_mut::<2>().0.iter_mut().zip(stretches) {
            *pair = [stretch.start as i64, stretch.end as i64];
        }
    }
    record
}

/// The stretches that a rank says it has.
fn stretches(record: &Record) -> Vec<Stretch> {
    let count = usize::try_from(record[0]).unwrap_or(0).min(STRETCHES_MAX);
    let stretch = |[start, end]: &[i64; 2]| *start as u64..*end as u64;
    record[1..].as_chunks().0.iter().take(count).map(stretch).collect()
}

/// What one rank is to do for a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deal {
    /// Whether what it has counts.
    pub(crate) keeps: bool,
    /// What it is to compute.
    pub(crate) own: Vec<Stretch>,
}

/// What `rank` is to do for a step of `batch` samples, after all ranks have said what they have.
pub(crate) fn deal(said: &[Record], batch: u64, rank: u32) -> Deal {
    let mut kept: Vec<Stretch> = Vec::new();
    let mut keeps = false;
    for (at, record) in said.iter().enumerate() {
        let stretches = stretches(record);
        let all = with(&kept, &stretches).filter(|all| all.last().is_none_or(|last| last.end <= batch));
        // Numbers for positions that another has too cannot be taken apart: the first one's count.
        if let Some(all) = all {
            keeps |= at == rank as usize && !stretches.is_empty();
            kept = all;
        }
    }
    let missing = gaps(&kept, batch);
    let total = missing.iter().map(|stretch| stretch.end - stretch.start).sum();
    Deal { keeps, own: cut(&missing, share(total, said.len() as u32, rank)) }
}

/// Both together, joined where they meet. Nothing if they overlap, or if one has no length.
pub(crate) fn with(some: &[Stretch], more: &[Stretch]) -> Option<Vec<Stretch>> {
    let mut all: Vec<Stretch> = some.iter().chain(more).cloned().collect();
    all.sort_by_key(|stretch| stretch.start);
    let mut joined: Vec<Stretch> = Vec::with_capacity(all.len());
    for stretch in all {
        if stretch.is_empty() {
            return None;
        }
        match joined.last_mut() {
            Some(last) if last.end > stretch.start => return None,
            Some(last) if last.end == stretch.start => last.end = stretch.end,
            _ => joined.push(stretch),
        }
    }
    Some(joined)
}

/// What is not in `stretches`, of `0..all`.
fn gaps(stretches: &[Stretch], all: u64) -> Vec<Stretch> {
    let starts = std::iter::once(0).chain(stretches.iter().map(|stretch| stretch.end));
    let ends = stretches.iter().map(|stretch| stretch.start).chain([all]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

/// The part of what `stretches` have, laid end to end.
fn cut(stretches: &[Stretch], part: Range<u64>) -> Vec<Stretch> {
    let mut before = 0;
    let mut cut = Vec::new();
    for stretch in stretches {
        let len = stretch.end - stretch.start;
        let from = part.start.clamp(before, before + len) - before;
        let to = part.end.clamp(before, before + len) - before;
        if from < to {
            cut.push(stretch.start + from..stretch.start + to);
        }
        before += len;
    }
    cut
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    clippy::reversed_empty_ranges,
    reason = "that is what they are about"
)]
mod tests {
    use super::*;

    fn said(stretches: &[Stretch]) -> Record {
        record(stretches)
    }

    fn deals(said: &[Record], batch: u64) -> Vec<Deal> {
        (0..said.len() as u32).map(|rank| deal(said, batch, rank)).collect()
    }

    #[test]
    fn without_anything_kept_a_step_is_shared_out_as_ever() {
        for size in 1..9 {
            for (rank, deal) in deals(&vec![said(&[]); size], 12).into_iter().enumerate() {
                let own = share(12, size as u32, rank as u32);
                assert_eq!(deal, Deal { keeps: false, own: vec![own] });
            }
        }
    }

    #[test]
    fn only_what_is_missing_is_computed() {
        let all = deals(&[said(&[0..3]), said(&[3..6]), said(&[6..9])], 12);
        let own = |rank: usize| &all[rank].own[..];
        assert!(all.iter().all(|deal| deal.keeps));
        assert_eq!((own(0), own(1), own(2)), (&[9..10][..], &[10..11][..], &[11..12][..]));
    }

    #[test]
    fn who_has_what_another_has_drops_it_all() {
        let all = deals(&[said(&[0..4]), said(&[3..6, 8..9]), said(&[])], 12);
        assert_eq!(all.iter().map(|deal| deal.keeps).collect::<Vec<_>>(), [true, false, false]);
    }

    #[test]
    fn what_makes_no_sense_is_nothing() {
        for bad in [&[4..4][..], &[0..13], &[5..7, 6..8], &[3..2]] {
            assert!(!deal(&[said(bad)], 12, 0).keeps, "{bad:?}");
        }
        let mut wild = said(&[0..2]);
        for count in [-1, 9, i64::MAX] {
            wild[0] = count;
            assert!(!deal(&[wild], 12, 0).keeps, "{count}");
        }
        let many: Vec<Stretch> = (0..9).map(|at| 2 * at..2 * at + 1).collect();
        assert!(!deal(&[said(&many)], 100, 0).keeps, "too many to be said");
    }

    /// Worlds that break one after the other, with ranks lost, come, and come back with what they had: in each, every
    /// position is kept or computed by exactly one rank.
    #[test]
    fn t9_whatever_worlds_break_each_position_counts_once() {
        let mut kept_ever = 0;
        for seed in 0..3000_u64 {
            let mut state = seed;
            let mut below = |n: u64| {
                state = crate::order::mix(state);
                state % n
            };
            let batch = 1 + below(40);
            let mut members: Vec<Vec<Stretch>> = vec![Vec::new(); 1 + below(6) as usize];
            let mut away: Vec<Vec<Stretch>> = Vec::new();
            for _ in 0..6 {
                let said: Vec<Record> = members.iter().map(|held| said(held)).collect();
                let mut counted = vec![0; batch as usize];
                for (rank, held) in members.iter_mut().enumerate() {
                    let Deal { keeps, own } = deal(&said, batch, rank as u32);
                    if !keeps {
                        held.clear();
                    }
                    kept_ever += held.len();
                    for position in held.iter().chain(&own).flat_map(Range::clone) {
                        counted[position as usize] += 1;
                    }
                    // It may be interrupted before it has computed its part.
                    if below(4) > 0 {
                        *held = with(held, &own.into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>())
                            .unwrap();
                    }
                }
                assert!(counted.iter().all(|count| *count == 1), "seed {seed}: {counted:?}");
                for _ in 0..below(3) {
                    let lost = members.remove(below(members.len() as u64) as usize);
                    away.push(lost);
                    if members.is_empty() {
                        members.push(Vec::new());
                    }
                }
                match (below(3), away.pop()) {
                    (0, Some(back)) => members.insert(below(members.len() as u64 + 1) as usize, back),
                    (1, _) => members.push(Vec::new()),
                    _ => {}
                }
            }
        }
        assert!(kept_ever > 0);
    }
}
