//! Rule M-1: a generation has at most one world, and every member is told its place in that one.

use std::collections::BTreeMap;

use reknit_membership::event::Message;
use reknit_membership::{Generation, World};

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct UniqueWorld {
    worlds: BTreeMap<Generation, World>,
}

impl Invariant for UniqueWorld {
    fn name(&self) -> &'static str {
        "unique world (M-1)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Stored { after, .. } => {
                let Some(world) = &after.world else { return Ok(()) };
                let known = self.worlds.entry(world.generation).or_insert_with(|| world.clone());
                demand(known == world, || format!("{known:?} became {world:?}"))
            }
            // Of worlds that only the lost store knew, nobody need be left who could say so.
            Seen::RolledBack { found } => {
                self.worlds.retain(|generation, _| *generation <= found.generation);
                Ok(())
            }
            // What the lost store had told may arrive after its number was given to another world.
            Seen::Heard { message: Message::World(place), process } if !sim.has_forked => {
                let Some(world) = self.worlds.get(&place.generation) else { return Ok(()) };
                let theirs = world.seats.get(place.seat as usize);
                let same = theirs.is_some_and(|seat| seat.rank == place.rank && seat.slots == place.slots)
                    && place.size == world.size()
                    && place.seats as usize == world.seats.len()
                    && place.roster == world.roster_digest();
                demand(same, || format!("process {process} is told {place:?} of {world:?}"))
            }
            _ => Ok(()),
        }
    }
}
