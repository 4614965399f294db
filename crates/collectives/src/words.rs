//! The words in shared memory that [`Progress`](crate::progress::Progress) is made of, one by one: and, in tests, the same
//! words in a memory whose every behaviour is tried.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex;

use crate::segment::Segment;

/// Where the words are in the segment, each in a line of the cache of its own; two lines, for they are fetched in pairs.
const LINE: usize = 128;
const GIVEN_UP: usize = 0;
const BELL: usize = LINE;
const SLEEPERS: usize = 2 * LINE;
const PROGRESS: usize = 3 * LINE;

/// How many bytes at the start of a segment the words of so many ranks take.
pub(crate) const fn bytes(ranks: usize) -> usize {
    PROGRESS + ranks * LINE
}

/// What ranks can do with their words.
pub(crate) trait Words: Debug {
    /// How far a rank has come; and all that it wrote before.
    fn progress(&self, rank: usize) -> u64;
    /// Says how far this rank has come.
    fn set_progress(&self, rank: usize, step: u64);

    /// Zero, or what the first who gave up said.
    fn given_up(&self) -> u32;
    /// Says so, if nobody did before.
    fn give_up(&self, code: u32);

    /// How many sleep.
    fn sleepers(&self) -> u32;
    fn lie_down(&self);
    fn get_up(&self);

    /// How often the bell was rung.
    fn bell(&self) -> u32;
    fn ring(&self);

    /// What was written before it is seen by whoever reads after one of its own, if that comes later.
    fn fence(&self);
    /// Sleeps until it is woken, if the bell was rung so often; not for longer than the timeout, and maybe shorter.
    fn sleep(&self, bell: u32, timeout: Duration);
    fn wake_all(&self);
}

/// The words at the start of a segment.
#[derive(Debug, Clone)]
pub(crate) struct SegmentWords(pub(crate) Arc<Segment>);

impl SegmentWords {
    fn of(&self, rank: usize) -> &AtomicU64 {
        self.0.long_word(PROGRESS + rank * LINE)
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        self.0.word(at)
    }
}

impl Words for SegmentWords {
    fn progress(&self, rank: usize) -> u64 {
        self.of(rank).load(Ordering::Acquire)
    }

    fn set_progress(&self, rank: usize, step: u64) {
        self.of(rank).store(step, Ordering::Release);
    }

    fn given_up(&self) -> u32 {
        self.word(GIVEN_UP).load(Ordering::Acquire)
    }

    fn give_up(&self, code: u32) {
        let _ = self.word(GIVEN_UP).compare_exchange(0, code, Ordering::Release, Ordering::Relaxed);
    }

    fn sleepers(&self) -> u32 {
        self.word(SLEEPERS).load(Ordering::Relaxed)
    }

    fn lie_down(&self) {
        self.word(SLEEPERS).fetch_add(1, Ordering::Relaxed);
    }

    fn get_up(&self) {
        self.word(SLEEPERS).fetch_sub(1, Ordering::Relaxed);
    }

    fn bell(&self) -> u32 {
        self.word(BELL).load(Ordering::Acquire)
    }

    fn ring(&self) {
        self.word(BELL).fetch_add(1, Ordering::Release);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn sleep(&self, bell: u32, timeout: Duration) {
        // A timeout that is too long for the kernel is none.
        let timeout = timeout.try_into().ok();
        match futex::wait(self.word(BELL), futex::Flags::empty(), bell, timeout.as_ref()) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
            // There is no other error for a word that is mapped and aligned. Whatever it is, the caller looks again.
            Err(_) => std::thread::yield_now(),
        }
    }

    fn wake_all(&self) {
        // It cannot fail: the word is mapped and aligned.
        let _ = futex::wake(self.word(BELL), futex::Flags::empty(), u32::MAX >> 1);
    }
}
