//! Saving a job's record before anybody is told what is in it (rule D-2).

use reknit_membership::Job;
use reknit_membership::event::Event;
use reknit_membership::record::{JobRecord, Stage};
use reknit_proto::record;
use tokio::time::Instant;

use super::{JobTask, Life, PULSES_PER_SILENCE, SAVE_RETRY, source_text};
use crate::secret::JobSecret;
use crate::store::StoreError;

/// Every so many attempts a save that fails is logged again.
const FAILURES_PER_LOG: u32 = 25;

impl JobTask {
    /// Saves, for as long as it takes: until then nobody is told anything (rule D-2). A world that runs does not need
    /// the coordinator meanwhile.
    pub(super) async fn save(&mut self, record: &JobRecord) -> Result<(), Life> {
        let value = record::encode(record, self.secret.as_bytes());
        let began = Instant::now();
        let mut failures = 0u32;
        loop {
            match self.around.store.save(self.job_id(), self.revision, value.clone()).await {
                Ok(revision) => {
                    self.revision = revision;
                    break;
                }
                Err(StoreError::NotLeader) => {
                    tracing::warn!(job = %self.job_id(), "another coordinator leads: members go there");
                    self.around.deposed.notify_one();
                    return Err(Life::Ends);
                }
                Err(why) if why.is_retryable() => {
                    if failures.is_multiple_of(FAILURES_PER_LOG) {
                        tracing::error!(job = %self.job_id(), error = %source_text(&why), "a record could not be saved; \
                            members are not told of the change until it can");
                    }
                    failures = failures.saturating_add(1);
                    tokio::time::sleep(SAVE_RETRY).await;
                }
                Err(StoreError::Conflict) if self.was_saved_by_us(&value).await => break,
                Err(why) => {
                    tracing::error!(job = %self.job_id(), error = %source_text(&why), "the record is not ours any more");
                    return Err(self.start_over().await);
                }
            }
        }
        self.around.counters.saved();
        let waited = began.elapsed();
        if waited > self.around.timing.silence / PULSES_PER_SILENCE {
            // Nobody was heard meanwhile.
            let held_up = self.job.step(self.now(), Event::Stalled { by: waited });
            debug_assert_eq!((held_up.save, held_up.then.len()), (None, 0), "a stall tells nobody anything");
            // This stall is counted; the pulse that fell into it must not count it again.
            self.next_pulse = Instant::now() + self.pulse;
        }
        if record.stage == Stage::Published {
            self.job.published(self.now());
        }
        Ok(())
    }

    /// A save was carried out and only its answer was lost, if what is there is what we wrote.
    pub(super) async fn was_saved_by_us(&mut self, value: &[u8]) -> bool {
        match self.around.store.load(self.job_id()).await {
            Ok(Some(saved)) if saved.value == value => {
                self.revision = saved.revision;
                true
            }
            Ok(_) | Err(_) => false,
        }
    }

    /// Somebody else changed the record: what this task believes is void (rule D-3). Members attach again.
    pub(super) async fn start_over(&mut self) -> Life {
        self.streams.clear();
        self.answers.clear();
        loop {
            match self.around.store.load(self.job_id()).await {
                Ok(Some(saved)) => match record::decode(&saved.value) {
                    Ok((record, secret)) => {
                        let (timing, limits) = (self.around.timing, self.around.limits);
                        self.job = Job::restore(record, timing, limits.members, self.now());
                        self.secret = JobSecret::from_bytes(secret);
                        self.revision = saved.revision;
                        return Life::GoesOn;
                    }
                    Err(why) => {
                        tracing::error!(job = %self.job_id(), error = %why, "the record cannot be read");
                        return Life::Ends;
                    }
                },
                Ok(None) => return Life::Ends,
                Err(why) if why.is_retryable() => tokio::time::sleep(SAVE_RETRY).await,
                Err(why) => {
                    tracing::error!(job = %self.job_id(), error = %source_text(&why), "the record cannot be read");
                    return Life::Ends;
                }
            }
        }
    }
}
