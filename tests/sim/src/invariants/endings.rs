//! A member is turned away for a reason only: it was let go, replaced, evicted, or the job is over.

use reknit_membership::reason::{Departure, Refusal};
use reknit_membership::record::Stage;
use reknit_trainer::session::End;

use super::{Invariant, Seen, demand};
use crate::happening::ProcessKey;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Endings {
    rolled_back: bool,
}

impl Endings {
    fn is_reason(&self, process: ProcessKey, end: &End, sim: &Sim) -> bool {
        let record = sim.store.record();
        let stage = record.map(|record| record.stage);
        let p = &sim.processes[process];
        match end {
            End::Left => true,
            End::Closed(closure) | End::Refused(Refusal::JobClosed(closure)) => {
                stage == Some(Stage::Closed(*closure))
            }
            End::Released => {
                let how = p.ids.iter().rev().find_map(|id| record?.departure(*id));
                how == Some(Departure::Drained) || matches!(stage, Some(Stage::Closed(_))) || self.rolled_back
            }
            End::Refused(Refusal::Departed(how)) => match how {
                // A process must never be fenced by itself.
                Departure::Replaced { by } => !p.ids.contains(by),
                Departure::Evicted | Departure::Drained | Departure::Left => true,
                Departure::Died
                | Departure::Silent
                | Departure::Gone
                | Departure::Unready
                | Departure::Unrestored
                | Departure::Stuck
                | Departure::Unreachable
                | Departure::Diverged => false,
            },
            End::Refused(Refusal::BadSlots { slots }) => {
                record.is_some_and(|record| *slots > record.spec.max)
            }
            End::Refused(Refusal::OtherHistory { .. }) => self.rolled_back,
            End::Refused(
                Refusal::BadSpec(_)
                | Refusal::OtherShape { .. }
                | Refusal::OtherRecipe
                | Refusal::TooManyMembers { .. },
            )
            | End::Rejected { .. } => false,
        }
    }
}

impl Invariant for Endings {
    fn name(&self) -> &'static str {
        "endings (L6)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::RolledBack { .. } => {
                self.rolled_back = true;
                Ok(())
            }
            Seen::Ended { process, end } => demand(self.is_reason(*process, end, sim), || {
                let stage = sim.store.record().map(|record| record.stage);
                format!("{} is turned away: {end:?}, the store has {stage:?}", sim.who(*process))
            }),
            _ => Ok(()),
        }
    }
}
