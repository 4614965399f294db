//! The task that owns one job: it feeds the core, saves what the core says must be saved, and only then tells anybody.
//!
//! Everybody else holds a [`JobHandle`]. The task ends when the job is forgotten, when the server stops, or when nobody
//! is left of a job that never formed a world.

mod log;
mod saving;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reknit_membership::event::{Answer, Effect, Event, Join, Message, Operation, Request};
use reknit_membership::record::{JobRecord, Stage, WorldChange};
use reknit_membership::status::{PhaseName, Status};
use reknit_membership::world::Seat;
use reknit_membership::{Generation, Job, JobId, MemberId, Timestamp, Timing};
use reknit_proto::{rendezvous, v1};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::config::Limits;
use crate::counters::Counters;
use crate::secret::JobSecret;
use crate::store::recorded::{Recorded, Recorder};
use crate::store::{Epoch, Revision, Store, StoreError};

/// Tells one stream of a member from a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// The way to one member. Dropping it ends the member's stream. Messages are boxed because a queue reserves room for a
/// few dozen of them per member, and almost always holds none.
#[derive(Debug)]
pub struct Outbound {
    /// Which of the member's streams.
    pub connection: ConnectionId,
    /// Takes messages until the limit is reached; then the reader is too slow and is cut off.
    pub sender: mpsc::Sender<Box<v1::CoordinatorMessage>>,
}

/// A page of a roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterPage {
    /// The world's generation.
    pub generation: Generation,
    /// Digest of the whole roster.
    pub digest: u64,
    /// Some of its seats, in rank order.
    pub seats: Vec<Seat>,
    /// Where the next page begins.
    pub next: Option<u32>,
}

/// What a job's task is asked.
#[derive(Debug)]
pub enum Input {
    /// A member's stream begins.
    Attach {
        /// Who.
        member: MemberId,
        /// How it introduces itself.
        join: Join,
        /// The way to it.
        outbound: Outbound,
    },
    /// A member's stream ended.
    Detached {
        /// Who.
        member: MemberId,
        /// Which of its streams.
        connection: ConnectionId,
    },
    /// A member says something.
    Said {
        /// On which of its streams.
        connection: ConnectionId,
        /// What.
        event: Event,
    },
    /// An operator asks for something.
    Operate {
        /// What.
        operation: Operation,
        /// Where the answer goes, once what was changed is saved.
        answer: oneshot::Sender<Answer>,
    },
    /// Somebody wants to see the job.
    Status {
        /// How many members to list.
        members_max: usize,
        /// Where it goes, with the number of all members.
        answer: oneshot::Sender<(Status, u32)>,
    },
    /// Somebody wants to see its changes.
    History {
        /// Where they go.
        answer: oneshot::Sender<Vec<WorldChange>>,
    },
    /// Somebody wants to see its roster.
    Roster {
        /// The first seat.
        from: usize,
        /// How many.
        most: usize,
        /// Where it goes; nothing if there has been no world.
        answer: oneshot::Sender<Option<RosterPage>>,
    },
    /// Deletes the record of a job that has ended.
    Forget {
        /// Whether it was done: not if the job has not ended.
        answer: oneshot::Sender<bool>,
    },
    /// The server stops: every stream ends, the record stays.
    Stop,
}

/// The job's task is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the job is not served here any more")]
pub struct JobGone;

/// What others hold of a job.
#[derive(Debug, Clone)]
pub struct JobHandle {
    inputs: mpsc::Sender<Input>,
    changed: watch::Receiver<u64>,
    closed: Arc<AtomicBool>,
}

/// Why a question to a job's task has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// There is no task any more.
    #[error(transparent)]
    Gone(#[from] JobGone),
    /// It has no time: it cannot save the job's record, or has too much to do.
    #[error(
        "the job has not answered within {ASK_PATIENCE:?}: its record cannot be saved, or it is busy; the coordinator's log says more"
    )]
    Busy,
}

impl JobHandle {
    /// Hands something to the task, waiting for room.
    ///
    /// # Errors
    /// [`JobGone`] if the task has ended.
    pub async fn send(&self, input: Input) -> Result<(), JobGone> {
        self.inputs.send(input).await.map_err(|_| JobGone)
    }

    /// Hands a question to the task and waits for the answer.
    ///
    /// While a record cannot be saved, the task tells nothing of the change that it holds (rule D-2): whoever asks is told
    /// that, soon, rather than kept waiting.
    ///
    /// # Errors
    /// [`Unanswered`] says whether asking again may help.
    pub async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Input) -> Result<T, Unanswered> {
        let (answer, answered) = oneshot::channel();
        let asking = async {
            self.send(question(answer)).await?;
            answered.await.map_err(|_| JobGone)
        };
        match tokio::time::timeout(ASK_PATIENCE, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Unanswered::Busy),
        }
    }

    /// Whether the job is over.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Counts the job's changes, for those who watch it.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    /// Whether the task has ended.
    pub fn is_gone(&self) -> bool {
        self.inputs.is_closed()
    }
}

/// What every job's task of a server has in common.
#[derive(Clone)]
pub struct Surroundings {
    /// Where records live.
    pub store: Arc<dyn Store>,
    /// The server's clock.
    pub clock: Clock,
    /// By which jobs wait.
    pub timing: Timing,
    /// What peers may ask for.
    pub limits: Limits,
    /// Counts for operators.
    pub counters: Arc<Counters>,
    /// Which reign this is.
    pub epoch: Epoch,
    /// Where tells are written down, if they are.
    pub recorder: Option<Arc<Recorder>>,
    /// Told when a save finds that another coordinator leads.
    pub deposed: Arc<Notify>,
}

impl Surroundings {
    /// Those of a server that has its store for itself.
    pub fn alone(store: Arc<dyn Store>, timing: Timing, limits: Limits) -> Surroundings {
        Surroundings {
            store,
            clock: Clock::start(),
            timing,
            limits,
            counters: Arc::default(),
            epoch: Epoch::default(),
            recorder: None,
            deposed: Arc::default(),
        }
    }

    /// The same for one reign over `store`; what is asked of it is written down, if anything is.
    pub(crate) fn reigning(&self, store: Arc<dyn Store>, epoch: Epoch) -> Surroundings {
        let store = match &self.recorder {
            Some(recorder) => Arc::new(Recorded { store, epoch, recorder: Arc::clone(recorder) }),
            None => store,
        };
        Surroundings { store, epoch, deposed: Arc::default(), ..self.clone() }
    }
}

/// The record of a job as the task takes it up.
#[derive(Debug, Clone)]
pub struct Known {
    /// The record.
    pub record: JobRecord,
    /// What its generations' secrets are derived from.
    pub secret: JobSecret,
    /// The revision it was read with; zero if it was never saved.
    pub revision: Revision,
}

/// How often the task wakes at the least, as a part of the silence a member is allowed: from a longer gap it knows that
/// it was held up itself, so that members could not be heard.
const PULSES_PER_SILENCE: u32 = 6;

/// How long a question may wait for its answer.
const ASK_PATIENCE: Duration = Duration::from_secs(2);

/// How long it waits before it tries to save again.
const SAVE_RETRY: Duration = Duration::from_millis(200);

/// Makes a job's task; the returned future is its life.
pub fn job_task(known: Known, surroundings: Surroundings) -> (JobHandle, impl Future<Output = ()> + Send) {
    let (inputs, inbox) = mpsc::channel(surroundings.limits.inbound);
    let (changed, watched) = watch::channel(0);
    let now = surroundings.clock.now();
    let job = Job::restore(known.record, surroundings.timing, surroundings.limits.members, now);
    let closed = Arc::new(AtomicBool::new(matches!(job.phase(), PhaseName::Closed(_))));
    let pulse = surroundings.timing.silence / PULSES_PER_SILENCE;
    let counted = job.member_count();
    surroundings.counters.members_changed(0, counted);
    let task = JobTask {
        job,
        counted,
        pulse,
        next_pulse: Instant::now() + pulse,
        attended: false,
        closed: Arc::clone(&closed),
        secret: known.secret,
        revision: known.revision,
        around: surroundings,
        streams: BTreeMap::new(),
        answers: BTreeMap::new(),
        requests: 0,
        changed,
    };
    (JobHandle { inputs, changed: watched, closed }, task.run(inbox))
}

struct JobTask {
    job: Job,
    /// How many members of it the counters know of.
    counted: usize,
    /// How often it wakes at the least.
    pulse: Duration,
    next_pulse: Instant,
    /// Whether anybody has ever attached.
    attended: bool,
    /// Told to whoever has a handle.
    closed: Arc<AtomicBool>,
    secret: JobSecret,
    revision: Revision,
    around: Surroundings,
    streams: BTreeMap<MemberId, Outbound>,
    answers: BTreeMap<Request, oneshot::Sender<Answer>>,
    requests: u64,
    changed: watch::Sender<u64>,
}

/// Whether the task goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    GoesOn,
    Ends,
}

impl JobTask {
    async fn run(mut self, mut inbox: mpsc::Receiver<Input>) {
        loop {
            let due = self.job.next_deadline().map(|at| self.around.clock.instant(at));
            let wake = due.map_or(self.next_pulse, |due| due.min(self.next_pulse));
            // The clock comes first: a flood of messages must not keep leases from running out.
            let life = tokio::select! {
                biased;
                () = tokio::time::sleep_until(wake) => match self.hears_out(&mut inbox).await {
                    Life::GoesOn => self.pulse().await,
                    Life::Ends => Life::Ends,
                },
                input = inbox.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => Life::Ends,
                },
            };
            if life == Life::Ends || self.is_abandoned() {
                return;
            }
        }
    }

    /// Who has spoken before its time was up is heard before the time is: a disk that has been slow with what came before
    /// must not cost anybody its lease. No more than may wait, so that nobody holds up the time.
    async fn hears_out(&mut self, inbox: &mut mpsc::Receiver<Input>) -> Life {
        for _ in 0..self.around.limits.inbound {
            let Ok(input) = inbox.try_recv() else { break };
            if self.take(input).await == Life::Ends {
                return Life::Ends;
            }
        }
        Life::GoesOn
    }

    async fn pulse(&mut self) -> Life {
        let late = self.next_pulse.elapsed();
        if self.next_pulse <= Instant::now() {
            self.next_pulse = Instant::now() + self.pulse;
        }
        if late > self.pulse {
            tracing::warn!(job = %self.job_id(), late_ms = late.as_millis(), "held up; leases are lengthened");
            if self.step(Event::Stalled { by: late }).await == Life::Ends {
                return Life::Ends;
            }
        }
        let due = self.job.next_deadline().is_some_and(|at| at <= self.now());
        if due { self.step(Event::Tick).await } else { Life::GoesOn }
    }

    fn now(&self) -> Timestamp {
        self.around.clock.now()
    }

    fn job_id(&self) -> &JobId {
        &self.job.record().job
    }

    async fn take(&mut self, input: Input) -> Life {
        match input {
            Input::Attach { member, join, outbound } => {
                // An older stream of the same member ends here: its sender is dropped.
                self.attended = true;
                self.streams.insert(member, outbound);
                let event = Event::Attach { member, join };
                self.around.counters.received(&event);
                self.step(event).await
            }
            Input::Detached { member, connection } => {
                if !self.is_current(member, connection) {
                    return Life::GoesOn;
                }
                self.streams.remove(&member);
                self.step(Event::Detached { member }).await
            }
            Input::Said { connection, event } => {
                if let Some(member) = speaker(&event)
                    && !self.is_current(member, connection)
                {
                    return Life::GoesOn;
                }
                self.around.counters.received(&event);
                self.step(event).await
            }
            Input::Operate { operation, answer } => {
                self.requests += 1;
                let request = Request(self.requests);
                self.answers.insert(request, answer);
                self.step(Event::Operate { request, operation }).await
            }
            Input::Status { members_max, answer } => {
                let status = self.job.status(members_max.min(self.around.limits.listed));
                // Whoever asked may have gone away; so with every answer below.
                let _ = answer.send((status, self.job.member_count() as u32));
                Life::GoesOn
            }
            Input::History { answer } => {
                let _ = answer.send(self.job.record().changes.iter().cloned().collect());
                Life::GoesOn
            }
            Input::Roster { from, most, answer } => {
                let _ = answer.send(self.roster(from, most.min(self.around.limits.listed)));
                Life::GoesOn
            }
            Input::Forget { answer } => self.forget(answer).await,
            Input::Stop => Life::Ends,
        }
    }

    fn is_current(&self, member: MemberId, connection: ConnectionId) -> bool {
        self.streams.get(&member).is_some_and(|stream| stream.connection == connection)
    }

    /// Nobody is left of a job that never was anything: a mistyped id must not stay for ever.
    fn is_abandoned(&self) -> bool {
        self.attended && self.streams.is_empty() && self.revision == Revision::default()
    }

    fn roster(&self, from: usize, most: usize) -> Option<RosterPage> {
        let world = self.job.record().world.as_ref()?;
        let seats: Vec<Seat> = world.seats.iter().skip(from).take(most).cloned().collect();
        let end = from.saturating_add(seats.len());
        let next = (end < world.seats.len() && !seats.is_empty()).then_some(end as u32);
        Some(RosterPage { generation: world.generation, digest: world.roster_digest(), seats, next })
    }

    async fn forget(&mut self, answer: oneshot::Sender<bool>) -> Life {
        let ended = matches!(self.job.record().stage, Stage::Closed(_));
        if !ended {
            let _ = answer.send(false);
            return Life::GoesOn;
        }
        let removed = self.around.store.remove(self.job_id(), self.revision).await;
        let is_gone = match &removed {
            Ok(()) => true,
            // An earlier request may have been carried out, and only its answer was lost.
            Err(StoreError::Conflict) => matches!(self.around.store.load(self.job_id()).await, Ok(None)),
            Err(_) => false,
        };
        if is_gone {
            let _ = answer.send(true);
            return Life::Ends;
        }
        // The question stays unanswered: the caller is told to ask again.
        let why = removed.err().map(|why| source_text(&why)).unwrap_or_default();
        tracing::error!(job = %self.job_id(), error = why, "a record could not be removed");
        Life::GoesOn
    }

    /// Feeds the core, and whatever follows from telling members (a reader that was cut off is one more event).
    async fn step(&mut self, event: Event) -> Life {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = self.now();
            let transition = self.job.step(now, event);
            if transition.save.is_none() && transition.then.is_empty() {
                continue;
            }
            if let Some(record) = transition.save
                && let Err(life) = self.save(&record).await
            {
                return life;
            }
            self.closed.store(matches!(self.job.phase(), PhaseName::Closed(_)), Ordering::Relaxed);
            let tells = transition.then.iter().any(|effect| matches!(effect, Effect::Tell { .. }));
            for effect in transition.then {
                events.extend(self.perform(effect));
            }
            self.changed.send_modify(|count| *count += 1);
            if tells {
                // When a store comes back, a backlog of events follows: whoever carries messages to members gets its turn
                // between two of them, or a quick reader would look like a slow one (rule D-4).
                tokio::task::yield_now().await;
            }
        }
        self.count_members(self.job.member_count());
        Life::GoesOn
    }

    fn count_members(&mut self, now: usize) {
        self.around.counters.members_changed(self.counted, now);
        self.counted = now;
    }

    /// Does what the core wants done. Returns what follows from it.
    fn perform(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Tell { member, message } => self.tell(member, &message),
            Effect::Answer { request, answer } => {
                if let Some(waiting) = self.answers.remove(&request) {
                    let _ = waiting.send(answer);
                }
                None
            }
            Effect::Note(note) => {
                log::note(self.job_id(), &note);
                None
            }
        }
    }

    fn tell(&mut self, member: MemberId, message: &Message) -> Option<Event> {
        let stream = self.streams.get(&member)?;
        let wire = rendezvous::to_member(message, |generation| self.secret.of(generation));
        self.around.counters.sent();
        if let Some(recorder) = &self.around.recorder {
            recorder.tells(self.job_id(), member, message, self.revision, self.around.epoch);
        }
        let sent = stream.sender.try_send(Box::new(wire));
        if message.is_last() {
            self.streams.remove(&member);
            return None;
        }
        if sent.is_err() {
            // It does not read, or it is gone: its stream ends (rule D-4).
            self.streams.remove(&member);
            return Some(Event::Detached { member });
        }
        None
    }
}

impl Drop for JobTask {
    fn drop(&mut self) {
        self.count_members(0);
        if std::thread::panicking() {
            tracing::error!(job = %self.job_id(), "the job's task has failed; it is taken up again from its record");
        }
    }
}

/// The member that an event comes from, if it comes from one.
fn speaker(event: &Event) -> Option<MemberId> {
    match event {
        Event::Attach { member, .. }
        | Event::Detached { member }
        | Event::Renew { member, .. }
        | Event::Leave { member }
        | Event::Available { member }
        | Event::Ready { member, .. }
        | Event::Restored { member, .. }
        | Event::RestoreFailed { member, .. }
        | Event::Broken { member, .. }
        | Event::Boundary { member, .. }
        | Event::FirstStep { member, .. }
        | Event::Finished { member, .. }
        | Event::ShardWritten { member, .. }
        | Event::SaveFailed { member, .. }
        | Event::ManifestWritten { member, .. }
        | Event::Notice { member, .. } => Some(*member),
        Event::Operate { .. } | Event::Stalled { .. } | Event::Tick => None,
    }
}

/// An error with what lies beneath it, for a log line.
pub(crate) fn source_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(beneath) = source {
        text.push_str(": ");
        text.push_str(&beneath.to_string());
        source = beneath.source();
    }
    text
}
