//! The table of the jobs that a server serves.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reknit_membership::spec::BadSpec;
use reknit_membership::{HistoryId, JobId, JobRecord, Spec};
use reknit_proto::BadMessage;
use tokio::task::JoinSet;

use crate::job::{Input, JobHandle, Known, Surroundings, job_task, source_text};
use crate::secret::JobSecret;
use crate::store::{Revision, StoreError};

/// Why a job cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum OpenJobError {
    #[error("no job has this id")]
    NoSuchJob,
    #[error("{0}")]
    BadSpec(BadSpec),
    #[error("the server serves as many jobs as it may ({limit})")]
    TooManyJobs { limit: usize },
    #[error("the server is stopping")]
    Stopping,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the job's record cannot be read: {0}")]
    Record(#[from] BadMessage),
    #[error("the operating system gives no randomness")]
    NoRandomness(#[source] getrandom::Error),
}

/// The jobs of one server.
#[derive(Clone)]
pub(crate) struct Jobs {
    pub(crate) around: Surroundings,
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    handles: BTreeMap<JobId, JobHandle>,
    tasks: JoinSet<()>,
    stopping: bool,
}

impl Jobs {
    pub(crate) fn new(around: Surroundings) -> Jobs {
        Jobs { around, table: Arc::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Table) -> T) -> T {
        // Nothing in a critical section can panic half way through a change.
        act(&mut self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes up every job that the store has, and returns how many those are. A record that cannot be read keeps nobody
    /// but its own job from being served.
    pub(crate) async fn load_all(&self) -> Result<usize, OpenJobError> {
        let mut loaded = 0;
        let mut left = self.around.store.jobs().await?.into_iter();
        let mut loading = JoinSet::new();
        loop {
            while loading.len() < LOADS_AT_ONCE
                && let Some(job) = left.next()
            {
                let jobs = self.clone();
                loading.spawn(async move { (jobs.open(&job, None).await, job) });
            }
            match loading.join_next().await {
                None => return Ok(loaded),
                Some(Ok((Ok(_), _))) => loaded += 1,
                Some(Ok((
                    Err(why @ (OpenJobError::Record(_) | OpenJobError::Store(StoreError::Corrupt(_)))),
                    job,
                ))) => {
                    tracing::error!(%job, error = %source_text(&why), "a job's record cannot be read: it is not served");
                }
                // Somebody has deleted it since it was listed.
                Some(Ok((Err(OpenJobError::NoSuchJob), _))) => {}
                Some(Ok((Err(why), _))) => return Err(why),
                // Loading ends with a result, and nobody aborts it.
                Some(Err(why)) => std::panic::resume_unwind(why.into_panic()),
            }
        }
    }

    /// The job of that id, if it is served.
    pub(crate) fn get(&self, job: &JobId) -> Option<JobHandle> {
        self.with(|table| table.handles.get(job).filter(|handle| !handle.is_gone()).cloned())
    }

    /// Every job that is served.
    pub(crate) fn all(&self) -> Vec<(JobId, JobHandle)> {
        self.with(|table| {
            table.handles.retain(|_, handle| !handle.is_gone());
            table.handles.iter().map(|(job, handle)| (job.clone(), handle.clone())).collect()
        })
    }

    /// The job of that id. If there is none, it is made with `spec`.
    pub(crate) async fn open(&self, job: &JobId, spec: Option<Spec>) -> Result<JobHandle, OpenJobError> {
        if let Some(handle) = self.get(job) {
            return Ok(handle);
        }
        let known = match self.around.store.load(job).await? {
            Some(saved) => {
                let (record, secret) = reknit_proto::record::decode(&saved.value)?;
                Known { record, secret: JobSecret::from_bytes(secret), revision: saved.revision }
            }
            None => {
                let spec = spec.ok_or(OpenJobError::NoSuchJob)?.checked().map_err(OpenJobError::BadSpec)?;
                let mut history = [0; 8];
                getrandom::fill(&mut history).map_err(OpenJobError::NoRandomness)?;
                let record = JobRecord::new(job.clone(), HistoryId(u64::from_le_bytes(history)), spec);
                let secret = JobSecret::draw().map_err(OpenJobError::NoRandomness)?;
                Known { record, secret, revision: Revision::default() }
            }
        };
        self.with(|table| {
            // Somebody else may have opened it meanwhile.
            if let Some(handle) = table.handles.get(job).filter(|handle| !handle.is_gone()) {
                return Ok(handle.clone());
            }
            if table.stopping {
                return Err(OpenJobError::Stopping);
            }
            table.handles.retain(|_, handle| !handle.is_gone());
            while table.tasks.try_join_next().is_some() {}
            let limit = self.around.limits.jobs;
            // Jobs that are over cost next to nothing, and whatever the store has is served.
            let live = table.handles.values().filter(|handle| !handle.is_closed()).count();
            if known.revision == Revision::default() && live >= limit {
                return Err(OpenJobError::TooManyJobs { limit });
            }
            let (handle, task) = job_task(known, self.around.clone());
            table.tasks.spawn(task);
            table.handles.insert(job.clone(), handle.clone());
            Ok(handle)
        })
    }

    /// Resolves when a save has found that another coordinator leads.
    pub(crate) async fn was_deposed(&self) {
        self.around.deposed.notified().await;
    }

    /// Ends every job's task at once: another coordinator leads, and nobody is to be told anything more here. Whether what
    /// was being saved is saved, reading tells whoever leads.
    pub(crate) async fn abandon(&self) {
        let mut tasks = self.with(|table| {
            table.stopping = true;
            table.handles.clear();
            std::mem::take(&mut table.tasks)
        });
        tasks.shutdown().await;
    }

    /// Ends every job's task, after what it is about to save is saved. Every stream ends with its task.
    pub(crate) async fn stop(&self) {
        let (handles, mut tasks) = self.with(|table| {
            table.stopping = true;
            let handles: Vec<JobHandle> = std::mem::take(&mut table.handles).into_values().collect();
            (handles, std::mem::take(&mut table.tasks))
        });
        let all_end = async {
            for handle in &handles {
                // A task that has ended already has nothing to stop; one that cannot save may have no room for this.
                let _ = handle.send(Input::Stop).await;
            }
            while tasks.join_next().await.is_some() {}
        };
        if tokio::time::timeout(STOP_PATIENCE, all_end).await.is_err() {
            // A store that cannot be written holds them up. Nobody has been told what is not saved.
            tracing::warn!("stopping although records could not be saved");
            tasks.shutdown().await;
        }
    }
}

/// How many jobs are read from the store at once.
const LOADS_AT_ONCE: usize = 32;

/// How long a stopping server waits for its store.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::store::Memory;
    use reknit_membership::Timing;

    fn jobs(limits: Limits) -> Jobs {
        Jobs::new(Surroundings::alone(Arc::new(Memory::new()), Timing::default(), limits))
    }

    #[tokio::test]
    async fn d1_a_job_that_many_ask_for_at_once_has_one_task() {
        let jobs = jobs(Limits::default());
        let job = JobId::new("job").unwrap();
        let mut opening = JoinSet::new();
        for _ in 0..100 {
            let (jobs, job) = (jobs.clone(), job.clone());
            opening.spawn(async move { jobs.open(&job, Some(Spec::default())).await.unwrap() });
        }
        let mut histories = Vec::new();
        while let Some(handle) = opening.join_next().await {
            let asked = handle.unwrap().ask(|answer| Input::Status { members_max: 0, answer }).await;
            histories.push(asked.unwrap().0.history);
        }
        histories.dedup();
        assert_eq!(histories.len(), 1, "one task, with the history that it drew");
        assert_eq!((jobs.all().len(), jobs.with(|table| table.tasks.len())), (1, 1));
    }

    #[tokio::test]
    async fn a_server_serves_no_more_jobs_than_it_may_and_an_abandoned_one_makes_room() {
        let jobs = jobs(Limits { jobs: 1, ..Limits::default() });
        let open = |id: &str| {
            let (jobs, job) = (jobs.clone(), JobId::new(id).unwrap());
            async move { jobs.open(&job, Some(Spec::default())).await }
        };
        let first = open("first").await.unwrap();
        assert!(matches!(open("second").await, Err(OpenJobError::TooManyJobs { limit: 1 })));
        first.send(Input::Stop).await.unwrap();
        while !first.is_gone() {
            tokio::task::yield_now().await;
        }
        assert!(open("second").await.is_ok());
    }
}
