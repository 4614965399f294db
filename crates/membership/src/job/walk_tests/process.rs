//! One honest worker process: what it was told, what it holds, and what it still has to say. It behaves as the trainer's
//! session does.

use std::collections::VecDeque;

use crate::event::{Event, Message};
use crate::holding::{Holding, Plan, Resume, ShardReport, Shards};
use crate::ids::{Digest, Generation, HistoryId, MemberId, Rank, Step, Timestamp};
use crate::reason::Refusal;

/// Index of a true state in [`super::model::Model::truth`].
pub(super) type Node = usize;

/// What a process has in memory, and what that truly is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Held {
    Fresh(Node),
    At(Resume, Node),
    Torn,
}

impl Held {
    pub(super) fn node(self) -> Option<Node> {
        match self {
            Held::Fresh(node) | Held::At(_, node) => Some(node),
            Held::Torn => None,
        }
    }

    pub(super) fn holding(self) -> Holding {
        match self {
            Held::Fresh(node) => Holding::Fresh { digest: Digest(node as u128) },
            Held::At(resume, _) => Holding::State { resume, shards: Shards::Whole },
            Held::Torn => Holding::Nothing,
        }
    }

    /// Whether it would hand itself to a receiver that asks for `resume`.
    pub(super) fn serves(self, resume: Resume) -> bool {
        match self {
            Held::Fresh(_) => resume.step == Step(0),
            Held::At(held, _) => {
                held == resume || (held.step == resume.step && resume.lineage > held.lineage)
            }
            Held::Torn => false,
        }
    }
}

/// The world a process was last told of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) generation: Generation,
    pub(super) rank: Rank,
    pub(super) seats: u32,
    /// Digest of the whole roster.
    pub(super) roster: u64,
    pub(super) prev: (MemberId, Rank),
    pub(super) next: (MemberId, Rank),
    pub(super) ready_due: bool,
    pub(super) plan: Option<Planned>,
    pub(super) go: bool,
    pub(super) stepped: bool,
    pub(super) halt: Option<Halt>,
    /// It was told that its world is over and has not yet said what it holds.
    pub(super) rest_due: bool,
    pub(super) boundary_requested: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Planned {
    pub(super) plan: Plan,
    pub(super) begun: bool,
    pub(super) answer: Option<Event>,
    pub(super) answer_due: bool,
}

/// Why its ring is at rest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Halt {
    Broken { suspects: Vec<Rank>, due: bool },
    Told,
    Boundary { due: bool },
    Finished { due: bool },
}

impl Halt {
    fn says(&mut self, member: MemberId, generation: Generation, held: Held) -> Option<Event> {
        match self {
            Halt::Broken { suspects, due } => {
                *due = false;
                Some(Event::Broken { member, generation, suspects: suspects.clone() })
            }
            Halt::Boundary { due } => {
                *due = false;
                Some(Event::Boundary { member, generation, holding: held.holding() })
            }
            Halt::Finished { due } => {
                *due = false;
                let Held::At(Resume { step, .. }, _) = held else { return None };
                Some(Event::Finished { member, generation, step })
            }
            Halt::Told => None,
        }
    }
}

/// Something that a process has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Available,
    Halt,
    Rest,
    Ready,
    Answer,
    Shard(usize),
    Manifest(usize),
}

/// Its part of a checkpoint that is not known to be committed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Save {
    pub(super) generation: Generation,
    pub(super) step: Step,
    pub(super) state: Node,
    pub(super) shard_due: bool,
    pub(super) manifest: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) id: MemberId,
    /// How many ids this place has used.
    pub(super) incarnations: u8,
    pub(super) alive: bool,
    pub(super) hung: bool,
    /// It was let go, or refused for good: nobody starts it again.
    pub(super) over: bool,
    /// Whether it lost its lease and came back under another id, with its memory.
    pub(super) came_back: bool,
    /// Whether the coordinator has a stream of it.
    pub(super) stream: bool,
    /// A stream of the process that was here before, whose end nobody has noticed.
    pub(super) ghost: Option<MemberId>,
    /// Whether it is slow to take in what it is told; else it does so at once.
    pub(super) lags: bool,
    pub(super) inbox: VecDeque<Message>,
    pub(super) history: Option<HistoryId>,
    /// Whether its program has asked for a world …
    pub(super) available: bool,
    /// … and whether that has still to be said.
    pub(super) available_due: bool,
    pub(super) world: Option<World>,
    pub(super) held: Held,
    pub(super) notice: Option<Timestamp>,
    pub(super) saves: Vec<Save>,
}

impl Process {
    pub(super) fn generation(&self) -> Generation {
        self.world.as_ref().map(|world| world.generation).unwrap_or_default()
    }

    /// Whether it takes part in the collectives of `generation`.
    pub(super) fn runs(&self, generation: Generation) -> bool {
        self.alive
            && self.world.as_ref().is_some_and(|w| w.generation == generation && w.go && w.halt.is_none())
    }

    pub(super) fn acts(&self) -> bool {
        self.alive && !self.hung
    }

    /// Whatever is so and still waits for an answer is said again on a new stream.
    pub(super) fn attached(&mut self) {
        self.stream = true;
        self.lags = false;
        self.inbox.clear();
        self.available_due = self.available && self.world.is_none();
        for save in &mut self.saves {
            save.shard_due = true;
            save.manifest = save.manifest.map(|_| true);
        }
        if let Some(world) = &mut self.world {
            match &mut world.halt {
                Some(Halt::Broken { due, .. } | Halt::Boundary { due } | Halt::Finished { due }) => {
                    *due = true
                }
                Some(Halt::Told) | None => {}
            }
        }
    }

    /// Takes in what the coordinator said.
    pub(super) fn told(&mut self, message: Message, new_id: MemberId) {
        match message {
            Message::Attached { history, .. } => self.history = Some(history),
            Message::Refused(Refusal::Departed(how)) if how.may_come_back() => self.come_back(new_id),
            Message::Refused(_) | Message::Released | Message::Closed(_) => self.ends(),
            Message::World(place) => {
                if place.generation < self.generation() {
                    return;
                }
                if place.generation == self.generation() {
                    self.world.iter_mut().for_each(|world| world.ready_due = true);
                    return;
                }
                self.world = Some(World {
                    generation: place.generation,
                    rank: place.rank,
                    seats: place.seats,
                    roster: place.roster,
                    prev: (place.prev.member, place.prev.rank),
                    next: (place.next.member, place.next.rank),
                    ready_due: true,
                    plan: None,
                    go: false,
                    stepped: false,
                    halt: None,
                    rest_due: false,
                    boundary_requested: false,
                });
            }
            Message::Plan(plan) => {
                let Some(world) = self.world_of(plan.generation).filter(|world| !world.go) else { return };
                match &mut world.plan {
                    Some(known) if known.plan == plan => known.answer_due = known.answer.is_some(),
                    known => {
                        *known = Some(Planned { plan, begun: false, answer: None, answer_due: false });
                    }
                }
            }
            Message::Go { generation, resume } => {
                let held = self.held;
                let Some(world) = self.world_of(generation).filter(|world| !world.go) else { return };
                world.go = true;
                if let Some(node) = held.node() {
                    self.held = Held::At(resume, node);
                }
            }
            Message::Break { generation } => {
                if let Some(world) = self.world.as_mut().filter(|world| world.generation <= generation) {
                    world.halt.get_or_insert(Halt::Told);
                    world.rest_due = true;
                }
            }
            Message::Boundary { generation } => {
                self.world_of(generation).into_iter().for_each(|world| world.boundary_requested = true);
            }
            Message::SaveNow { .. } | Message::Draining { .. } | Message::Serve { .. } => {}
            Message::Publish { generation, step, .. } => {
                let mut saves = self.saves.iter_mut();
                if let Some(save) = saves.find(|save| (save.generation, save.step) == (generation, step)) {
                    save.manifest = Some(true);
                }
            }
            Message::SaveGivenUp { generation, step } => {
                self.saves.retain(|save| (save.generation, save.step) != (generation, step));
            }
            Message::Committed { kept } => {
                let newest = kept.last().map(|commit| commit.step).unwrap_or_default();
                self.saves.retain(|save| save.step > newest);
            }
        }
    }

    pub(super) fn takes_in(&mut self, new_id: MemberId) {
        while let Some(message) = self.inbox.pop_front() {
            self.told(message, new_id);
        }
    }

    fn world_of(&mut self, generation: Generation) -> Option<&mut World> {
        self.world.as_mut().filter(|world| world.generation == generation)
    }

    /// It lost its lease, but not its state.
    fn come_back(&mut self, id: MemberId) {
        self.id = id;
        self.incarnations += 1;
        self.came_back = true;
        self.stream = false;
        self.inbox.clear();
        self.world = None;
        self.saves.clear();
    }

    pub(super) fn ends(&mut self) {
        self.alive = false;
        self.hung = false;
        self.over = true;
        self.dies();
    }

    pub(super) fn dies(&mut self) {
        self.alive = false;
        self.hung = false;
        self.lags = false;
        self.inbox.clear();
        self.world = None;
        self.saves.clear();
        self.notice = None;
        self.available_due = false;
        self.held = Held::Torn;
    }

    /// What it has to say next, if anything.
    pub(super) fn word(&self) -> Option<Word> {
        if self.available_due {
            return Some(Word::Available);
        }
        if let Some(world) = &self.world {
            match world.halt {
                Some(
                    Halt::Broken { due: true, .. }
                    | Halt::Boundary { due: true }
                    | Halt::Finished { due: true },
                ) => {
                    return Some(Word::Halt);
                }
                Some(Halt::Broken { .. } | Halt::Boundary { .. } | Halt::Finished { .. } | Halt::Told)
                | None => {}
            }
            let plan = world.plan.as_ref();
            // While it moves state, its program is not at rest.
            let restores = plan.is_some_and(|planned| planned.begun && planned.answer.is_none());
            if world.rest_due {
                return Some(Word::Rest);
            }
            if world.ready_due && world.halt.is_none() && !world.go && !restores {
                return Some(Word::Ready);
            }
            if plan.is_some_and(|planned| planned.answer_due) {
                return Some(Word::Answer);
            }
        }
        self.saves.iter().enumerate().find_map(|(i, save)| match save.manifest {
            _ if save.shard_due => Some(Word::Shard(i)),
            Some(true) => Some(Word::Manifest(i)),
            Some(false) | None => None,
        })
    }

    /// Says it: it is no longer due.
    pub(super) fn says(&mut self) -> Option<Event> {
        let (member, held) = (self.id, self.held);
        match (self.word()?, &mut self.world) {
            (Word::Available, _) => {
                self.available_due = false;
                Some(Event::Available { member })
            }
            (Word::Shard(i), _) => {
                let save = &mut self.saves[i];
                save.shard_due = false;
                let report = ShardReport { bytes: 1, file: Digest(1), state: Digest(save.state as u128) };
                Some(Event::ShardWritten { member, generation: save.generation, step: save.step, report })
            }
            (Word::Manifest(i), _) => {
                let save = &mut self.saves[i];
                save.manifest = Some(false);
                let (generation, step) = (save.generation, save.step);
                Some(Event::ManifestWritten { member, generation, step, manifest: Digest(2) })
            }
            (Word::Halt, Some(world)) => world.halt.as_mut()?.says(member, world.generation, held),
            (Word::Rest, Some(world)) => {
                world.rest_due = false;
                Some(Event::Boundary { member, generation: world.generation, holding: held.holding() })
            }
            (Word::Ready, Some(world)) => {
                world.ready_due = false;
                Some(Event::Ready { member, generation: world.generation, holding: held.holding() })
            }
            (Word::Answer, Some(world)) => {
                let planned = world.plan.as_mut()?;
                planned.answer_due = false;
                planned.answer.clone()
            }
            (Word::Halt | Word::Rest | Word::Ready | Word::Answer, None) => None,
        }
    }

    /// Whether it has a plan to carry out.
    pub(super) fn planned(&self) -> Option<&Planned> {
        let world = self.world.as_ref().filter(|world| world.halt.is_none() && !world.go)?;
        world.plan.as_ref().filter(|planned| planned.answer.is_none())
    }
}
