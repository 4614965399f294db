//! A member that is well is not struck off: once nothing fails any more and what was under way has run out, nobody who
//! lives and is attached leaves for any other reason than that somebody wants it to.

use std::collections::BTreeSet;

use reknit_membership::MemberId;
use reknit_membership::reason::Departure;

use super::{Invariant, Seen, demand};
use crate::queue::Ms;
use crate::sim::{Sim, Stage};

#[derive(Default)]
pub(super) struct Unharmed {
    known: BTreeSet<MemberId>,
}

/// How long what faults have left behind may still cost somebody its place.
fn aftermath(sim: &Sim) -> Ms {
    let t = &sim.options.timing;
    (t.takeover * 2 + t.silence * 2 + t.establish * 2 + t.reattach).as_millis() as Ms + 8_000
}

impl Invariant for Unharmed {
    fn name(&self) -> &'static str {
        "unharmed (M-8)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Stored { after, .. } = seen else { return Ok(()) };
        for (member, how) in &after.departed {
            if !self.known.insert(*member)
                || sim.stage == Stage::Chaos
                || sim.now < sim.healed_at + aftermath(sim)
            {
                continue;
            }
            let wanted = match how {
                Departure::Replaced { .. } | Departure::Left | Departure::Drained | Departure::Evicted => {
                    true
                }
                // Whether there was nothing left is for `endings.rs` to judge.
                Departure::StateLost => true,
                Departure::Died
                | Departure::Silent
                | Departure::Gone
                | Departure::Unready
                | Departure::Unrestored
                | Departure::Stuck
                | Departure::Unreachable => false,
                Departure::Diverged => sim.has_flipped,
            };
            let lives = sim.by_member(*member).filter(|_| !wanted);
            demand(lives.is_none(), || {
                format!("{} is struck off ({how:?})", lives.map(|key| sim.who(key)).unwrap_or_default())
            })?;
        }
        Ok(())
    }
}
