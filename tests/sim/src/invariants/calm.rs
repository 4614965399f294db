//! Rules M-9, M-12 and M-13: planned changes merge, and what is no change of the world costs no generation; a death costs
//! no time-out. Tried when all is well (see `calm.rs` of the crate).

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct Calm;

impl Invariant for Calm {
    fn name(&self) -> &'static str {
        "calm (M-9, M-12, M-13)"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Sim) -> Result<(), String> {
        match seen {
            Seen::Burst { changes, generations } => demand(*generations <= 2, || {
                format!("{changes} changes in one window cost {generations} generations")
            }),
            Seen::Undisturbed { what, before, after } => {
                demand(before == after, || format!("{what} cost a generation: {before:?} became {after:?}"))
            }
            Seen::Recovered { took, allowed } => demand(took <= allowed, || {
                format!("{took} ms from a death to the next step, {allowed} allowed")
            }),
            _ => Ok(()),
        }
    }
}
