//! Processes start, stop, die and leave; something starts them again.

use std::collections::BTreeMap;

use reknit_membership::reason::Refusal;
use reknit_membership::record::Stage as RecordStage;
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{Digest, Generation, MemberId, MemberName};
use reknit_trainer::session::{End, Identity, Session};

use crate::disk::state_digest;
use crate::happening::{Happening, ProcessKey};
use crate::invariants::Seen;
use crate::process::{Content, Held, Life, Link, Process, Program, Saver};
use crate::rng::fold;
use crate::sim::{Sim, Stage};
use crate::truth::Node;

/// How long a process that leaves waits for its last words to be heard.
const FAREWELL: (u64, u64) = (5, 1_000);

impl Sim {
    /// A machine gets a process, unless it has one.
    pub(crate) fn starts(&mut self, host: usize) {
        if self.is_job_over() {
            return;
        }
        if let Some(process) = self.on_host[host].filter(|process| self.processes[*process].is_there()) {
            if self.processes[process].session.end().is_some() {
                // It is about to go.
                self.after(200, Happening::Starts { host });
            }
            return;
        }
        if self.hold_starts {
            return self.after(50, Happening::Starts { host });
        }
        let process = self.processes.len();
        let renamed =
            self.stage == Stage::Chaos && self.rng.chance(self.options.faults.new_name) && process > 0;
        let name = if renamed { format!("w{host}-{process}") } else { format!("w{host}") };
        let name = MemberName::new(&name).expect("a plain name");
        let port = if self.options.fixed_ports { 7000 } else { 7000 + process };
        let address = format!("h{host}:{port}");
        let identity = Identity {
            name: name.clone(),
            slots: self.options.slots[host],
            address: address.clone(),
            spec: self.options.spec,
            shape: SHAPE,
        };
        let mut ids = self.rng.fork();
        let session = Session::new(identity, Box::new(move || MemberId(ids.draw())));
        let ids = vec![session.member()];
        let content = self.initial(host);
        let p = Process {
            host,
            name,
            address: address.clone(),
            life: Life::Runs,
            session,
            link: Link::Pauses,
            attempts: 0,
            connect_turn: 0,
            rng: self.rng.fork(),
            program: Program::Looks,
            turn: 0,
            due: None,
            held: Held::Fresh(state_digest(&content)),
            content,
            running: None,
            new_group: None,
            group: None,
            ring: None,
            in_call: None,
            doors: BTreeMap::new(),
            serving: None,
            doors_over: None,
            rest: 0,
            saver: Saver::default(),
            finishing: None,
            last_saved_in: None,
            deferred: Vec::new(),
            noticed: false,
            last_go: None,
            ids,
            commits: 0,
        };
        self.processes.push(p);
        self.on_host[host] = Some(process);
        self.listeners.insert(address, process);
        self.log(100, process as u64, |sim| {
            format!("{} starts on h{host} as {:?}", sim.who(process), sim.processes[process].member())
        });
        let attempt = self.processes[process].connect_turn;
        self.within((0, 50), Happening::Connects { process, attempt });
        // A program may do a lot before it asks for a world.
        let straggles = self.rng.chance(self.options.faults.straggle) && self.stage == Stage::Chaos;
        self.turn_within(process, (0, if straggles { 5_000 } else { 50 }));
    }

    /// What the program of a machine starts with.
    fn initial(&mut self, host: usize) -> Content {
        let hash = if self.options.strangers { fold(&[77, host as u64]) } else { 77 };
        self.truth.note(hash, Node { parent: None, step: 0, world: Generation(0), sampled: true });
        Content { hash, step: 0, flipped: false }
    }

    /// Whether the store says that the job is over: nobody is started for it any more.
    pub(crate) fn is_job_over(&self) -> bool {
        self.store.record().is_some_and(|record| matches!(record.stage, RecordStage::Closed(_)))
    }

    /// A process is killed, or its whole machine is gone.
    pub(crate) fn dies(&mut self, process: ProcessKey, silently: bool) {
        if !self.processes[process].is_there() {
            return;
        }
        self.log(101, process as u64, |sim| {
            let how = if silently { "is gone without a word" } else { "is killed" };
            format!("{} {how}", sim.who(process))
        });
        self.ends_as(process, Life::Gone { silently });
        let bounds = self.restart_bounds();
        let host = self.processes[process].host;
        self.within(bounds, Happening::Starts { host });
    }

    fn restart_bounds(&self) -> (u64, u64) {
        match self.stage {
            Stage::Chaos => self.options.restart_ms,
            Stage::Heal | Stage::Calm | Stage::Finish => (10, 200),
        }
    }

    fn ends_as(&mut self, process: ProcessKey, life: Life) {
        let p = &mut self.processes[process];
        p.life = life;
        p.deferred.clear();
        let silently = life == Life::Gone { silently: true };
        let (link, generation) = (p.link, p.ring.as_ref().map(|ring| ring.generation()));
        p.link = Link::Over;
        if let Link::Up(stream) | Link::Calls(stream) | Link::Parts(stream) = link {
            self.member_side_ends(stream, life);
        }
        if let Some(generation) = generation
            && !silently
        {
            self.shuts_down(process, generation);
        }
        self.program_waits(process, Program::Over);
    }

    /// A process is stopped for a while: its kernel goes on, its threads do not.
    pub(crate) fn stops(&mut self, process: ProcessKey, length: u64) {
        let p = &mut self.processes[process];
        if p.life == Life::Runs {
            p.life = Life::Stopped;
            self.coverage.hit("a member is stopped for a while");
            self.log(102, process as u64, |sim| format!("{} is stopped for {length} ms", sim.who(process)));
            self.after(length, Happening::Continues { process });
        }
    }

    pub(crate) fn continues(&mut self, process: ProcessKey) {
        let p = &mut self.processes[process];
        if p.life != Life::Stopped {
            return;
        }
        p.life = Life::Runs;
        let deferred = std::mem::take(&mut p.deferred);
        let in_call = p.in_call;
        self.log(103, process as u64, |sim| format!("{} goes on", sim.who(process)));
        // In the order in which it was put off.
        for (tie, happening) in deferred.into_iter().enumerate() {
            self.queue.put(self.now, tie as u64, happening);
        }
        if let Some(call) = in_call {
            self.after(0, Happening::CollectiveResumes { process, call });
        }
    }

    /// The program drops its trainer in the middle of everything.
    pub(crate) fn leaves(&mut self, process: ProcessKey) {
        if !self.processes[process].runs() {
            return;
        }
        self.log(104, process as u64, |sim| format!("{} leaves", sim.who(process)));
        self.coverage.hit("a program leaves");
        self.bring(process, Session::leave);
        self.program_waits(process, Program::Over);
        self.process_ends(process);
    }

    /// The session may have ended just now.
    pub(crate) fn is_it_over(&mut self, process: ProcessKey) {
        if self.processes[process].session.end().is_some() {
            self.wakes(process);
        }
    }

    /// The program is done: its last words are said, and then the process is gone.
    pub(crate) fn process_ends(&mut self, process: ProcessKey) {
        let Some(end) = self.processes[process].session.end().cloned() else { return };
        self.log(105, process as u64, |sim| format!("{} ends: {end:?}", sim.who(process)));
        self.seen(&Seen::Ended { process, end: &end });
        let p = &mut self.processes[process];
        if let Link::Up(stream) | Link::Calls(stream) = p.link {
            p.link = Link::Parts(stream);
            self.send(stream, crate::happening::Way::Up, crate::stream::Item::Ended);
        }
        self.within(FAREWELL, Happening::LinkCloses { process });
        let again = match &end {
            End::Closed(_) | End::Refused(Refusal::JobClosed(_)) => false,
            End::Refused(_)
            | End::Released
            | End::Left
            | End::Rejected { .. }
            | End::MachineFailed { .. } => true,
        };
        if again {
            let bounds = self.restart_bounds();
            let host = self.processes[process].host;
            let wait = self.rng.within(bounds) + FAREWELL.1;
            self.after(wait, Happening::Starts { host });
        }
    }

    pub(crate) fn link_closes(&mut self, process: ProcessKey) {
        let p = &mut self.processes[process];
        if !p.is_there() {
            return;
        }
        let generation = p.ring.as_ref().map(|ring| ring.generation());
        p.link = Link::Over;
        p.life = Life::Gone { silently: false };
        if let Some(generation) = generation {
            self.shuts_down(process, generation);
        }
    }

    /// The cloud takes a machine at the deadline it gave.
    pub(crate) fn is_taken(&mut self, process: ProcessKey) {
        if self.processes[process].is_there() && self.stage == Stage::Chaos {
            self.coverage.hit("the cloud takes a machine that has not left in time");
            let silently = self.rng.chance(500);
            self.dies(process, silently);
        }
    }
}

/// What all members have in common.
const SHAPE: Shape =
    Shape { tensors: Digest(1), count: 1, bytes: 1, recipe: Digest(1), sharding: Sharding::Replicated };
