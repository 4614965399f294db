//! When a checkpoint counts: every rank of the world that made it has reported its part, all with one digest of the
//! state, and the record that names the manifest is saved (rule M-14).

use std::collections::{BTreeMap, BTreeSet};

use super::{Job, Out, Phase};
use crate::event::Message;
use crate::holding::ShardReport;
use crate::ids::{Digest, Generation, MemberId, Step};
use crate::reason::{Cause, Note};
use crate::record::Commit;

/// A checkpoint whose parts are being written. It outlives a planned change of the world: the parts are what they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Saving {
    generation: Generation,
    pub(super) step: Step,
    /// The members of the world that makes it, in rank order.
    seats: Vec<MemberId>,
    /// Those of them that have not reported.
    missing: BTreeSet<MemberId>,
    reports: BTreeMap<MemberId, ShardReport>,
    /// Who was asked to write the manifest.
    publisher: Option<MemberId>,
}

impl Job {
    pub(super) fn shard_written(
        &mut self,
        member: MemberId,
        generation: Generation,
        step: Step,
        report: ShardReport,
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if self.committed(generation, step) {
            // The answer was lost (rule M-10).
            return out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
        if self.saving.as_ref().is_none_or(|saving| (saving.generation, saving.step) != (generation, step)) {
            if !self.may_begin(generation, step) {
                return;
            }
            self.drop_saving(out);
            self.saving = Some(Saving {
                generation,
                step,
                seats: self.seated().collect(),
                missing: self.seated().collect(),
                reports: BTreeMap::new(),
                publisher: None,
            });
        }
        let Some(saving) = &mut self.saving else { return };
        if !saving.missing.remove(&member) {
            return;
        }
        saving.reports.insert(member, report);
        if saving.missing.is_empty() {
            self.compare(out);
        }
    }

    fn committed(&self, generation: Generation, step: Step) -> bool {
        self.record.commits.iter().any(|commit| commit.key() == (generation, step))
    }

    /// Only the world that runs begins a checkpoint, and only one that is newer than all others.
    fn may_begin(&self, generation: Generation, step: Step) -> bool {
        let newest = self.record.commits.last().map_or(Step(0), |commit| commit.step);
        let newer = step > newest && self.saving.as_ref().is_none_or(|saving| step > saving.step);
        newer && generation == self.record.generation && matches!(self.phase, Phase::Running(_))
    }

    /// All parts are there. Ranks that hold different states must not be mixed.
    fn compare(&mut self, out: &mut Out) {
        let Some(saving) = &self.saving else { return };
        let mut by_digest: BTreeMap<Digest, Vec<MemberId>> = BTreeMap::new();
        for (member, report) in &saving.reports {
            by_digest.entry(report.state).or_default().push(*member);
        }
        if by_digest.len() <= 1 {
            return self.ask_publish(out);
        }
        let step = saving.step;
        let majority = by_digest.values().find(|members| members.len() * 2 > saving.seats.len());
        let minority: BTreeSet<MemberId> = match majority {
            Some(right) => saving.seats.iter().filter(|member| !right.contains(member)).copied().collect(),
            None => BTreeSet::new(),
        };
        let seats = saving.seats.clone();
        out.note(Note::Diverged { step, members: minority.iter().copied().collect() });
        self.drop_saving(out);
        if minority.is_empty() {
            // Nobody can tell who is right: go back to what all agreed on; if there is nothing, one must be followed.
            let follow = seats.first().copied().filter(|_| self.record.commits.is_empty());
            self.distrusted.extend(seats.into_iter().filter(|member| Some(*member) != follow));
        } else {
            self.distrusted.extend(minority);
        }
        // A world that restores may have chosen a wrong source; one that has not begun to will choose a right one.
        if matches!(self.phase, Phase::Running(_) | Phase::Restoring(_)) {
            self.break_world(Cause::Diverged, out);
            self.try_form(out);
        }
    }

    /// Asks the lowest rank that can be reached to write the manifest.
    fn ask_publish(&mut self, out: &mut Out) {
        let Some(saving) = &self.saving else { return };
        let publisher = saving.seats.iter().copied().find(|member| self.is_reachable(*member));
        let Some(saving) = &mut self.saving else { return };
        saving.publisher = publisher;
        if let Some(publisher) = publisher {
            let message = publish(saving);
            out.tell(publisher, message);
        }
    }

    pub(super) fn retell_publish(&mut self, member: MemberId, out: &mut Out) {
        let Some(saving) = &self.saving else { return };
        if !saving.missing.is_empty() {
            return;
        }
        if saving.publisher == Some(member) {
            out.tell(member, publish(saving));
        } else if saving.publisher.is_none() {
            self.ask_publish(out);
        }
    }

    pub(super) fn manifest_written(
        &mut self,
        member: MemberId,
        generation: Generation,
        step: Step,
        manifest: Digest,
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if self.committed(generation, step) {
            return out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
        let Some(saving) = &self.saving else { return };
        let expected = (saving.generation, saving.step, saving.publisher) == (generation, step, Some(member));
        if !expected || !saving.missing.is_empty() {
            return;
        }
        let shards = saving.seats.len() as u32;
        self.saving = None;
        self.record.commits.push(Commit { step, generation, shards, manifest, at: self.now });
        let surplus = self.record.commits.len().saturating_sub(self.record.spec.keep as usize);
        self.record.commits.drain(..surplus);
        out.save();
        out.note(Note::Committed { step, manifest });
        for member in self.seated().filter(|member| self.members.contains_key(member)) {
            out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
        self.restore_from_newer(step, out);
    }

    /// A world that is being brought to an older state than the one that has just been committed starts over.
    fn restore_from_newer(&mut self, committed: Step, out: &mut Out) {
        if let Phase::Restoring(restoring) = &self.phase
            && restoring.resume.step < committed
        {
            self.break_world(Cause::Unrestored, out);
            self.try_form(out);
        }
    }

    pub(super) fn save_failed(
        &mut self,
        member: MemberId,
        generation: Generation,
        step: Step,
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        let current = self.saving.as_ref().map(|saving| (saving.generation, saving.step));
        if current == Some((generation, step)) {
            self.drop_saving(out);
        }
    }

    pub(super) fn drop_saving(&mut self, out: &mut Out) {
        if let Some(saving) = self.saving.take() {
            out.note(Note::SaveDropped { step: saving.step });
        }
    }

    /// A member is gone: what it has not reported will never come; what it was to publish another one publishes.
    pub(super) fn saving_lost(&mut self, member: MemberId, out: &mut Out) {
        let Some(saving) = &self.saving else { return };
        if saving.missing.contains(&member) {
            self.drop_saving(out);
        } else if saving.publisher == Some(member) {
            self.ask_publish(out);
        }
    }
}

fn publish(saving: &Saving) -> Message {
    let shards = saving.seats.iter().filter_map(|member| saving.reports.get(member)).copied().collect();
    Message::Publish { generation: saving.generation, step: saving.step, shards }
}
