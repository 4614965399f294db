//! A world runs: planned changes are collected, asked for, and taken at a step boundary; and how a job ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Job, Out, Phase, Stream};
use crate::event::Message;
use crate::holding::Holding;
use crate::ids::{Generation, MemberId, Step, Timestamp};
use crate::reason::{Closure, Departure, Waiting};
use crate::world::{Peer, select};

/// The barrier is open; the coordinator hears nothing of the steps.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Running {
    pub(super) since: Timestamp,
    pub(super) change: Option<Change>,
    finished: BTreeSet<MemberId>,
}

/// A planned change: a join, a notice, a drain, new bounds, the end of the job; or several of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Change {
    first: Timestamp,
    last: Timestamp,
    /// When the boundary is asked for.
    due: Timestamp,
    asked: bool,
    /// Whom it was asked of. One would do, for the control word carries the wish round the ring; a few more cover a
    /// stream that is dead without anybody knowing.
    asked_of: BTreeSet<MemberId>,
    arrived: BTreeMap<MemberId, Holding>,
    /// Set by the first arrival: the others have finished the same collective.
    overdue: Option<Timestamp>,
}

/// Of how many members a boundary is asked.
const ASKED_MAX: usize = 3;

/// A world cannot do without a member that is to leave: the boundary is put off until this long before its deadline,
/// or a quarter of the time left if that is shorter.
const LAST_MOMENT: Duration = Duration::from_secs(10);

impl Running {
    pub(super) fn new(now: Timestamp) -> Running {
        Running { since: now, change: None, finished: BTreeSet::new() }
    }

    /// The phase of a job whose record says that a world runs.
    pub(super) fn resumed(now: Timestamp) -> Running {
        Running::new(now)
    }

    /// Whether a boundary has been asked for.
    pub(super) fn asked(&self) -> bool {
        self.change.as_ref().is_some_and(|change| change.asked)
    }

    pub(super) fn asked_of(&self, member: MemberId) -> bool {
        self.change.as_ref().is_some_and(|change| change.asked_of.contains(&member))
    }

    pub(super) fn deadline(&self) -> Option<Timestamp> {
        let change = self.change.as_ref()?;
        if change.asked { change.overdue } else { Some(change.due) }
    }
}

impl Job {
    /// Whether the world should be another one, and if so when it is to be asked to stop. `more` says that something
    /// new has come up, which may be followed by more of its kind (rule M-13).
    pub(super) fn review(&mut self, more: bool, out: &mut Out) {
        let Phase::Running(running) = &self.phase else { return };
        if running.asked() {
            return;
        }
        let now = self.now;
        let first = running.change.as_ref().map_or(now, |change| change.first);
        let last = match &running.change {
            Some(change) if !more => change.last,
            Some(_) | None => now,
        };
        let due = self.change_due(first, last);
        let Phase::Running(running) = &mut self.phase else { return };
        running.change = due.map(|due| Change {
            first,
            last,
            due,
            asked: false,
            asked_of: BTreeSet::new(),
            arrived: BTreeMap::new(),
            overdue: None,
        });
        self.running_due(out);
    }

    /// When the world is to be asked to stop for what has come up, if for anything.
    fn change_due(&self, first: Timestamp, last: Timestamp) -> Option<Timestamp> {
        let merged = last.after(self.timing.merge_quiet).min(first.after(self.timing.merge_max));
        if self.record.closing {
            return Some(first);
        }
        let leaving = || self.seated().filter_map(|member| self.record.drains.get(&member));
        let deadline = leaving().filter_map(|drain| drain.deadline).min();
        match select(&self.record.spec, &self.candidates()) {
            Ok(chosen) => {
                let changed = !chosen.into_iter().eq(self.seated());
                let half_way = deadline.map(|at| first.after(at.since(first) / 2));
                changed.then(|| half_way.map_or(merged, |at| at.min(merged)))
            }
            // Without those who leave there is no world. An operator gets what they asked for; a notice is made use of
            // to the last moment, for a replacement may still come.
            Err(_) if leaving().any(|drain| drain.deadline.is_none()) => Some(merged),
            Err(_) => deadline.map(|at| {
                let left = at.since(first);
                first.after(left - LAST_MOMENT.min(left / 4))
            }),
        }
    }

    pub(super) fn running_due(&mut self, out: &mut Out) {
        let Phase::Running(running) = &mut self.phase else { return };
        let Some(change) = &mut running.change else { return };
        if !change.asked {
            if change.due <= self.now {
                change.asked = true;
                self.ask_boundary(out);
            }
            return;
        }
        if change.overdue.is_some_and(|at| at <= self.now) {
            let arrived: BTreeSet<MemberId> = change.arrived.keys().copied().collect();
            for member in self.seated_except(|member| arrived.contains(&member)) {
                self.lose(member, Departure::Stuck, out);
            }
            self.after_loss(out);
        }
    }

    /// Asks a few members that can be reached; one of them is enough.
    pub(super) fn ask_boundary(&mut self, out: &mut Out) {
        let generation = self.record.generation;
        let reachable: BTreeSet<MemberId> = self
            .seated()
            .filter(|member| self.members.get(member).is_some_and(|m| m.stream == Stream::Up))
            .take(ASKED_MAX)
            .collect();
        let Phase::Running(running) = &mut self.phase else { return };
        let Some(change) = &mut running.change else { return };
        for member in &reachable {
            if change.asked_of.insert(*member) {
                out.tell(*member, Message::Boundary { generation });
            }
        }
    }

    pub(super) fn boundary(
        &mut self,
        member: MemberId,
        generation: Generation,
        holding: Holding,
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if generation != self.record.generation || !self.is_seated(member) {
            return;
        }
        let now = self.now;
        let overdue = now.after(self.timing.busy);
        let Phase::Running(running) = &mut self.phase else { return };
        // A coordinator that was restarted may have forgotten what it asked for; the members have stopped all the same.
        let change = running.change.get_or_insert_with(|| Change {
            first: now,
            last: now,
            due: now,
            asked: true,
            asked_of: BTreeSet::new(),
            arrived: BTreeMap::new(),
            overdue: None,
        });
        change.asked = true;
        change.overdue.get_or_insert(overdue);
        change.arrived.insert(member, holding);
        let seats = self.record.world.as_ref().map_or(0, |world| world.seats.len());
        if change.arrived.len() < seats {
            return;
        }
        let learned = change.first;
        let arrived = std::mem::take(&mut change.arrived);
        let leaving = arrived
            .into_iter()
            .filter(|(member, _)| self.record.drains.contains_key(member))
            .filter_map(|(member, holding)| {
                let address = self.members.get(&member)?.address.clone();
                Some((Peer::outside(member, address), holding))
            })
            .collect();
        self.form_at_boundary(learned, leaving, out);
    }

    pub(super) fn first_step(&mut self, member: MemberId, generation: Generation, step: Step, out: &mut Out) {
        let Some(m) = self.members.get_mut(&member) else {
            return self.refuse_stranger(member, out);
        };
        m.step = step;
        self.extend_lease(member);
        if generation != self.record.generation || !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        self.top_step = self.top_step.max(step);
        self.fruitless = 0;
        self.grudges.clear();
        if let Some(change) = self.record.changes.back_mut() {
            change.first_step.get_or_insert(self.now);
        }
    }

    pub(super) fn finished(&mut self, member: MemberId, generation: Generation, step: Step, out: &mut Out) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if generation != self.record.generation || !self.is_seated(member) {
            return;
        }
        let seats = self.record.world.as_ref().map_or(0, |world| world.seats.len());
        let Phase::Running(running) = &mut self.phase else { return };
        running.finished.insert(member);
        if running.finished.len() == seats {
            self.top_step = self.top_step.max(step);
            self.close(Closure::Completed { step }, out);
        }
    }

    pub(super) fn running_waits_for(&self, running: &Running) -> Waiting {
        if !running.finished.is_empty() {
            return Waiting::Finish {
                missing: self.seated_except(|member| running.finished.contains(&member)),
            };
        }
        match &running.change {
            None => Waiting::Nothing,
            Some(change) if change.asked => Waiting::Boundary {
                missing: self.seated_except(|member| change.arrived.contains_key(&member)),
            },
            Some(change) => Waiting::Merge { left: change.due.since(self.now) },
        }
    }
}
