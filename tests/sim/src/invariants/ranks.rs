//! Rule M-3: ranks are 0..n-1 without gaps; survivors keep their relative order and newcomers follow; nobody has two
//! seats, and no name has.

use std::collections::BTreeSet;

use reknit_membership::{MemberId, Rank};

use super::{Invariant, Seen, demand, publishes};
use crate::sim::Sim;

pub(super) struct Ranks;

impl Invariant for Ranks {
    fn name(&self) -> &'static str {
        "ranks (M-3)"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Sim) -> Result<(), String> {
        let Seen::Stored { before, after, .. } = seen else { return Ok(()) };
        let Some(world) = publishes(*before, after) else { return Ok(()) };
        let mut next = 0;
        for seat in &world.seats {
            demand(seat.rank == Rank(next) && seat.slots > 0, || format!("a gap before {seat:?}"))?;
            next += seat.slots;
        }
        let members: BTreeSet<MemberId> = world.seats.iter().map(|seat| seat.member).collect();
        let names: BTreeSet<&str> = world.seats.iter().map(|seat| seat.name.as_str()).collect();
        let unique = members.len() == world.seats.len() && names.len() == world.seats.len();
        demand(unique, || format!("somebody has two seats: {:?}", world.seats))?;
        let old: Vec<MemberId> = before
            .iter()
            .flat_map(|r| r.world.iter())
            .flat_map(|w| w.seats.iter().map(|s| s.member))
            .collect();
        let place = |member: MemberId| old.iter().position(|known| *known == member).unwrap_or(usize::MAX);
        let places: Vec<usize> = world.seats.iter().map(|seat| place(seat.member)).collect();
        demand(places.is_sorted(), || format!("{old:?} became {:?}", world.seats))
    }
}
