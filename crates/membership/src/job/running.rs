//! A world runs: planned changes are collected, asked for, and taken at a step boundary; and how a job ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Job, Member, Out, Phase};
use crate::event::Message;
use crate::holding::Holding;
use crate::ids::{Generation, MemberId, Step, Timestamp};
use crate::reason::{Closure, Departure, Waiting};
use crate::spec::Timing;
use crate::world::select;

/// The barrier is open; the coordinator hears nothing of the steps.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Running {
    pub(super) change: Option<Change>,
    finished: BTreeSet<MemberId>,
}

/// A planned change: a join, a notice, a drain, new bounds, the end of the job; or several of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Change {
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
    /// When the boundary is asked for.
    pub(super) when: When,
    asked: bool,
    /// Whom it was asked of. One would do, for the control word carries the wish round the ring; a few more cover a
    /// stream that is dead without anybody knowing.
    asked_of: BTreeSet<MemberId>,
    arrived: BTreeMap<MemberId, Holding>,
    /// Set by the first arrival: the others have finished the same collective.
    pub(super) overdue: Option<Timestamp>,
}

/// When a boundary is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum When {
    /// When no other change has come up for a while, or at the latest then.
    Quiet {
        /// The latest instant.
        at_most: Timestamp,
    },
    /// At that instant, whatever else comes up.
    At(Timestamp),
}

/// Of how many members a boundary is asked.
const ASKED_MAX: usize = 3;

/// A world cannot do without a member that is to leave: the boundary is put off until this long before its deadline,
/// or a quarter of the time left if that is shorter.
const LAST_MOMENT: Duration = Duration::from_secs(10);

impl Running {
    pub(super) fn new() -> Running {
        Running { change: None, finished: BTreeSet::new() }
    }

    /// Whether a boundary has been asked for.
    pub(super) fn asked(&self) -> bool {
        self.change.as_ref().is_some_and(|change| change.asked)
    }

    pub(super) fn asked_of(&self, member: MemberId) -> bool {
        self.change.as_ref().is_some_and(|change| change.asked_of.contains(&member))
    }

    /// Whether members stand at the boundary and wait for the others.
    pub(super) fn stopping(&self) -> bool {
        self.change.as_ref().is_some_and(|change| change.overdue.is_some())
    }

    pub(super) fn deadline(&self, timing: &Timing) -> Option<Timestamp> {
        let change = self.change.as_ref()?;
        if change.asked { change.overdue } else { Some(change.due(timing)) }
    }

    pub(super) fn each_deadline(&mut self, visit: &mut dyn FnMut(&mut Timestamp)) {
        self.change.iter_mut().flat_map(|change| &mut change.overdue).for_each(visit);
    }
}

impl When {
    #[cfg(test)]
    pub(super) fn map(self, change: impl FnOnce(Timestamp) -> Timestamp) -> When {
        match self {
            When::Quiet { at_most } => When::Quiet { at_most: change(at_most) },
            When::At(at) => When::At(change(at)),
        }
    }
}

impl Change {
    fn new(first: Timestamp, last: Timestamp, when: When) -> Change {
        Change {
            first,
            last,
            when,
            asked: false,
            asked_of: BTreeSet::new(),
            arrived: BTreeMap::new(),
            overdue: None,
        }
    }

    fn due(&self, timing: &Timing) -> Timestamp {
        match self.when {
            When::Quiet { at_most } => self.last.after(timing.merge_quiet).min(at_most),
            When::At(at) => at,
        }
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
        let when = self.change_when(first);
        let Phase::Running(running) = &mut self.phase else { return };
        running.change = when.map(|when| Change::new(first, last, when));
        self.running_due(out);
    }

    /// A member that is not in the world has come, or asks for a place. Joiners come by the thousand: a pass over all members only if this
    /// one may make a difference (rule M-12).
    pub(super) fn consider_spare(&mut self, member: MemberId, asks: bool, out: &mut Out) {
        let Phase::Running(running) = &mut self.phase else { return };
        let Some(Member { available: true, slots, .. }) = self.members.get(&member) else { return };
        let fits = *slots <= self.record.spec.max.saturating_sub(self.roster.size.0);
        match &mut running.change {
            None if !fits => {}
            Some(Change { when: When::Quiet { .. }, last, .. }) => {
                if asks && fits {
                    *last = self.now;
                }
            }
            Some(Change { when: When::At(_), .. }) | None => self.review(asks, out),
        }
    }

    /// When the world is to be asked to stop for what has come up, if for anything.
    fn change_when(&self, first: Timestamp) -> Option<When> {
        if self.record.closing {
            return Some(When::At(first));
        }
        let merged = first.after(self.timing.merge_max);
        let leaving = || self.seated().filter_map(|member| self.record.drains.get(&member));
        let deadline = leaving().filter_map(|drain| drain.deadline).min();
        match select(&self.record.spec, &self.candidates()) {
            Ok(chosen) => {
                let changed = !chosen.into_iter().eq(self.seated());
                let half_way = deadline.map_or(merged, |at| first.after(at.since(first) / 2));
                changed.then(|| When::Quiet { at_most: merged.min(half_way) })
            }
            // Without those who leave there is no world. An operator gets what they asked for; a notice is made use of
            // to the last moment, for a replacement may still come.
            Err(_) if leaving().any(|drain| drain.deadline.is_none()) => {
                Some(When::Quiet { at_most: merged })
            }
            Err(_) => deadline.map(|at| {
                let left = at.since(first);
                When::At(first.after(left - LAST_MOMENT.min(left / 4)))
            }),
        }
    }

    pub(super) fn running_due(&mut self, out: &mut Out) {
        let Phase::Running(running) = &mut self.phase else { return };
        let Some(change) = &mut running.change else { return };
        if !change.asked {
            if change.due(&self.timing) <= self.now {
                self.ask_if_still_wanted(out);
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

    /// What was wanted may have gone away meanwhile, like a joiner that died again: that costs no generation.
    fn ask_if_still_wanted(&mut self, out: &mut Out) {
        let Phase::Running(running) = &self.phase else { return };
        let wanted = running.change.as_ref().and_then(|change| self.change_when(change.first));
        let Phase::Running(running) = &mut self.phase else { return };
        match (&mut running.change, wanted) {
            (Some(change), Some(_)) => {
                change.asked = true;
                self.ask_boundary(out);
            }
            (change, _) => *change = None,
        }
    }

    /// Asks a few members that can be reached; one of them is enough.
    pub(super) fn ask_boundary(&mut self, out: &mut Out) {
        let generation = self.record.generation;
        let reachable: BTreeSet<MemberId> =
            self.seated().filter(|member| self.is_reachable(*member)).take(ASKED_MAX).collect();
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
        if !self.is_seated(member) || matches!(self.phase, Phase::Forming(_)) {
            return self.rests(member, holding, out);
        }
        if generation != self.record.generation {
            return;
        }
        self.learn_step(&holding);
        let (now, overdue, seats) = (self.now, self.now.after(self.timing.busy), self.seats());
        let Phase::Running(running) = &mut self.phase else { return };
        // A coordinator that was restarted may have forgotten what it asked for; the members have stopped all the same.
        let change = running.change.get_or_insert_with(|| Change::new(now, now, When::At(now)));
        change.asked = true;
        let is_first = change.overdue.is_none();
        change.overdue.get_or_insert(overdue);
        change.arrived.insert(member, holding);
        if change.arrived.len() == seats {
            let (learned, arrived) = (change.first, std::mem::take(&mut change.arrived));
            self.form_at_boundary(learned, arrived, out);
        } else if is_first {
            // From now on everybody waits for everybody.
            self.shorten_leases_adrift();
        }
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
        if let Some(change) = self.record.changes.back_mut().filter(|change| change.first_step.is_none()) {
            // For the history alone: what a recovery cost should outlive the coordinator that saw it.
            change.first_step = Some(self.now);
            out.save();
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
        let seats = self.seats();
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
            Some(change) => Waiting::Merge { left: change.due(&self.timing).since(self.now) },
        }
    }
}
