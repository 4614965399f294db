//! When every member has answered the new world, and from which state it resumes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::restoring::Restoring;
use super::{Job, Out, Phase};
use crate::holding::{Decision, Holding, Holdings, decide};
use crate::ids::{Generation, MemberId, Timestamp};
use crate::reason::{Cause, Departure, Note, Waiting};
use crate::record::JobRecord;
use crate::spec::{Sharding, Timing};

/// A world is published; its members leave the old one, build the new one and say what they hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Establishing {
    pub(super) ready: BTreeMap<MemberId, Holding>,
    pub(super) since: Timestamp,
    pub(super) deadline: Timestamp,
    /// The number of the first plan, should there be plans.
    pub(super) first_attempt: u32,
}

impl Establishing {
    pub(super) fn new(now: Timestamp, timing: &Timing) -> Establishing {
        let deadline = now.after(timing.establish);
        Establishing { ready: BTreeMap::new(), since: now, deadline, first_attempt: 1 }
    }

    /// The phase of a job whose record says that a world is published: members attach again first.
    ///
    /// Plans may have been told before, under numbers that nobody remembers; numbers that follow the clock are above
    /// them.
    pub(super) fn resumed(record: &JobRecord, now: Timestamp, timing: &Timing) -> Establishing {
        let age = record.changes.back().map_or(Duration::ZERO, |change| now.since(change.learned));
        let first_attempt = u32::try_from(age.as_millis()).unwrap_or(u32::MAX / 2).max(1);
        Establishing { first_attempt, ..Establishing::new(now.after(timing.takeover), timing) }
    }

    pub(super) fn each_deadline(&mut self, change: &mut dyn FnMut(&mut Timestamp)) {
        change(&mut self.since);
        change(&mut self.deadline);
    }
}

impl Job {
    pub(super) fn ready(
        &mut self,
        member: MemberId,
        generation: Generation,
        holding: Holding,
        out: &mut Out,
    ) {
        let Some(m) = self.members.get_mut(&member) else {
            return self.refuse_stranger(member, out);
        };
        m.heard = m.heard.max(generation);
        self.extend_lease(member);
        if generation != self.record.generation || !self.is_seated(member) {
            return;
        }
        if let Phase::Establishing(establishing) = &mut self.phase {
            establishing.ready.insert(member, holding);
            self.resume_if_ready(out);
        }
    }

    /// All that the next state depends on is known as soon as every member of the world has answered, and everybody who
    /// was left out of it has said what it holds.
    pub(super) fn resume_if_ready(&mut self, out: &mut Out) {
        let (seats, unheard) = (self.seats(), self.unheard.len());
        let Phase::Establishing(establishing) = &self.phase else { return };
        let waits = establishing.ready.len() < seats || unheard > 0 || self.a_holder_is_away();
        if waits || self.others_may_know_more(establishing) {
            return;
        }
        let Phase::Establishing(establishing) = &mut self.phase else { return };
        let mut held = std::mem::take(&mut establishing.ready);
        let first_attempt = establishing.first_attempt;
        if let Some(change) = self.record.changes.back_mut() {
            change.rebuilt.get_or_insert(self.now);
        }
        self.name_alike(&mut held);
        self.resume_from(held, first_attempt, out);
    }

    /// A step of the present branch goes by several names, one for each world that started with it. From here on it goes
    /// by one, for what has been moved adds up with what was there only under the same name.
    fn name_alike(&self, held: &mut BTreeMap<MemberId, Holding>) {
        let branch = self.record.branch();
        for holding in held.values_mut() {
            if let Holding::State { resume, .. } = holding
                && branch.get(&resume.lineage).is_some_and(|last| resume.step <= *last)
            {
                resume.lineage = self.record.resume.lineage;
            }
        }
    }

    /// Whether a member without a place that holds something has just lost its stream: it comes back, or is lost, at once.
    fn a_holder_is_away(&self) -> bool {
        let holds = |holding: &Holding| matches!(holding, Holding::State { .. });
        self.rested.iter().any(|(member, holding)| holds(holding) && !self.is_reachable(*member))
    }

    /// After a start of the coordinator: whether a member that it has not heard of may hold a newer state than all who
    /// are there. Not if one of the last world that ran is there, for its other members are all known.
    fn others_may_know_more(&self, establishing: &Establishing) -> bool {
        let newest = |holding: &Holding| match holding {
            Holding::State { resume, .. } => resume.lineage == self.record.resume.lineage,
            Holding::Fresh { .. } | Holding::Nothing => false,
        };
        self.now < self.blind_until && !(self.took_over_run && establishing.ready.values().any(newest))
    }

    /// Decides from which state the world resumes, and lets it run at once if nobody has to move anything.
    fn resume_from(&mut self, held: BTreeMap<MemberId, Holding>, attempt: u32, out: &mut Out) {
        match self.decide(&held) {
            None => {
                let is_lost = self.is_lost(&held);
                self.unrestorable(out);
                if is_lost {
                    self.give_up_state(&held, out);
                }
            }
            Some(decision) if decision.moves.is_empty() => {
                self.go(decision.resume.step, decision.source, out);
            }
            Some(decision) => {
                let deadline = self.now.after(self.timing.restore);
                self.begin_restore(Restoring::new(decision, held, attempt, deadline), out);
            }
        }
    }

    pub(super) fn decide(&self, held: &BTreeMap<MemberId, Holding>) -> Option<Decision> {
        decide(&Holdings {
            generation: self.record.generation,
            seats: self.record.world.as_ref().map_or(&[], |world| &world.seats),
            held,
            leaving: &self.outside(),
            lineage: self.record.resume.lineage,
            branch: &self.record.branch(),
            commits: &self.record.commits,
            sharding: self.record.shape.map_or(Sharding::Replicated, |shape| shape.sharding),
            distrusted: &self.distrusted,
            unreadable: &self.unreadable,
        })
    }

    /// Whether there is no checkpoint that could be mended, and nobody has anything.
    pub(super) fn is_lost(&self, held: &BTreeMap<MemberId, Holding>) -> bool {
        let nothing = |holding: &Holding| *holding == Holding::Nothing;
        self.record.commits.is_empty()
            && held.values().all(nothing)
            && self.outside().iter().all(|(_, holding)| nothing(holding))
    }

    /// Only programs that are started again have a state to begin with: those that are here are told so, and end.
    fn give_up_state(&mut self, held: &BTreeMap<MemberId, Holding>, out: &mut Out) {
        for member in held.keys() {
            self.lose(*member, Departure::StateLost, out);
        }
        self.try_again(out);
    }

    /// What could not be restored is tried again at once.
    pub(super) fn try_again(&mut self, out: &mut Out) {
        if let Phase::Forming(forming) = &mut self.phase {
            forming.hold = None;
        }
        self.try_form(out);
    }

    /// No source of state is left. An operator may mend it, or a member with a better disk may join: tried again.
    pub(super) fn unrestorable(&mut self, out: &mut Out) {
        let tried: BTreeSet<_> = self.unreadable.iter().map(|(_, step)| *step).collect();
        out.note(Note::Unrestorable { tried: tried.into_iter().collect() });
        self.break_world(Cause::Unrestored, out);
        if let Phase::Forming(forming) = &mut self.phase {
            forming.hold = Some(self.now.after(self.timing.retry));
        }
        self.try_form(out);
    }

    pub(super) fn establishing_deadline(&self, establishing: &Establishing) -> Timestamp {
        let unheard = self.unheard.values().min().copied();
        let blind = (self.now < self.blind_until).then_some(self.blind_until);
        [unheard, blind].into_iter().flatten().fold(establishing.deadline, Timestamp::min)
    }

    /// Members that have not answered in time are struck off, unless they show that they know the world and are only
    /// held up by their own program. Those that have no place in it hold up the others no longer than that.
    pub(super) fn establish_overdue(&mut self, out: &mut Out) {
        let mut late: Vec<MemberId> = Vec::new();
        late.extend(self.unheard_for_too_long());
        late.extend(self.unready_for_too_long());
        for member in &late {
            self.lose(*member, Departure::Unready, out);
        }
        self.after_loss(out);
    }

    /// Members without a place that have not said in time what they hold.
    pub(super) fn unheard_for_too_long(&self) -> Vec<MemberId> {
        let late = self.unheard.iter().filter(|(_, until)| **until <= self.now);
        late.map(|(member, _)| *member).collect()
    }

    fn unready_for_too_long(&mut self) -> Vec<MemberId> {
        let Phase::Establishing(establishing) = &mut self.phase else { return Vec::new() };
        if self.now < establishing.deadline {
            return Vec::new();
        }
        establishing.deadline = self.now.after(self.timing.establish);
        let patience_ends = establishing.since.after(self.timing.busy) <= self.now;
        let generation = self.record.generation;
        let ready = &establishing.ready;
        self.members
            .iter()
            .filter(|(member, m)| m.seat.is_some() && !ready.contains_key(member))
            .filter(|(_, m)| patience_ends || m.heard < generation)
            .map(|(member, _)| *member)
            .collect()
    }

    pub(super) fn establishing_waits_for(&self, establishing: &Establishing) -> Waiting {
        let mut missing = self.seated_except(|member| establishing.ready.contains_key(&member));
        missing.extend(self.unheard.keys());
        // With nobody missing, it is members that this coordinator does not know yet.
        if missing.is_empty() { Waiting::Reattaching { missing } } else { Waiting::Ready { missing } }
    }
}
