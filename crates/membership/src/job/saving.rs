//! When a checkpoint counts: every rank of the world that made it has reported its part, all with one digest of the
//! state, and the record that names the manifest is saved (rule M-14).
//!
//! Several may be under way at once, for ranks write at different speeds: a fast one may have its part of the next before a
//! slow one has its part of this. Whichever is whole first is committed, and those older than it are given up.

use std::collections::{BTreeMap, BTreeSet};

use super::{Job, Out, Phase};
use crate::event::Message;
use crate::holding::ShardReport;
use crate::ids::{Digest, Generation, MemberId, Step};
use crate::reason::{Cause, Note, SaveTrouble};
use crate::record::Commit;

/// What tells a checkpoint from every other one of the job.
pub(crate) type SaveKey = (Generation, Step);

/// How many checkpoints may be under way.
const SAVINGS_MAX: usize = 4;

/// How many that were given up are remembered: a late part must not begin one of them again.
const GIVEN_UP_MAX: usize = 16;

/// A checkpoint whose parts are being written. It outlives a planned change of the world: the parts are what they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Saving {
    /// The members of the world that makes it, in rank order.
    seats: Vec<MemberId>,
    /// Those of them that have not reported.
    missing: BTreeSet<MemberId>,
    reports: BTreeMap<MemberId, ShardReport>,
    /// Who was asked to write the manifest.
    publisher: Option<MemberId>,
}

/// The checkpoints that are under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Savings {
    under_way: BTreeMap<SaveKey, Saving>,
    given_up: BTreeSet<SaveKey>,
    /// The last world that ran, once it is over: its ranks may still be writing.
    ran: Option<(Generation, Vec<MemberId>)>,
    /// What went wrong last, until a checkpoint is committed again.
    pub(crate) trouble: Option<SaveTrouble>,
}

impl Savings {
    /// Whether none is under way.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Forgets what only matters if somebody still speaks of a checkpoint that nobody knows of any more.
    #[cfg(test)]
    pub(super) fn forget_all_but(&mut self, known: &BTreeSet<SaveKey>) {
        self.given_up.retain(|key| known.contains(key));
        self.ran.take_if(|(ran, _)| !known.iter().any(|(generation, _)| generation == ran));
        self.trouble = None;
    }

    fn remember_given_up(&mut self, key: SaveKey) {
        self.given_up.insert(key);
        if self.given_up.len() > GIVEN_UP_MAX {
            self.given_up.pop_first();
        }
    }
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
        let key = (generation, step);
        if self.committed(key) {
            // The answer was lost (rule M-10).
            return out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
        if self.savings.given_up.contains(&key) {
            return self.tell_given_up(member, key, out);
        }
        if !self.savings.under_way.contains_key(&key) {
            let Some(seats) = self.may_begin(key) else { return self.came_too_late(member, key, out) };
            let missing = seats.iter().copied().collect();
            let saving = Saving { seats, missing, reports: BTreeMap::new(), publisher: None };
            self.savings.under_way.insert(key, saving);
            if self.savings.under_way.len() > SAVINGS_MAX
                && let Some(oldest) = self.savings.under_way.keys().next().copied()
            {
                self.give_up(oldest, out);
            }
        }
        let Some(saving) = self.savings.under_way.get_mut(&key) else { return };
        if !saving.missing.remove(&member) {
            return;
        }
        saving.reports.insert(member, report);
        if saving.missing.is_empty() {
            self.compare(key, out);
        }
    }

    /// A part of a checkpoint that is not to be any more: of a world whose others are gone, or older than what is committed.
    fn came_too_late(&mut self, member: MemberId, key: SaveKey, out: &mut Out) {
        self.savings.remember_given_up(key);
        self.tell_given_up(member, key, out);
        if self.record.commits.last().is_some_and(|commit| key.1 <= commit.step) {
            out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
    }

    fn committed(&self, key: SaveKey) -> bool {
        self.record.commits.iter().any(|commit| commit.key() == key)
    }

    /// The members whose parts make up this checkpoint, if it may begin: the world's that runs; or the last one's that
    /// ran, if all of them are still there. It must be newer than what is committed, and on the way to what runs.
    fn may_begin(&self, (generation, step): SaveKey) -> Option<Vec<MemberId>> {
        let newest = self.record.commits.last().map_or(Step(0), |commit| commit.step);
        if step <= newest {
            return None;
        }
        let runs = matches!(self.phase, Phase::Running(_));
        if runs && generation == self.record.generation {
            return Some(self.seated().collect());
        }
        let (ran, seats) = self.savings.ran.as_ref()?;
        let is_present = !runs || step <= self.record.resume.step;
        let all_there = seats.iter().all(|member| self.members.contains_key(member));
        (*ran == generation && is_present && all_there).then(|| seats.clone())
    }

    /// The world that runs is over; what it has begun may still be finished.
    pub(super) fn world_ran(&mut self) {
        if matches!(self.phase, Phase::Running(_)) {
            self.savings.ran = Some((self.record.generation, self.seated().collect()));
        }
    }

    /// All parts are there. Ranks that hold different states must not be mixed.
    fn compare(&mut self, key: SaveKey, out: &mut Out) {
        let Some(saving) = self.savings.under_way.get(&key) else { return };
        let mut by_digest: BTreeMap<Digest, Vec<MemberId>> = BTreeMap::new();
        for (member, report) in &saving.reports {
            by_digest.entry(report.state).or_default().push(*member);
        }
        if by_digest.len() <= 1 {
            return self.ask_publish(key, out);
        }
        let majority = by_digest.values().find(|members| members.len() * 2 > saving.seats.len());
        let minority: BTreeSet<MemberId> = match majority {
            Some(right) => saving.seats.iter().filter(|member| !right.contains(member)).copied().collect(),
            None => BTreeSet::new(),
        };
        let seats = saving.seats.clone();
        out.note(Note::Diverged { step: key.1, members: minority.iter().copied().collect() });
        self.give_up(key, out);
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
    fn ask_publish(&mut self, key: SaveKey, out: &mut Out) {
        let Some(saving) = self.savings.under_way.get(&key) else { return };
        let publisher = saving.seats.iter().copied().find(|member| self.is_reachable(*member));
        let Some(saving) = self.savings.under_way.get_mut(&key) else { return };
        saving.publisher = publisher;
        if let Some(publisher) = publisher {
            let message = publish(key, saving);
            out.tell(publisher, message);
        }
    }

    pub(super) fn retell_publish(&mut self, member: MemberId, out: &mut Out) {
        let whole = self.savings.under_way.iter().filter(|(_, saving)| saving.missing.is_empty());
        let due: Vec<(SaveKey, Option<MemberId>)> =
            whole.map(|(key, saving)| (*key, saving.publisher)).collect();
        for (key, publisher) in due {
            if publisher.is_none_or(|publisher| publisher == member) {
                self.ask_publish(key, out);
            }
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
        let key = (generation, step);
        if self.committed(key) {
            return out.tell(member, Message::Committed { kept: self.record.commits.clone() });
        }
        let Some(saving) = self.savings.under_way.get(&key) else { return };
        if saving.publisher != Some(member) || !saving.missing.is_empty() {
            return;
        }
        let shards = saving.seats.len() as u32;
        // Older ones are of no use any more; what was written of them is deleted with all that is old.
        self.savings.under_way.retain(|(_, other), _| *other > step);
        self.record.commits.push(Commit { step, generation, shards, manifest, at: self.now });
        let surplus = self.record.commits.len().saturating_sub(self.record.spec.keep as usize);
        self.record.commits.drain(..surplus);
        self.savings.trouble = None;
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
        let Some(name) = self.members.get(&member).map(|m| m.name.clone()) else {
            return self.refuse_stranger(member, out);
        };
        let key = (generation, step);
        let is_under_way = self.savings.under_way.contains_key(&key);
        if !is_under_way && self.may_begin(key).is_none() {
            return;
        }
        let trouble = SaveTrouble { step, member: name };
        if self.savings.trouble.as_ref() != Some(&trouble) {
            out.note(Note::SaveFailed(trouble.clone()));
        }
        self.savings.trouble = Some(trouble);
        if is_under_way {
            self.give_up(key, out);
        } else {
            // The others' parts are still to come: they come in vain.
            self.savings.remember_given_up(key);
        }
    }

    /// What a world computed beyond the state that is gone back to must not be taken for this branch's.
    pub(super) fn give_up_beyond(&mut self, step: Step, out: &mut Out) {
        let beyond: Vec<SaveKey> =
            self.savings.under_way.keys().filter(|(_, other)| *other > step).copied().collect();
        for key in beyond {
            self.give_up(key, out);
        }
    }

    /// A checkpoint will never be whole. Those who have written their part of it are told, so that it does not lie there
    /// for ever; that makes room where a full disk was the reason.
    ///
    /// A part is deleted on the strength of this, so it is told only together with a save: a coordinator that was succeeded
    /// and does not know it cannot do that.
    fn give_up(&mut self, key: SaveKey, out: &mut Out) {
        let Some(saving) = self.savings.under_way.remove(&key) else { return };
        self.savings.remember_given_up(key);
        out.note(Note::SaveDropped { step: key.1 });
        for member in saving.reports.keys() {
            self.tell_given_up(*member, key, out);
        }
    }

    fn tell_given_up(&self, member: MemberId, (generation, step): SaveKey, out: &mut Out) {
        if self.members.contains_key(&member) {
            out.save();
            out.tell(member, Message::SaveGivenUp { generation, step });
        }
    }

    /// A member is gone: what it has not reported will never come; what it was to publish another one publishes.
    pub(super) fn saving_lost(&mut self, member: MemberId, out: &mut Out) {
        let keys: Vec<SaveKey> = self.savings.under_way.keys().copied().collect();
        for key in keys {
            let Some(saving) = self.savings.under_way.get(&key) else { continue };
            if saving.missing.contains(&member) {
                self.give_up(key, out);
            } else if saving.publisher == Some(member) {
                self.ask_publish(key, out);
            }
        }
    }
}

fn publish((generation, step): SaveKey, saving: &Saving) -> Message {
    let shards = saving.seats.iter().filter_map(|member| saving.reports.get(member)).copied().collect();
    Message::Publish { generation, step, shards }
}
