//! What a coordinator that does not lead can say of jobs: what is saved of them, and how old that is.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reknit_membership::record::{JobRecord, WorldChange};
use reknit_membership::{Job, JobId};
use reknit_proto::{inspect, v1};
use tokio::time::Instant;
use tonic::Status;

use crate::access::Identity;
use crate::inspect::no_such_job;
use crate::job::{Surroundings, source_text};
use crate::store::StoreError;

/// The records of jobs as they were last read.
///
/// They are read again and again while all is well, so that there is something to show when the store is away.
#[derive(Default)]
pub(crate) struct Records {
    read: Mutex<BTreeMap<JobId, Read>>,
}

struct Read {
    record: JobRecord,
    at: Instant,
}

/// For how many times as long as a reading of all takes the store is left alone.
const IDLE_PER_READING: u32 = 20;

/// How long the store may take before what was read earlier is shown.
const PATIENCE: Duration = Duration::from_secs(2);

impl Records {
    /// The job's record, and how long ago it was as it is shown.
    async fn read(&self, around: &Surroundings, job: &JobId) -> Result<(JobRecord, Duration), Status> {
        let began = Instant::now();
        let loading = tokio::time::timeout(PATIENCE, around.store.load(job));
        let why = match loading
            .await
            .unwrap_or_else(|_| Err(StoreError::Unavailable("it does not answer".into())))
        {
            Ok(None) => {
                self.with(|read| read.remove(job));
                return Err(no_such_job(job));
            }
            Ok(Some(saved)) => match reknit_proto::record::decode(&saved.value) {
                Ok((record, _)) => {
                    self.with(|read| {
                        if read.len() < around.limits.jobs || read.contains_key(job) {
                            read.insert(job.clone(), Read { record: record.clone(), at: began });
                        }
                    });
                    return Ok((record, began.elapsed()));
                }
                Err(why) => return Err(Status::data_loss(format!("the job's record cannot be read: {why}"))),
            },
            Err(why) => why,
        };
        self.known(job).ok_or_else(|| Status::unavailable(source_text(&why)))
    }

    /// The job's record as it was read last, and how long ago that was.
    fn known(&self, job: &JobId) -> Option<(JobRecord, Duration)> {
        self.with(|read| read.get(job).map(|read| (read.record.clone(), read.at.elapsed())))
    }

    /// Reads them all again and again, for ever; the more there are, the more seldom.
    pub(crate) async fn keep_reading(&self, around: &Surroundings, every: Duration) {
        loop {
            let began = Instant::now();
            if let Ok(Ok(jobs)) = tokio::time::timeout(PATIENCE, around.store.jobs()).await {
                self.with(|read| read.retain(|job, _| jobs.contains(job)));
                for job in jobs.iter().take(around.limits.jobs) {
                    // What cannot be read is shown as it was.
                    let _ = self.read(around, job).await;
                }
            }
            tokio::time::sleep(every.max(began.elapsed() * IDLE_PER_READING)).await;
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<JobId, Read>) -> T) -> T {
        // Each is put in by one move.
        act(&mut self.read.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The job's status, as far as it is saved: without leases, and with the last saved step.
    pub(crate) async fn status(
        &self,
        around: &Surroundings,
        job: &JobId,
        members_max: u32,
    ) -> Result<v1::JobStatus, Status> {
        let (record, age) = self.read(around, job).await?;
        let job = Job::restore(record, around.timing, around.limits.members, around.clock.now());
        let listed = if members_max == 0 { usize::MAX } else { members_max as usize };
        let status = job.status(listed.min(around.limits.listed));
        let mut status = inspect::from_status(&status, job.member_count() as u32);
        status.saved_age_us = Some(micros(age));
        Ok(status)
    }

    /// The job's changes that are saved.
    pub(crate) async fn history(
        &self,
        around: &Surroundings,
        job: &JobId,
    ) -> Result<v1::HistoryReply, Status> {
        let (record, age) = self.read(around, job).await?;
        let changes: Vec<WorldChange> = record.changes.into_iter().collect();
        let changes = changes.iter().map(inspect::from_change).collect();
        Ok(v1::HistoryReply { changes, saved_age_us: Some(micros(age)) })
    }

    /// Every saved job that is theirs who ask, and the age of the oldest one that is shown.
    pub(crate) async fn summaries(
        &self,
        around: &Surroundings,
        who: &Identity,
    ) -> Result<v1::JobsReply, Status> {
        let listing = tokio::time::timeout(PATIENCE, around.store.jobs());
        let listed = match listing.await {
            Ok(Ok(jobs)) => jobs,
            // What was read earlier is what there is to show.
            Ok(Err(_)) | Err(_) => self.with(|read| read.keys().cloned().collect()),
        };
        let mut jobs = Vec::new();
        let mut oldest = Duration::ZERO;
        let deadline = Instant::now() + PATIENCE;
        for job in listed.iter().filter(|job| who.covers(job)).take(around.limits.jobs) {
            let known = match tokio::time::timeout_at(deadline, self.read(around, job)).await {
                Ok(read) => read.ok(),
                // The store does not answer: what is left is shown as it was read last.
                Err(_) => self.known(job),
            };
            let Some((record, age)) = known else { continue };
            oldest = oldest.max(age);
            let restored = Job::restore(record, around.timing, around.limits.members, around.clock.now());
            let status = inspect::from_status(&restored.status(0), restored.member_count() as u32);
            jobs.push(crate::inspect::summary(&status));
        }
        Ok(v1::JobsReply { jobs, saved_age_us: Some(micros(oldest)) })
    }
}

fn micros(age: Duration) -> u64 {
    u64::try_from(age.as_micros()).unwrap_or(u64::MAX)
}
