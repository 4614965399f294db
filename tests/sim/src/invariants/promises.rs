//! What an operator was promised is in the store, and stays there (rules M-10, D-2). A request whose answer was lost may
//! have been carried out or not: nothing is known of it until it is asked again.

use reknit_membership::event::{Answer, Operation};
use reknit_membership::record::Stage;
use reknit_membership::{JobRecord, MemberName};

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct Promises {
    bounds: Option<(u32, u32)>,
    /// Bounds that were asked for and not yet answered, or never will be.
    asked: Vec<(u32, u32)>,
    closing: bool,
}

impl Promises {
    fn kept(&self, record: &JobRecord) -> Result<(), String> {
        if let Some(bounds) = self.bounds {
            let stored = (record.spec.min, record.spec.max);
            let fits = stored == bounds || self.asked.contains(&stored);
            demand(fits, || format!("{bounds:?} was promised, {stored:?} is stored"))?;
        }
        let closing = record.closing || matches!(record.stage, Stage::Closed(_));
        demand(closing || !self.closing, || "the job was to be closed".to_owned())
    }

    fn promised(&mut self, operation: &Operation, sim: &Sim) -> Result<(), String> {
        let Some(record) = sim.store.record() else {
            // Before the first world nothing is saved of a job.
            return Ok(());
        };
        match operation {
            Operation::Drain { name } | Operation::Notice { name, .. } => {
                let leaves = ids(name, sim)
                    .any(|id| record.drains.contains_key(&id) || record.departure(id).is_some());
                demand(leaves || over(record), || format!("{name:?} was to leave: {:?}", record.drains))
            }
            Operation::Evict { name } => {
                let gone = ids(name, sim).any(|id| record.departure(id).is_some());
                demand(gone || over(record), || format!("{name:?} was to be gone"))
            }
            Operation::Resize { min, max } => {
                let bounds = (*min, *max);
                if let Some(at) = self.asked.iter().position(|asked| *asked == bounds) {
                    self.asked.remove(at);
                }
                self.bounds = Some(bounds);
                self.kept(record)
            }
            Operation::Close => {
                self.closing = true;
                self.kept(record)
            }
            Operation::Undrain { .. } | Operation::SaveNow => Ok(()),
        }
    }
}

fn over(record: &JobRecord) -> bool {
    matches!(record.stage, Stage::Closed(_))
}

/// Everybody who ever went by that name.
fn ids<'a>(name: &'a MemberName, sim: &'a Sim) -> impl Iterator<Item = reknit_membership::MemberId> + 'a {
    sim.processes.iter().filter(move |p| p.name == *name).flat_map(|p| p.ids.iter().copied())
}

impl Invariant for Promises {
    fn name(&self) -> &'static str {
        "promises (M-10, D-2)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Asked { operation: Operation::Resize { min, max } } => {
                self.asked.push((*min, *max));
                Ok(())
            }
            // Of two, the one that has not saved last answers from what it last knew, if nothing need be saved for it.
            Seen::Answered { .. } if sim.servers.len() > 1 => Ok(()),
            Seen::Answered { operation, answer, repeated, .. } => match (operation, answer) {
                (_, Answer::Done) => self.promised(operation, sim),
                (Operation::Resize { min, max }, Answer::BadSpec(_)) => {
                    let unit = sim.options.spec.unit;
                    let bad = min > max || max / unit * unit < *min;
                    demand(bad, || format!("{min}..={max} was refused"))
                }
                (_, Answer::JobClosed(closure)) => {
                    let closed = sim.store.record().map(|record| record.stage);
                    demand(closed == Some(Stage::Closed(*closure)), || {
                        format!("{closed:?} is said to be {closure:?}")
                    })
                }
                (_, Answer::NoSuchMember { name, .. }) if *repeated => {
                    let known = sim.store.record().is_some_and(|r| {
                        r.world.iter().any(|w| {
                            w.seats
                                .iter()
                                .any(|seat| seat.name == *name && r.departure(seat.member).is_none())
                        })
                    });
                    demand(!known, || format!("{name:?} is said not to be there, and has a seat"))
                }
                (_, Answer::NoSuchMember { .. } | Answer::BadSpec(_) | Answer::NotRunning) => Ok(()),
            },
            Seen::Stored { after, .. } => self.kept(after),
            Seen::RolledBack { .. } => {
                *self = Promises::default();
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
