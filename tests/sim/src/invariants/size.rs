//! Rule M-4: a published world has between `min` and `max` ranks and a multiple of `unit`.

use super::{Invariant, Seen, demand, publishes};
use crate::sim::Sim;

pub(super) struct Size;

impl Invariant for Size {
    fn name(&self) -> &'static str {
        "size (M-4)"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Sim) -> Result<(), String> {
        let Seen::Stored { before, after, .. } = seen else { return Ok(()) };
        let Some(world) = publishes(*before, after) else { return Ok(()) };
        let size = world.size().0;
        let spec = after.spec;
        let fits = (spec.min..=spec.max).contains(&size) && size.is_multiple_of(spec.unit);
        demand(fits, || format!("a world of {size} ranks with {spec:?}"))
    }
}
