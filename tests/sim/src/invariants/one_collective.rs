//! Whoever computes together is at one step and has one state: otherwise the sum means nothing.

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct OneCollective;

impl Invariant for OneCollective {
    fn name(&self) -> &'static str {
        "one collective (M-6, M-15)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Reduced { generation, entries } = seen else { return Ok(()) };
        for two in entries.windows(2) {
            let (a, b) = (&two[0], &two[1]);
            demand(a.index == b.index, || {
                format!("steps {} and {} meet in {generation:?}", a.index, b.index)
            })?;
            let same = a.content.hash == b.content.hash || sim.is_tainted();
            demand(same, || format!("{:x?} and {:x?} meet in {generation:?}", a.content, b.content))?;
        }
        Ok(())
    }
}
