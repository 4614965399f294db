//! Rule M-14, the other half: a committed checkpoint that is kept can be loaded, unless somebody has damaged it.

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct KeptCheckpoints {
    /// An older store may name checkpoints that were too old for the one that was lost.
    rolled_back: bool,
}

impl Invariant for KeptCheckpoints {
    fn name(&self) -> &'static str {
        "kept checkpoints (M-14)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::RolledBack { .. } => {
                self.rolled_back = true;
                Ok(())
            }
            Seen::LoadFailed { commit, on_purpose: false, why } => {
                let key = commit.key();
                let kept =
                    sim.store.record().is_some_and(|record| record.commits.iter().any(|c| c.key() == key));
                let excused = self.rolled_back || sim.disk.damaged.contains(&key);
                demand(!kept || excused, || format!("{commit:?} is kept and cannot be loaded: {why}"))
            }
            Seen::Stored { after, .. } => {
                let gone = after.commits.iter().find(|commit| sim.disk.deleted.contains(&commit.key()));
                demand(gone.is_none() || self.rolled_back, || format!("{gone:?} is kept and was deleted"))
            }
            _ => Ok(()),
        }
    }
}
