//! Rule D-4: what waits for a reader is bounded.

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct Queues;

impl Invariant for Queues {
    fn name(&self) -> &'static str {
        "queues (D-4)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Queued { waiting } = seen else { return Ok(()) };
        let most = sim.options.outbound;
        demand(*waiting <= most, || format!("{waiting} messages wait, {most} may"))
    }
}
