//! Rule M-14: a checkpoint counts only when every member of the world that made it has written its part and all parts are
//! of one state; what is committed only moves forward, but for a go that goes back.

use std::collections::BTreeMap;

use reknit_membership::record::{Commit, Stage};
use reknit_membership::{Generation, JobRecord};

use super::{Invariant, Seen, demand, goes};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Checkpoints {
    /// How many seats the worlds that ran have.
    ran: BTreeMap<Generation, usize>,
}

impl Checkpoints {
    fn is_whole(&self, commit: &Commit, sim: &Sim) -> Result<(), String> {
        let key = commit.key();
        let seats = self.ran.get(&commit.generation).copied();
        demand(seats == Some(commit.shards as usize), || {
            format!("{commit:?} of a world of {seats:?} seats")
        })?;
        if sim.has_forked {
            // Another world of that number has written parts, too.
            return Ok(());
        }
        let parts: Vec<_> = sim.disk.parts_of(key).map(|(_, (_, content))| content).collect();
        demand(Some(parts.len()) == seats, || format!("{commit:?} has {} parts of {seats:?}", parts.len()))?;
        let same = parts.windows(2).all(|two| two[0].hash == two[1].hash);
        demand(same, || format!("{commit:?} is made of several states: {parts:?}"))?;
        let step = parts.first().map(|part| part.step);
        demand(step == Some(commit.step.0), || format!("{commit:?} is of step {step:?}"))?;
        let manifest = sim.disk.manifests.get(&key);
        demand(manifest.is_some_and(|m| m.digest == commit.manifest), || {
            format!("{commit:?} has {manifest:?}")
        })
    }
}

impl Invariant for Checkpoints {
    fn name(&self) -> &'static str {
        "checkpoints (M-14)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Stored { before, after, .. } = seen else { return Ok(()) };
        if let (Stage::Running, Some(world)) = (after.stage, &after.world) {
            self.ran.insert(world.generation, world.seats.len());
        }
        let old: &[Commit] = before.map_or(&[], |record: &JobRecord| &record.commits);
        let goes_back = goes(*before, after).is_some();
        let kept: Vec<&Commit> = old.iter().filter(|c| !goes_back || c.step <= after.resume.step).collect();
        let new: Vec<&Commit> = after.commits.iter().filter(|commit| !old.contains(commit)).collect();
        demand(new.len() <= 1, || format!("{new:?} are committed at once"))?;
        let newest = old.last().map(|commit| commit.step);
        for commit in &new {
            demand(newest.is_none_or(|newest| commit.step > newest), || {
                format!("{commit:?} follows {newest:?}")
            })?;
            self.is_whole(commit, sim)?;
        }
        let expected: Vec<&Commit> = kept.into_iter().chain(new).collect();
        let surplus = expected.len().saturating_sub(after.spec.keep as usize);
        let same = after.commits.iter().eq(expected[surplus..].iter().copied())
            || (surplus > 0 && after.commits.iter().eq(expected.iter().copied()));
        demand(same, || format!("{old:?} became {:?}", after.commits))
    }
}
