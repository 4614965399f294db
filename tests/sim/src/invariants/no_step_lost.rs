//! Rule M-7: a committed step that a member with a lease holds is never lost.
//!
//! Measured against what members truly hold when a world is let go. A state counts if it lies on the way to the present
//! one or was computed by the last world that ran. A member counts if it has a place in the new world; or if it had one
//! before, the coordinator has let it in since it last forgot everything, and has not struck it off. (Who was struck off
//! and came back as a new member is asked for what it holds only when it gets a place.) Members that were named as not
//! having delivered a state do not count: the core may give them up.

use std::collections::{BTreeMap, BTreeSet};

use reknit_membership::event::Message;
use reknit_membership::{Generation, JobRecord, MemberId, Step};

use super::{Invariant, Seen, demand, goes};
use crate::process::Content;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct NoStepLost {
    /// The last go: which world, from which state.
    base: Option<(Generation, u64)>,
    let_in: BTreeMap<usize, BTreeSet<MemberId>>,
    placed: BTreeSet<MemberId>,
    accused: BTreeSet<MemberId>,
    unreadable: BTreeSet<(Generation, Step)>,
    /// A store that was put back does not know what it lost: nothing is demanded of the next go.
    blind: bool,
}

impl NoStepLost {
    fn is_present(&self, content: Content, sim: &Sim) -> bool {
        let Some((generation, base)) = self.base else { return true };
        let computed_by_last = sim.truth.get(content.hash).is_some_and(|node| node.world == generation);
        sim.truth.descends(base, content.hash) || (computed_by_last && sim.truth.descends(content.hash, base))
    }

    fn check(
        &self,
        server: usize,
        before: Option<&JobRecord>,
        after: &JobRecord,
        sim: &Sim,
    ) -> Result<(), String> {
        let Some(world) = &after.world else { return Ok(()) };
        let let_in = self.let_in.get(&server);
        for (process, p) in sim.present() {
            let member = p.member();
            let seated = world.seat(member).is_some();
            let known = self.placed.contains(&member) && let_in.is_some_and(|all| all.contains(&member));
            let leases = known && after.departure(member).is_none();
            let Some(content) = p.state().filter(|_| seated || leases) else { continue };
            let lost = content.step > after.resume.step.0
                && !self.accused.contains(&member)
                && self.is_present(content, sim);
            demand(!lost, || {
                let who = sim.who(process);
                format!(
                    "{who} ({member:?}, seated {seated}) holds step {}, {:?} goes",
                    content.step, after.resume
                )
            })?;
        }
        let readable =
            before.into_iter().flat_map(|r| &r.commits).filter(|c| !self.unreadable.contains(&c.key()));
        let newest = readable.map(|commit| commit.step).max().unwrap_or_default();
        demand(newest <= after.resume.step, || format!("{newest:?} is committed, {:?} goes", after.resume))
    }
}

impl Invariant for NoStepLost {
    fn name(&self) -> &'static str {
        "no step lost (M-7)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Stored { server, before, after, .. } => {
                let seats = after.world.iter().flat_map(|world| &world.seats);
                self.placed.extend(seats.map(|seat| seat.member));
                let Some(world) = goes(*before, after) else { return Ok(()) };
                if !std::mem::take(&mut self.blind) && !sim.is_tainted() {
                    self.check(*server, *before, after, sim)?;
                }
                let holders = world.seats.iter().filter_map(|seat| sim.by_member(seat.member));
                let state = holders.filter_map(|process| sim.processes[process].state()).next();
                self.base = state.map(|content| (world.generation, content.hash)).or(self.base);
                self.accused.clear();
                self.unreadable.clear();
            }
            Seen::Told { server, member, message: Message::Attached { .. } } => {
                self.let_in.entry(*server).or_default().insert(*member);
            }
            Seen::Forgot { server } => {
                self.let_in.remove(server);
            }
            Seen::Accused { member } => {
                self.accused.insert(*member);
            }
            Seen::LoadFailed { commit, .. } => {
                self.unreadable.insert(commit.key());
            }
            Seen::RolledBack { .. } => self.blind = true,
            _ => {}
        }
        Ok(())
    }
}
