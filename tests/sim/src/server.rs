//! Coordinators: the real driver of the job, in a process that can die, stop and come back.
//!
//! What surrounds the driver here is what `rendezvous.rs` and `jobs.rs` do in a server: a stream is introduced, the job is
//! opened (from the store, or anew), and what members say is handed to its task.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use reknit_coordinator::clock::Clock;
use reknit_coordinator::config::Limits;
use reknit_coordinator::job::{
    ConnectionId, Input, JobGone, JobHandle, Known, Outbound, Surroundings, job_task,
};
use reknit_coordinator::secret::JobSecret;
use reknit_coordinator::store::Revision;
use reknit_membership::{HistoryId, JobId, JobRecord, Spec, Timestamp};
use reknit_proto::{rendezvous, v1};
use tokio::sync::mpsc;

use crate::happening::{Happening, StreamKey, Way};
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::queue::Ms;
use crate::sim::{Sim, Stage};
use crate::stream::Item;

/// Handing one input to the task: it waits while there is no room.
pub(crate) type Handing = Pin<Box<dyn Future<Output = Result<(), JobGone>>>>;

/// What the wall clock shows when a run begins.
pub(crate) const WALL: Timestamp = Timestamp(1_800_000_000_000_000);

struct Task {
    handle: JobHandle,
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
}

pub(crate) struct Server {
    pub(crate) number: usize,
    pub(crate) up: bool,
    pub(crate) stopped: bool,
    /// Counts its processes.
    pub(crate) life: u32,
    /// When its process started.
    pub(crate) started: Ms,
    /// It dies as soon as it has begun to tell what it has saved.
    pub(crate) dies_telling: bool,
    task: Option<Task>,
    clock: Option<Clock>,
    connections: u64,
    /// What arrived while it was stopped.
    backlog: VecDeque<(StreamKey, Item)>,
}

impl Server {
    pub(crate) fn new(number: usize) -> Server {
        Server {
            number,
            up: false,
            stopped: false,
            life: 0,
            started: 0,
            dies_telling: false,
            task: None,
            clock: None,
            connections: 0,
            backlog: VecDeque::new(),
        }
    }

    pub(crate) fn acts(&self) -> bool {
        self.up && !self.stopped
    }

    /// The job's task, if it serves the job.
    pub(crate) fn handle(&self) -> Option<JobHandle> {
        self.task
            .as_ref()
            .filter(|task| self.acts() && !task.handle.is_gone())
            .map(|task| task.handle.clone())
    }
}

pub(crate) fn job_id() -> JobId {
    JobId::new("sim").expect("a plain name")
}

impl Sim {
    /// A coordinator's process starts and takes up what the store has.
    pub(crate) fn server_starts(&mut self, server: usize) {
        let extra = self.stage != Stage::Chaos && self.servers.iter().any(|server| server.up);
        if self.servers[server].up || extra {
            return;
        }
        if self.store.outage {
            return self.after(300, Happening::ServerStarts { server });
        }
        let chaos = self.stage == Stage::Chaos;
        let restart = self.servers[server].life > 0;
        let faults = self.options.faults.clone();
        if restart && chaos && self.servers.iter().all(|server| !server.up) {
            if self.rng.chance(faults.rollback) {
                self.store_rolls_back();
            }
            if self.options.mutant == Some(Mutant::ForgetsTheLast) {
                self.store_forgets_the_last();
            }
        }
        let skewed = restart && chaos && self.rng.chance(faults.skew);
        let skew = if skewed { self.rng.within((0, 4_000_000)) } else { 2_000_000 };
        let wall = Timestamp(WALL.0 + self.now * 1000 + skew);
        let now = self.now;
        let s = &mut self.servers[server];
        s.up = true;
        s.stopped = false;
        s.life += 1;
        s.started = now;
        s.dies_telling = false;
        s.clock = Some(Clock::at(wall));
        let life = s.life;
        // Whoever starts while another one is up has ended that one's lease.
        self.store.leader = Some((server, life));
        self.log(20, server as u64, |_| format!("c{server} starts, life {life}"));
        if self.store.saved().is_some() {
            self.open_job(server, None);
        }
    }

    /// Takes the job up as a server does: from the store, or anew with the bounds of whoever asks.
    fn open_job(&mut self, server: usize, spec: Option<Spec>) -> Option<JobHandle> {
        if let Some(handle) = self.servers[server].handle() {
            return Some(handle);
        }
        if self.store.outage {
            return None;
        }
        let life = self.servers[server].life;
        if self
            .store
            .leader
            .is_none_or(|(other, life)| !self.servers[other].up || self.servers[other].life != life)
        {
            self.store.leader = Some((server, life));
        }
        if !self.leads(server, life) {
            // It says who leads; a member tries that one next, as it does in any case.
            return None;
        }
        let known = match self.store.saved() {
            Some(saved) => {
                let decoded = reknit_proto::record::decode(&saved.value);
                let (record, secret) = decoded.expect("it was read when it was written");
                Known { record, secret: JobSecret::from_bytes(secret), revision: saved.revision }
            }
            None => {
                let history = HistoryId(self.rng.draw());
                let mut secret = [0; 32];
                secret
                    .chunks_exact_mut(8)
                    .for_each(|chunk| chunk.copy_from_slice(&self.rng.draw().to_le_bytes()));
                let record = JobRecord::new(job_id(), history, spec?.checked().ok()?);
                Known { record, secret: JobSecret::from_bytes(secret), revision: Revision::default() }
            }
        };
        let s = &mut self.servers[server];
        let limits =
            Limits { outbound: self.options.outbound, inbound: self.options.inbound, ..Limits::default() };
        let surroundings = Surroundings {
            clock: s.clock?,
            ..Surroundings::alone(self.store.end(server, s.life), self.options.timing, limits)
        };
        let (handle, future) = job_task(known, surroundings);
        s.task = Some(Task { handle: handle.clone(), future: Box::pin(future) });
        self.stirred = true;
        Some(handle)
    }

    /// Lets every job's task do what it can, and takes what comes of it.
    pub(crate) fn poll_servers(&mut self, context: &mut Context<'_>) {
        for server in &mut self.servers {
            if !server.acts() {
                continue;
            }
            if let Some(task) = &mut server.task
                && task.future.as_mut().poll(context).is_ready()
            {
                server.task = None;
            }
        }
        self.take_requests();
        self.pump_streams();
        self.hear_answers();
        for server in 0..self.servers.len() {
            if self.servers[server].dies_telling && self.servers[server].acts() {
                self.log(21, server as u64, |_| format!("c{server} dies while it tells what it saved"));
                self.server_crashes(server, true);
            }
        }
    }

    /// A coordinator's process dies. What it had sent may still arrive, up to some point.
    pub(crate) fn server_crashes(&mut self, server: usize, restarts: bool) {
        let s = &mut self.servers[server];
        if !s.up {
            return;
        }
        s.up = false;
        s.stopped = false;
        s.task = None;
        s.backlog.clear();
        s.dies_telling = false;
        self.log(22, server as u64, |_| format!("c{server} dies"));
        self.seen(&Seen::Forgot { server });
        let silently = self.stage == Stage::Chaos && self.rng.chance(150);
        let streams = self.open_streams.iter().copied().filter(|key| self.streams[*key].server == server);
        for stream in streams.collect::<Vec<StreamKey>>() {
            self.server_side_dies(stream, silently);
        }
        self.operator_hears_nothing(server);
        if restarts {
            let wait = if self.rng.chance(700) { (1, 400) } else { (400, 8_000) };
            self.within(wait, Happening::ServerStarts { server });
        }
    }

    pub(crate) fn server_stops(&mut self, server: usize, length: Ms) {
        let s = &mut self.servers[server];
        if s.acts() {
            s.stopped = true;
            let life = s.life;
            self.coverage.hit("the coordinator is stopped for a while");
            self.log(23, server as u64, |_| format!("c{server} is stopped for {length} ms"));
            self.after(length, Happening::ServerContinues { server, life });
        }
    }

    /// A coordinator stands still for so long that another one is started. Then it goes on, and for a while does not know
    /// that it is not wanted any more.
    pub(crate) fn server_is_succeeded(&mut self) {
        let acting: Vec<usize> =
            self.servers.iter().filter(|server| server.up).map(|server| server.number).collect();
        let [old] = acting[..] else { return };
        if self.servers[old].stopped {
            return;
        }
        let successor = (old + 1) % self.servers.len();
        self.coverage.hit("a coordinator is succeeded while it lives");
        let length = self.rng.within((100, 8_000));
        self.server_stops(old, length);
        let life = self.servers[old].life;
        let zombie = length + self.rng.within((1, 3_000));
        self.after(zombie, Happening::ServerRetires { server: old, life });
        self.within((0, length), Happening::ServerStarts { server: successor });
    }

    pub(crate) fn server_retires(&mut self, server: usize, life: u32) {
        let another = self.servers.iter().any(|other| other.number != server && other.up);
        if self.servers[server].life == life && self.stage == Stage::Chaos {
            self.server_crashes(server, !another);
        }
    }

    pub(crate) fn server_continues(&mut self, server: usize, life: u32) {
        let s = &mut self.servers[server];
        if !s.up || s.life != life || !s.stopped {
            return;
        }
        s.stopped = false;
        let backlog = std::mem::take(&mut s.backlog);
        self.log(24, server as u64, |_| format!("c{server} goes on"));
        for (stream, item) in backlog {
            self.server_hears(stream, item);
        }
        self.stirred = true;
    }

    /// Something arrived at a coordinator.
    pub(crate) fn server_hears(&mut self, stream: StreamKey, item: Item) {
        let (server, life) = (self.streams[stream].server, self.streams[stream].life);
        let s = &mut self.servers[server];
        if !s.up || s.life != life {
            return;
        }
        if s.stopped {
            return s.backlog.push_back((stream, item));
        }
        match item {
            Item::Message(bytes) => self.server_reads(stream, &bytes),
            Item::Ended => {
                self.streams[stream].up_ended = true;
                if let Some(connection) = self.streams[stream].connection {
                    let member = self.streams[stream].member;
                    self.hand_over(stream, Input::Detached { member, connection });
                }
            }
            Item::Accepted => {}
        }
    }

    fn server_reads(&mut self, stream: StreamKey, bytes: &[u8]) {
        let wire: v1::MemberMessage = prost::Message::decode(bytes).expect("a member sends what can be read");
        let s = &self.streams[stream];
        if s.up_ended {
            return;
        }
        match s.connection {
            None => self.introduced(stream, wire),
            Some(connection) => {
                let server = &self.servers[s.server];
                let now = server.clock.map(|clock| clock.now()).unwrap_or_default();
                let event = rendezvous::event(s.member, wire, now).expect("a member sends what makes sense");
                self.hand_over(stream, Input::Said { connection, event });
            }
        }
    }

    fn introduced(&mut self, stream: StreamKey, wire: v1::MemberMessage) {
        let introduction = rendezvous::introduction(wire).expect("a member introduces itself properly");
        let server = self.streams[stream].server;
        let Some(_) = self.open_job(server, Some(introduction.join.spec)) else {
            return self.server_ends(stream);
        };
        let (sender, receiver) = mpsc::channel(self.options.outbound);
        let s = &mut self.servers[server];
        s.connections += 1;
        let connection = ConnectionId(s.connections);
        let st = &mut self.streams[stream];
        st.connection = Some(connection);
        st.outbound = Some(receiver);
        let (member, join) = (introduction.member, introduction.join);
        self.hand_over(stream, Input::Attach { member, join, outbound: Outbound { connection, sender } });
        self.send(stream, Way::Down, Item::Accepted);
    }

    /// Hands an input to the job's task, after those of the same stream that wait for room.
    fn hand_over(&mut self, stream: StreamKey, input: Input) {
        self.streams[stream].inputs.push_back(input);
        self.pump_inputs(stream);
    }

    pub(crate) fn pump_inputs(&mut self, stream: StreamKey) {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            if self.streams[stream].handing.is_none() {
                let server = self.streams[stream].server;
                let Some(input) = self.streams[stream].inputs.pop_front() else { return };
                let Some(handle) = self.servers[server].task.as_ref().map(|task| task.handle.clone()) else {
                    // The task has ended: who attends it is sent away, who speaks is not heard.
                    self.streams[stream].inputs.clear();
                    return self.server_ends(stream);
                };
                self.streams[stream].handing = Some(Box::pin(async move { handle.send(input).await }));
            }
            let Some(handing) = &mut self.streams[stream].handing else { return };
            match handing.as_mut().poll(&mut context) {
                Poll::Ready(handed) => {
                    self.streams[stream].handing = None;
                    self.stirred = true;
                    if handed.is_err() {
                        self.streams[stream].inputs.clear();
                        return self.server_ends(stream);
                    }
                }
                Poll::Pending => {
                    self.coverage.hit("the task's inbox is full");
                    return;
                }
            }
        }
    }
}
