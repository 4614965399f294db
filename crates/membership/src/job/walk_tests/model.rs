//! The world around one job: its store, its workers, their streams and their ring, and all that can happen next.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::process::{Halt, Held, Node, Planned, Process, Save};
use super::rules;
use crate::event::{Effect, Event, Join, Message, Operation, Request};
use crate::ids::{Digest, Generation, HistoryId, JobId, MemberId, MemberName, Rank, Step, Timestamp};
use crate::job::Job;
use crate::record::{JobRecord, Stage};
use crate::spec::{Shape, Sharding, Spec, Timing};

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

/// How much of each kind may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Budget {
    pub(super) deaths: u8,
    pub(super) starts: u8,
    pub(super) blips: u8,
    pub(super) hangs: u8,
    pub(super) links: u8,
    pub(super) crashes: u8,
    pub(super) fails: u8,
    pub(super) notices: u8,
    pub(super) drains: u8,
    pub(super) evictions: u8,
    pub(super) undrains: u8,
    pub(super) resizes: u8,
    pub(super) saves: u8,
    pub(super) steps: u8,
    /// Times at which somebody is too slow for a deadline.
    pub(super) hurries: u8,
    pub(super) generations: u64,
}

/// What one walk is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) spec: Spec,
    pub(super) places: usize,
    /// How many places have a process from the beginning.
    pub(super) started: usize,
    /// Whether every process starts from a state of its own.
    pub(super) strangers: bool,
    pub(super) resize_to: (u32, u32),
    /// The job is over at this step.
    pub(super) last_step: Option<u64>,
    pub(super) budget: Budget,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Model {
    pub(super) job: Job,
    pub(super) saved: Rc<JobRecord>,
    pub(super) processes: Vec<Process>,
    pub(super) truth: Vec<Truth>,
    /// The state from which the last world that ran has run.
    pub(super) base: Option<Node>,
    pub(super) written: BTreeMap<(Generation, Step), Written>,
    pub(super) budget: Budget,
}

/// Something that can happen. The number is a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start(usize),
    Attach(usize),
    Deliver(usize),
    Say(usize),
    StreamEnds(usize),
    GhostEnds(usize),
    Notice(usize),
    Begin(usize),
    Restore(usize),
    RestoreFails(usize, Fault),
    Commit(usize),
    Stop(Generation),
    Save(Generation),
    SeesBreak(usize),
    LinkBreaks(usize),
    Die(usize),
    Hang(usize),
    Wake(usize),
    Drain(usize),
    Undrain(usize),
    Evict(usize),
    Resize,
    Advance,
}

/// What goes wrong with a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Source,
    Own,
}

/// Whether the coordinator dies of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    None,
    BeforeSave,
    AfterSave,
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

const SHAPE: Shape = Shape {
    tensors: Digest(1),
    count: 1,
    bytes: 1,
    recipe: Digest(1),
    sharding: Sharding::Replicated,
};

/// The most ids one place may use.
const INCARNATIONS_MAX: u8 = 14;

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
            inbox: std::collections::VecDeque::new(),
            history: None,
            world: None,
            held: if place < setting.started { Held::Fresh(place % roots) } else { Held::Torn },
            notice: None,
            saves: Vec::new(),
        };
        Model {
            job: Job::restore(record.clone(), timing(), 16, EPOCH),
            saved: Rc::new(record),
            processes: (0..setting.places).map(process).collect(),
            truth: vec![root; roots],
            base: None,
            written: BTreeMap::new(),
            budget: setting.budget,
        }
    }

    fn by_id(&self, id: MemberId) -> Option<usize> {
        self.processes.iter().position(|p| p.id == id && p.alive)
    }

    fn step_of(&self, p: &Process) -> Option<Step> {
        p.held.node().map(|node| self.truth[node].step)
    }

    /// The places that hold a rank of the ring of `generation`, if every one of them is still in it.
    fn ring(&self, generation: Generation) -> Option<Vec<usize>> {
        let world = self.saved.world.as_ref().filter(|world| world.generation == generation)?;
        let places: Option<Vec<usize>> = world.seats.iter().map(|seat| self.by_id(seat.member)).collect();
        let places = places?;
        let lowest = places.iter().filter_map(|place| self.step_of(&self.processes[*place])).min()?;
        let in_it = |place: &usize| {
            let p = &self.processes[*place];
            // Who has stopped at the end of the collective that the others are in has given them what they need.
            let stopped_ahead = p.generation() == generation
                && p.world.as_ref().is_some_and(|w| matches!(w.halt, Some(Halt::Boundary { .. } | Halt::Finished { .. })))
                && self.step_of(p) > Some(lowest);
            p.runs(generation) || stopped_ahead
        };
        places.iter().all(in_it).then_some(places)
    }

    /// The ring of `generation`, if all its ranks run and are at one step.
    fn even_ring(&self, generation: Generation) -> Option<Vec<usize>> {
        let places = self.ring(generation)?;
        let steps: Vec<_> = places.iter().map(|p| self.step_of(&self.processes[*p])).collect();
        let even = steps.windows(2).all(|two| two[0] == two[1]);
        let run = places.iter().all(|p| self.processes[*p].runs(generation) && !self.processes[*p].hung);
        (even && run).then_some(places)
    }

    fn stop_requested(&self, places: &[usize]) -> bool {
        let requested = |p: &usize| self.processes[*p].world.as_ref().is_some_and(|w| w.boundary_requested);
        places.iter().any(requested)
    }

    /// What can happen next, by itself: no fault, no wish.
    pub(super) fn proceedings(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        for (place, p) in self.processes.iter().enumerate() {
            if p.ghost.is_some() {
                actions.push(Action::GhostEnds(place));
            }
            if !p.alive && p.stream {
                actions.push(Action::StreamEnds(place));
            }
            if !p.acts() {
                continue;
            }
            if !p.inbox.is_empty() {
                actions.push(Action::Deliver(place));
            }
            if !p.stream && p.incarnations < INCARNATIONS_MAX {
                actions.push(Action::Attach(place));
            }
            if p.stream && p.word().is_some() {
                actions.push(Action::Say(place));
            }
            match p.planned() {
                Some(planned) if !planned.begun => actions.push(Action::Begin(place)),
                Some(_) => actions.push(Action::Restore(place)),
                None => {}
            }
            if self.sees_break(p).is_some() {
                actions.push(Action::SeesBreak(place));
            }
        }
        let generation = self.saved.generation;
        if let Some(places) = self.even_ring(generation) {
            if self.stop_requested(&places) {
                actions.push(Action::Stop(generation));
            }
        } else if self.ring(generation).is_some() {
            actions.extend(self.committers(generation).into_iter().map(Action::Commit));
        }
        actions
    }

    /// Members of an uneven ring that have yet to finish the collective.
    fn committers(&self, generation: Generation) -> Vec<usize> {
        let Some(places) = self.ring(generation) else { return Vec::new() };
        let lowest = places.iter().map(|p| self.step_of(&self.processes[*p])).min().flatten();
        let behind = |p: &usize| {
            let p = &self.processes[*p];
            p.acts() && p.runs(generation) && self.step_of(p) == lowest
        };
        places.into_iter().filter(behind).collect()
    }

    /// Faults, wishes and the next step, as far as the budget goes.
    pub(super) fn choices(&self, setting: &Setting) -> Vec<Action> {
        let b = &self.budget;
        let mut actions = Vec::new();
        let any = |left: u8, action: fn(usize) -> Action, may: &dyn Fn(&Process) -> bool, out: &mut Vec<Action>| {
            if left > 0 {
                let places = self.processes.iter().enumerate().filter(|(_, p)| may(p));
                out.extend(places.map(|(place, _)| action(place)));
            }
        };
        any(b.starts, Action::Start, &|p| !p.alive && !p.over && p.ghost.is_none(), &mut actions);
        any(b.deaths, Action::Die, &|p| p.alive, &mut actions);
        any(b.blips, Action::StreamEnds, &|p| p.alive && p.stream, &mut actions);
        any(b.hangs, Action::Hang, &|p| p.acts(), &mut actions);
        any(1, Action::Wake, &|p| p.hung, &mut actions);
        any(b.notices, Action::Notice, &|p| p.acts() && p.stream && p.notice.is_none(), &mut actions);
        let member = |p: &Process| self.job.members.contains_key(&p.id);
        any(b.drains, Action::Drain, &|p| member(p), &mut actions);
        any(b.undrains, Action::Undrain, &|p| self.saved.drains.contains_key(&p.id), &mut actions);
        any(b.evictions, Action::Evict, &|p| member(p), &mut actions);
        let source = Action::RestoreFails as fn(usize, Fault) -> Action;
        for (place, p) in self.processes.iter().enumerate() {
            if b.fails > 0 && p.acts() && p.planned().is_some_and(|planned| planned.begun) {
                let fetches = p.planned().is_some_and(|planned| !planned.plan.fetch.is_empty());
                actions.extend(fetches.then(|| source(place, Fault::Source)));
                actions.push(source(place, Fault::Own));
            }
        }
        if b.resizes > 0 {
            actions.push(Action::Resize);
        }
        let generation = self.saved.generation;
        if let Some(places) = self.even_ring(generation) {
            if b.links > 0 && places.len() > 1 {
                actions.extend(places.iter().copied().map(Action::LinkBreaks));
            }
            if b.saves > 0 && !places.iter().any(|p| self.processes[*p].saves.iter().any(|s| s.generation == generation)) {
                actions.push(Action::Save(generation));
            }
            let step = self.step_of(&self.processes[places[0]]).unwrap_or_default();
            if b.steps > 0 && setting.last_step.is_none_or(|last| step < Step(last)) {
                actions.extend(places.into_iter().map(Action::Commit));
            }
        }
        actions
    }

    /// Whether time passes without anybody being late.
    pub(super) fn is_quiet(&self) -> bool {
        self.proceedings().is_empty()
    }

    /// The suspects, if `p` is in a ring that no longer works.
    fn sees_break(&self, p: &Process) -> Option<Vec<Rank>> {
        let world = p.world.as_ref().filter(|world| world.halt.is_none() && world.seats > 1)?;
        let gone = |(member, _): &&(MemberId, Rank)| match self.by_id(*member).map(|q| &self.processes[q]) {
            None => true,
            Some(q) if q.hung => true,
            Some(q) => match &q.world {
                None => true,
                Some(theirs) if theirs.generation == world.generation => match theirs.halt {
                    // It stopped after the collective that this one is in, and gave it all it needs.
                    Some(Halt::Boundary { .. } | Halt::Finished { .. }) => self.ring(world.generation).is_none(),
                    Some(Halt::Broken { .. } | Halt::Told) => true,
                    None => false,
                },
                Some(theirs) => theirs.generation > world.generation,
            },
        };
        let suspects: Vec<Rank> = [world.prev, world.next].iter().filter(gone).map(|(_, rank)| *rank).collect();
        (!suspects.is_empty()).then_some(suspects)
    }

    /// What the world is after `action`, and with it maybe the coordinator's death. `None` if that death makes no
    /// difference here.
    pub(super) fn after(&self, action: Action, crash: Crash, setting: &Setting) -> Result<Option<Model>, Broke> {
        let mut next = self.clone();
        let event = next.act(action, setting);
        match event {
            None if crash == Crash::None => {}
            None => return Ok(None),
            Some(event) => {
                if !next.feed(event, crash)? {
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
            Action::Hang(place) => {
                self.budget.hangs -= 1;
                self.processes[place].hung = true;
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
        p.held = Held::Fresh(place % roots);
    }

    fn attach(&mut self, place: usize, setting: &Setting) -> Event {
        let p = &mut self.processes[place];
        p.attached();
        let join = Join {
            name: name(place),
            slots: 1,
            address: format!("h{place}:1"),
            spec: setting.spec,
            shape: SHAPE,
            history: p.history,
            generation: p.generation(),
            running: p.world.as_ref().is_some_and(|world| world.go),
        };
        Event::Attach { member: p.id, join }
    }

    fn deliver(&mut self, place: usize) {
        let p = &mut self.processes[place];
        let new_id = id(place, p.incarnations);
        if let Some(message) = p.inbox.pop_front() {
            p.told(message, new_id);
        }
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

    fn halt(&mut self, place: usize, halt: Halt) {
        if let Some(world) = &mut self.processes[place].world {
            world.halt = Some(halt);
        }
    }

    /// Carries out a plan as an honest worker does: from whoever truly serves.
    fn restore(&mut self, place: usize) {
        let Some(Planned { plan, .. }) = self.processes[place].planned().cloned() else { return };
        let from_disk = plan.load.as_ref().and_then(|load| self.written.get(&load.commit.key())).map(|w| w.state);
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
                self.answer(place, Event::Restored { member, generation, attempt, resume, moved: Vec::new() });
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

    /// One rank finishes the collective and commits the step.
    fn commit(&mut self, place: usize, setting: &Setting) -> Option<Event> {
        let generation = self.processes[place].generation();
        let places = self.ring(generation)?;
        let even = self.even_ring(generation).is_some();
        self.budget.steps -= u8::from(even && self.budget.steps > 0);
        // All ranks find the same control word at the end of one collective.
        let ahead = |p: &&usize| self.step_of(&self.processes[**p]) > self.step_of(&self.processes[place]);
        let stops = match places.iter().find(ahead) {
            Some(first) => self.processes[*first].world.as_ref().is_some_and(|w| w.halt.is_some()),
            None => self.stop_requested(&places),
        };
        let parent = self.processes[place].held.node()?;
        let step = Step(self.truth[parent].step.0 + 1);
        let child = Truth { parent: Some(parent), step, world: generation };
        let node = self.truth.iter().position(|truth| *truth == child).unwrap_or_else(|| {
            self.truth.push(child);
            self.truth.len() - 1
        });
        let p = &mut self.processes[place];
        let Held::At(resume, _) = p.held else { return None };
        p.held = Held::At(crate::holding::Resume { step, ..resume }, node);
        if setting.last_step == Some(step.0) {
            self.halt(place, Halt::Finished { due: true });
        } else if stops {
            self.halt(place, Halt::Boundary { due: true });
        }
        let p = &mut self.processes[place];
        let (member, stream) = (p.id, p.stream);
        let world = p.world.as_mut()?;
        let first = !std::mem::replace(&mut world.stepped, true);
        (first && stream).then_some(Event::FirstStep { member, generation, step })
    }

    fn save(&mut self, generation: Generation) {
        self.budget.saves -= 1;
        let places = self.even_ring(generation).unwrap_or_default();
        for place in &places {
            let p = &self.processes[*place];
            let (Some(state), Some(step)) = (p.held.node(), self.step_of(p)) else { continue };
            let (id, key) = (p.id, (generation, step));
            let part = Save { generation, step, state, shard_due: true, manifest: None };
            self.processes[*place].saves.push(part);
            let written = self.written.entry(key).or_insert(Written { state, parts: BTreeMap::new() });
            written.parts.insert(id, false);
        }
    }

    /// Gives the coordinator an event. False if its death would make no difference to what happens without.
    fn feed(&mut self, event: Event, crash: Crash) -> Result<bool, Broke> {
        if crash != Crash::None {
            self.budget.crashes -= 1;
        }
        if event == Event::Tick {
            self.renew_all();
        }
        let now = match event {
            Event::Tick => self.job.next_deadline().unwrap_or(self.job.now).max(self.job.now),
            _ => self.job.now,
        };
        let before = self.clone();
        let transition = self.job.step(now, event.clone());
        rules::check_transition(&before, &event, &transition, &self.job)?;
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
        for p in &mut self.processes {
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
        }
    }

    /// Whoever lives and has a stream renews its lease, before anybody's lease runs out.
    fn renew_all(&mut self) {
        for p in &self.processes {
            if p.acts() && p.stream {
                let event = Event::Renew { member: p.id, generation: p.generation(), step: Step(0) };
                let _ = self.job.step(self.job.now, event);
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
        super::canonical::job(&mut self.job);
        let moved = |at: Timestamp| super::canonical::future(at, shift);
        for p in &mut self.processes {
            p.notice = p.notice.map(moved);
        }
        if shift != EPOCH || self.saved.changes.iter().any(|change| change.learned != Timestamp(0)) {
            super::canonical::record(Rc::make_mut(&mut self.saved), shift);
        }
        super::canonical::truth(self);
    }
}

fn operate(operation: Operation) -> Event {
    Event::Operate { request: Request(1), operation }
}

