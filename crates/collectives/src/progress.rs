//! How the ranks of one host wait for each other: each counts the steps it has done in a word of its own, and who needs
//! the others to have come so far looks at their words; first without pause, then giving its core away, then asleep.
//!
//! Nobody asks who is asleep before it has counted, and nobody falls asleep before it has said so and looked again:
//! ```text
//! a rank that counts                      a rank that waits
//! progress[own] = step                    sleepers += 1
//! ── fence ──                             ── fence ──
//! sleepers > 0?  bell += 1, wake all      seen = bell;  progress[all] >= step?  else sleep while bell == seen
//! ```
//! One of the two sees what the other has written, so nobody sleeps through what it waits for.
//!
//! A rank that cannot go on says so in the word `given_up`. Whoever sees that, or that a neighbour is gone, looks at the
//! words once more before it gives up itself: had the one that is gone finished this collective, then everybody has done
//! all steps of it, and their words say so by now (C-6).

use std::time::{Duration, Instant};

use reknit_membership::ids::Rank;

use crate::words::{SegmentWords, Words};

/// How often who waits looks before it asks for the time.
const LOOKS: u32 = 64;

/// The words of all ranks of a host, as one of them sees them.
#[derive(Debug, Clone)]
pub(crate) struct Progress<W = SegmentWords> {
    words: W,
    own: usize,
    ranks: usize,
    /// How long a rank that waits keeps its core: not at all if another rank may need it.
    keep_core: Duration,
}

/// Why the others will not come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// A rank has given up, because of that one: itself, if it knows of no other.
    GivenUp(Rank),
    /// This rank is to stop.
    Stopped(Stop),
    /// Nobody has counted for too long; these have not come.
    Stalled { waited: Duration, late: Vec<Rank> },
}

impl<W: Words> Progress<W> {
    /// How long a rank keeps its core at most.
    const KEEP_CORE: Duration = Duration::from_micros(20);

    /// What the rank `own` of so many does with the words.
    pub(crate) fn new(words: W, own: usize, ranks: usize) -> Progress<W> {
        assert!(own < ranks, "a rank has its words");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let keep_core = if ranks <= cores { Self::KEEP_CORE } else { Duration::ZERO };
        Progress { words, own, ranks, keep_core }
    }

    /// Says that this rank has done `step`: all that it wrote before is there for who sees it.
    pub(crate) fn count(&self, step: u64) {
        self.words.set_progress(self.own, step);
        self.words.fence();
        if self.words.sleepers() > 0 {
            self.ring();
        }
    }

    /// Says that this rank does no further step, because of `suspect`. Who said so first is heard.
    pub(crate) fn give_up(&self, suspect: Rank) {
        // Zero is nobody.
        self.words.give_up(suspect.0 + 1);
        self.ring();
    }

    /// Because of whom somebody has given up, if anybody has.
    pub(crate) fn given_up(&self) -> Option<Rank> {
        self.words.given_up().checked_sub(1).map(Rank)
    }

    /// Wakes all who sleep, of this process and of others, so that they look.
    pub(crate) fn ring(&self) {
        self.words.ring();
        self.words.wake_all();
    }

    /// How many steps this rank has done.
    #[cfg(test)]
    pub(crate) fn counted(&self) -> u64 {
        self.words.progress(self.own)
    }

    /// Waits until all ranks have done `step`, but not after `stop` says so, and not for longer than `stall` in which
    /// nobody does a step; in all that not beyond `until`.
    pub(crate) fn wait(&self, step: u64, waiting: &Waiting<'_>) -> Result<(), Stuck> {
        let mut first_late = 0;
        if self.all_have(step, &mut first_late) {
            return Ok(());
        }
        let begun = Instant::now();
        let mut passed = Duration::ZERO;
        while passed < waiting.spin.max(self.keep_core) {
            for _ in 0..LOOKS {
                if self.all_have(step, &mut first_late) {
                    return Ok(());
                }
                if passed < self.keep_core {
                    std::hint::spin_loop();
                } else {
                    break;
                }
            }
            self.check(step, waiting)?;
            if passed >= self.keep_core {
                std::thread::yield_now();
            }
            passed = begun.elapsed();
        }
        self.sleep(step, begun, waiting)
    }

    fn sleep(&self, step: u64, begun: Instant, waiting: &Waiting<'_>) -> Result<(), Stuck> {
        let _asleep = Asleep::new(&self.words);
        let mut since = begun;
        let mut counted = self.sum();
        loop {
            let seen = self.words.bell();
            let mut first_late = 0;
            if self.all_have(step, &mut first_late) {
                return Ok(());
            }
            self.check(step, waiting)?;
            let now = Instant::now();
            let moved = self.sum();
            if moved != counted {
                (counted, since) = (moved, now);
            }
            let waited = now - since;
            let left = waiting.stall.saturating_sub(waited);
            let left = waiting.until.map_or(left, |until| left.min(until.saturating_duration_since(now)));
            if left.is_zero() {
                let late = self.late(step);
                // The last one may have come just now.
                return if late.is_empty() { Ok(()) } else { Err(Stuck::Stalled { waited, late }) };
            }
            self.words.sleep(seen, left);
        }
    }

    /// Whether there is a reason not to wait on: there is none if all have come after all.
    fn check(&self, step: u64, waiting: &Waiting<'_>) -> Result<(), Stuck> {
        // Who gives up says so before it ends its connections, and knows better who was lost than who sees these end.
        let stop = (waiting.stop)();
        let stuck = match (self.given_up(), stop) {
            (None, None) => return Ok(()),
            (None, Some(stop)) => Stuck::Stopped(stop),
            (Some(suspect), _) => Stuck::GivenUp(suspect),
        };
        if self.all_have(step, &mut 0) { Ok(()) } else { Err(stuck) }
    }

    /// Whether all ranks have done `step`. `first_late` is the first that may not have.
    fn all_have(&self, step: u64, first_late: &mut usize) -> bool {
        while *first_late < self.ranks {
            if self.words.progress(*first_late) < step {
                return false;
            }
            *first_late += 1;
        }
        true
    }

    fn late(&self, step: u64) -> Vec<Rank> {
        let late = |rank: &usize| self.words.progress(*rank) < step;
        (0..self.ranks).filter(late).map(|rank| Rank(rank as u32)).collect()
    }

    fn sum(&self) -> u64 {
        (0..self.ranks).fold(0, |sum, rank| sum.wrapping_add(self.words.progress(rank)))
    }
}

/// How long to wait, and what ends it early.
pub(crate) struct Waiting<'a> {
    pub(crate) spin: Duration,
    pub(crate) stall: Duration,
    pub(crate) until: Option<Instant>,
    pub(crate) stop: &'a dyn Fn() -> Option<Stop>,
}

/// Why a rank is to stop waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It was told to.
    Aborted,
    /// A neighbour is gone, who may have done all its part.
    Lost,
}

/// One more who sleeps, for as long as it lives. A rank that is killed in its sleep stays counted: from then on the bell
/// is rung in vain, for a group that is broken anyway.
struct Asleep<'a, W: Words>(&'a W);

impl<'a, W: Words> Asleep<'a, W> {
    fn new(words: &'a W) -> Asleep<'a, W> {
        words.lie_down();
        words.fence();
        Asleep(words)
    }
}

impl<W: Words> Drop for Asleep<'_, W> {
    fn drop(&mut self) {
        self.0.get_up();
    }
}

#[cfg(test)]
mod model_tests;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::segment::Segment;
    use crate::words::bytes;

    const LONG: Duration = Duration::from_secs(60);

    fn ranks(count: usize) -> Vec<Progress> {
        let segment = Arc::new(Segment::create(bytes(count)).unwrap());
        (0..count).map(|rank| Progress::new(SegmentWords(segment.clone()), rank, count)).collect()
    }

    fn waiting(stop: &dyn Fn() -> Option<Stop>) -> Waiting<'_> {
        Waiting { spin: Duration::ZERO, stall: LONG, until: None, stop }
    }

    #[test]
    fn nobody_sleeps_through_a_step() {
        for count in [2, 3, 7] {
            thread::scope(|scope| {
                for progress in ranks(count) {
                    scope.spawn(move || {
                        for step in 1..=3000 {
                            progress.count(step);
                            progress.wait(step, &waiting(&|| None)).unwrap();
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn who_gives_up_wakes_all_and_whom_it_suspects_is_heard() {
        let all = ranks(3);
        thread::scope(|scope| {
            let waits: Vec<_> =
                all[1..].iter().map(|one| scope.spawn(|| one.wait(1, &waiting(&|| None)))).collect();
            all[0].give_up(Rank(2));
            all[0].give_up(Rank(0));
            for wait in waits {
                assert_eq!(wait.join().unwrap(), Err(Stuck::GivenUp(Rank(2))));
            }
        });
    }

    /// Rule C-6: all that who gave up had to do for this step is done.
    #[test]
    fn what_all_have_done_counts_though_one_has_given_up_since() {
        let all = ranks(2);
        all[0].count(1);
        all[1].count(1);
        all[1].give_up(Rank(1));
        assert_eq!(all[0].wait(1, &waiting(&|| Some(Stop::Lost))), Ok(()));
        assert_eq!(all[0].wait(2, &waiting(&|| None)), Err(Stuck::GivenUp(Rank(1))));
    }

    #[test]
    fn who_is_told_to_stop_in_its_sleep_stops() {
        let all = ranks(2);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let wait = scope.spawn(|| {
                all[0].wait(1, &waiting(&|| stop.load(Ordering::Acquire).then_some(Stop::Aborted)))
            });
            while all[0].words.sleepers() == 0 {
                thread::yield_now();
            }
            stop.store(true, Ordering::Release);
            all[0].ring();
            assert_eq!(wait.join().unwrap(), Err(Stuck::Stopped(Stop::Aborted)));
        });
        assert_eq!(all[0].words.sleepers(), 0);
    }

    #[test]
    fn a_stall_is_counted_from_the_last_step_of_anybody_and_names_who_is_late() {
        let all = ranks(3);
        all[0].count(1);
        let stall = Duration::from_millis(30);
        let stuck = all[0].wait(1, &Waiting { stall, ..waiting(&|| None) }).unwrap_err();
        let Stuck::Stalled { waited, late } = stuck else { panic!("{stuck:?}") };
        assert!(waited >= stall && late == [Rank(1), Rank(2)], "{waited:?} {late:?}");
        let until = Some(Instant::now() + stall);
        let stuck = all[0].wait(1, &Waiting { until, ..waiting(&|| None) }).unwrap_err();
        assert!(matches!(stuck, Stuck::Stalled { .. }), "{stuck:?}");
    }
}
