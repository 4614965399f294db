//! [`Progress`] over words in a memory of loom's, which tries every order of what threads do and every value that the orderings
//! used allow a read to see. A rank that sleeps through what it waits for is a deadlock there.

use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::*;

/// The words, with the orderings that those in shared memory have.
#[derive(Debug, Clone)]
struct Modelled(Arc<Memory>);

#[derive(Debug)]
struct Memory {
    progress: Vec<AtomicU64>,
    given_up: AtomicU32,
    sleepers: AtomicU32,
    bell: AtomicU32,
    bed: Mutex<()>,
    wake: Condvar,
}

impl Words for Modelled {
    fn progress(&self, rank: usize) -> u64 {
        self.0.progress[rank].load(Ordering::Acquire)
    }

    fn set_progress(&self, rank: usize, step: u64) {
        self.0.progress[rank].store(step, Ordering::Release);
    }

    fn given_up(&self) -> u32 {
        self.0.given_up.load(Ordering::Acquire)
    }

    fn give_up(&self, code: u32) {
        let _ = self.0.given_up.compare_exchange(0, code, Ordering::Release, Ordering::Relaxed);
    }

    fn sleepers(&self) -> u32 {
        self.0.sleepers.load(Ordering::Relaxed)
    }

    fn lie_down(&self) {
        self.0.sleepers.fetch_add(1, Ordering::Relaxed);
    }

    fn get_up(&self) {
        self.0.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    fn bell(&self) -> u32 {
        self.0.bell.load(Ordering::Acquire)
    }

    fn ring(&self) {
        self.0.bell.fetch_add(1, Ordering::Release);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    /// The kernel looks at the word and puts the thread to bed under one lock, which who wakes takes too.
    fn sleep(&self, bell: u32, _: Duration) {
        let bed = self.0.bed.lock().unwrap();
        // A read-modify-write sees the newest value, as the kernel does.
        if self.0.bell.fetch_add(0, Ordering::Relaxed) == bell {
            drop(self.0.wake.wait(bed).unwrap());
        }
    }

    fn wake_all(&self) {
        let _bed = self.0.bed.lock().unwrap();
        self.0.wake.notify_all();
    }
}

fn words(ranks: usize) -> Modelled {
    Modelled(Arc::new(Memory {
        progress: (0..ranks).map(|_| AtomicU64::new(0)).collect(),
        given_up: AtomicU32::new(0),
        sleepers: AtomicU32::new(0),
        bell: AtomicU32::new(0),
        bed: Mutex::new(()),
        wake: Condvar::new(),
    }))
}

fn rank(words: &Modelled, own: usize, ranks: usize) -> Progress<Modelled> {
    // It lies down at once: what it would do before is what it does then, once more.
    Progress { words: words.clone(), own, ranks, keep_core: Duration::ZERO }
}

fn waiting(stop: &dyn Fn() -> Option<Stop>) -> Waiting<'_> {
    Waiting { spin: Duration::ZERO, stall: Duration::MAX, until: None, stop }
}

fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn two_ranks_never_sleep_through_each_others_steps() {
    explore(3, || {
        let words = words(2);
        let other = {
            let words = words.clone();
            thread::spawn(move || {
                let other = rank(&words, 1, 2);
                for step in 1..=2 {
                    other.count(step);
                    other.wait(step, &waiting(&|| None)).unwrap();
                }
            })
        };
        let one = rank(&words, 0, 2);
        for step in 1..=2 {
            one.count(step);
            one.wait(step, &waiting(&|| None)).unwrap();
        }
        other.join().unwrap();
    });
}

#[test]
fn three_ranks_never_sleep_through_each_others_steps() {
    explore(2, || {
        let words = words(3);
        let others: Vec<_> = [1, 2]
            .map(|own| {
                let words = words.clone();
                thread::spawn(move || {
                    let other = rank(&words, own, 3);
                    other.count(1);
                    other.wait(1, &waiting(&|| None)).unwrap();
                })
            })
            .into();
        let one = rank(&words, 0, 3);
        one.count(1);
        one.wait(1, &waiting(&|| None)).unwrap();
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

/// Rule C-6: whoever saw everybody's step may give up after it; nobody else fails that step for it.
#[test]
fn who_gives_up_is_heard_but_not_by_those_whose_step_all_have_done() {
    explore(3, || {
        let words = words(2);
        let other = {
            let words = words.clone();
            thread::spawn(move || {
                let other = rank(&words, 1, 2);
                other.count(1);
                other.wait(1, &waiting(&|| None)).unwrap();
                other.give_up(Rank(1));
            })
        };
        let one = rank(&words, 0, 2);
        one.count(1);
        assert_eq!(one.wait(1, &waiting(&|| None)), Ok(()));
        assert_eq!(one.wait(2, &waiting(&|| None)), Err(Stuck::GivenUp(Rank(1))));
        other.join().unwrap();
    });
}

#[test]
fn an_abort_wakes_who_has_lain_down_or_is_about_to() {
    explore(3, || {
        let words = words(2);
        let stop = Arc::new(AtomicBool::new(false));
        let aborter = {
            let (words, stop) = (words.clone(), stop.clone());
            thread::spawn(move || {
                stop.store(true, Ordering::Release);
                rank(&words, 0, 2).ring();
            })
        };
        let one = rank(&words, 0, 2);
        one.count(1);
        let stop = || stop.load(Ordering::Acquire).then_some(Stop::Aborted);
        assert_eq!(one.wait(1, &waiting(&stop)), Err(Stuck::Stopped(Stop::Aborted)));
        aborter.join().unwrap();
    });
}
