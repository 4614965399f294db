//! The members' service: one stream per member.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use reknit_membership::event::Message;
use reknit_membership::reason::Refusal;
use reknit_membership::{JobId, MemberId};
use reknit_proto::rendezvous::{BadIntroduction, Introduction};
use reknit_proto::v1::rendezvous_server::Rendezvous;
use reknit_proto::{rendezvous, v1};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::access::Identity;
use crate::inspect::{find, unanswered};
use crate::job::{ConnectionId, Input, JobHandle, Outbound, source_text};
use crate::jobs::{Jobs, OpenJobError};
use crate::office::Office;
use crate::rate::Allowance;

pub(crate) struct RendezvousService {
    office: Office,
    connections: AtomicU64,
}

impl RendezvousService {
    pub(crate) fn new(office: Office) -> RendezvousService {
        RendezvousService { office, connections: AtomicU64::new(0) }
    }

    async fn introduction(&self, inbound: &mut Streaming<v1::MemberMessage>) -> Result<Introduction, Status> {
        let limit = self.office.around.limits.introduction;
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

type Outgoing = Pin<Box<dyn Stream<Item = Result<v1::CoordinatorMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Rendezvous for RendezvousService {
    type AttendStream = Outgoing;

    async fn attend(
        &self,
        request: Request<Streaming<v1::MemberMessage>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let who = Identity::of(&request);
        // Whoever asks the wrong coordinator hears so before it has said a word.
        let jobs = self.office.jobs()?;
        let mut inbound = request.into_inner();
        let Introduction { job, member, join } = self.introduction(&mut inbound).await?;
        who.check(&job)?;
        let (sender, receiver) = mpsc::channel(jobs.around.limits.outbound);
        let (told, all_told) = oneshot::channel::<()>();
        let (complain, complaint) = oneshot::channel();
        let outgoing = ReceiverStream::new(receiver).map(move |message: Box<v1::CoordinatorMessage>| {
            // Held until the member's stream has ended on this side: then there is nobody to be heard either.
            let _ = &told;
            Ok(*message)
        });
        // What was wrong with what it sent, if anything was, is the last that it hears.
        let outgoing: Outgoing = Box::pin(outgoing.chain(Complaint(Some(complaint))));
        match jobs.open(&job, Some(join.spec)).await {
            Ok(handle) => {
                let connection = ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed));
                let outbound = Outbound { connection, sender };
                let attach = Input::Attach { member, join, outbound };
                handle.send(attach).await.map_err(|gone| Status::unavailable(gone.to_string()))?;
                let from = Speaker { job, member, connection };
                let ends = Ends { all_told, complain };
                tokio::spawn(listen(jobs.clone(), handle, from, inbound, ends));
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
        let who = Identity::of(&request);
        let request = request.into_inner();
        let handle = find(&self.office.jobs()?, &who, &request.job).await?;
        let from = request.from as usize;
        let most = self.office.around.limits.listed;
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

/// How the two directions of a stream end each other.
struct Ends {
    /// Resolves when the member's direction is gone.
    all_told: oneshot::Receiver<()>,
    /// What is wrong with what it sent.
    complain: oneshot::Sender<Status>,
}

/// A stream of one complaint, or of nothing if there is none.
struct Complaint(Option<oneshot::Receiver<Status>>);

impl Stream for Complaint {
    type Item = Result<v1::CoordinatorMessage, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(complaint) = &mut self.0 else { return Poll::Ready(None) };
        let complaint = std::task::ready!(Pin::new(complaint).poll(context));
        self.0 = None;
        Poll::Ready(complaint.ok().map(Err))
    }
}

/// Hears a member until its stream ends, on either side.
async fn listen(
    jobs: Jobs,
    handle: JobHandle,
    from: Speaker,
    mut inbound: Streaming<v1::MemberMessage>,
    mut ends: Ends,
) {
    let Speaker { job, member, connection } = from;
    let limits = jobs.around.limits;
    let mut pace = Allowance::new(limits.messages_per_second, limits.messages_burst, Instant::now());
    let wrong = loop {
        let message = tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => message,
                Ok(None) => break None,
                // Of a message that is none, or too large; whatever else ends a stream has nobody left to be told.
                Err(why) => break is_senders_fault(&why).then(|| why.message().to_owned()),
            },
            _ = &mut ends.all_told => break None,
        };
        // Who sends too much is read more slowly: what waits then waits on its own side.
        let pause = pace.take(Instant::now());
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let event = match rendezvous::event(member, message, jobs.around.clock.now()) {
            Ok(event) => event,
            Err(why) => break Some(why.to_string()),
        };
        if handle.send(Input::Said { connection, event }).await.is_err() {
            return;
        }
    };
    if let Some(why) = wrong {
        tracing::warn!(%job, %member, error = why, "a member sent what is no message; its stream ends");
        let limit = limits.message_bytes;
        let text = format!("this is no message ({why}); one may have up to {limit} bytes");
        // It may have hung up.
        let _ = ends.complain.send(Status::invalid_argument(text));
    }
    // If the job's task is gone, so is the member's seat in it.
    let _ = handle.send(Input::Detached { member, connection }).await;
}

/// Whether a stream was ended by what the other side sent, not by the way between the two.
fn is_senders_fault(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::OutOfRange | Code::ResourceExhausted | Code::Internal | Code::InvalidArgument
    )
}
