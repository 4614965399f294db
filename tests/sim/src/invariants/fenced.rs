//! Rule M-8: whoever has left stays away: it gets no seat any more and is told nothing but that it has left.

use std::collections::{BTreeMap, BTreeSet};

use reknit_membership::MemberId;
use reknit_membership::event::Message;
use reknit_membership::reason::Departure;

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Fenced {
    departed: BTreeMap<MemberId, Departure>,
    /// What a coordinator that is gone has saved of late: the present one finds out when it saves itself.
    unknown: BTreeSet<MemberId>,
}

impl Invariant for Fenced {
    fn name(&self) -> &'static str {
        "fenced (M-8)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Stored { after, before, by_ghost, .. } => {
                for (member, how) in &self.departed {
                    let still = after.departure(*member);
                    demand(still == Some(*how), || format!("{member:?} has left ({how:?}), now {still:?}"))?;
                }
                let new = after.departed.iter().filter(|(member, _)| !self.departed.contains_key(member));
                match by_ghost {
                    true => self.unknown.extend(new.map(|(member, _)| *member)),
                    false => self.unknown.clear(),
                }
                self.departed.extend(after.departed.iter().copied());
                let Some(world) = super::publishes(*before, after) else { return Ok(()) };
                let back = world.seats.iter().find(|seat| self.departed.contains_key(&seat.member));
                demand(back.is_none(), || format!("{back:?} has a seat again"))
            }
            Seen::Forgot { .. } => {
                self.unknown.clear();
                Ok(())
            }
            Seen::RolledBack { found } => {
                self.departed = found.departed.iter().copied().collect();
                Ok(())
            }
            Seen::Told { member, message, .. } => {
                let quiet = match message {
                    Message::Refused(_) | Message::Released | Message::Closed(_) => true,
                    // In the same breath it is told that it has left.
                    Message::Publish { .. }
                    | Message::Attached { .. }
                    | Message::SaveGivenUp { .. }
                    | Message::Break { .. } => true,
                    Message::World(_)
                    | Message::Plan(_)
                    | Message::Go { .. }
                    | Message::Boundary { .. }
                    | Message::Serve { .. }
                    | Message::SaveNow { .. }
                    | Message::Draining { .. }
                    | Message::Committed { .. } => false,
                };
                // Of two coordinators, or on a slow stream, one may have said it before the other saved.
                let alone = sim.servers.len() == 1 && sim.options.window > 100;
                let gone = self.departed.contains_key(member) && !self.unknown.contains(member) && alone;
                demand(quiet || !gone, || format!("{member:?} has left and is told {message:?}"))
            }
            _ => Ok(()),
        }
    }
}
