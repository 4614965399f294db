//! Rule M-6: a world runs only after every member of it has its state; and every member goes from that very state.

use std::collections::BTreeMap;

use reknit_membership::Generation;

use super::{Invariant, Seen, demand, goes};
use crate::process::Content;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Barrier {
    from: BTreeMap<Generation, Content>,
}

impl Invariant for Barrier {
    fn name(&self) -> &'static str {
        "barrier (M-6)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            // A ghost's go has not been told to anybody; those who hear of it from another coordinator see for themselves.
            Seen::Stored { by_ghost: true, .. } => Ok(()),
            Seen::Stored { before, after, .. } => {
                let Some(world) = goes(*before, after) else { return Ok(()) };
                let mut all: Option<Content> = None;
                for seat in &world.seats {
                    let Some(process) = sim.by_member(seat.member) else { continue };
                    let p = &sim.processes[process];
                    if p.generation() != world.generation {
                        continue;
                    }
                    let Some(content) = p.state() else {
                        return Err(format!("{} goes with a torn state", sim.who(process)));
                    };
                    demand(content.step == after.resume.step.0 || sim.has_forked, || {
                        format!("{} has step {}, {:?} goes", sim.who(process), content.step, after.resume)
                    })?;
                    let same = all.is_none_or(|all| all.hash == content.hash);
                    demand(same || sim.is_tainted(), || {
                        format!("{} goes from another state than the others", sim.who(process))
                    })?;
                    all.get_or_insert(content);
                }
                if let Some(content) = all {
                    self.from.insert(world.generation, content);
                }
                Ok(())
            }
            Seen::TookGo { process, generation, resume, content } => {
                demand(content.step == resume.step.0 || sim.has_forked, || {
                    format!(
                        "{} goes in {generation:?} from {resume:?} with step {}",
                        sim.who(*process),
                        content.step
                    )
                })?;
                let from = self.from.get(generation);
                let same = from.is_none_or(|from| from.hash == content.hash) || sim.is_tainted();
                demand(same, || {
                    format!(
                        "{} goes in {generation:?} with {:x}, not {from:?}",
                        sim.who(*process),
                        content.hash
                    )
                })
            }
            Seen::RolledBack { .. } => {
                self.from.clear();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
