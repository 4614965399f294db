//! What a server has done since its start, counted without a lock.
//!
//! The counts by kind are what proves rule D-5: while a world runs, only renewals rise, and those by time, not by step.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use reknit_membership::Event;

/// The kinds of messages that members send.
pub const KINDS: [&str; 15] = [
    "join",
    "renew",
    "leave",
    "ready",
    "restored",
    "restore_failed",
    "broken",
    "boundary",
    "first_step",
    "finished",
    "shard_written",
    "save_failed",
    "manifest_written",
    "notice",
    "available",
];

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Counters {
    received: [AtomicU64; KINDS.len()],
    sent: AtomicU64,
    saves: AtomicU64,
    members: AtomicUsize,
}

impl Counters {
    /// A member sent this.
    pub fn received(&self, event: &Event) {
        let kind = match event {
            Event::Attach { .. } => 0,
            Event::Renew { .. } => 1,
            Event::Leave { .. } => 2,
            Event::Ready { .. } => 3,
            Event::Restored { .. } => 4,
            Event::RestoreFailed { .. } => 5,
            Event::Broken { .. } => 6,
            Event::Boundary { .. } => 7,
            Event::FirstStep { .. } => 8,
            Event::Finished { .. } => 9,
            Event::ShardWritten { .. } => 10,
            Event::SaveFailed { .. } => 11,
            Event::ManifestWritten { .. } => 12,
            Event::Notice { .. } => 13,
            Event::Available { .. } => 14,
            Event::Detached { .. } | Event::Operate { .. } | Event::Stalled { .. } | Event::Tick => return,
        };
        self.received[kind].fetch_add(1, Ordering::Relaxed);
    }

    /// A member was told something.
    pub fn sent(&self) {
        self.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// A record was saved.
    pub fn saved(&self) {
        self.saves.fetch_add(1, Ordering::Relaxed);
    }

    /// How many members all jobs have at present, heard or not.
    pub(crate) fn members(&self) -> usize {
        self.members.load(Ordering::Relaxed)
    }

    /// A job that had so many members has another number now.
    pub(crate) fn members_changed(&self, before: usize, after: usize) {
        self.members.fetch_add(after, Ordering::Relaxed);
        self.members.fetch_sub(before, Ordering::Relaxed);
    }

    /// How much members have said.
    pub(crate) fn heard(&self) -> u64 {
        self.received.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// What members sent, by kind.
    pub fn all_received(&self) -> BTreeMap<String, u64> {
        let count = |(kind, count): (&&str, &AtomicU64)| ((*kind).to_owned(), count.load(Ordering::Relaxed));
        KINDS.iter().zip(&self.received).map(count).collect()
    }

    /// How often members were told something.
    pub fn all_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// How many records were saved.
    pub fn all_saves(&self) -> u64 {
        self.saves.load(Ordering::Relaxed)
    }
}
