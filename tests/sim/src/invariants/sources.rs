//! Whoever is named as a source of state lets those in that are to get it from there: once nothing fails any more, nobody
//! dials one that runs until its patience ends.

use super::{Invariant, Seen, demand};
use crate::sim::{Sim, Stage};

pub(super) struct Sources;

impl Invariant for Sources {
    fn name(&self) -> &'static str {
        "sources (M-7)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::LetsNobodyIn { holder, by, since } = seen else { return Ok(()) };
        let excused = sim.stage == Stage::Chaos || *since < sim.healed_at || sim.has_forked;
        demand(excused || !sim.processes[*holder].runs(), || {
            format!("{} does not let {} in, which is to get its state there", sim.who(*holder), sim.who(*by))
        })
    }
}
