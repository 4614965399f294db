//! A member is turned away for a reason only: it was let go, replaced, evicted, or the job is over.

use reknit_membership::reason::{Departure, Refusal};
use reknit_membership::record::Stage;
use reknit_trainer::session::End;

use super::{Invariant, Seen, demand};
use crate::happening::ProcessKey;
use crate::process::Held;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Endings {
    rolled_back: bool,
    /// The lowest limit that was ever in force: whoever is refused hears of it later.
    least_max: Option<u32>,
}

impl Endings {
    fn is_reason(&self, process: ProcessKey, end: &End, sim: &Sim) -> bool {
        let record = sim.store.record();
        let stage = record.map(|record| record.stage);
        let p = &sim.processes[process];
        match end {
            End::Left => true,
            End::Closed(closure) => stage == Some(Stage::Closed(*closure)),
            // Whoever had a place when the job ended has not been refused.
            End::Refused(Refusal::JobClosed(closure)) => {
                stage == Some(Stage::Closed(*closure)) && p.session.place().is_none()
            }
            End::Released => {
                let how = p.ids.iter().rev().find_map(|id| record?.departure(*id));
                how == Some(Departure::Drained) || matches!(stage, Some(Stage::Closed(_))) || self.rolled_back
            }
            End::Refused(Refusal::Departed(how)) => match how {
                // A process must never be fenced by itself.
                Departure::Replaced { by } => !p.ids.contains(by),
                Departure::Evicted | Departure::Left => true,
                Departure::Drained => p.session.place().is_none(),
                Departure::StateLost => p.held == Held::Torn && record.is_some_and(|r| r.commits.is_empty()),
                Departure::Died
                | Departure::Silent
                | Departure::Gone
                | Departure::Unready
                | Departure::Unrestored
                | Departure::Stuck
                | Departure::Unreachable
                | Departure::Diverged => false,
            },
            End::Refused(Refusal::BadSlots { slots }) => self.least_max.is_some_and(|max| *slots > max),
            End::Refused(Refusal::OtherHistory { ours, .. }) => {
                // Of two coordinators one may have begun a history that was never saved. (A leader's lease is against that.)
                let unsaved = record.is_some_and(|record| record.history != *ours);
                self.rolled_back || (unsaved && sim.servers.len() > 1)
            }
            End::Refused(
                Refusal::BadSpec(_)
                | Refusal::OtherShape { .. }
                | Refusal::OtherRecipe
                | Refusal::TooManyMembers { .. },
            )
            | End::Rejected { .. }
            | End::MachineFailed { .. } => false,
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
            Seen::Stored { after, .. } => {
                let max = after.spec.max;
                self.least_max = Some(self.least_max.map_or(max, |least| least.min(max)));
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
