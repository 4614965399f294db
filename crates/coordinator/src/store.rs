//! Where records live: one value per job, replaced by compare-and-swap on its revision.
//!
//! What a store promises, and what `contract` tests of every one:
//! - a save that was answered is there after a crash of the process and of the machine;
//! - of two saves that expect the same revision at most one succeeds;
//! - revisions of a job rise, and are not used again after it was removed and made anew;
//! - a save that failed may still have been carried out (its answer was lost): reading tells.

pub mod contract;
mod embedded;
mod etcd;
mod memory;
pub mod recorded;

use std::future::Future;
use std::pin::Pin;

use reknit_membership::JobId;

pub use embedded::{Embedded, OpenError};
pub use etcd::Etcd;
pub use memory::Memory;

/// Which version of a job's value is meant. Zero: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

/// Which reign of which coordinator: it rises with every leader. Zero where there is one server only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// A value as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Its version.
    pub revision: Revision,
    /// The encoded record.
    pub value: Vec<u8>,
}

/// Why a store did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The job's value has another revision than the caller expects: somebody else wrote it.
    #[error("the record was changed by somebody else")]
    Conflict,
    /// Another coordinator leads, or may lead: this one changes nothing any more.
    #[error("this coordinator does not lead any more")]
    NotLeader,
    /// It could not be done, or nobody knows whether it was. Trying again may help.
    #[error("the store could not be reached or written")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store is damaged: trying again will not help.
    #[error("the store is damaged")]
    Corrupt(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl StoreError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable(_))
    }
}

/// An answer that a store will give.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Where records live.
pub trait Store: Send + Sync + 'static {
    /// A short name for people: which kind, and where.
    fn describe(&self) -> String;

    /// Every job there is.
    fn jobs(&self) -> Pending<'_, Vec<JobId>>;

    /// The value of `job`, if there is one.
    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>>;

    /// Replaces the value of `job` if its revision is `expected`, durably.
    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision>;

    /// Removes the value of `job` if its revision is `expected`, durably.
    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()>;

    /// How many transactions it has put to another process since the start; zero if there is none.
    fn transactions(&self) -> u64 {
        0
    }
}
