//! Every sample of a step is in it exactly once, whatever the world: so in the committed history each is in exactly one
//! step.

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct Samples;

impl Invariant for Samples {
    fn name(&self) -> &'static str {
        "samples (design 5)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Committed { process, index, after, .. } = seen else { return Ok(()) };
        let whole = sim.truth.get(after.hash).is_some_and(|node| node.sampled);
        demand(whole, || {
            format!("{} commits step {index} without all its samples, or some twice", sim.who(*process))
        })
    }
}
