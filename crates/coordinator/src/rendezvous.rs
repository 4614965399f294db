//! The members' service: one stream per member.

use std::sync::atomic::{AtomicU64, Ordering};

use reknit_membership::event::Message;
use reknit_membership::reason::Refusal;
use reknit_membership::{JobId, MemberId};
use reknit_proto::rendezvous::{BadIntroduction, Introduction};
use reknit_proto::v1::rendezvous_server::Rendezvous;
use reknit_proto::{rendezvous, v1};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::inspect::{find, unanswered};
use crate::job::{ConnectionId, Input, JobHandle, Outbound, source_text};
use crate::jobs::{Jobs, OpenJobError};

pub(crate) struct RendezvousService {
    jobs: Jobs,
    connections: AtomicU64,
}

impl RendezvousService {
    pub(crate) fn new(jobs: Jobs) -> RendezvousService {
        RendezvousService { jobs, connections: AtomicU64::new(0) }
    }

    async fn introduction(&self, inbound: &mut Streaming<v1::MemberMessage>) -> Result<Introduction, Status> {
        let limit = self.jobs.around.limits.introduction;
        let first = tokio::time::timeout(limit, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("a stream must begin with a join"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before a join"))?;
        rendezvous::introduction(first).map_err(|why| match why {
            BadIntroduction::OtherProtocol { .. } => Status::failed_precondition(why.to_string()),
            _ => Status::invalid_argument(why.to_string()),
        })
    }
}

/// What a stream that never became a member's is answered with.
fn refused(refusal: Refusal) -> Box<v1::CoordinatorMessage> {
    Box::new(rendezvous::to_member(&Message::Refused(refusal), |_| [0; 32]))
}

pub(crate) fn open_status(why: &OpenJobError) -> Status {
    let text = source_text(why);
    match why {
        OpenJobError::NoSuchJob => Status::not_found(text),
        OpenJobError::BadSpec(_) => Status::invalid_argument(text),
        OpenJobError::TooManyJobs { .. } => Status::resource_exhausted(text),
        OpenJobError::Stopping => Status::unavailable(text),
        OpenJobError::Store(why) if why.is_retryable() => Status::unavailable(text),
        OpenJobError::Store(_) | OpenJobError::Record(_) => Status::data_loss(text),
        OpenJobError::NoRandomness(_) => Status::internal(text),
    }
}

type Outgoing = std::pin::Pin<Box<dyn Stream<Item = Result<v1::CoordinatorMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Rendezvous for RendezvousService {
    type AttendStream = Outgoing;

    async fn attend(
        &self,
        request: Request<Streaming<v1::MemberMessage>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let mut inbound = request.into_inner();
        let Introduction { job, member, join } = self.introduction(&mut inbound).await?;
        let (sender, receiver) = mpsc::channel(self.jobs.around.limits.outbound);
        let (told, all_told) = oneshot::channel::<()>();
        let outgoing = ReceiverStream::new(receiver).map(move |message: Box<v1::CoordinatorMessage>| {
            // Held until the member's stream has ended on this side: then there is nobody to be heard either.
            let _ = &told;
            Ok(*message)
        });
        let outgoing: Outgoing = Box::pin(outgoing);
        match self.jobs.open(&job, Some(join.spec)).await {
            Ok(handle) => {
                let connection = ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed));
                let outbound = Outbound { connection, sender };
                let attach = Input::Attach { member, join, outbound };
                handle.send(attach).await.map_err(|gone| Status::unavailable(gone.to_string()))?;
                let from = Speaker { job, member, connection };
                tokio::spawn(listen(self.jobs.clone(), handle, from, inbound, all_told));
            }
            Err(OpenJobError::BadSpec(why)) => {
                // The queue is new and empty: there is room.
                let _ = sender.try_send(refused(Refusal::BadSpec(why)));
            }
            Err(why) => return Err(open_status(&why)),
        }
        Ok(Response::new(outgoing))
    }

    async fn roster(&self, request: Request<v1::RosterRequest>) -> Result<Response<v1::RosterPage>, Status> {
        let request = request.into_inner();
        let handle = find(&self.jobs, &request.job).await?;
        let from = request.from as usize;
        let most = self.jobs.around.limits.listed;
        let page = handle
            .ask(|answer| Input::Roster { from, most, answer })
            .await
            .map_err(unanswered)?
            .ok_or_else(|| Status::failed_precondition("the job has not formed a world yet"))?;
        if request.generation != 0 && request.generation != page.generation.0 {
            return Err(Status::failed_precondition(format!(
                "the job's last world is generation {}, not {}",
                page.generation, request.generation
            )));
        }
        Ok(Response::new(v1::RosterPage {
            generation: page.generation.0,
            roster: page.digest,
            seats: page.seats.iter().map(reknit_proto::inspect::from_seat).collect(),
            next: page.next,
        }))
    }
}

/// Whom a stream belongs to.
struct Speaker {
    job: JobId,
    member: MemberId,
    connection: ConnectionId,
}

/// Hears a member until its stream ends, on either side.
async fn listen(
    jobs: Jobs,
    handle: JobHandle,
    from: Speaker,
    mut inbound: Streaming<v1::MemberMessage>,
    mut all_told: oneshot::Receiver<()>,
) {
    let Speaker { job, member, connection } = from;
    loop {
        let message = tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => message,
                Ok(None) | Err(_) => break,
            },
            _ = &mut all_told => break,
        };
        let event = match rendezvous::event(member, message, jobs.around.clock.now()) {
            Ok(event) => event,
            Err(why) => {
                tracing::warn!(%job, %member, error = %why, "a member sent what is no message; its stream ends");
                break;
            }
        };
        if handle.send(Input::Said { connection, event }).await.is_err() {
            return;
        }
    }
    // If the job's task is gone, so is the member's seat in it.
    let _ = handle.send(Input::Detached { member, connection }).await;
}
