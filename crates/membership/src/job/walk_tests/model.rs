//! The world around one job: its store, its workers, their streams and their ring, and all that can happen next.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::choices::{Action, Budget, Crash, Fault, Setting};
use super::process::{Halt, Held, Node, Planned, Process};
use super::rules;
use crate::event::{Effect, Event, Join, Message, Operation, Request};
use crate::ids::{Digest, Generation, HistoryId, JobId, MemberId, MemberName, Step, Timestamp};
use crate::job::Job;
use crate::record::{JobRecord, Stage};
use crate::spec::{Shape, Sharding, Timing};

/// One state of the job's state: which step it is, computed by which world, from which other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Truth {
    pub(super) parent: Option<Node>,
    pub(super) step: Step,
    pub(super) world: Generation,
}

/// A checkpoint as it truly is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Written {
    pub(super) state: Node,
    /// The members of the world that makes it, and whether each has said that its part is written.
    pub(super) parts: BTreeMap<MemberId, bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Model {
    pub(super) job: Job,
    pub(super) saved: Rc<JobRecord>,
    /// A backup of the store.
    pub(super) kept: Rc<JobRecord>,
    pub(super) processes: Vec<Process>,
    pub(super) truth: Vec<Truth>,
    /// The state from which the last world that ran has run.
    pub(super) base: Option<Node>,
    pub(super) written: BTreeMap<(Generation, Step), Written>,
    pub(super) budget: Budget,
}

pub(super) const UNIT: Duration = Duration::from_secs(1);
/// What every canonical state's clock shows.
pub(super) const EPOCH: Timestamp = Timestamp(1_000_000_000);

pub(super) fn timing() -> Timing {
    Timing {
        silence: UNIT * 4,
        settle: UNIT,
        reattach: UNIT * 2,
        takeover: UNIT * 4,
        last_call: UNIT,
        merge_quiet: UNIT,
        merge_max: UNIT * 2,
        establish: UNIT * 6,
        restore: UNIT * 10,
        busy: UNIT * 14,
        retry: UNIT * 5,
    }
    .checked()
    .expect("the times are in order")
}

pub(super) fn name(place: usize) -> MemberName {
    MemberName::new(&format!("w{place}")).expect("a plain name")
}

fn id(place: usize, incarnation: u8) -> MemberId {
    MemberId(place as u64 * 16 + u64::from(incarnation))
}

const SHAPE: Shape =
    Shape { tensors: Digest(1), count: 1, bytes: 1, recipe: Digest(1), sharding: Sharding::Replicated };

type Broke = String;

impl Model {
    pub(super) fn new(setting: &Setting) -> Model {
        let job_id = JobId::new("walk").expect("a plain name");
        let record = JobRecord::new(job_id, HistoryId(7), setting.spec);
        let roots = if setting.strangers { setting.places } else { 1 };
        let root = Truth { parent: None, step: Step(0), world: Generation(0) };
        let process = |place: usize| Process {
            id: id(place, 0),
            incarnations: 1,
            alive: place < setting.started,
            hung: false,
            over: false,
            came_back: false,
            stream: false,
            ghost: None,
            lags: false,
            inbox: std::collections::VecDeque::new(),
            history: None,
            available: !setting.late,
            available_due: false,
            world: None,
            held: if place < setting.started { Held::Fresh(place % roots) } else { Held::Torn },
            notice: None,
            saves: Vec::new(),
        };
        Model {
            job: Job::restore(record.clone(), timing(), 16, EPOCH),
            saved: Rc::new(record.clone()),
            kept: Rc::new(record),
            processes: (0..setting.places).map(process).collect(),
            truth: vec![root; roots],
            base: None,
            written: BTreeMap::new(),
            budget: setting.budget,
        }
    }

    pub(super) fn by_id(&self, id: MemberId) -> Option<usize> {
        self.processes.iter().position(|p| p.id == id && p.alive)
    }

    pub(super) fn step_of(&self, p: &Process) -> Option<Step> {
        p.held.node().map(|node| self.truth[node].step)
    }

    /// What the world is after `action`, and with it maybe the coordinator's death. `None` if that death makes no
    /// difference here.
    pub(super) fn after(
        &self,
        action: Action,
        crash: Crash,
        setting: &Setting,
    ) -> Result<Option<Model>, Broke> {
        let mut next = self.clone();
        let event = next.act(action, setting);
        match event {
            None if crash == Crash::None => {}
            None => return Ok(None),
            Some(event) => {
                if !next.feed(event, crash, setting)? {
                    return Ok(None);
                }
            }
        }
        rules::check_processes(&next)?;
        next.canonicalise();
        Ok(Some(next))
    }

    fn act(&mut self, action: Action, setting: &Setting) -> Option<Event> {
        match action {
            Action::Start(place) => self.start(place, setting),
            Action::Attach(place) => return Some(self.attach(place, setting)),
            Action::Deliver(place) => self.deliver(place),
            Action::Say(place) => return self.say(place),
            Action::Ask(place) => {
                let p = &mut self.processes[place];
                p.available = true;
                // Said before it is let in, it is lost.
                p.available_due = p.stream;
            }
            Action::StreamEnds(place) => {
                self.budget.blips -= u8::from(self.processes[place].alive && self.budget.blips > 0);
                self.processes[place].stream = false;
                return Some(Event::Detached { member: self.processes[place].id });
            }
            Action::GhostEnds(place) => {
                return self.processes[place].ghost.take().map(|member| Event::Detached { member });
            }
            Action::Notice(place) => {
                self.budget.notices -= 1;
                let p = &mut self.processes[place];
                p.notice = Some(EPOCH.after(UNIT * 8));
                return Some(Event::Notice { member: p.id, deadline: EPOCH.after(UNIT * 8) });
            }
            Action::Begin(place) => {
                let p = &mut self.processes[place];
                p.held = Held::Torn;
                let planned = p.world.as_mut().and_then(|world| world.plan.as_mut());
                planned.into_iter().for_each(|planned| planned.begun = true);
            }
            Action::Restore(place) => self.restore(place),
            Action::RestoreFails(place, fault) => {
                self.budget.fails -= 1;
                self.restore_fails(place, fault);
            }
            Action::Commit(place) => return self.commit(place, setting),
            Action::Stop(generation) => {
                for place in self.even_ring(generation).unwrap_or_default() {
                    self.halt(place, Halt::Boundary { due: true });
                }
            }
            Action::Save(generation) => self.save(generation),
            Action::SeesBreak(place) => {
                let suspects = self.sees_break(&self.processes[place])?;
                self.halt(place, Halt::Broken { suspects, due: true });
                // It says so at once if it can.
                return self.processes[place].stream.then(|| self.say(place)).flatten();
            }
            Action::LinkBreaks(place) => {
                self.budget.links -= 1;
                let world = self.processes[place].world.clone()?;
                let next = self.by_id(world.next.0)?;
                self.halt(place, Halt::Broken { suspects: vec![world.next.1], due: true });
                self.halt(next, Halt::Broken { suspects: vec![world.rank], due: true });
            }
            Action::Die(place) => {
                self.budget.deaths -= 1;
                self.processes[place].dies();
            }
            Action::Leave(place) => {
                self.budget.leaves -= 1;
                let p = &mut self.processes[place];
                p.ends();
                return Some(Event::Leave { member: p.id });
            }
            Action::Hang(place) => {
                self.budget.hangs -= 1;
                self.processes[place].hung = true;
            }
            Action::Lag(place) => {
                self.budget.lags -= 1;
                self.processes[place].lags = true;
            }
            Action::Wake(place) => self.processes[place].hung = false,
            Action::Drain(place) => {
                self.budget.drains -= 1;
                return Some(operate(Operation::Drain { name: name(place) }));
            }
            Action::Undrain(place) => {
                self.budget.undrains -= 1;
                return Some(operate(Operation::Undrain { name: name(place) }));
            }
            Action::Evict(place) => {
                self.budget.evictions -= 1;
                return Some(operate(Operation::Evict { name: name(place) }));
            }
            Action::Resize => {
                self.budget.resizes -= 1;
                let (min, max) = setting.resize_to;
                return Some(operate(Operation::Resize { min, max }));
            }
            Action::BackUp => {
                self.budget.backups -= 1;
                self.kept = self.saved.clone();
            }
            Action::PutBack => {
                self.budget.rollbacks -= 1;
                self.saved = self.kept.clone();
                self.restart(self.job.now);
            }
            Action::Advance => {
                self.budget.hurries -= u8::from(!self.is_quiet() && self.budget.hurries > 0);
                return Some(Event::Tick);
            }
        }
        None
    }

    fn start(&mut self, place: usize, setting: &Setting) {
        self.budget.starts -= 1;
        let roots = if setting.strangers { setting.places } else { 1 };
        let p = &mut self.processes[place];
        p.ghost = p.stream.then_some(p.id);
        p.id = id(place, p.incarnations);
        p.incarnations += 1;
        p.alive = true;
        p.stream = false;
        p.came_back = false;
        p.history = None;
        p.available = !setting.late;
        p.held = Held::Fresh(place % roots);
    }

    fn attach(&mut self, place: usize, setting: &Setting) -> Event {
        let p = &mut self.processes[place];
        p.attached();
        let join = Join {
            name: name(place),
            slots: if setting.wide && place == 0 { 2 } else { 1 },
            address: format!("h{place}:1"),
            spec: setting.spec,
            shape: SHAPE,
            history: p.history,
            generation: p.generation(),
            running: p.world.as_ref().is_some_and(|world| world.go),
            available: p.available,
        };
        // Only who asks later, or might have, says so once more.
        p.available_due &= setting.late;
        Event::Attach { member: p.id, join }
    }

    fn deliver(&mut self, place: usize) {
        let p = &mut self.processes[place];
        let new_id = id(place, p.incarnations);
        if let Some(message) = p.inbox.pop_front() {
            p.told(message, new_id);
        }
        p.lags &= !p.inbox.is_empty();
    }

    fn say(&mut self, place: usize) -> Option<Event> {
        let event = self.processes[place].says()?;
        if let Event::ShardWritten { member, generation, step, .. } = &event
            && let Some(written) = self.written.get_mut(&(*generation, *step))
        {
            written.parts.insert(*member, true);
        }
        Some(event)
    }

    pub(super) fn halt(&mut self, place: usize, halt: Halt) {
        if let Some(world) = &mut self.processes[place].world {
            world.halt = Some(halt);
        }
    }

    /// Carries out a plan as an honest worker does: from whoever truly serves.
    fn restore(&mut self, place: usize) {
        let Some(Planned { plan, .. }) = self.processes[place].planned().cloned() else { return };
        let from_disk =
            plan.load.as_ref().and_then(|load| self.written.get(&load.commit.key())).map(|w| w.state);
        let sources = plan.fetch.iter().flat_map(|fetch| &fetch.from);
        let serving = sources.filter_map(|peer| {
            let p = &self.processes[self.by_id(peer.member)?];
            p.held.node().filter(|_| p.acts() && p.held.serves(plan.resume))
        });
        match from_disk.or(serving.min()) {
            Some(node) => {
                let (generation, attempt, resume) = (plan.generation, plan.attempt, plan.resume);
                let member = self.processes[place].id;
                self.processes[place].held = Held::At(resume, node);
                self.answer(
                    place,
                    Event::Restored { member, generation, attempt, resume, moved: Vec::new() },
                );
            }
            None => self.restore_fails(place, Fault::Source),
        }
    }

    fn restore_fails(&mut self, place: usize, fault: Fault) {
        let Some(Planned { plan, .. }) = self.processes[place].planned().cloned() else { return };
        let source = plan.fetch.first().and_then(|fetch| fetch.from.first()).map(|peer| peer.member);
        let culprit = if fault == Fault::Source { source } else { None };
        let member = self.processes[place].id;
        let (generation, attempt) = (plan.generation, plan.attempt);
        self.answer(place, Event::RestoreFailed { member, generation, attempt, culprit });
    }

    fn answer(&mut self, place: usize, event: Event) {
        let planned = self.processes[place].world.as_mut().and_then(|world| world.plan.as_mut());
        if let Some(planned) = planned {
            planned.answer = Some(event);
            planned.answer_due = true;
        }
    }

    /// Gives the coordinator an event. False if its death would make no difference to what happens without.
    fn feed(&mut self, event: Event, crash: Crash, setting: &Setting) -> Result<bool, Broke> {
        if crash != Crash::None {
            self.budget.crashes -= 1;
        }
        let mut now = self.job.now;
        if event == Event::Tick {
            now = self.job.next_deadline().unwrap_or(now).max(now);
            self.renew_all(now);
        }
        let before = self.clone();
        let transition = self.job.step(now, event.clone());
        rules::check_transition(&before, &event, &transition, &self.job, setting)?;
        let new = transition.save.is_some();
        match crash {
            Crash::AfterSave if !new => return Ok(false),
            Crash::BeforeSave => {}
            Crash::None | Crash::AfterSave => {
                if let Some(record) = transition.save {
                    self.persist(record);
                }
            }
        }
        if crash != Crash::None {
            self.restart(now);
            return Ok(true);
        }
        if new {
            self.job.published(now);
        }
        for effect in transition.then {
            if let Effect::Tell { member, message } = effect {
                self.tell(member, message);
            }
        }
        Ok(true)
    }

    fn persist(&mut self, record: JobRecord) {
        let key = |record: &JobRecord| (record.stage == Stage::Running).then_some(record.generation);
        let goes = key(&record).is_some() && key(&record) != key(&self.saved);
        self.saved = Rc::new(record);
        if goes {
            let members = self.saved.world.iter().flat_map(|world| &world.seats).map(|seat| seat.member);
            let ran = members.filter_map(|m| self.processes[self.by_id(m)?].held.node()).next();
            self.base = ran.or(self.base);
        }
    }

    fn tell(&mut self, member: MemberId, message: Message) {
        for (place, p) in self.processes.iter_mut().enumerate() {
            if p.ghost == Some(member) && message.is_last() {
                p.ghost = None;
            }
            if p.id != member || !p.stream {
                continue;
            }
            p.stream = !message.is_last();
            if p.alive {
                p.inbox.push_back(message.clone());
            }
            let new_id = id(place, p.incarnations);
            // What a process that hangs is told makes no difference before it wakes: then all of it is there at once.
            if p.alive && !p.lags {
                p.takes_in(new_id);
            }
        }
    }

    /// Whoever lives and has a stream has renewed its lease meanwhile.
    fn renew_all(&mut self, now: Timestamp) {
        for p in &self.processes {
            if p.acts() && p.stream {
                let event = Event::Renew { member: p.id, generation: p.generation(), step: Step(0) };
                let _ = self.job.step(now, event);
            }
        }
    }

    /// The coordinator dies, and another one takes over.
    fn restart(&mut self, now: Timestamp) {
        self.job = Job::restore((*self.saved).clone(), timing(), 16, now);
        for p in &mut self.processes {
            p.stream = false;
            p.ghost = None;
        }
    }

    fn canonicalise(&mut self) {
        let shift = self.job.now;
        let speakers: Vec<MemberId> =
            self.processes.iter().flat_map(|p| [Some(p.id), p.ghost]).flatten().collect();
        super::canonical::job(&mut self.job, &speakers);
        for p in &mut self.processes {
            p.notice = p.notice.map(|at| super::canonical::future(at, shift));
        }
        super::canonical::record(Rc::make_mut(&mut self.saved), shift, &speakers);
        if self.budget.rollbacks > 0 {
            super::canonical::record(Rc::make_mut(&mut self.kept), shift, &[]);
        } else {
            self.kept = self.saved.clone();
        }
        super::canonical::truth(self);
    }
}

fn operate(operation: Operation) -> Event {
    Event::Operate { request: Request(1), operation }
}
