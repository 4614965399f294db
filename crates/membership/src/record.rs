//! What is saved of a job: as much as a coordinator needs to take up where another one stopped.
//!
//! Leases and heartbeats are not in it. Who merely joined is not in it either: such a member introduces itself again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::holding::{Resume, Source};
use crate::ids::{Digest, Generation, HistoryId, JobId, Lineage, MemberId, MemberName, Step, Timestamp};
use crate::reason::{Cause, Closure, Departure, Drain};
use crate::spec::{Shape, Spec};
use crate::world::World;

/// A committed checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Commit {
    /// The state's step.
    pub step: Step,
    /// The world that made it; step and generation name its files.
    pub generation: Generation,
    /// How many ranks wrote it.
    pub shards: u32,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// When it was committed.
    pub at: Timestamp,
}

impl Commit {
    /// What tells it from every other checkpoint of the job: a world commits a step at most once.
    pub fn key(&self) -> (Generation, Step) {
        (self.generation, self.step)
    }
}

/// How far the last published world has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// It is over, or there has been none.
    Forming,
    /// It is published; its members build it and restore their state.
    Published,
    /// It runs.
    Running,
    /// The job is over.
    Closed(Closure),
}

/// One change of the world, with its times: what `reknit history` shows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorldChange {
    /// The generation it led to.
    pub generation: Generation,
    /// Why.
    pub causes: Vec<Cause>,
    /// Ranks before.
    pub before: u32,
    /// Ranks after.
    pub after: u32,
    /// When the coordinator learned of the first cause.
    pub learned: Timestamp,
    /// When the members had left the old world, as far as they had to: at once after a loss, at the step boundary for a
    /// planned change.
    pub stopped: Timestamp,
    /// When the new world was saved and told.
    pub agreed: Option<Timestamp>,
    /// When every member had answered.
    pub rebuilt: Option<Timestamp>,
    /// When the barrier opened.
    pub restored: Option<Timestamp>,
    /// When a member had committed the first step.
    pub first_step: Option<Timestamp>,
    /// The state it resumed from.
    pub resume: Option<Resume>,
    /// Where that state came from.
    pub source: Option<Source>,
    /// Committed steps that were lost, as far as the coordinator had heard of them.
    pub steps_lost: u64,
}

impl WorldChange {
    /// From the coordinator's first knowledge to the first committed step of the new world.
    pub fn total(&self) -> Option<Duration> {
        self.first_step.map(|at| at.since(self.learned))
    }
}

/// How many [`WorldChange`]s a record keeps.
pub const CHANGES_MAX: usize = 256;

/// How many departed members a record remembers, so that their late joins are refused.
pub const DEPARTED_MAX: usize = 1024;

/// A job as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct JobRecord {
    /// Which job.
    pub job: JobId,
    /// Drawn when the record was made; tells this job from one of the same name in another store.
    pub history: HistoryId,
    /// Its bounds.
    pub spec: Spec,
    /// What its members have in common, once there was one.
    pub shape: Option<Shape>,
    /// The highest generation ever published.
    pub generation: Generation,
    /// The last published world: who survives it keeps its order.
    pub world: Option<World>,
    /// How far that world has come.
    pub stage: Stage,
    /// The state from which the last world that ran has run.
    pub resume: Resume,
    /// Where that state came from.
    pub source: Option<Source>,
    /// Whether an operator wants the job to end.
    pub closing: bool,
    /// The committed checkpoints that are kept, oldest first.
    pub commits: Vec<Commit>,
    /// Members that are to leave.
    pub drains: BTreeMap<MemberId, Drain>,
    /// Members that have left, oldest first.
    pub departed: VecDeque<(MemberId, Departure)>,
    /// The last changes of the world, oldest first.
    pub changes: VecDeque<WorldChange>,
}

impl JobRecord {
    /// A job that nobody has joined yet.
    pub fn new(job: JobId, history: HistoryId, spec: Spec) -> JobRecord {
        JobRecord {
            job,
            history,
            spec,
            shape: None,
            generation: Generation(0),
            world: None,
            stage: Stage::Forming,
            resume: Resume::default(),
            source: None,
            closing: false,
            commits: Vec::new(),
            drains: BTreeMap::new(),
            departed: VecDeque::new(),
            changes: VecDeque::new(),
        }
    }

    pub(crate) fn depart(&mut self, member: MemberId, how: Departure) {
        self.drains.remove(&member);
        if self.departed.len() == DEPARTED_MAX {
            self.departed.pop_front();
        }
        self.departed.push_back((member, how));
    }

    /// How `member` left, if it did and is still remembered.
    pub fn departure(&self, member: MemberId) -> Option<Departure> {
        self.departed.iter().rev().find(|(gone, _)| *gone == member).map(|(_, how)| *how)
    }

    pub(crate) fn change(&mut self, change: WorldChange) {
        if self.changes.len() == CHANGES_MAX {
            self.changes.pop_front();
        }
        self.changes.push_back(change);
    }

    /// The states that lie on the way to the present one: for every world that ran on it, the last of its steps that
    /// counts. What a world computed beyond the step at which a later one went on is not part of it.
    pub fn branch(&self) -> BTreeMap<Lineage, Step> {
        let mut branch = BTreeMap::new();
        let mut last = Step(u64::MAX);
        for change in self.changes.iter().rev() {
            let (Some(resume), Some(source)) = (change.resume, change.source) else { continue };
            branch.insert(resume.lineage, last);
            last = last.min(resume.step);
            let goes_back = match source {
                Source::Memory | Source::Checkpoint { .. } => true,
                Source::AbandonedMemory | Source::Initial => false,
            };
            // What came before a store was put back is not known for sure; at step 0 there is nothing before.
            if !goes_back || last == Step(0) || change.causes.contains(&Cause::StoreRolledBack) {
                break;
            }
        }
        branch
    }

    /// The name of `member` in the last published world.
    pub fn name_of(&self, member: MemberId) -> Option<&MemberName> {
        self.world.as_ref()?.seat(member).map(|seat| &seat.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m15_the_branch_ends_each_world_where_a_later_one_went_on() {
        let change = |generation: u64, ran: Option<(u64, Source)>| WorldChange {
            generation: Generation(generation),
            causes: Vec::new(),
            before: 0,
            after: 0,
            learned: Timestamp(0),
            stopped: Timestamp(0),
            agreed: None,
            rebuilt: None,
            restored: ran.map(|_| Timestamp(0)),
            first_step: None,
            resume: ran.map(|(step, _)| Resume { lineage: Lineage(generation), step: Step(step) }),
            source: ran.map(|(_, source)| source),
            steps_lost: 0,
        };
        let job = JobId::new("job").expect("a plain name");
        let mut record = JobRecord::new(job, HistoryId(7), Spec::default());
        let branch = |record: &JobRecord| -> Vec<(u64, u64)> {
            record.branch().into_iter().map(|(world, step)| (world.0, step.0)).collect()
        };
        assert_eq!(branch(&record), []);
        record.changes.push_back(change(1, Some((0, Source::Initial))));
        record.changes.push_back(change(2, None));
        record.changes.push_back(change(3, Some((10, Source::Memory))));
        assert_eq!(branch(&record), [(1, 10), (3, u64::MAX)], "world 2 never ran");
        record.changes.push_back(change(4, Some((8, Source::Checkpoint { step: Step(8) }))));
        assert_eq!(branch(&record), [(1, 8), (3, 8), (4, u64::MAX)], "steps 9 and 10 are given up");
        record.changes.push_back(change(5, Some((12, Source::Memory))));
        assert_eq!(branch(&record), [(1, 8), (3, 8), (4, 12), (5, u64::MAX)]);
        let mut rolled_back = record.clone();
        rolled_back.changes.back_mut().expect("a change").causes.push(Cause::StoreRolledBack);
        assert_eq!(branch(&rolled_back), [(5, u64::MAX)], "what was before is not known for sure");
        record.changes.push_back(change(6, Some((9, Source::AbandonedMemory))));
        assert_eq!(branch(&record), [(6, u64::MAX)]);
    }
}
