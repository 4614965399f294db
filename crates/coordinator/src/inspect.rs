//! The service for those who look.

use std::pin::Pin;
use std::time::Duration;

use reknit_membership::JobId;
use reknit_proto::v1::inspect_server::Inspect;
use reknit_proto::{PROTOCOL, inspect, v1};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::job::{Input, JobGone, JobHandle};
use crate::jobs::Jobs;

pub(crate) struct InspectService {
    jobs: Jobs,
}

impl InspectService {
    pub(crate) fn new(jobs: Jobs) -> InspectService {
        InspectService { jobs }
    }
}

/// The served job of that name.
pub(crate) fn find(jobs: &Jobs, job: &str) -> Result<JobHandle, Status> {
    let id = JobId::new(job).map_err(|why| Status::invalid_argument(why.to_string()))?;
    jobs.get(&id).ok_or_else(|| Status::not_found(format!("no job is called {id}")))
}

fn gone(gone: JobGone) -> Status {
    Status::unavailable(gone.to_string())
}

async fn status(handle: &JobHandle, members_max: u32) -> Result<v1::JobStatus, JobGone> {
    let members_max = if members_max == 0 { usize::MAX } else { members_max as usize };
    let (status, total) = handle.ask(|answer| Input::Status { members_max, answer }).await?;
    Ok(inspect::from_status(&status, total))
}

/// Watchers see a job's changes at most this often …
const WATCH_EVERY_MIN: Duration = Duration::from_millis(50);
/// … and its renewed leases and steps at least this often.
const WATCH_EVERY_MAX: Duration = Duration::from_secs(1);

#[tonic::async_trait]
impl Inspect for InspectService {
    async fn server(&self, _: Request<v1::ServerRequest>) -> Result<Response<v1::ServerStatus>, Status> {
        let around = &self.jobs.around;
        let mut jobs = 0;
        let mut members = 0;
        for (_, handle) in self.jobs.all() {
            if let Ok(status) = status(&handle, 1).await {
                jobs += 1;
                members += status.members_total;
            }
        }
        Ok(Response::new(v1::ServerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            store: around.store.describe(),
            uptime_ms: u64::try_from(around.clock.uptime().as_millis()).unwrap_or(u64::MAX),
            jobs,
            members,
            received: around.counters.all_received().into_iter().collect(),
            sent: around.counters.all_sent(),
            saves: around.counters.all_saves(),
        }))
    }

    async fn jobs(&self, _: Request<v1::JobsRequest>) -> Result<Response<v1::JobsReply>, Status> {
        let mut jobs = Vec::new();
        for (_, handle) in self.jobs.all() {
            // A job that ends while it is asked is no job any more.
            let Ok(status) = status(&handle, 1).await else { continue };
            jobs.push(v1::JobSummary {
                phase: status.phase,
                job: status.job,
                generation: status.generation,
                size: status.size,
                members: status.members_total,
                step: status.step,
            });
        }
        Ok(Response::new(v1::JobsReply { jobs }))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::JobStatus>, Status> {
        let request = request.into_inner();
        let handle = find(&self.jobs, &request.job)?;
        Ok(Response::new(status(&handle, request.members_max).await.map_err(gone)?))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::JobStatus, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let handle = find(&self.jobs, &request.job)?;
        // One status waits at the most: a slow reader sees fewer, newer ones.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut changed = handle.changed();
            loop {
                changed.mark_unchanged();
                let Ok(status) = status(&handle, request.members_max).await else { return };
                if sender.send(Ok(status)).await.is_err() {
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
        let handle = find(&self.jobs, &request.into_inner().job)?;
        let changes = handle.ask(|answer| Input::History { answer }).await.map_err(gone)?;
        Ok(Response::new(v1::HistoryReply { changes: changes.iter().map(inspect::from_change).collect() }))
    }
}
