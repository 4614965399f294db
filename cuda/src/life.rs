//! The life of a process's part in the communicators of one job, as a pure state machine: events in, actions out.
//!
//! | from | when | to |
//! |---|---|---|
//! | Empty | told of a world: afresh, or as a newcomer | Forming |
//! | Healthy, Revoked | told of one that is made of what is held | Forming, with a parent |
//! | Healthy, Revoked | told of one that is not | Aborting, then Forming |
//! | Forming | done | Healthy; with a parent, Releasing |
//! | Forming | failed, missed, given up, told of a newer one | Aborting |
//! | Releasing | done | Healthy |
//! | Healthy | broke | Revoking; without revoke, Aborting |
//! | Revoking | done | Revoked |
//! | Revoking | failed, missed | Aborting |
//! | Aborting | done | Empty, or Forming what was told meanwhile |
//! | Healthy | leaves | Leaving, then Empty |
//! | Releasing, Aborting | missed | Exit |
//! | any | missed for the second time, no answer at all | Exit |
//!
//! One thing is done at a time, and has a ticket; whoever does it answers with the ticket, or a clock says that it missed its
//! deadline. What comes with an older ticket is about something that was given up, and changes nothing.
//!
//! There is no falling back from one way to another within a generation: the others would wait for this rank for ever. A way
//! that failed is reported, and the coordinator commits a world that is formed afresh.

use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::version::{Feature, Version};
use crate::way::{Parent, Way, World};

/// Which action it is that has come to an end. A ticket is never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Ticket(pub(crate) u64);

/// What happens to a process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The coordinator has committed a world.
    Told(World),
    /// An action has succeeded.
    Done(Ticket),
    /// An action has failed.
    Failed(Ticket),
    /// An action has missed its deadline, and is given up.
    Missed(Ticket),
    /// A collective failed, or somebody gave the world up.
    Broke,
    /// The process wants to leave in good order.
    Leave,
    /// The thread that makes the calls does not answer: it is inside a call that does not end.
    Stuck,
}

/// What is to be done. Each but the last two is answered with its ticket, by a deadline.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Form a communicator from nothing.
    Init(Ticket, World),
    /// Form one of the parent's survivors.
    Shrink(Ticket, World),
    /// Form one of the parent and newcomers.
    Grow(Ticket, World),
    /// Abort the parents of what was just formed. They are never destroyed (rule G-6).
    Release(Ticket),
    /// End what runs, and keep the handles.
    Revoke(Ticket),
    /// Abort every handle there is, as one group.
    Abort(Ticket),
    /// Finish and destroy the handles, in good order with all ranks.
    Leave(Ticket),
    /// The world that was told cannot be entered from here: say so.
    Refuse(Refusal),
    /// This process cannot go on: the launcher has to start it anew.
    Exit(ExitReason),
}

impl Action {
    /// What the answer has to carry, if one is waited for.
    pub(crate) fn ticket(&self) -> Option<Ticket> {
        match self {
            Action::Init(ticket, _) | Action::Shrink(ticket, _) | Action::Grow(ticket, _) => Some(*ticket),
            Action::Release(ticket)
            | Action::Revoke(ticket)
            | Action::Abort(ticket)
            | Action::Leave(ticket) => Some(*ticket),
            Action::Refuse(_) | Action::Exit(_) => None,
        }
    }
}

/// Why a world cannot be entered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A newer world, or this one, was told already.
    #[error("generation {told} is stale: {newest} was told already")]
    Stale {
        /// What was told now.
        told: Generation,
        /// The newest that was told.
        newest: Generation,
    },
    /// It is made of a communicator that this process does not hold.
    #[error("the world is made of generation {wanted}, of which this process holds no communicator")]
    NoParent {
        /// Of which it is made.
        wanted: Generation,
    },
    /// Ranks and size do not follow from the parent's.
    #[error("the ranks of the world do not follow from those of generation {parent}: {what}")]
    WrongSeat {
        /// The parent.
        parent: Generation,
        /// What is wrong.
        what: &'static str,
    },
    /// A communicator that was revoked cannot grow.
    #[error("the communicator of generation {parent} was revoked, so it cannot grow")]
    NotQuiet {
        /// The parent.
        parent: Generation,
    },
    /// This NCCL cannot do it.
    #[error("NCCL {version} has no {feature}")]
    Version {
        /// What it cannot do.
        feature: Feature,
        /// Which NCCL.
        version: Version,
    },
    /// This process is to be started anew.
    #[error("this process cannot form worlds any more: {0}")]
    Exited(ExitReason),
}

/// Why a process cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ExitReason {
    /// Two deadlines in a row, with no world in between.
    #[error("a second deadline was missed")]
    MissedTwice,
    /// An abort did not end. What it holds is not known, so nothing can be built beside it.
    #[error("an abort did not end")]
    AbortHangs,
    /// A call into NCCL or the driver that should return at once did not.
    #[error("a call into NCCL or the driver does not return")]
    CallHangs,
}

/// A communicator that this process holds its part of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Held {
    /// Formed in which generation.
    pub generation: Generation,
    /// Of how many ranks.
    pub size: WorldSize,
    /// Which of them are this process's.
    pub ranks: Vec<Rank>,
}

/// Where a life has got to. Each state holds only what is true in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// There is no handle.
    Empty,
    /// A communicator is being formed.
    Forming {
        /// The action.
        ticket: Ticket,
        /// Of which world.
        world: World,
        /// Whether it is made of handles that are there too.
        of_parent: bool,
    },
    /// One has been formed, and the parents are being aborted.
    Releasing {
        /// The action.
        ticket: Ticket,
        /// What was formed.
        held: Held,
        /// Whether it was broken, or a newer world told, meanwhile.
        then: Then,
    },
    /// It can be used.
    Healthy(Held),
    /// What runs is being ended.
    Revoking {
        /// The action.
        ticket: Ticket,
        /// What is revoked.
        held: Held,
        /// What was told meanwhile.
        then: Option<World>,
    },
    /// It cannot be used, but shrunk.
    Revoked(Held),
    /// Every handle is being aborted.
    Aborting {
        /// The action.
        ticket: Ticket,
        /// The world to be formed next, if one was told.
        then: Option<World>,
    },
    /// The handles are being given back in good order.
    Leaving {
        /// The action.
        ticket: Ticket,
    },
    /// The process is to end.
    Exit(ExitReason),
}

/// What happened while the parents were being released.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Then {
    /// Nothing.
    Use,
    /// It is not to be used.
    Abort,
    /// A newer world was told.
    Form(World),
}

/// The state machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Life {
    version: Version,
    state: State,
    /// The newest generation that was told: the committed one, as far as is known here.
    newest: Generation,
    /// Deadlines missed since a world was last formed.
    missed: u8,
    tickets: u64,
}

impl Life {
    /// A life that holds nothing yet, with this NCCL.
    pub(crate) fn new(version: Version) -> Life {
        Life { version, state: State::Empty, newest: Generation(0), missed: 0, tickets: 0 }
    }

    /// Where it has got to.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// What may be used for collectives now: the communicator of the committed generation, and no other (rule G-4).
    pub(crate) fn usable(&self) -> Option<&Held> {
        match &self.state {
            State::Healthy(held) if held.generation == self.newest => Some(held),
            State::Healthy(_)
            | State::Empty
            | State::Forming { .. }
            | State::Releasing { .. }
            | State::Revoking { .. }
            | State::Revoked(_)
            | State::Aborting { .. }
            | State::Leaving { .. }
            | State::Exit(_) => None,
        }
    }

    /// What a later world can be made of, for each of this process's ranks.
    pub(crate) fn parents(&self) -> Vec<Parent> {
        let (held, revoked) = match &self.state {
            State::Healthy(held) => (held, false),
            State::Revoked(held) => (held, true),
            State::Empty
            | State::Forming { .. }
            | State::Releasing { .. }
            | State::Revoking { .. }
            | State::Aborting { .. }
            | State::Leaving { .. }
            | State::Exit(_) => return Vec::new(),
        };
        let Held { generation, size, .. } = *held;
        held.ranks.iter().map(|rank| Parent { generation, size, rank: *rank, revoked }).collect()
    }

    /// What follows from `event`.
    pub(crate) fn on(&mut self, event: Event) -> Option<Action> {
        match event {
            Event::Told(world) => self.told(world),
            Event::Done(ticket) => self.done(ticket),
            Event::Failed(ticket) => self.failed(ticket),
            Event::Missed(ticket) => self.missed(ticket),
            Event::Broke => self.broke(),
            Event::Leave => self.leave(),
            Event::Stuck => self.exit(ExitReason::CallHangs),
        }
    }

    fn told(&mut self, world: World) -> Option<Action> {
        if let State::Exit(reason) = self.state {
            return Some(Action::Refuse(Refusal::Exited(reason)));
        }
        if world.generation <= self.newest {
            let stale = Refusal::Stale { told: world.generation, newest: self.newest };
            return Some(Action::Refuse(stale));
        }
        self.newest = world.generation;
        match &mut self.state {
            State::Empty | State::Healthy(_) | State::Revoked(_) => self.begin(world),
            State::Forming { .. } => self.abort(Some(world)),
            State::Releasing { then, .. } => {
                *then = Then::Form(world);
                None
            }
            State::Revoking { then, .. } | State::Aborting { then, .. } => {
                *then = Some(world);
                None
            }
            State::Leaving { .. } => self.abort(Some(world)),
            State::Exit(reason) => Some(Action::Refuse(Refusal::Exited(*reason))),
        }
    }

    /// Sets out for `world`, from where nothing is under way.
    fn begin(&mut self, world: World) -> Option<Action> {
        let (held, revoked) = match &self.state {
            State::Healthy(held) => (Some(held), false),
            State::Revoked(held) => (Some(held), true),
            State::Empty
            | State::Forming { .. }
            | State::Releasing { .. }
            | State::Revoking { .. }
            | State::Aborting { .. }
            | State::Leaving { .. }
            | State::Exit(_) => (None, false),
        };
        let of_parent = match follows(&world, held, revoked, self.version) {
            Ok(of_parent) => of_parent,
            Err(refusal) => return Some(Action::Refuse(refusal)),
        };
        if held.is_some() && !of_parent {
            return self.abort(Some(world));
        }
        let ticket = self.ticket();
        self.state = State::Forming { ticket, world: world.clone(), of_parent };
        Some(match world.way {
            Way::Fresh { .. } => Action::Init(ticket, world),
            Way::Shrink { .. } => Action::Shrink(ticket, world),
            Way::Grow { .. } => Action::Grow(ticket, world),
        })
    }

    fn done(&mut self, answered: Ticket) -> Option<Action> {
        if self.waits_for() != Some(answered) {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Empty) {
            State::Forming { world, of_parent, .. } => {
                let World { generation, size, ranks, .. } = world;
                let held = Held { generation, size, ranks };
                if !of_parent {
                    return self.healthy(held);
                }
                let ticket = self.ticket();
                self.state = State::Releasing { ticket, held, then: Then::Use };
                Some(Action::Release(ticket))
            }
            State::Releasing { held, then, .. } => match then {
                Then::Use => self.healthy(held),
                Then::Abort => self.abort(None),
                Then::Form(world) => {
                    self.healthy(held);
                    self.begin(world)
                }
            },
            State::Revoking { held, then, .. } => {
                self.state = State::Revoked(held);
                then.and_then(|world| self.begin(world))
            }
            State::Aborting { then, .. } => then.and_then(|world| self.begin(world)),
            State::Leaving { .. } => None,
            idle @ (State::Empty | State::Healthy(_) | State::Revoked(_) | State::Exit(_)) => {
                self.state = idle;
                None
            }
        }
    }

    fn failed(&mut self, answered: Ticket) -> Option<Action> {
        if self.waits_for() != Some(answered) {
            return None;
        }
        match &mut self.state {
            State::Forming { .. } | State::Leaving { .. } => self.abort(None),
            State::Revoking { then, .. } => {
                let then = then.take();
                self.abort(then)
            }
            // Whatever an abort answers, the handle is gone.
            State::Releasing { .. } | State::Aborting { .. } => self.done(answered),
            State::Empty | State::Healthy(_) | State::Revoked(_) | State::Exit(_) => None,
        }
    }

    fn missed(&mut self, answered: Ticket) -> Option<Action> {
        if self.waits_for() != Some(answered) {
            return None;
        }
        self.missed += 1;
        if matches!(self.state, State::Releasing { .. } | State::Aborting { .. }) {
            return self.exit(ExitReason::AbortHangs);
        }
        if self.missed > 1 {
            return self.exit(ExitReason::MissedTwice);
        }
        match &mut self.state {
            State::Forming { .. } | State::Leaving { .. } => self.abort(None),
            State::Revoking { then, .. } => {
                let then = then.take();
                self.abort(then)
            }
            State::Releasing { .. }
            | State::Aborting { .. }
            | State::Empty
            | State::Healthy(_)
            | State::Revoked(_)
            | State::Exit(_) => None,
        }
    }

    fn broke(&mut self) -> Option<Action> {
        match &mut self.state {
            State::Healthy(held) if self.version.has(Feature::Revoke) => {
                let held = held.clone();
                let ticket = self.ticket();
                self.state = State::Revoking { ticket, held, then: None };
                Some(Action::Revoke(ticket))
            }
            State::Healthy(_) | State::Forming { .. } => self.abort(None),
            State::Releasing { then: then @ Then::Use, .. } => {
                *then = Then::Abort;
                None
            }
            State::Releasing { then: Then::Abort | Then::Form(_), .. }
            | State::Empty
            | State::Revoking { .. }
            | State::Revoked(_)
            | State::Aborting { .. }
            | State::Leaving { .. }
            | State::Exit(_) => None,
        }
    }

    fn leave(&mut self) -> Option<Action> {
        match &mut self.state {
            State::Healthy(_) => {
                let ticket = self.ticket();
                self.state = State::Leaving { ticket };
                Some(Action::Leave(ticket))
            }
            State::Forming { .. } | State::Revoked(_) => self.abort(None),
            State::Releasing { then, .. } => {
                *then = Then::Abort;
                None
            }
            State::Revoking { then, .. } | State::Aborting { then, .. } => {
                *then = None;
                None
            }
            State::Empty | State::Leaving { .. } | State::Exit(_) => None,
        }
    }

    fn healthy(&mut self, held: Held) -> Option<Action> {
        self.missed = 0;
        self.state = State::Healthy(held);
        None
    }

    fn abort(&mut self, then: Option<World>) -> Option<Action> {
        let ticket = self.ticket();
        self.state = State::Aborting { ticket, then };
        Some(Action::Abort(ticket))
    }

    fn exit(&mut self, reason: ExitReason) -> Option<Action> {
        if let State::Exit(_) = self.state {
            return None;
        }
        self.state = State::Exit(reason);
        Some(Action::Exit(reason))
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// The action whose end it waits for.
    pub(crate) fn waits_for(&self) -> Option<Ticket> {
        match &self.state {
            State::Forming { ticket, .. }
            | State::Releasing { ticket, .. }
            | State::Revoking { ticket, .. }
            | State::Aborting { ticket, .. }
            | State::Leaving { ticket } => Some(*ticket),
            State::Empty | State::Healthy(_) | State::Revoked(_) | State::Exit(_) => None,
        }
    }
}

/// Whether `world` is made of what is held (or is not, and is entered with empty hands), if it can be entered at all.
fn follows(world: &World, held: Option<&Held>, revoked: bool, version: Version) -> Result<bool, Refusal> {
    let needs = |feature| {
        if version.has(feature) { Ok(()) } else { Err(Refusal::Version { feature, version }) }
    };
    match &world.way {
        Way::Fresh { .. } => Ok(false),
        Way::Shrink { parent, exclude } => {
            needs(Feature::Shrink)?;
            let held = held
                .filter(|held| held.generation == *parent)
                .ok_or(Refusal::NoParent { wanted: *parent })?;
            let wrong = |what| Err(Refusal::WrongSeat { parent: *parent, what });
            if exclude.is_empty() || exclude.windows(2).any(|pair| pair[0] >= pair[1]) {
                return wrong("the list of who is gone is empty or out of order");
            }
            if exclude.iter().any(|rank| rank.0 >= held.size.0) {
                return wrong("somebody is gone who never was there");
            }
            if world.size.0 as usize + exclude.len() != held.size.0 as usize {
                return wrong("the size is not that of who is left");
            }
            let renumbered = |rank: &Rank| {
                let before = exclude.iter().filter(|gone| *gone < rank).count();
                (!exclude.contains(rank)).then(|| Rank(rank.0 - u32::try_from(before).unwrap_or(rank.0)))
            };
            let ranks: Option<Vec<Rank>> = held.ranks.iter().map(renumbered).collect();
            match ranks {
                Some(ranks) if ranks == world.ranks => Ok(true),
                Some(_) => wrong("survivors are renumbered in order"),
                None => wrong("this process is on the list of who is gone"),
            }
        }
        Way::Grow { parent, quorum, .. } => {
            needs(Feature::Grow)?;
            let wrong = |what| Err(Refusal::WrongSeat { parent: *parent, what });
            if quorum.0 < 2 || world.size <= *quorum {
                return wrong("it takes two ranks or more to grow, and somebody new");
            }
            if world.ranks.iter().all(|rank| rank.0 >= quorum.0) {
                return Ok(false);
            }
            let held = held
                .filter(|held| held.generation == *parent)
                .ok_or(Refusal::NoParent { wanted: *parent })?;
            if revoked {
                return Err(Refusal::NotQuiet { parent: *parent });
            }
            if held.size != *quorum || held.ranks != world.ranks {
                return wrong("who was there keeps its rank");
            }
            Ok(true)
        }
    }
}

#[cfg(test)]
mod life_tests;
#[cfg(test)]
mod walk_tests;
