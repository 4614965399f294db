//! What is still to happen, in the order of virtual time. What falls on the same instant happens in an order drawn at
//! random: nobody may rely on one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::happening::Happening;

/// Virtual time since the start of the run, in milliseconds: the grain of tokio's timers.
pub type Ms = u64;

struct Entry {
    at: Ms,
    tie: u64,
    number: u64,
    what: Happening,
}

impl Entry {
    fn key(&self) -> (Ms, u64, u64) {
        (self.at, self.tie, self.number)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Reverse<Entry>>,
    count: u64,
}

impl Queue {
    /// Has `what` happen at `at`; `tie` decides among those of one instant.
    pub(crate) fn put(&mut self, at: Ms, tie: u64, what: Happening) {
        self.count += 1;
        self.heap.push(Reverse(Entry { at, tie, number: self.count, what }));
    }

    /// When the next one is due.
    pub(crate) fn next_at(&self) -> Option<Ms> {
        self.heap.peek().map(|Reverse(entry)| entry.at)
    }

    /// The next one that is due at `now`.
    pub(crate) fn take_due(&mut self, now: Ms) -> Option<Happening> {
        if self.next_at()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry.what)
    }

    /// How many were ever put in.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
}
