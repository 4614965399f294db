//! A store in memory: for tests, and for trying things out.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use reknit_membership::JobId;

use super::{Pending, Revision, Saved, Store, StoreError};

/// Keeps records for as long as the process lives.
#[derive(Debug, Default)]
pub struct Memory {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    values: BTreeMap<JobId, Saved>,
    /// The last revision given out, over all jobs: a job that is made anew continues from there.
    last: u64,
}

impl Memory {
    /// An empty one.
    pub fn new() -> Memory {
        Memory::default()
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        // A poisoned lock cannot leave a value half written: each is put in by one move.
        act(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Inner {
    fn revision(&self, job: &JobId) -> Revision {
        self.values.get(job).map(|saved| saved.revision).unwrap_or_default()
    }
}

impl Store for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        let jobs = self.with(|inner| inner.values.keys().cloned().collect());
        Box::pin(std::future::ready(Ok(jobs)))
    }

    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>> {
        let saved = self.with(|inner| inner.values.get(job).cloned());
        Box::pin(std::future::ready(Ok(saved)))
    }

    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        let result = self.with(|inner| {
            if inner.revision(job) != expected {
                return Err(StoreError::Conflict);
            }
            inner.last += 1;
            let revision = Revision(inner.last);
            inner.values.insert(job.clone(), Saved { revision, value });
            Ok(revision)
        });
        Box::pin(std::future::ready(result))
    }

    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()> {
        let result = self.with(|inner| {
            if inner.revision(job) != expected {
                return Err(StoreError::Conflict);
            }
            inner.values.remove(job);
            Ok(())
        });
        Box::pin(std::future::ready(result))
    }
}
