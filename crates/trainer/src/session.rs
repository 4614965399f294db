//! What a member knows and says: the counterpart of the core, and as pure. It is told things by the coordinator, by its
//! own ring and by the training program, and answers with what is to be done. It knows no socket, thread or clock.
//!
//! ```text
//!   coordinator ──told──►┐                  ┌──► Send(event)      to the coordinator
//!   ring  ──formed, broken──► Session ──────┼──► Form, Abort      to the ring
//!   program ──at rest, committed──►┘        └──► Wake             to the program, which asks for its directive
//! ```
//!
//! Anything it has said may be lost with the stream it was said on. So it never remembers that something was *said*, only
//! what is *so*; and when a new stream is up it says again whatever is so and still waits for an answer.

mod ends;
mod output;
mod saves;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reknit_collectives::ControlWord;
use reknit_membership::event::{Event, Join, Message};
use reknit_membership::holding::{Holding, Moved, Plan, Resume};
use reknit_membership::reason::Refusal;
use reknit_membership::spec::{Shape, Spec};
use reknit_membership::world::Place;
use reknit_membership::{Generation, HistoryId, MemberId, MemberName, Rank, Step, Timestamp};
use reknit_proto::rendezvous::{SecretBytes, Told};

pub use output::{Directive, End, Output};

/// What a member is, whatever world it is in.
#[derive(Debug, Clone)]
pub struct Identity {
    /// What people call it.
    pub name: MemberName,
    /// How many ranks it brings.
    pub slots: u32,
    /// Where its data plane listens.
    pub address: String,
    /// The bounds the job gets if this is its first member.
    pub spec: Spec,
    /// What it has in common with the others.
    pub shape: Shape,
}

/// Why a world is over for this member, before it knows the next one.
#[derive(Debug, Clone, PartialEq)]
enum Halt {
    /// The ring broke here.
    Broken { suspects: Vec<Rank> },
    /// The coordinator said so.
    Told,
    /// All ranks stopped at a step boundary, with this state.
    Boundary { holding: Holding },
    /// The job's last step is done.
    Finished { step: Step },
}

/// The world the member was last told of.
#[derive(Debug, Clone)]
struct World {
    place: Place,
    formed: bool,
    /// Whether the world has been told, or told again, since it was last answered.
    ready_due: bool,
    plan: Option<Plan>,
    /// Whether the plan was told on an earlier stream: numbers of plans are ordered within one stream only, for another
    /// coordinator with another clock may have given it.
    plan_is_of_before: bool,
    /// The answer to the plan.
    answer: Option<Event>,
    go: Option<Resume>,
    /// Whether its first step is committed.
    stepped: bool,
    halt: Option<Halt>,
    /// Whether it was told that the world is over, and has not said since what the program holds.
    rest_due: bool,
    boundary_requested: bool,
    save_requested: bool,
}

/// One member's side of the protocol.
pub struct Session {
    identity: Identity,
    next_id: Box<dyn FnMut() -> MemberId + Send>,
    member: MemberId,
    history: Option<HistoryId>,
    /// Whether it was ever told of a world. Before that nothing binds it to a history: the coordinator that let it in may
    /// have died without having saved anything, and the next one knows nothing of the job.
    placed: bool,
    attached: bool,
    renew_every: Duration,
    world: Option<World>,
    /// The world without a place for this member whose members it serves.
    serving: Option<Generation>,
    /// What the program holds, while it is at rest.
    rest: Option<Holding>,
    /// What the program holds, whether it is at rest or not, if it has no state.
    stateless: Option<Holding>,
    /// Whether the program has ever been at rest: from then on it can be given a place.
    available: bool,
    step: Step,
    /// The part of a checkpoint that is being written.
    writing: Option<(Generation, Step)>,
    /// Parts of checkpoints that wait to be committed, by world and step.
    saves: BTreeMap<(Generation, Step), Vec<Event>>,
    /// The newest checkpoint that was committed, as far as it was told since its world began.
    committed: Option<Step>,
    /// Parts of checkpoints that could not be written, as far as others may still wait for them.
    failed_saves: BTreeSet<(Generation, Step)>,
    notice: Option<Timestamp>,
    /// Whether the coordinator knows of the notice: it keeps it, unless an operator takes it back.
    notice_known: bool,
    end: Option<End>,
}

impl Session {
    /// A member that has not joined yet. `next_id` draws member ids: one now, and one whenever it has to come back as a
    /// new member.
    pub fn new(identity: Identity, mut next_id: Box<dyn FnMut() -> MemberId + Send>) -> Session {
        let member = next_id();
        Session {
            identity,
            next_id,
            member,
            history: None,
            placed: false,
            attached: false,
            renew_every: Duration::from_millis(200),
            world: None,
            serving: None,
            rest: None,
            stateless: None,
            available: false,
            step: Step(0),
            writing: None,
            saves: BTreeMap::new(),
            committed: None,
            failed_saves: BTreeSet::new(),
            notice: None,
            notice_known: false,
            end: None,
        }
    }

    /// The same for a program without a state: what it holds never changes, so nobody ever waits to hear it. Only for an
    /// answer to a new world it must have come to rest.
    #[must_use]
    pub fn without_state(self, holding: Holding) -> Session {
        Session { stateless: Some(holding), ..self }
    }

    /// The history it belongs to, once it was let in.
    pub fn history(&self) -> Option<HistoryId> {
        self.history
    }

    /// The last world it was told of, if any.
    pub fn place(&self) -> Option<&Place> {
        self.world.as_ref().map(|world| &world.place)
    }

    /// Who it is at present.
    pub fn member(&self) -> MemberId {
        self.member
    }

    /// How it introduces itself on a new stream.
    pub fn join(&self) -> Join {
        Join {
            name: self.identity.name.clone(),
            slots: self.identity.slots,
            address: self.identity.address.clone(),
            spec: self.identity.spec,
            shape: self.identity.shape,
            history: self.history.filter(|_| self.placed),
            generation: self.generation(),
            running: self.world.as_ref().is_some_and(|world| world.go.is_some()),
            available: self.available,
        }
    }

    fn generation(&self) -> Generation {
        self.world.as_ref().map(|world| world.place.generation).unwrap_or_default()
    }

    /// How often it is to renew its lease.
    pub fn renew_every(&self) -> Duration {
        self.renew_every
    }

    /// The renewal that is due now.
    pub fn renewal(&self) -> Event {
        Event::Renew { member: self.member, generation: self.generation(), step: self.step }
    }

    /// Whether the coordinator has let it in.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// How it ended, if it did.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Whether the coordinator wants the world to stop at the next boundary: every rank raises the flag in its control
    /// word when its own session says so.
    pub fn boundary_requested(&self) -> bool {
        self.world.as_ref().is_some_and(|world| world.boundary_requested)
    }

    /// The program wants a checkpoint, whether or not one is due.
    pub fn wishes_save(&mut self) -> Vec<Output> {
        self.world.iter_mut().for_each(|world| world.save_requested = true);
        Vec::new()
    }

    /// Whether an operator or the program wants a checkpoint.
    pub fn save_requested(&self) -> bool {
        self.world.as_ref().is_some_and(|world| world.save_requested)
    }

    /// What this rank wants the others to know at the next collective.
    pub fn wishes(&self) -> ControlWord {
        let mut word = ControlWord::default();
        if self.boundary_requested() {
            word |= ControlWord::BOUNDARY_REQUESTED;
        }
        if self.save_requested() {
            word |= ControlWord::SAVE_REQUESTED;
        }
        if self.is_saving_busy() {
            word |= ControlWord::SAVE_BUSY;
        }
        word
    }

    /// Whether this plan is still the one to be carried out.
    pub fn is_planned(&self, plan: &Plan) -> bool {
        let world = self.world.as_ref().filter(|world| world.halt.is_none() && world.go.is_none());
        self.end.is_none() && world.is_some_and(|world| world.plan.as_ref() == Some(plan))
    }

    /// What the program is to do now.
    pub fn directive(&self) -> Directive {
        if let Some(end) = &self.end {
            return Directive::Over(end.clone());
        }
        let Some(world) = &self.world else { return Directive::Wait };
        if world.halt.is_some() {
            return Directive::Wait;
        }
        match (&world.go, &world.plan) {
            (Some(resume), _) => Directive::Run { place: world.place.clone(), resume: *resume },
            (None, Some(plan)) if world.answer.is_none() => Directive::Restore(plan.clone()),
            (None, _) => Directive::Wait,
        }
    }

    /// The stream ended.
    pub fn disconnected(&mut self) {
        self.attached = false;
    }

    /// The coordinator said something.
    pub fn told(&mut self, told: Told) -> Vec<Output> {
        if self.end.is_some() {
            return Vec::new();
        }
        match told.message {
            Message::Attached { history, renew_every } => self.is_let_in(history, renew_every),
            Message::Refused(refusal) => self.refused(refusal),
            Message::World(place) => self.new_world(place, told.secret.unwrap_or_default()),
            Message::Plan(plan) => self.planned(plan),
            Message::Go { generation, resume } => self.with_world(generation, |world| {
                world.go.get_or_insert(resume);
                vec![Output::Wake]
            }),
            Message::Break { generation } => self.broken_elsewhere(generation),
            Message::Boundary { generation } => self.with_world(generation, |world| {
                world.boundary_requested = true;
                // Who trains asks at its next collective; who has none to come must be told.
                vec![Output::Wake]
            }),
            Message::Draining { left } => {
                self.notice_known = true;
                vec![Output::Notice { left }]
            }
            Message::Serve { generation } => self.is_to_serve(generation, told.secret.unwrap_or_default()),
            Message::SaveGivenUp { generation, step } => self.save_given_up(generation, step),
            Message::SaveNow { generation } => self.with_world(generation, |world| {
                world.save_requested = true;
                Vec::new()
            }),
            Message::Publish { generation, step, shards } => {
                vec![Output::Publish { generation, step, shards }]
            }
            Message::Committed { kept } => {
                let newest = kept.last().map(|commit| commit.step).unwrap_or_default();
                self.saves.retain(|(_, step), _| *step > newest);
                self.failed_saves.retain(|(_, step)| *step > newest);
                self.committed = Some(newest);
                vec![Output::Committed { kept }]
            }
            Message::Released => self.finish(End::Released),
            Message::Closed(closure) => self.finish(End::Closed(closure)),
        }
    }

    fn with_world(
        &mut self,
        generation: Generation,
        act: impl FnOnce(&mut World) -> Vec<Output>,
    ) -> Vec<Output> {
        match &mut self.world {
            Some(world) if world.place.generation == generation => act(world),
            Some(_) | None => Vec::new(),
        }
    }

    fn is_let_in(&mut self, history: HistoryId, renew_every: Duration) -> Vec<Output> {
        if let Some(theirs) = self.history.filter(|ours| self.placed && *ours != history) {
            // It was let into another life of the job than the one it has a state of.
            return self.finish(End::Refused(Refusal::OtherHistory { ours: history, theirs }));
        }
        self.attached = true;
        self.history = Some(history);
        self.renew_every = renew_every;
        if let Some(world) = &mut self.world {
            world.plan_is_of_before = true;
        }
        let mut out = vec![Output::Wake];
        out.extend(self.unanswered().into_iter().map(Output::Send));
        out
    }

    /// Whatever is so and still waits for an answer. A world or a plan that is unanswered is told again by the
    /// coordinator, and answered then.
    fn unanswered(&self) -> Vec<Event> {
        let member = self.member;
        let mut events = Vec::new();
        if self.available && self.world.is_none() {
            // It may have become so since it introduced itself.
            events.push(Event::Available { member });
        }
        if let Some(deadline) = self.notice.filter(|_| !self.notice_known) {
            events.push(Event::Notice { member, deadline });
        }
        if let Some(world) = &self.world {
            let generation = world.place.generation;
            match &world.halt {
                Some(Halt::Broken { suspects }) => {
                    events.push(Event::Broken { member, generation, suspects: suspects.clone() });
                }
                Some(Halt::Boundary { holding }) => {
                    events.push(Event::Boundary { member, generation, holding: holding.clone() });
                }
                Some(Halt::Finished { step }) => {
                    events.push(Event::Finished { member, generation, step: *step })
                }
                Some(Halt::Told) | None => {}
            }
        }
        events.extend(self.saves.values().flatten().cloned());
        let failed = self.failed_saves.iter();
        events.extend(failed.map(|(generation, step)| Event::SaveFailed {
            member,
            generation: *generation,
            step: *step,
        }));
        events
    }

    fn new_world(&mut self, place: Place, secret: SecretBytes) -> Vec<Output> {
        let known = self.generation();
        if place.generation < known {
            return Vec::new();
        }
        self.renew_every = place.renew_every;
        if place.generation == known {
            // Told again, to a new stream: answered again.
            self.world.iter_mut().for_each(|world| world.ready_due = true);
            return self.ready();
        }
        let mut out = self.drop_worlds();
        out.push(Output::Form { place: place.clone(), secret });
        self.placed = true;
        self.committed = None;
        self.world = Some(World {
            place,
            formed: false,
            ready_due: true,
            plan: None,
            plan_is_of_before: false,
            answer: None,
            go: None,
            stepped: false,
            halt: None,
            rest_due: false,
            boundary_requested: false,
            save_requested: false,
        });
        out.push(Output::Wake);
        out
    }

    /// The answer to a world, once the ring stands and the program is at rest.
    fn ready(&mut self) -> Vec<Output> {
        let (Some(world), Some(holding)) = (&mut self.world, &self.rest) else { return Vec::new() };
        if !world.ready_due || !world.formed || world.go.is_some() || world.halt.is_some() {
            return Vec::new();
        }
        world.ready_due = false;
        let generation = world.place.generation;
        vec![Output::Send(Event::Ready { member: self.member, generation, holding: holding.clone() })]
    }

    fn planned(&mut self, plan: Plan) -> Vec<Output> {
        self.with_world(plan.generation, |world| {
            if world.go.is_some() {
                return Vec::new();
            }
            let is_ordered = !std::mem::take(&mut world.plan_is_of_before);
            match &world.plan {
                Some(known) if is_ordered && known.attempt > plan.attempt => Vec::new(),
                Some(known) if *known == plan => world.answer.clone().map(Output::Send).into_iter().collect(),
                known => {
                    let abandons = known.is_some() && world.answer.is_none();
                    let mut out = Vec::new();
                    if abandons {
                        out.push(Output::AbandonPlan { generation: plan.generation });
                    }
                    world.plan = Some(plan);
                    world.answer = None;
                    out.push(Output::Wake);
                    out
                }
            }
        })
    }

    fn is_to_serve(&mut self, generation: Generation, secret: SecretBytes) -> Vec<Output> {
        if generation <= self.generation() || self.serving >= Some(generation) {
            return Vec::new();
        }
        self.serving = Some(generation);
        vec![Output::Serve { generation, secret }]
    }

    fn broken_elsewhere(&mut self, generation: Generation) -> Vec<Output> {
        match &mut self.world {
            Some(world) if world.place.generation <= generation => {
                let own = world.place.generation;
                world.halt.get_or_insert(Halt::Told);
                world.rest_due = true;
                let mut out = vec![Output::Abort { generation: own }, Output::Wake];
                out.extend(self.rests());
                out
            }
            Some(_) | None => Vec::new(),
        }
    }

    /// What the program holds when the world is over, once it rests: it may be the newest state, and there may be no place
    /// for this member in the next world.
    fn rests(&mut self) -> Vec<Output> {
        let holding = self.rest.as_ref().or(self.stateless.as_ref());
        let (Some(world), Some(holding)) = (&mut self.world, holding) else { return Vec::new() };
        if !std::mem::take(&mut world.rest_due) {
            return Vec::new();
        }
        let (member, generation) = (self.member, world.place.generation);
        vec![Output::Send(Event::Boundary { member, generation, holding: holding.clone() })]
    }

    /// The ring of `generation` stands.
    pub fn formed(&mut self, generation: Generation) -> Vec<Output> {
        match &mut self.world {
            Some(world) if world.place.generation == generation => {
                world.formed = true;
                self.ready()
            }
            Some(_) | None => Vec::new(),
        }
    }

    /// The ring of `generation` could not be built, or broke, or a neighbour's connection ended.
    pub fn broken(&mut self, generation: Generation, suspects: Vec<Rank>) -> Vec<Output> {
        let member = self.member;
        self.with_world(generation, |world| {
            if world.halt.is_some() {
                // It is known, or all ranks have stopped and are taking their rings down.
                return Vec::new();
            }
            world.halt = Some(Halt::Broken { suspects: suspects.clone() });
            vec![
                Output::Send(Event::Broken { member, generation, suspects }),
                Output::Abort { generation },
                Output::Wake,
            ]
        })
    }

    /// The program has come to rest and holds this. The first time, it asks for a world by that.
    pub fn at_rest(&mut self, holding: Holding) -> Vec<Output> {
        self.rest = Some(holding);
        let mut out = Vec::new();
        if !std::mem::replace(&mut self.available, true) {
            out.push(Output::Send(Event::Available { member: self.member }));
        }
        out.extend(self.rests());
        out.extend(self.ready());
        out
    }

    /// Whether the program has come to rest.
    pub fn is_at_rest(&self) -> bool {
        self.rest.is_some()
    }

    /// The program begins to change its state (it restores, or trains): what it held, it holds no longer for sure.
    pub fn busy(&mut self) {
        self.rest = None;
    }

    /// The program has carried out its plan.
    pub fn restored(&mut self, plan: &Plan, moved: Vec<Moved>) -> Vec<Output> {
        let (generation, attempt) = (plan.generation, plan.attempt);
        let event = Event::Restored { member: self.member, generation, attempt, resume: plan.resume, moved };
        self.answer_plan(plan, event)
    }

    /// The program could not carry out its plan. `culprit` is the member whose state did not arrive; none if it was the
    /// checkpoint.
    pub fn restore_failed(&mut self, plan: &Plan, culprit: Option<MemberId>) -> Vec<Output> {
        let (generation, attempt) = (plan.generation, plan.attempt);
        let event = Event::RestoreFailed { member: self.member, generation, attempt, culprit };
        self.answer_plan(plan, event)
    }

    fn answer_plan(&mut self, plan: &Plan, event: Event) -> Vec<Output> {
        self.with_world(plan.generation, |world| {
            if world.plan.as_ref() != Some(plan) {
                return Vec::new();
            }
            world.answer = Some(event.clone());
            vec![Output::Send(event)]
        })
    }

    /// The program has committed a step, in the world of `generation`.
    pub fn committed(&mut self, generation: Generation, step: Step) -> Vec<Output> {
        self.step = step;
        let member = self.member;
        self.with_world(generation, |world| {
            if std::mem::replace(&mut world.stepped, true) {
                return Vec::new();
            }
            vec![Output::Send(Event::FirstStep { member, generation, step })]
        })
    }

    /// All ranks of `generation` have agreed to stop at this boundary.
    pub fn boundary(&mut self, generation: Generation, holding: Holding) -> Vec<Output> {
        let member = self.member;
        self.with_world(generation, |world| {
            if world.halt.is_some() {
                return Vec::new();
            }
            world.halt = Some(Halt::Boundary { holding: holding.clone() });
            vec![Output::Send(Event::Boundary { member, generation, holding })]
        })
    }

    /// The job's last step is committed.
    pub fn finished(&mut self, generation: Generation, step: Step) -> Vec<Output> {
        let member = self.member;
        self.with_world(generation, |world| {
            if world.halt.is_some() {
                return Vec::new();
            }
            world.halt = Some(Halt::Finished { step });
            vec![Output::Send(Event::Finished { member, generation, step })]
        })
    }

    /// The cloud will take this machine.
    pub fn notice(&mut self, deadline: Timestamp) -> Vec<Output> {
        let deadline = self.notice.map_or(deadline, |known| known.min(deadline));
        self.notice = Some(deadline);
        vec![Output::Send(Event::Notice { member: self.member, deadline })]
    }
}
