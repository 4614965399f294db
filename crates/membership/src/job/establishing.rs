//! When every member has answered the new world, and from which state it resumes.

use std::collections::{BTreeMap, BTreeSet};

use super::restoring::Restoring;
use super::{Job, Out, Phase};
use crate::holding::{Decision, Holding, Holdings, decide};
use crate::ids::{Generation, MemberId, Timestamp};
use crate::reason::{Cause, Departure, Note};
use crate::spec::{Sharding, Timing};
use crate::world::Peer;

/// A world is published; its members leave the old one, build the new one and say what they hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Establishing {
    pub(super) ready: BTreeMap<MemberId, Holding>,
    since: Timestamp,
    pub(super) deadline: Timestamp,
    pub(super) leaving: Vec<(Peer, Holding)>,
}

impl Establishing {
    pub(super) fn new(now: Timestamp, timing: &Timing, leaving: Vec<(Peer, Holding)>) -> Establishing {
        Establishing { ready: BTreeMap::new(), since: now, deadline: now.after(timing.establish), leaving }
    }

    /// The phase of a job whose record says that a world is published: members attach again first.
    pub(super) fn resumed(now: Timestamp, timing: &Timing) -> Establishing {
        Establishing::new(now.after(timing.takeover), timing, Vec::new())
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
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if generation != self.record.generation || !self.is_seated(member) {
            return;
        }
        let seats = self.record.world.as_ref().map_or(0, |world| world.seats.len());
        let Phase::Establishing(establishing) = &mut self.phase else { return };
        establishing.ready.insert(member, holding);
        if establishing.ready.len() < seats {
            return;
        }
        let held = std::mem::take(&mut establishing.ready);
        let leaving = std::mem::take(&mut establishing.leaving);
        if let Some(change) = self.record.changes.back_mut() {
            change.rebuilt.get_or_insert(self.now);
        }
        self.resume_from(held, leaving, out);
    }

    /// Decides from which state the world resumes, and lets it run at once if nobody has to move anything.
    fn resume_from(
        &mut self,
        held: BTreeMap<MemberId, Holding>,
        leaving: Vec<(Peer, Holding)>,
        out: &mut Out,
    ) {
        match self.decide(&held, &leaving) {
            None => self.unrestorable(out),
            Some(decision) if decision.moves.is_empty() => self.go(decision.resume, decision.source, out),
            Some(decision) => {
                let restoring = Restoring::new(decision, held, leaving, self.now, &self.timing);
                restoring.tell_plans(self.record.generation, out);
                self.phase = Phase::Restoring(restoring);
            }
        }
    }

    pub(super) fn decide(
        &self,
        held: &BTreeMap<MemberId, Holding>,
        leaving: &[(Peer, Holding)],
    ) -> Option<Decision> {
        decide(&Holdings {
            generation: self.record.generation,
            seats: self.record.world.as_ref().map_or(&[], |world| &world.seats),
            held,
            leaving,
            lineage: self.record.resume.lineage,
            commits: &self.record.commits,
            sharding: self.record.shape.map_or(Sharding::Replicated, |shape| shape.sharding),
            distrusted: &self.distrusted,
            unreadable: &self.unreadable,
        })
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

    /// Members that have not answered in time are struck off, unless they show that they know the world and are only
    /// held up by their own program.
    pub(super) fn establish_overdue(&mut self, out: &mut Out) {
        let Phase::Establishing(establishing) = &mut self.phase else { return };
        if self.now < establishing.deadline {
            return;
        }
        establishing.deadline = self.now.after(self.timing.establish);
        let patience_ends = establishing.since.after(self.timing.busy) <= self.now;
        let generation = self.record.generation;
        let ready = &establishing.ready;
        let late: Vec<MemberId> = self
            .members
            .iter()
            .filter(|(member, m)| m.seat.is_some() && !ready.contains_key(member))
            .filter(|(_, m)| patience_ends || m.heard < generation)
            .map(|(member, _)| *member)
            .collect();
        for member in &late {
            self.lose(*member, Departure::Unready, out);
        }
        if !late.is_empty() {
            self.after_loss(out);
        }
    }
}
