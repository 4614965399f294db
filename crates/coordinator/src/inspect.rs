//! The service for those who look.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use reknit_membership::JobId;
use reknit_proto::v1::inspect_server::Inspect;
use reknit_proto::{PROTOCOL, inspect, v1};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::access::Identity;
use crate::job::{Input, JobHandle, Unanswered};
use crate::jobs::{Jobs, OpenJobError};
use crate::office::Office;
use crate::records::Records;
use crate::rendezvous::open_status;
use crate::torchelastic::Runs;

#[derive(Clone)]
pub(crate) struct InspectService {
    office: Office,
    records: Arc<Records>,
    /// The runs of stock torchrun, if there is an endpoint for them.
    runs: Option<Arc<Runs>>,
}

impl InspectService {
    pub(crate) fn new(office: Office, records: Arc<Records>, runs: Option<Arc<Runs>>) -> InspectService {
        InspectService { office, records, runs }
    }

    /// A run of stock torchrun, if there is one of that id and it is theirs who ask.
    fn run_status(&self, who: &Identity, job: &str, members_max: u32) -> Option<v1::JobStatus> {
        let id = JobId::new(job).ok().filter(|id| who.covers(id))?;
        let (status, total) =
            self.runs.as_ref()?.status(&id, self.office.around.clock.now(), most(members_max))?;
        Some(inspect::from_status(&status, total))
    }

    fn run_changes(&self, who: &Identity, job: &str) -> Option<Vec<v1::WorldChange>> {
        let id = JobId::new(job).ok().filter(|id| who.covers(id))?;
        Some(self.runs.as_ref()?.changes(&id)?.iter().map(inspect::from_change).collect())
    }

    /// A run of stock torchrun again and again, as often as it changes, and at least every second.
    fn watch_run(&self, who: Identity, request: v1::StatusRequest) -> Option<Response<StatusStream>> {
        self.run_status(&who, &request.job, request.members_max)?;
        let (sender, receiver) = mpsc::channel(1);
        let this = self.clone();
        tokio::spawn(async move {
            let mut last: Option<(Instant, v1::JobStatus)> = None;
            while let Some(status) = this.run_status(&who, &request.job, request.members_max) {
                let is_same = |(at, last): &(Instant, v1::JobStatus)| {
                    at.elapsed() < WATCH_EVERY_MAX
                        && last.phase == status.phase
                        && last.generation == status.generation
                        && last.members_total == status.members_total
                };
                if !last.as_ref().is_some_and(is_same) {
                    last = Some((Instant::now(), status.clone()));
                    if sender.send(Ok(status)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    () = tokio::time::sleep(WATCH_EVERY_MIN) => {}
                    () = sender.closed() => return,
                }
            }
        });
        Some(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// An answer from what is saved, which says where a fresher one is to be had.
    fn as_saved<T>(&self, answer: Result<T, Status>) -> Result<Response<T>, Status> {
        let mut response = Response::new(answer.map_err(|status| self.office.redirected(status))?);
        self.office.redirect(response.metadata_mut());
        Ok(response)
    }
}

pub(crate) fn no_such_job(job: &JobId) -> Status {
    Status::not_found(format!("no job is called {job}"))
}

fn id(job: &str) -> Result<JobId, Status> {
    JobId::new(job).map_err(|why| Status::invalid_argument(why.to_string()))
}

/// The line of a job in the list of all.
pub(crate) fn summary(status: &v1::JobStatus) -> v1::JobSummary {
    v1::JobSummary {
        phase: status.phase,
        job: status.job.clone(),
        generation: status.generation,
        size: status.size,
        members: status.members_total,
        step: status.step,
    }
}

/// The job of that name, if it is theirs who ask; taken up from its record if it is not served at present.
pub(crate) async fn find(jobs: &Jobs, who: &Identity, job: &str) -> Result<JobHandle, Status> {
    let id = id(job)?;
    who.check(&id)?;
    match jobs.open(&id, None).await {
        Ok(handle) => Ok(handle),
        Err(OpenJobError::NoSuchJob) => Err(no_such_job(&id)),
        Err(why) => Err(open_status(&why)),
    }
}

pub(crate) fn unanswered(why: Unanswered) -> Status {
    match why {
        Unanswered::Gone(gone) => Status::unavailable(gone.to_string()),
        Unanswered::Busy => Status::deadline_exceeded(why.to_string()),
    }
}

/// How many members to list: none means as many as there are.
fn most(members_max: u32) -> usize {
    if members_max == 0 { usize::MAX } else { members_max as usize }
}

async fn status(handle: &JobHandle, members_max: u32) -> Result<v1::JobStatus, Unanswered> {
    let members_max = most(members_max);
    let (status, total) = handle.ask(|answer| Input::Status { members_max, answer }).await?;
    Ok(inspect::from_status(&status, total))
}

impl InspectService {
    /// Every job that is theirs who ask, in order. All are asked at once: one that has no time holds up nobody, and is
    /// listed without a phase.
    async fn summaries(&self, jobs: &Jobs, who: &Identity) -> Vec<v1::JobSummary> {
        let mut asking = JoinSet::new();
        for (job, handle) in jobs.all().into_iter().filter(|(job, _)| who.covers(job)) {
            asking.spawn(async move {
                match status(&handle, 1).await {
                    Ok(status) => Some(summary(&status)),
                    Err(Unanswered::Busy) => {
                        Some(v1::JobSummary { job: job.as_str().to_owned(), ..v1::JobSummary::default() })
                    }
                    // A job that ends while it is asked is no job any more.
                    Err(Unanswered::Gone(_)) => None,
                }
            });
        }
        let mut jobs: Vec<v1::JobSummary> = asking.join_all().await.into_iter().flatten().collect();
        for run in self.runs.iter().flat_map(|runs| runs.ids()) {
            let is_job = jobs.iter().any(|job| job.job == run.as_str());
            let status = self.run_status(who, run.as_str(), 1).filter(|_| !is_job);
            jobs.extend(status.as_ref().map(summary));
        }
        jobs.sort_by(|a, b| a.job.cmp(&b.job));
        jobs
    }
}

type StatusStream = Pin<Box<dyn Stream<Item = Result<v1::JobStatus, Status>> + Send>>;

/// Watchers see a job's changes at most this often …
const WATCH_EVERY_MIN: Duration = Duration::from_millis(50);
/// … and its renewed leases and steps at least this often.
const WATCH_EVERY_MAX: Duration = Duration::from_secs(1);

#[tonic::async_trait]
impl Inspect for InspectService {
    async fn server(
        &self,
        request: Request<v1::ServerRequest>,
    ) -> Result<Response<v1::ServerStatus>, Status> {
        let around = &self.office.around;
        let who = Identity::of(&request);
        // One that does not lead has none.
        let jobs = self.office.jobs().ok();
        let all = match &jobs {
            Some(jobs) => self.summaries(jobs, &who).await,
            None => Vec::new(),
        };
        let (jobs, members) = (all.len() as u32, all.iter().map(|job| job.members).sum());
        let visible = v1::ServerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            uptime_ms: u64::try_from(around.clock.uptime().as_millis()).unwrap_or(u64::MAX),
            jobs,
            members,
            role: if self.office.epoch().is_some() { "leading" } else { "following" }.to_owned(),
            leader: self.office.leader().unwrap_or_default(),
            epoch: self.office.epoch().unwrap_or_default().0,
            ..v1::ServerStatus::default()
        };
        if !who.operates_server() {
            return Ok(Response::new(visible));
        }
        Ok(Response::new(v1::ServerStatus {
            store: around.store.describe(),
            received: around.counters.all_received().into_iter().collect(),
            sent: around.counters.all_sent(),
            saves: around.counters.all_saves(),
            store_transactions: around.store.transactions(),
            ..visible
        }))
    }

    async fn jobs(&self, request: Request<v1::JobsRequest>) -> Result<Response<v1::JobsReply>, Status> {
        let who = Identity::of(&request);
        match self.office.jobs() {
            Ok(jobs) => {
                let jobs = self.summaries(&jobs, &who).await;
                Ok(Response::new(v1::JobsReply { jobs, saved_age_us: None }))
            }
            Err(_) => self.as_saved(self.records.summaries(&self.office.around, &who).await),
        }
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::JobStatus>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        let Ok(jobs) = self.office.jobs() else {
            let job = id(&request.job)?;
            who.check(&job)?;
            let status = self.records.status(&self.office.around, &job, request.members_max).await;
            return self.as_saved(status);
        };
        let handle = match find(&jobs, &who, &request.job).await {
            Ok(handle) => handle,
            Err(why) => {
                let run = self.run_status(&who, &request.job, request.members_max);
                return run.map(Response::new).ok_or(why);
            }
        };
        Ok(Response::new(status(&handle, request.members_max).await.map_err(unanswered)?))
    }

    type WatchStream = StatusStream;

    async fn watch(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        let handle = match find(&self.office.jobs()?, &who, &request.job).await {
            Ok(handle) => handle,
            Err(why) => return self.watch_run(who, request).ok_or(why),
        };
        // One status waits at the most: a slow reader sees fewer, newer ones.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut changed = handle.changed();
            loop {
                changed.mark_unchanged();
                let next = match status(&handle, request.members_max).await {
                    Ok(status) => Ok(status),
                    // It is asked again when something changes; whoever watches has the last one meanwhile.
                    Err(Unanswered::Busy) if !sender.is_closed() => continue,
                    Err(why) => Err(unanswered(why)),
                };
                let is_last = next.is_err();
                if sender.send(next).await.is_err() || is_last {
                    return;
                }
                tokio::time::sleep(WATCH_EVERY_MIN).await;
                tokio::select! {
                    change = changed.changed() => if change.is_err() { return },
                    () = tokio::time::sleep(WATCH_EVERY_MAX) => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn history(
        &self,
        request: Request<v1::HistoryRequest>,
    ) -> Result<Response<v1::HistoryReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        let Ok(jobs) = self.office.jobs() else {
            let job = id(&request.job)?;
            who.check(&job)?;
            return self.as_saved(self.records.history(&self.office.around, &job).await);
        };
        let handle = match find(&jobs, &who, &request.job).await {
            Ok(handle) => handle,
            Err(why) => {
                let changes = self.run_changes(&who, &request.job).ok_or(why)?;
                return Ok(Response::new(v1::HistoryReply { changes, saved_age_us: None }));
            }
        };
        let changes = handle.ask(|answer| Input::History { answer }).await.map_err(unanswered)?;
        let changes = changes.iter().map(inspect::from_change).collect();
        Ok(Response::new(v1::HistoryReply { changes, saved_age_us: None }))
    }
}
