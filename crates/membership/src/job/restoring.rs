//! When every member has reached the resume step, and what happens if one cannot.

use std::collections::{BTreeMap, BTreeSet};

use super::running::Running;
use super::{Job, Out, Phase, Stream};
use crate::event::Message;
use crate::holding::{Decision, Holding, Moved, Moves, Plan, Resume, Shards, Source};
use crate::ids::{Generation, MemberId, Timestamp};
use crate::reason::{Cause, Departure, Note};
use crate::record::Stage;
use crate::spec::Timing;
use crate::world::Peer;

/// Every member has answered; some move state before the barrier opens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Restoring {
    resume: Resume,
    source: Source,
    attempt: u32,
    /// Who still has to move what.
    pub(super) pending: BTreeMap<MemberId, Moves>,
    /// Who could not load the checkpoint and waits for somebody who could.
    failed: BTreeSet<MemberId>,
    held: BTreeMap<MemberId, Holding>,
    pub(super) leaving: Vec<(Peer, Holding)>,
    pub(super) deadline: Timestamp,
}

impl Restoring {
    pub(super) fn new(
        decision: Decision,
        held: BTreeMap<MemberId, Holding>,
        leaving: Vec<(Peer, Holding)>,
        now: Timestamp,
        timing: &Timing,
    ) -> Restoring {
        Restoring {
            resume: decision.resume,
            source: decision.source,
            attempt: 1,
            pending: decision.moves,
            failed: BTreeSet::new(),
            held,
            leaving,
            deadline: now.after(timing.restore),
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

    pub(super) fn tell_plans(&self, generation: Generation, out: &mut Out) {
        for member in self.pending.keys() {
            if let Some(plan) = self.plan_of(*member, generation) {
                out.tell(*member, Message::Plan(plan));
            }
        }
    }
}

impl Job {
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
        {
            self.go(restoring.resume, restoring.source, out);
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
        if !restoring.pending.contains_key(&member) {
            return;
        }
        // What it had is torn by now.
        restoring.held.insert(member, Holding::Nothing);
        match (culprit, restoring.source) {
            (Some(culprit), _) => {
                out.note(Note::BadSource { member: culprit, noticed_by: member });
                self.distrusted.insert(culprit);
                self.replan(out);
            }
            (None, Source::Checkpoint { step }) => {
                out.note(Note::BadCheckpoint { step, noticed_by: member });
                restoring.failed.insert(member);
                self.help_failed(out);
            }
            // Nothing but other members' memory was in its plan: it fails on its own account.
            (None, Source::Memory | Source::AbandonedMemory | Source::Initial) => {
                self.lose(member, Departure::Unrestored, out);
                self.after_loss(out);
            }
        }
    }

    /// A member that cannot load the checkpoint fetches from one that could; if nobody could, the checkpoint is bad.
    fn help_failed(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        if restoring.failed.is_empty() {
            return;
        }
        let Source::Checkpoint { .. } = restoring.source else { return };
        if restoring.pending.len() > restoring.failed.len() {
            return;
        }
        let loaded = restoring.held.values().any(|holding| is_at(holding, restoring.resume));
        if !loaded {
            let load = restoring.pending.values().find_map(|moves| moves.load.as_ref());
            self.unreadable.extend(load.map(|load| load.commit.key()));
        }
        self.replan(out);
    }

    /// Decides anew with what has been learned. Members that already have the state that comes out keep it.
    fn replan(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        let (mut held, leaving) = (restoring.held.clone(), restoring.leaving.clone());
        // Whoever was told to move something may have done half of it.
        held.extend(restoring.pending.keys().map(|member| (*member, Holding::Nothing)));
        let (old, attempt, deadline) = (restoring.resume, restoring.attempt, restoring.deadline);
        let old_source = restoring.source;
        let Some(mut decision) = self.decide(&held, &leaving) else {
            return self.unrestorable(out);
        };
        if matches!(old_source, Source::Initial) && matches!(decision.source, Source::Initial) {
            // Another model for the initial state is another state: it needs a name of its own (rule M-15).
            self.break_world(Cause::Unrestored, out);
            return self.try_form(out);
        }
        if decision.resume == old {
            decision.source = old_source;
        }
        let mut restoring = Restoring::new(decision, held, leaving, self.now, &self.timing);
        restoring.attempt = attempt + 1;
        restoring.deadline = deadline;
        restoring.tell_plans(self.record.generation, out);
        self.phase = Phase::Restoring(restoring);
        self.go_if_restored(out);
    }

    /// The barrier opens.
    pub(super) fn go(&mut self, resume: Resume, source: Source, out: &mut Out) {
        let generation = self.record.generation;
        let lost = match source {
            Source::Memory => self.top_step.0.saturating_sub(resume.step.0),
            Source::Checkpoint { .. } | Source::AbandonedMemory | Source::Initial => {
                // The commits of the branch that is given up must not be taken for this one's.
                self.record.commits.retain(|commit| commit.step <= resume.step);
                self.drop_saving(out);
                self.top_step.0.saturating_sub(resume.step.0)
            }
        };
        self.top_step = resume.step;
        if let Some(change) = self.record.changes.back_mut() {
            change.restored = Some(self.now);
            change.resume = Some(resume);
            change.source = Some(source);
            change.steps_lost = lost;
        }
        self.record.stage = Stage::Running;
        self.record.resume = resume;
        self.record.source = Some(source);
        self.distrusted.clear();
        self.unreadable.clear();
        out.save();
        out.note(Note::Running { generation, resume });
        for member in self.seated() {
            out.tell(member, Message::Go { generation, resume });
        }
        self.phase = Phase::Running(Running::new(self.now));
        self.release_drained(out);
        self.review(true, out);
    }

    /// Members that leave have served as sources for as long as that could help.
    pub(super) fn release_drained(&mut self, out: &mut Out) {
        let drained: Vec<MemberId> = self
            .record
            .drains
            .keys()
            .filter(|member| self.members.get(member).is_some_and(|m| m.seat.is_none()))
            .copied()
            .collect();
        for member in drained {
            let reachable = self.members.get(&member).is_some_and(|m| m.stream == Stream::Up);
            if reachable {
                out.save();
                self.lose(member, Departure::Drained, out);
            }
        }
    }

    pub(super) fn restore_overdue(&mut self, out: &mut Out) {
        let Phase::Restoring(restoring) = &self.phase else { return };
        if self.now < restoring.deadline {
            return;
        }
        let late: Vec<MemberId> = restoring.pending.keys().copied().collect();
        for member in late {
            self.lose(member, Departure::Unrestored, out);
        }
        self.after_loss(out);
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
