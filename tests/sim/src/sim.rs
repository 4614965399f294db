//! One simulated world: everything that is in it, and what drives it through virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::task::{Context, Poll};

use tokio::time::{Duration, Instant, sleep_until};

use crate::collective::{Call, CallKey};
use crate::coverage::Coverage;
use crate::disk::Disk;
use crate::faults::Cut;
use crate::happening::{Happening, ProcessKey, StreamKey, Way};
use crate::invariants::{Invariant, Seen};
use crate::operator::Operator;
use crate::options::Options;
use crate::process::{Life, Process};
use crate::queue::{Ms, Queue};
use crate::rng::{Rng, fold};
use crate::server::Server;
use crate::store::StoreSide;
use crate::stream::Stream;
use crate::trace::Trace;
use crate::truth::Truth;

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Faults strike.
    Chaos,
    /// Nothing fails any more, and all must become well.
    Heal,
    /// All is well, and what must not disturb it is tried.
    Calm,
    /// The job goes on to its last step.
    Finish,
}

/// A rule that did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
    /// When.
    pub at: Ms,
}

pub(crate) struct Sim {
    pub(crate) options: Options,
    pub(crate) rng: Rng,
    pub(crate) began: Instant,
    pub(crate) now: Ms,
    pub(crate) queue: Queue,
    pub(crate) stage: Stage,
    pub(crate) servers: Vec<Server>,
    /// Whether a job's task may have something to do.
    pub(crate) stirred: bool,
    pub(crate) store: StoreSide,
    pub(crate) streams: Vec<Stream>,
    /// Streams that still have something to do on the coordinator's side.
    pub(crate) open_streams: BTreeSet<StreamKey>,
    pub(crate) processes: Vec<Process>,
    /// The process of each machine.
    pub(crate) on_host: Vec<Option<ProcessKey>>,
    /// Whether machines without a process stay so for now.
    pub(crate) hold_starts: bool,
    /// When faults ended.
    pub(crate) healed_at: Ms,
    /// Who listens where.
    pub(crate) listeners: BTreeMap<String, ProcessKey>,
    pub(crate) calls: BTreeMap<CallKey, Call>,
    pub(crate) disk: Disk,
    pub(crate) cuts: BTreeMap<u64, Cut>,
    pub(crate) operator: Operator,
    pub(crate) truth: Truth,
    /// Whether a bit of anybody's memory has flipped: then states differ that should not.
    pub(crate) has_flipped: bool,
    /// Whether a store that was put back has given a generation's number to another world, before anybody could tell it
    /// that it was taken: then two states go by one name.
    pub(crate) has_forked: bool,
    pub(crate) invariants: Vec<Box<dyn Invariant>>,
    pub(crate) coverage: Coverage,
    pub(crate) trace: Trace,
    pub(crate) violation: Option<Violation>,
}

impl Sim {
    /// A world at its first instant. Must be made inside a tokio runtime whose time is paused.
    pub(crate) fn new(options: Options, keep_trace: bool) -> Sim {
        let rng = Rng::new(options.seed ^ 0xA5A5_5A5A);
        let servers = (0..options.servers).map(Server::new).collect();
        let on_host = vec![None; options.hosts];
        Sim {
            rng,
            began: Instant::now(),
            now: 0,
            queue: Queue::default(),
            stage: Stage::Chaos,
            servers,
            stirred: false,
            store: StoreSide::default(),
            streams: Vec::new(),
            open_streams: BTreeSet::new(),
            processes: Vec::new(),
            on_host,
            hold_starts: false,
            healed_at: 0,
            listeners: BTreeMap::new(),
            calls: BTreeMap::new(),
            disk: Disk::default(),
            cuts: BTreeMap::new(),
            operator: Operator::default(),
            truth: Truth::default(),
            has_flipped: false,
            has_forked: false,
            invariants: crate::invariants::all(),
            coverage: Coverage::default(),
            trace: Trace::new(keep_trace),
            violation: None,
            options,
        }
    }

    /// Has `what` happen `wait` from now.
    pub(crate) fn after(&mut self, wait: Ms, what: Happening) {
        let tie = self.rng.draw();
        self.queue.put(self.now + wait, tie, what);
    }

    /// Has `what` happen after a wait within bounds.
    pub(crate) fn within(&mut self, bounds: (Ms, Ms), what: Happening) {
        let wait = self.rng.within(bounds);
        self.after(wait, what);
    }

    /// Lets time pass until `until`, or until a rule is broken or `done` says so.
    pub(crate) async fn run_until(&mut self, until: Ms, done: impl Fn(&Sim) -> bool) {
        loop {
            self.settle().await;
            if self.violation.is_some() || self.now >= until || done(self) {
                return;
            }
            let next = self.queue.next_at().map_or(until, |at| at.min(until));
            self.sleep_or_stir(next).await;
            self.now = self.began.elapsed().as_millis() as Ms;
        }
    }

    /// Does all that is due at this instant.
    async fn settle(&mut self) {
        loop {
            if self.violation.is_some() {
                return;
            }
            if std::mem::take(&mut self.stirred) {
                poll_fn(|context| {
                    self.poll_servers(context);
                    Poll::Ready(())
                })
                .await;
                continue;
            }
            match self.queue.take_due(self.now) {
                Some(happening) => self.happens(happening),
                None => return,
            }
        }
    }

    /// Waits until `next`, or until a job's task has done something that makes something else happen sooner.
    async fn sleep_or_stir(&mut self, next: Ms) {
        let sleep = sleep_until(self.began + Duration::from_millis(next));
        let mut sleep = std::pin::pin!(sleep);
        poll_fn(|context: &mut Context<'_>| {
            // The simulation's own clock comes first, so that what is due at one instant is due for everybody.
            if sleep.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            self.now = self.began.elapsed().as_millis() as Ms;
            self.poll_servers(context);
            let sooner = self.queue.next_at().is_some_and(|at| at < next);
            if sooner || self.stirred || self.violation.is_some() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn happens(&mut self, happening: Happening) {
        if let Some(process) = happening.process() {
            match self.processes[process].life {
                Life::Runs => {}
                Life::Stopped => return self.processes[process].deferred.push(happening),
                Life::Gone { .. } if matches!(happening, Happening::LinkCloses { .. }) => {}
                Life::Gone { .. } => return,
            }
        }
        match happening {
            Happening::ServerStarts { server } => self.server_starts(server),
            Happening::ServerContinues { server, life } => self.server_continues(server, life),
            Happening::ServerRetires { server, life } => self.server_retires(server, life),
            Happening::StoreWrites { request } => self.store_writes(request),
            Happening::StoreAnswers { request } => self.store_answers(request),
            Happening::Arrives { stream, way: Way::Up } => self.arrives_up(stream),
            Happening::Arrives { stream, way: Way::Down } => self.arrives_down(stream),
            Happening::KeepaliveEnds { stream, side } => self.keepalive_ends(stream, side),
            Happening::Connects { process, attempt } => self.connects(process, attempt),
            Happening::ConnectTimesOut { process, stream } => self.connect_times_out(process, stream),
            Happening::Renews { process, stream } => self.renews(process, stream),
            Happening::ProgramGoesOn { process, turn } => self.program_goes_on(process, turn),
            Happening::Dials { process, generation } => self.dials(process, generation),
            Happening::RingStands { process, generation } => self.ring_stands(process, generation),
            Happening::NeighbourLost { process, generation, neighbour } => {
                self.neighbour_lost(process, generation, neighbour);
            }
            Happening::LossIsSeen { process, generation, neighbour } => {
                self.loss_is_seen(process, generation, neighbour);
            }
            Happening::DoorCloses { process, generation } => self.processes[process].close_door(generation),
            Happening::CollectiveResumes { process, call } => {
                self.try_complete(process, call);
            }
            Happening::CollectiveEnds { process, call } => {
                self.collective_ends(process, call);
            }
            Happening::FetchGoesOn { process, turn, source } => self.fetch_goes_on(process, turn, source),
            Happening::LoadEnds { process, turn } => self.load_ends(process, turn),
            Happening::PartEnds { process, key } => self.part_ends(process, key),
            Happening::ManifestEnds { process, key } => self.manifest_ends(process, key),
            Happening::Continues { process } => self.continues(process),
            Happening::Starts { host } => self.starts(host),
            Happening::Takes { process } => self.is_taken(process),
            Happening::LinkCloses { process } => self.link_closes(process),
            Happening::Strikes { fault } => self.strikes(fault),
            Happening::CutHeals { number } => self.cut_heals(number),
            Happening::StoreReturns => self.store_returns(),
            Happening::AsksAgain { number } => self.asks_again(number),
            Happening::Looks => self.looks(),
        }
    }

    /// Whether states may differ that go by one name.
    pub(crate) fn is_tainted(&self) -> bool {
        self.has_flipped || self.has_forked
    }

    /// Shows all invariants what was seen.
    pub(crate) fn seen(&mut self, seen: &Seen<'_>) {
        if self.violation.is_some() {
            return;
        }
        let mut invariants = std::mem::take(&mut self.invariants);
        for invariant in &mut invariants {
            if let Err(what) = invariant.see(seen, self) {
                self.violated(invariant.name(), what);
                break;
            }
        }
        self.invariants = invariants;
    }

    /// A rule does not hold: the run ends here.
    pub(crate) fn violated(&mut self, invariant: &'static str, what: String) {
        let violation = Violation { invariant, what, at: self.now };
        self.log(u64::MAX, 0, |_| format!("VIOLATION of {}: {}", violation.invariant, violation.what));
        self.violation.get_or_insert(violation);
    }

    /// A line in the trace; `kind` and `about` go into the run's fingerprint, whether or not the trace is kept.
    pub(crate) fn log(&mut self, kind: u64, about: u64, text: impl FnOnce(&Sim) -> String) {
        self.trace.digest = fold(&[self.trace.digest, self.now, kind, about]);
        if self.trace.keep {
            let text = text(self);
            self.trace.lines.push(format!("{:>9} {text}", self.now));
        }
    }

    /// A process by its name and number, for the trace.
    pub(crate) fn who(&self, process: ProcessKey) -> String {
        let p = &self.processes[process];
        format!("{}#{process}", p.name)
    }

    /// The processes that are there, with their keys.
    pub(crate) fn present(&self) -> impl Iterator<Item = (ProcessKey, &Process)> {
        self.processes.iter().enumerate().filter(|(_, p)| p.is_there())
    }

    /// The process that is `member` at present.
    pub(crate) fn by_member(&self, member: reknit_membership::MemberId) -> Option<ProcessKey> {
        self.present().find(|(_, p)| p.member() == member).map(|(key, _)| key)
    }
}
