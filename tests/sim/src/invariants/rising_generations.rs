//! Rule M-2: generations strictly rise, in the store over crashes and coordinators, and for every member.
//!
//! A store that was put back from a backup cannot know which numbers were used since: it learns them from members that
//! come back. From then on it must not use them again. (If nobody comes back in time it does, and nobody can help it.)

use std::collections::BTreeMap;

use reknit_membership::Generation;

use super::{Invariant, Seen, demand, publishes};
use crate::happening::ProcessKey;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct RisingGenerations {
    /// In the store.
    highest: Generation,
    /// What members have told its coordinators.
    proved: Generation,
    went: BTreeMap<ProcessKey, Generation>,
}

impl Invariant for RisingGenerations {
    fn name(&self) -> &'static str {
        "rising generations (M-2)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Stored { before, after, .. } => {
                let highest = self.highest;
                demand(after.generation >= highest, || {
                    format!("{highest:?} falls to {:?}", after.generation)
                })?;
                if let Some(world) = publishes(*before, after) {
                    let new = world.generation > highest && world.generation == after.generation;
                    demand(new, || format!("{:?} is published after {highest:?}", world.generation))?;
                    let proved = self.proved;
                    demand(world.generation > proved, || {
                        format!("{:?} is published although a member was in {proved:?}", world.generation)
                    })?;
                }
                self.highest = after.generation;
                Ok(())
            }
            Seen::Proved { generation } => {
                self.proved = self.proved.max(*generation);
                Ok(())
            }
            Seen::RolledBack { found } => {
                self.highest = found.generation;
                self.proved = Generation(0);
                Ok(())
            }
            Seen::TookGo { process, generation, .. } => {
                let before = self.went.insert(*process, *generation);
                demand(before.is_none_or(|before| before < *generation) || sim.has_forked, || {
                    format!("process {process} goes in {generation:?} after {before:?}")
                })
            }
            _ => Ok(()),
        }
    }
}
