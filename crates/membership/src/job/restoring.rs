//! When every member has reached the resume step, and what happens if one cannot.

use std::collections::{BTreeMap, BTreeSet};

use super::running::Running;
use super::{Job, Out, Phase};
use crate::event::Message;
use crate::holding::{Decision, Holding, Moved, Moves, Plan, Resume, Shards, Source};
use crate::ids::{Generation, Lineage, MemberId, Step, Timestamp};
use crate::reason::{Cause, Departure, Note, Waiting};
use crate::record::Stage;

/// Every member has answered; some move state before the barrier opens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Restoring {
    pub(super) resume: Resume,
    source: Source,
    attempt: u32,
    /// Who still has to move what.
    pub(super) pending: BTreeMap<MemberId, Moves>,
    /// Who could not load the checkpoint and waits for somebody who could.
    failed: BTreeSet<MemberId>,
    held: BTreeMap<MemberId, Holding>,
    /// Members without a place in the world that others get their state from.
    outside: BTreeSet<MemberId>,
    pub(super) deadline: Timestamp,
}

impl Restoring {
    pub(super) fn new(
        decision: Decision,
        held: BTreeMap<MemberId, Holding>,
        attempt: u32,
        deadline: Timestamp,
    ) -> Restoring {
        let fetches = decision.moves.values().flat_map(|moves| &moves.fetch);
        let peers = fetches.flat_map(|fetch| &fetch.from).filter(|peer| peer.is_outside());
        Restoring {
            outside: peers.map(|peer| peer.member).collect(),
            resume: decision.resume,
            source: decision.source,
            attempt,
            pending: decision.moves,
            failed: BTreeSet::new(),
            held,
            deadline,
        }
    }

    /// What `member` still has to do, if anything.
    pub(super) fn plan_of(&self, member: MemberId, generation: Generation) -> Option<Plan> {
        self.pending.get(&member).filter(|_| !self.failed.contains(&member)).map(|moves| Plan {
            generation,
            attempt: self.attempt,
            resume: self.resume,
            fetch: moves.fetch.clone(),
            load: moves.load.clone(),
        })
    }

    /// Whether others get their state from this member, which has no place in the world.
    pub(super) fn counts_on(&self, member: MemberId) -> bool {
        self.outside.contains(&member)
    }

    fn tell_plans(&self, generation: Generation, out: &mut Out) {
        for member in &self.outside {
            out.tell(*member, Message::Serve { generation });
        }
        for member in self.pending.keys() {
            if let Some(plan) = self.plan_of(*member, generation) {
                out.tell(*member, Message::Plan(plan));
            }
        }
    }
}

impl Job {
    /// Some members have to move state before the world can run.
    pub(super) fn begin_restore(&mut self, restoring: Restoring, out: &mut Out) {
        restoring.tell_plans(self.record.generation, out);
        self.phase = Phase::Restoring(restoring);
    }

    pub(super) fn restored(
        &mut self,
        member: MemberId,
        generation: Generation,
        attempt: u32,
        resume: Resume,
        moved: &[Moved],
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if let Some(wrong) = moved.iter().find(|part| part.sent != part.got) {
            return self.restore_failed(member, generation, attempt, Some(wrong.from), out);
        }
        let Some(restoring) = self.restoring(generation, attempt) else { return };
        if resume != restoring.resume {
            return;
        }
        let Some(moves) = restoring.pending.remove(&member) else { return };
        let before = restoring.held.remove(&member);
        restoring.held.insert(member, after_moves(resume, before.as_ref(), &moves));
        self.help_failed(out);
        self.go_if_restored(out);
    }

    fn restoring(&mut self, generation: Generation, attempt: u32) -> Option<&mut Restoring> {
        match &mut self.phase {
            Phase::Restoring(restoring)
                if generation == self.record.generation && attempt == restoring.attempt =>
            {
                Some(restoring)
            }
            Phase::Restoring(_)
            | Phase::Forming(_)
            | Phase::Establishing(_)
            | Phase::Running(_)
            | Phase::Closed(_) => None,
        }
    }

    fn go_if_restored(&mut self, out: &mut Out) {
        if let Phase::Restoring(restoring) = &self.phase
            && restoring.pending.is_empty()
            // Who has just come back may hold a newer state, and is waited for as long as for any other answer.
            && self.unheard.is_empty()
        {
            self.go(restoring.resume.step, restoring.source, out);
        }
    }

    pub(super) fn restore_failed(
        &mut self,
        member: MemberId,
        generation: Generation,
        attempt: u32,
        culprit: Option<MemberId>,
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        let Some(restoring) = self.restoring(generation, attempt) else { return };
        let Some(moves) = restoring.pending.get(&member) else { return };
        let loads = moves.load.is_some();
        // What it had is torn by now.
        restoring.held.insert(member, Holding::Nothing);
        match (culprit, restoring.source) {
            (Some(culprit), _) => {
                out.note(Note::BadSource { member: culprit, noticed_by: member });
                self.doubt(culprit);
                self.replan(out);
            }
            (None, Source::Checkpoint { step }) if loads => {
                out.note(Note::BadCheckpoint { step, noticed_by: member });
                restoring.failed.insert(member);
                self.help_failed(out);
            }
            // Nothing but other members' memory was in its plan: it fails on its own account.
            (None, _) => {
                self.lose(member, Departure::Unrestored, out);
                self.after_loss(out);
            }
        }
    }

    /// A source did not deliver, so another one is used. If there is none as good, steps would be lost over what may be
    /// a fault of the network or of the receiver: then it gets a second chance.
    fn doubt(&mut self, culprit: MemberId) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        if !self.members.contains_key(&culprit) {
            // It is gone, and no source any more.
            return;
        }
        let resume = restoring.resume;
        let held = restoring.held_for_sure();
        self.distrusted.insert(culprit);
        let as_good = self.decide(&held).is_some_and(|decision| decision.resume == resume);
        if !as_good && self.doubted.insert(culprit) {
            self.distrusted.remove(&culprit);
        }
    }

    /// A member that cannot load the checkpoint fetches from one that could; if nobody could, the checkpoint is bad.
    fn help_failed(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        if restoring.failed.is_empty() || restoring.pending.len() > restoring.failed.len() {
            return;
        }
        let could = |(member, holding): (&MemberId, &Holding)| {
            is_at(holding, restoring.resume) && !self.distrusted.contains(member)
        };
        if !restoring.held.iter().any(could) {
            let load = restoring.pending.values().find_map(|moves| moves.load.as_ref());
            self.unreadable.extend(load.map(|load| load.commit.key()));
        }
        self.replan(out);
    }

    /// What members without a place in the world hold has changed. If others get their state from one that is gone,
    /// nobody waits until that shows; if one came back with a newer state, that one is gone to (rule M-7).
    pub(super) fn restore_on(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        let is_gone = |member: &MemberId| !self.members.contains_key(member);
        let is_newer = |holding: &Holding| match holding {
            Holding::State { resume, .. } => resume.step > restoring.resume.step,
            Holding::Fresh { .. } | Holding::Nothing => false,
        };
        let better = || {
            let decision = self.decide(&restoring.held_for_sure());
            decision.is_some_and(|decision| decision.resume.step > restoring.resume.step)
        };
        if restoring.outside.iter().any(is_gone) || (self.rested.values().any(is_newer) && better()) {
            return self.replan(out);
        }
        self.go_if_restored(out);
    }

    /// Decides anew with what has been learned. Members that already have the state that comes out keep it.
    fn replan(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        let held = restoring.held_for_sure();
        let (old, old_source) = (restoring.resume, restoring.source);
        let (attempt, deadline) = (restoring.attempt + 1, restoring.deadline);
        let Some(mut decision) = self.decide(&held) else {
            let is_lost = self.is_lost(&held);
            self.unrestorable(out);
            if is_lost {
                // Members whose moves were under way count as having nothing. That is for them to say: at once.
                self.try_again(out);
            }
            return;
        };
        if matches!(old_source, Source::Initial) && matches!(decision.source, Source::Initial) {
            // Another model for the initial state is another state: it needs a name of its own (rule M-15).
            self.break_world(Cause::Unrestored, out);
            return self.try_form(out);
        }
        if decision.resume == old {
            decision.source = old_source;
        }
        self.begin_restore(Restoring::new(decision, held, attempt, deadline), out);
        self.go_if_restored(out);
    }

    /// The barrier opens. From here on the state goes by the name of the world that runs from it (rule M-15).
    pub(super) fn go(&mut self, step: Step, source: Source, out: &mut Out) {
        let generation = self.record.generation;
        let resume = Resume { lineage: Lineage(generation.0), step };
        // What was made beyond the state that is gone back to must not be taken for this branch's.
        self.record.commits.retain(|commit| commit.step <= step);
        self.give_up_beyond(step, out);
        if let Some(change) = self.record.changes.back_mut() {
            change.restored = Some(self.now);
            change.resume = Some(resume);
            change.source = Some(source);
            change.steps_lost = self.top_step.0.saturating_sub(step.0);
        }
        self.top_step = step;
        self.record.stage = Stage::Running;
        self.record.resume = resume;
        self.record.source = Some(source);
        self.rested.retain(|member, _| !self.distrusted.contains(member));
        self.distrusted.clear();
        self.doubted.clear();
        self.unreadable.clear();
        out.save();
        out.note(Note::Running { generation, resume });
        for member in self.seated() {
            out.tell(member, Message::Go { generation, resume });
        }
        self.phase = Phase::Running(Running::new());
        self.release_drained(out);
        self.forget_drains_of_strangers();
        self.review(true, out);
    }

    /// Lets members go that leave and have no place: once a world runs, or if they have nothing that could help it.
    pub(super) fn release_drained(&mut self, out: &mut Out) {
        let drained: Vec<MemberId> = self.record.drains.keys().copied().collect();
        for member in drained {
            self.release_if_drained(member, out);
        }
    }

    pub(super) fn release_if_drained(&mut self, member: MemberId, out: &mut Out) {
        if !self.record.drains.contains_key(&member) || self.is_seated(member) || !self.is_reachable(member) {
            return;
        }
        let runs = matches!(self.phase, Phase::Running(_));
        let serves = matches!(self.rested.get(&member), Some(Holding::State { .. }));
        if runs || !(serves || self.unheard.contains_key(&member)) {
            out.save();
            self.lose(member, Departure::Drained, out);
        }
    }

    /// Drains of members that did not come back after a start of the coordinator must not stay for ever.
    fn forget_drains_of_strangers(&mut self) {
        if self.now >= self.takeover_until {
            let members = &self.members;
            self.record.drains.retain(|member, _| members.contains_key(member));
        }
    }

    pub(super) fn restore_overdue(&mut self, out: &mut Out) {
        let unheard: Vec<MemberId> = self.unheard_for_too_long();
        for member in &unheard {
            self.lose(*member, Departure::Unready, out);
        }
        if let Phase::Restoring(restoring) = &self.phase
            && restoring.deadline <= self.now
        {
            // Who has said that it cannot load the checkpoint waits for the others, too.
            let late = restoring.pending.keys().filter(|member| !restoring.failed.contains(member));
            for member in late.copied().collect::<Vec<_>>() {
                self.lose(member, Departure::Unrestored, out);
            }
        } else if unheard.is_empty() {
            return;
        }
        self.after_loss(out);
    }

    pub(super) fn restoring_deadline(&self, restoring: &Restoring) -> Timestamp {
        let unheard = self.unheard.values().min().copied();
        // Nobody is late with a plan if nobody has one left to carry out.
        let late = (!restoring.pending.is_empty()).then_some(restoring.deadline);
        [unheard, late].into_iter().flatten().min().unwrap_or(restoring.deadline)
    }

    pub(super) fn restoring_waits_for(&self, restoring: &Restoring) -> Waiting {
        if restoring.pending.is_empty() {
            return Waiting::Ready { missing: self.unheard.keys().copied().collect() };
        }
        Waiting::Restored { missing: restoring.pending.keys().copied().collect() }
    }
}

impl Restoring {
    /// What members hold whatever has become of the moves that are under way: those may be half done.
    fn held_for_sure(&self) -> BTreeMap<MemberId, Holding> {
        let mut held = self.held.clone();
        held.extend(self.pending.keys().map(|member| (*member, Holding::Nothing)));
        held
    }
}

/// What a member holds once it has carried out `moves`.
fn after_moves(resume: Resume, before: Option<&Holding>, moves: &Moves) -> Holding {
    let moved =
        moves.fetch.iter().map(|fetch| &fetch.shards).chain(moves.load.iter().map(|load| &load.shards));
    let mut shards = BTreeSet::new();
    for some in moved {
        if some.is_empty() {
            return Holding::State { resume, shards: Shards::Whole };
        }
        shards.extend(some.iter().copied());
    }
    match before {
        Some(Holding::State { resume: held, shards: Shards::Whole }) if *held == resume => {
            return Holding::State { resume, shards: Shards::Whole };
        }
        Some(Holding::State { resume: held, shards: Shards::Only(some) }) if *held == resume => {
            shards.extend(some.iter().copied());
        }
        Some(Holding::State { .. } | Holding::Fresh { .. } | Holding::Nothing) | None => {}
    }
    Holding::State { resume, shards: Shards::Only(shards) }
}

fn is_at(holding: &Holding, resume: Resume) -> bool {
    match holding {
        Holding::State { resume: held, .. } => *held == resume,
        Holding::Fresh { .. } | Holding::Nothing => false,
    }
}
