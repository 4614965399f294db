//! Every step is applied once: the step that a program counts is the step that its memory has seen.

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct AppliedOnce;

impl Invariant for AppliedOnce {
    fn name(&self) -> &'static str {
        "applied once (M-7)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        let Seen::Committed { process, index, resume, before, after, .. } = seen else { return Ok(()) };
        if sim.has_forked {
            return Ok(());
        }
        demand(before.step == *index && after.step == index + 1 && resume.step.0 == after.step, || {
            format!("{} applies step {index} to a state of {} steps", sim.who(*process), before.step)
        })?;
        let node = sim.truth.get(after.hash);
        let follows = node.is_some_and(|node| node.parent == Some(before.hash) && node.step == after.step);
        demand(follows, || {
            format!("{} reaches a state that was reached otherwise: {node:?}", sim.who(*process))
        })
    }
}
