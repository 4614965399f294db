//! At most one world runs, as far as the members can know.
//!
//! A world whose members are all cut off from the coordinator cannot know that another one was formed without them: it
//! runs on, and what it computes is an abandoned branch. But as soon as one of its members is in a newer world that has
//! committed a step, nothing may be computed in the old one any more. Ranks may still commit a step whose collective had
//! completed before.

use std::collections::{BTreeMap, BTreeSet};

use reknit_membership::Generation;

use super::{Invariant, Seen, demand};
use crate::happening::ProcessKey;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct OneWorldRuns {
    /// Who has committed a step in which world.
    committed: BTreeMap<Generation, BTreeSet<ProcessKey>>,
}

impl Invariant for OneWorldRuns {
    fn name(&self) -> &'static str {
        "one world runs (S6)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Committed { process, generation, .. } => {
                self.committed.entry(*generation).or_default().insert(*process);
                Ok(())
            }
            Seen::Reduced { generation, .. } => {
                let seats: Vec<ProcessKey> = sim
                    .present()
                    .filter(|(_, p)| p.in_call.is_some_and(|call| call.generation == *generation))
                    .map(|(key, _)| key)
                    .collect();
                for process in &seats {
                    let knows = sim.processes[*process].generation();
                    demand(knows <= *generation, || {
                        format!("{} computes in {generation:?} and knows {knows:?}", sim.who(*process))
                    })?;
                    let later =
                        self.committed.range(generation.next()..).find(|(_, all)| all.contains(process));
                    demand(later.is_none(), || {
                        format!("{} computes in {generation:?} after {later:?}", sim.who(*process))
                    })?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
