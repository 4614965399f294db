//! Where the threads of one member meet: the session behind a lock, and the ways to the others.
//!
//! ```text
//!   link thread (gRPC) ──told──►┐               ┌──events──► link thread
//!   ring thread  ──formed──────►├── Hub(Session)├──forms───► ring threads (ring.rs)
//!   program ──at rest, commit──►┘               └──wakes───► program
//! ```
//! Whoever brings news runs the session and carries out what follows, on its own thread: no news waits for a hop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reknit_collectives::{
    AbortHandle, BreakReason, Group, Listener, ListenerOptions, Secret, SharedMemory, StateConnection,
};
use reknit_membership::event::{Event, Message};
use reknit_membership::holding::{Holding, Plan, ShardReport};
use reknit_membership::record::Commit;
use reknit_membership::spec::Shape;
use reknit_membership::world::Place;
use reknit_membership::{Generation, MemberId, Step};
use reknit_proto::rendezvous::{SecretBytes, Told};
use tokio::sync::mpsc as tokio_mpsc;

use crate::error::TrainError;
use crate::launcher::LauncherOptions;
use crate::link::{self, Target};
use crate::options::{Notice, NoticeCallback, advertised};
use crate::ring;
use crate::session::{Identity, Output, Session};

/// What the program's thread hears while it waits.
pub(crate) enum ToProgram {
    /// Its directive may have changed.
    Wake,
    /// Another member wants state.
    Serve(StateConnection),
}

/// What the thread that looks after checkpoints is told.
pub(crate) enum ToSaves {
    /// A part was written, or could not be.
    Written,
    /// It is this member's turn to write a manifest.
    Publish { generation: Generation, step: Step, shards: Vec<ShardReport> },
    /// These checkpoints are committed.
    Committed { kept: Vec<Commit> },
    /// This checkpoint will never be whole: this member's part of it is of no use.
    GivenUp { generation: Generation, step: Step },
    /// The program is done.
    End,
}

/// The present world's ring, as far as other threads need to know it.
struct Ring {
    generation: Generation,
    secret: SecretBytes,
    abort: AbortHandle,
    /// What ends the moving of state for the plan that is being carried out.
    moving: AbortHandle,
}

impl Ring {
    fn abort(&self) {
        self.abort.abort(BreakReason::Aborted);
        self.moving.abort(BreakReason::Aborted);
    }
}

/// A world without a place for this member, whose members it serves.
struct Serving {
    generation: Generation,
    abort: AbortHandle,
}

/// What the link's thread is told.
#[derive(Debug)]
pub(crate) enum ToLink {
    /// Say this, if there is a stream.
    Say(Event),
    /// Begin a new stream.
    Reconnect,
    /// End.
    End,
}

pub(crate) struct Hub {
    session: Mutex<Session>,
    listener: Listener,
    to_link: tokio_mpsc::UnboundedSender<ToLink>,
    to_program: std_mpsc::Sender<ToProgram>,
    /// What ends the ring, and the moving of state, of the present world.
    ring: Mutex<Option<Ring>>,
    serving: Mutex<Option<Serving>>,
    /// The ring of the newest world that has one, until the program takes it.
    group: Mutex<Option<Group>>,
    to_saves: std_mpsc::Sender<ToSaves>,
    shared_memory: SharedMemory,
    on_notice: Option<NoticeCallback>,
    noticed: AtomicBool,
    /// Since when there has been no stream.
    apart_since: Mutex<Option<Instant>>,
    /// What ended the last stream, or the last attempt at one.
    trouble: Mutex<String>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section here leaves its value whole before anything in it can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A member that has begun to join, and what its threads listen to.
pub(crate) struct Joined {
    pub(crate) hub: Arc<Hub>,
    pub(crate) inbox: std_mpsc::Receiver<ToProgram>,
    pub(crate) saves_inbox: std_mpsc::Receiver<ToSaves>,
    pub(crate) link: std::thread::JoinHandle<()>,
}

impl Hub {
    /// Listens for neighbours, and begins to look for a coordinator. `stateless`: what the member holds, whatever its
    /// program does, if it has no state.
    ///
    /// # Errors
    /// [`TrainError`] if the data plane cannot listen, or the system gives no thread or randomness.
    pub(crate) fn join(
        member: &LauncherOptions,
        shape: Shape,
        stateless: Option<Holding>,
    ) -> Result<Joined, TrainError> {
        let listen = member.listen;
        let listener = Listener::bind(listen, ListenerOptions::default())
            .map_err(|source| TrainError::Listen { listen, source })?;
        let identity = Identity {
            name: member.name.clone(),
            slots: 1,
            address: advertised(member.advertise.as_deref(), &listener),
            spec: member.spec,
            shape,
        };
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(std::io::Error::from)?;
        let mut drawn = u64::from_le_bytes(seed);
        let next_id = Box::new(move || {
            drawn = crate::order::mix(drawn);
            MemberId(drawn)
        });
        let session = Session::new(identity, next_id);
        let session = match stateless {
            Some(holding) => session.without_state(holding),
            None => session,
        };
        let (to_link, link_inbox) = tokio_mpsc::unbounded_channel();
        let (to_program, inbox) = std_mpsc::channel();
        let (to_saves, saves_inbox) = std_mpsc::channel();
        let hub = Hub::new(session, listener, to_link, to_program, to_saves, member);
        let link = {
            let hub = Arc::clone(&hub);
            let to = Target {
                coordinators: member.coordinators.clone(),
                credentials: member.credentials.clone(),
                job: member.job.clone(),
            };
            let thread = std::thread::Builder::new().name("reknit-link".to_owned());
            thread.spawn(move || link::run(hub, to, link_inbox))?
        };
        Ok(Joined { hub, inbox, saves_inbox, link })
    }

    fn new(
        session: Session,
        listener: Listener,
        to_link: tokio_mpsc::UnboundedSender<ToLink>,
        to_program: std_mpsc::Sender<ToProgram>,
        to_saves: std_mpsc::Sender<ToSaves>,
        member: &LauncherOptions,
    ) -> Arc<Hub> {
        Arc::new(Hub {
            session: Mutex::new(session),
            listener,
            to_link,
            to_program,
            ring: Mutex::new(None),
            serving: Mutex::new(None),
            group: Mutex::new(None),
            to_saves,
            shared_memory: member.shared_memory,
            on_notice: member.on_notice.clone(),
            noticed: AtomicBool::new(false),
            apart_since: Mutex::new(Some(Instant::now())),
            trouble: Mutex::new("no attempt has ended yet".to_owned()),
        })
    }

    /// Whether this member offers to share memory.
    pub(crate) fn shared_memory(&self) -> SharedMemory {
        self.shared_memory
    }

    pub(crate) fn listener(&self) -> &Listener {
        &self.listener
    }

    /// Looks at the session.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Session) -> T) -> T {
        look(&lock(&self.session))
    }

    /// Brings news to the session and carries out what follows.
    pub(crate) fn bring(self: &Arc<Hub>, news: impl FnOnce(&mut Session) -> Vec<Output>) {
        // The lock is held while the outputs are handed on, so that two threads' news cannot overtake each other. None
        // of the ways blocks.
        let mut session = lock(&self.session);
        let mut refused = None;
        for output in news(&mut session) {
            if let Err(why) = self.carry_out(output) {
                refused = Some(why);
            }
        }
        if let Some(why) = refused {
            // Nothing that follows from this needs a thread.
            for output in session.machine_failed(why) {
                let _ = self.carry_out(output);
            }
        }
    }

    /// # Errors
    /// What the operating system does not give this process.
    fn carry_out(self: &Arc<Hub>, output: Output) -> Result<(), String> {
        match output {
            Output::Send(event) => self.say(ToLink::Say(event)),
            Output::Reconnect => self.say(ToLink::Reconnect),
            Output::Form { place, secret } => return self.form(place, secret),
            Output::Abort { generation } => self.abort(generation),
            Output::AbandonPlan { generation } => self.abandon_plan(generation),
            Output::Serve { generation, secret } => self.serve(generation, secret),
            Output::Wake => self.tell_program(ToProgram::Wake),
            Output::Publish { generation, step, shards } => {
                self.tell_saves(ToSaves::Publish { generation, step, shards });
            }
            Output::SaveGivenUp { generation, step } => {
                self.tell_saves(ToSaves::GivenUp { generation, step });
            }
            Output::Notice { left } => self.notice_arrived(left),
            Output::Committed { kept } => self.tell_saves(ToSaves::Committed { kept }),
        }
        Ok(())
    }

    pub(crate) fn say(&self, what: ToLink) {
        // The link ends only after the program has: then nobody is left to say anything to.
        let _ = self.to_link.send(what);
    }

    pub(crate) fn tell_program(&self, what: ToProgram) {
        // A program that is gone hears nothing.
        let _ = self.to_program.send(what);
    }

    pub(crate) fn tell_saves(&self, what: ToSaves) {
        // Without checkpoints nobody listens.
        let _ = self.to_saves.send(what);
    }

    fn form(self: &Arc<Hub>, place: Place, secret: SecretBytes) -> Result<(), String> {
        let abort = AbortHandle::new();
        let (generation, moving) = (place.generation, AbortHandle::new());
        let ring = Ring { generation, secret, abort: abort.clone(), moving };
        if let Some(old) = lock(&self.ring).replace(ring) {
            old.abort();
        }
        ring::form_in_background(self, place, secret, abort)
    }

    /// The ring of a world stands. One that comes after a newer world's is of no use.
    pub(crate) fn put_group(&self, new: Group) {
        let mut group = lock(&self.group);
        let is_late = group.as_ref().is_some_and(|group| group.generation() > new.generation());
        let old = if is_late { Some(new) } else { group.replace(new) };
        drop(group);
        // Its threads are waited for: not under a lock.
        drop(old);
    }

    /// The ring of `generation`, if it stands and no newer one does.
    pub(crate) fn take_group(&self, generation: Generation) -> Option<Group> {
        lock(&self.group).take_if(|group| group.generation() == generation)
    }

    /// The program is done: nobody gets in any more, and the port is free.
    pub(crate) fn close(&self) {
        let group = lock(&self.group).take();
        drop(group);
        self.listener.close();
    }

    fn abort(&self, generation: Generation) {
        let ring = lock(&self.ring);
        if let Some(ring) = ring.as_ref().filter(|ring| ring.generation <= generation) {
            ring.abort();
        }
        drop(ring);
        if let Some(serving) = lock(&self.serving).take_if(|serving| serving.generation <= generation) {
            serving.abort.abort(BreakReason::Aborted);
        }
    }

    fn abandon_plan(&self, generation: Generation) {
        let ring = lock(&self.ring);
        if let Some(ring) = ring.as_ref().filter(|ring| ring.generation == generation) {
            ring.moving.abort(BreakReason::Aborted);
        }
    }

    fn serve(self: &Arc<Hub>, generation: Generation, secret: SecretBytes) {
        let abort = AbortHandle::new();
        let serving = Serving { generation, abort: abort.clone() };
        if let Some(old) = lock(&self.serving).replace(serving) {
            old.abort.abort(BreakReason::Aborted);
        }
        ring::serve_in_background(self, generation, secret, abort);
    }

    /// The program begins to carry out `plan`: what the connections of its world must prove, and what ends the moving of
    /// state for it. None if it is not the plan any more.
    pub(crate) fn begin_plan(&self, plan: &Plan) -> Option<(Secret, AbortHandle)> {
        // Under the session's lock, so that what makes the plan void comes before or after this, not in between.
        let mut session = lock(&self.session);
        let mut ring = lock(&self.ring);
        let ring = ring.as_mut().filter(|ring| ring.generation == plan.generation)?;
        if !session.is_planned(plan) || ring.abort.is_aborted() {
            return None;
        }
        session.busy();
        ring.moving = AbortHandle::new();
        Some((Secret::new(ring.secret), ring.moving.clone()))
    }

    /// The coordinator said something.
    pub(crate) fn told(self: &Arc<Hub>, told: Told) {
        *lock(&self.apart_since) = None;
        match &told.message {
            Message::Attached { .. } => tracing::info!("the coordinator has let this worker in"),
            Message::World(Place { generation, rank, size, .. }) => {
                tracing::info!(%generation, %rank, %size, "a place in a world");
            }
            Message::Draining { .. } => tracing::info!("this worker is to leave"),
            Message::Go { generation, resume } => {
                tracing::info!(%generation, step = %resume.step, "the world runs");
            }
            Message::Break { generation } => tracing::info!(%generation, "the world is over"),
            _ => {}
        }
        self.bring(|session| session.told(told));
    }

    /// What ended the last stream, or the last attempt at one.
    fn trouble(&self) -> String {
        lock(&self.trouble).clone()
    }

    /// The stream ended, or could not be had.
    pub(crate) fn disconnected(self: &Arc<Hub>, trouble: String) {
        *lock(&self.trouble) = trouble;
        lock(&self.apart_since).get_or_insert_with(Instant::now);
        self.bring(|session| {
            session.disconnected();
            Vec::new()
        });
    }

    /// What there is to say when there has been no coordinator for so long.
    pub(crate) fn unreachable(&self, member: &LauncherOptions, waited: Duration) -> TrainError {
        let coordinators = member.coordinators.join(", ");
        TrainError::Unreachable { coordinators, waited, last: self.trouble() }
    }

    /// For how long there has been no stream.
    pub(crate) fn apart_for(&self) -> Duration {
        lock(&self.apart_since).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Tells the program, once, that it is to leave. On a thread of its own: what a program does then may take long, or
    /// use its handle.
    pub(crate) fn notice_arrived(&self, left: Option<Duration>) {
        if let Some(callback) = self.on_notice.clone()
            && !self.noticed.swap(true, Ordering::Relaxed)
        {
            let thread = std::thread::Builder::new().name("reknit-notice".to_owned());
            if let Err(why) = thread.spawn(move || callback(Notice { left })) {
                tracing::error!(error = %why, "no thread for the program's notice callback");
            }
        }
    }
}
