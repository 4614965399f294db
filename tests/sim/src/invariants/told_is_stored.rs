//! Rule M-5: nobody is told of a world, a go, a commit or an end that the store does not have at that moment.

use std::collections::{BTreeMap, BTreeSet};

use reknit_membership::event::Message;
use reknit_membership::holding::Resume;
use reknit_membership::reason::{Closure, Departure, Refusal};
use reknit_membership::record::Stage;
use reknit_membership::{Generation, JobRecord, MemberId, Step, World};

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct ToldIsStored {
    worlds: BTreeMap<Generation, Vec<World>>,
    goes: BTreeSet<(Generation, Resume)>,
    commits: BTreeSet<Vec<(Generation, Step)>>,
    drained: BTreeSet<MemberId>,
    departed: BTreeMap<MemberId, Departure>,
    closed: Option<Closure>,
    highest: Generation,
    /// Whether a coordinator that is gone has saved last: the present one finds out when it saves itself.
    by_ghost: bool,
}

impl ToldIsStored {
    fn stored(&mut self, record: &JobRecord) {
        if let Some(world) = &record.world {
            let known = self.worlds.entry(world.generation).or_default();
            if !known.contains(world) {
                known.push(world.clone());
            }
        }
        match record.stage {
            Stage::Running => {
                self.goes.insert((record.generation, record.resume));
            }
            Stage::Closed(closure) => self.closed = Some(closure),
            Stage::Forming | Stage::Published => {}
        }
        self.commits.insert(record.commits.iter().map(|commit| commit.key()).collect());
        self.drained.extend(record.drains.keys());
        for (member, how) in &record.departed {
            self.departed.insert(*member, *how);
        }
        self.highest = self.highest.max(record.generation);
    }

    fn went(&self, generation: Generation) -> bool {
        self.goes.iter().any(|(gone, _)| *gone == generation)
    }
}

impl Invariant for ToldIsStored {
    fn name(&self) -> &'static str {
        "told is stored (M-5)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Stored { after, by_ghost, .. } => {
                self.by_ghost = *by_ghost;
                self.stored(after);
                Ok(())
            }
            Seen::Forgot { .. } => {
                self.by_ghost = false;
                Ok(())
            }
            Seen::Told { member, message, .. } => {
                let record = sim.store.record();
                let stored = match message {
                    Message::World(place) => self.worlds.get(&place.generation).is_some_and(|worlds| {
                        worlds.iter().any(|world| {
                            let seat = world.seats.get(place.seat as usize);
                            seat.is_some_and(|seat| seat.member == *member && seat.rank == place.rank)
                        })
                    }),
                    Message::Serve { generation } => self.worlds.contains_key(generation),
                    Message::Plan(plan) => self.worlds.contains_key(&plan.generation),
                    Message::Go { generation, resume } => self.goes.contains(&(*generation, *resume)),
                    Message::Boundary { generation }
                    | Message::SaveNow { generation }
                    | Message::Publish { generation, .. } => self.went(*generation),
                    // A part is deleted on the strength of it.
                    Message::SaveGivenUp { generation, step } => {
                        let key = (*generation, *step);
                        record.is_some_and(|record| record.commits.iter().all(|commit| commit.key() != key))
                    }
                    Message::Draining { .. } => self.drained.contains(member),
                    Message::Committed { kept } => {
                        self.commits.contains(&kept.iter().map(|commit| commit.key()).collect::<Vec<_>>())
                    }
                    Message::Break { generation } => *generation <= self.highest,
                    Message::Closed(closure) => self.closed == Some(*closure),
                    Message::Released => self.departed.get(member) == Some(&Departure::Drained),
                    Message::Refused(Refusal::Departed(how)) => {
                        let seated =
                            record.and_then(|r| r.world.as_ref()).is_some_and(|w| w.seat(*member).is_some());
                        // One that is not alone and does not know it can only say what it last knew.
                        let alone = !self.by_ghost && sim.servers.len() == 1;
                        !seated || self.departed.get(member) == Some(how) || !alone
                    }
                    Message::Attached { .. } | Message::Refused(_) => true,
                };
                demand(stored, || {
                    let stage = record.map(|record| (record.generation, record.stage));
                    format!("{member:?} is told {message:?}, and the store has {stage:?}")
                })
            }
            _ => Ok(()),
        }
    }
}
