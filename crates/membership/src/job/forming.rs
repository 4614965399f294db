//! When enough members are there, and who makes up the next world.

use std::collections::{BTreeMap, BTreeSet};

use super::establishing::Establishing;
use super::{Job, Out, Phase, Stream};
use crate::event::Message;
use crate::holding::Holding;
use crate::ids::{MemberId, Rank, Timestamp};
use crate::reason::{Cause, Closure, Departure, Note, Waiting};
use crate::record::{JobRecord, Stage, WorldChange};
use crate::spec::Timing;
use crate::world::{Peer, Seat, Shortage, World, select};

/// Between two worlds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Forming {
    /// Why the last world is over, or the causes so far of the first one.
    pub(super) causes: Vec<Cause>,
    /// When the first of them was learned.
    pub(super) learned: Timestamp,
    /// When the old world's members stood still.
    pub(super) stopped: Timestamp,
    /// Ranks of the last world that ran.
    pub(super) before: u32,
    /// Whether more members may be on their way: at the first formation, and after there were too few.
    cold: bool,
    last_call: Option<LastCall>,
    /// Accused members whose stream is up, and until when each may speak for itself or hang up.
    pub(super) settling: BTreeMap<MemberId, Timestamp>,
    /// Members that reported the break themselves.
    pub(super) spoken: BTreeSet<MemberId>,
    /// Nothing could be restored: not tried again before this instant.
    pub(super) hold: Option<Timestamp>,
    /// Members that are leaving at this boundary, and what they hold.
    pub(super) leaving: Vec<(Peer, Holding)>,
    /// Whether the members of the last world know that it is over.
    told: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LastCall {
    /// However many still join, it ends then.
    at_most: Timestamp,
    /// It ends then if nobody joins.
    until: Timestamp,
}

impl Forming {
    /// The phase of a job whose record says that no world lives.
    pub(super) fn resumed(record: &JobRecord, now: Timestamp) -> Forming {
        let unfinished = record.changes.back().filter(|change| change.restored.is_none());
        Forming {
            causes: unfinished.map(|change| change.causes.clone()).unwrap_or_default(),
            learned: unfinished.map_or(now, |change| change.learned),
            stopped: unfinished.map_or(now, |change| change.stopped),
            before: ranks_before(record),
            cold: true,
            last_call: None,
            settling: BTreeMap::new(),
            spoken: BTreeSet::new(),
            hold: None,
            leaving: Vec::new(),
            // Whoever attaches is told.
            told: true,
        }
    }

    /// A joiner may be followed by another.
    pub(super) fn last_call_again(&mut self, now: Timestamp, timing: &Timing) {
        if let Some(call) = &mut self.last_call {
            call.until = now.after(timing.last_call).min(call.at_most);
        }
    }

    pub(super) fn deadline(&self) -> Option<Timestamp> {
        let settling = self.settling.values().min().copied();
        [settling, self.last_call.map(|call| call.until), self.hold].into_iter().flatten().min()
    }
}

/// Ranks of the last world that ran.
fn ranks_before(record: &JobRecord) -> u32 {
    record.changes.iter().rev().find(|change| change.restored.is_some()).map_or(0, |change| change.after)
}

/// How many causes one change keeps.
const CAUSES_MAX: usize = 16;

/// What stands between the members and the next world.
enum Obstacle {
    Settling,
    Reattaching,
    Shortage(Shortage),
    Hold(Timestamp),
}

impl Job {
    /// The world is over. What was under way to it carries on: a change that has not yet led to a running world and
    /// the one that follows are one recovery for the people who wait.
    pub(super) fn break_world(&mut self, cause: Cause, out: &mut Out) {
        let now = self.now;
        let mut forming = Forming {
            causes: Vec::new(),
            learned: now,
            stopped: now,
            before: ranks_before(&self.record),
            cold: false,
            last_call: None,
            settling: BTreeMap::new(),
            spoken: BTreeSet::new(),
            hold: None,
            leaving: Vec::new(),
            told: false,
        };
        match &mut self.phase {
            Phase::Establishing(Establishing { leaving, .. }) => forming.leaving = std::mem::take(leaving),
            Phase::Restoring(restoring) => forming.leaving = std::mem::take(&mut restoring.leaving),
            Phase::Running(_) => {}
            Phase::Forming(_) | Phase::Closed(_) => return,
        }
        if let Some(change) = self.record.changes.back().filter(|change| change.restored.is_none()) {
            forming.causes = change.causes.clone();
            forming.learned = change.learned;
            forming.stopped = change.stopped;
        }
        forming.causes.push(cause);
        self.phase = Phase::Forming(forming);
        self.record.stage = Stage::Forming;
        out.save();
        let waited_for: Vec<MemberId> = self
            .members
            .iter()
            .filter(|(_, m)| m.seat.is_some() && m.stream != Stream::Up)
            .map(|(member, _)| *member)
            .collect();
        for member in waited_for {
            self.shorten_lease(member);
        }
    }

    /// All members stand at a step boundary: the old world is over, the next one follows at once.
    pub(super) fn form_at_boundary(
        &mut self,
        learned: Timestamp,
        leaving: Vec<(Peer, Holding)>,
        out: &mut Out,
    ) {
        self.phase = Phase::Forming(Forming {
            causes: Vec::new(),
            learned,
            stopped: self.now,
            before: ranks_before(&self.record),
            cold: false,
            last_call: None,
            settling: BTreeMap::new(),
            spoken: BTreeSet::new(),
            hold: None,
            leaving,
            told: false,
        });
        self.record.stage = Stage::Forming;
        out.save();
        self.try_form(out);
    }

    /// Forms the next world if nothing stands against it; otherwise makes sure that everybody knows the old one is
    /// over.
    pub(super) fn try_form(&mut self, out: &mut Out) {
        let now = self.now;
        let Phase::Forming(forming) = &mut self.phase else { return };
        forming.settling.retain(|_, until| *until > now);
        if self.record.closing {
            return self.close(Closure::Closed, out);
        }
        if forming.hold.is_some_and(|until| until <= now) {
            forming.hold = None;
            self.distrusted.clear();
            self.unreadable.clear();
        }
        if forming.last_call.is_some_and(|call| now < call.until) && self.slots_total < self.record.spec.max {
            return;
        }
        self.evict_unreachable(out);
        let chosen = match self.obstacle() {
            Ok(chosen) => chosen,
            Err(obstacle) => return self.wait_for(&obstacle, out),
        };
        let Phase::Forming(forming) = &mut self.phase else { return };
        if forming.cold && (chosen.len() < self.members.len() || self.ranks(&chosen) < self.record.spec.max) {
            let at_most = now.after(self.timing.last_call * 4);
            let Phase::Forming(forming) = &mut self.phase else { return };
            let first = LastCall { at_most, until: now.after(self.timing.last_call) };
            let call = *forming.last_call.get_or_insert(first);
            if now < call.until {
                return self.tell_break(out);
            }
        }
        self.publish(&chosen, out);
    }

    fn ranks(&self, chosen: &[MemberId]) -> u32 {
        chosen.iter().filter_map(|member| self.members.get(member)).map(|m| m.slots).sum()
    }

    fn wait_for(&mut self, obstacle: &Obstacle, out: &mut Out) {
        if let (Obstacle::Shortage(_), Phase::Forming(forming)) = (obstacle, &mut self.phase) {
            forming.cold = true;
            forming.last_call = None;
        }
        self.tell_break(out);
    }

    fn obstacle(&self) -> Result<Vec<MemberId>, Obstacle> {
        let Phase::Forming(forming) = &self.phase else { return Ok(Vec::new()) };
        if !forming.settling.is_empty() {
            return Err(Obstacle::Settling);
        }
        // A survivor without a stream may hold the newest state (rule M-7): it is waited for as long as its lease lasts.
        if self.survivors_without_stream().next().is_some() {
            return Err(Obstacle::Reattaching);
        }
        if let Some(until) = forming.hold {
            return Err(Obstacle::Hold(until));
        }
        if self.slots_total < self.record.spec.min {
            // Joiners come by the thousand: no pass over all of them for each.
            let shortage = Shortage::BelowMin { have: self.slots_total, need: self.record.spec.min };
            return Err(Obstacle::Shortage(shortage));
        }
        select(&self.record.spec, &self.candidates()).map_err(Obstacle::Shortage)
    }

    fn survivors_without_stream(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.seated().filter(|member| self.members.get(member).is_some_and(|m| m.stream != Stream::Up))
    }

    /// Who could be in the next world, in rank order: survivors as they were, then the others as they came (rule M-3).
    /// Members that leave are no candidates, nor are members that could not be told.
    pub(super) fn candidates(&self) -> Vec<(MemberId, u32)> {
        let running = matches!(self.phase, Phase::Running(_));
        let mut found: Vec<((u32, u64), MemberId, u32)> = self
            .members
            .iter()
            .filter(|(member, m)| {
                // In a running world a lost stream is only a hint.
                let reachable = m.stream == Stream::Up || (running && m.seat.is_some());
                reachable && !self.record.drains.contains_key(member)
            })
            .map(|(member, m)| ((m.seat.unwrap_or(u32::MAX), m.arrival), *member, m.slots))
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, member, slots)| (member, slots)).collect()
    }

    /// Worlds that break again and again although everybody lives: somebody cannot be reached by its neighbours.
    fn evict_unreachable(&mut self, out: &mut Out) {
        let Phase::Forming(forming) = &self.phase else { return };
        let link_only = forming.causes.last() == Some(&Cause::LinkBroken);
        if !link_only || !forming.settling.is_empty() || self.fruitless < FRUITLESS_MAX {
            return;
        }
        let seat = |member: &MemberId| self.members.get(member).and_then(|m| m.seat);
        let worst = self.grudges.iter().max_by_key(|(member, times)| (**times, seat(member)));
        if let Some(member) = worst.map(|(member, _)| *member) {
            self.fruitless = 0;
            self.grudges.clear();
            self.lose(member, Departure::Unreachable, out);
        }
    }

    fn tell_break(&mut self, out: &mut Out) {
        let Phase::Forming(forming) = &mut self.phase else { return };
        if std::mem::replace(&mut forming.told, true) {
            return;
        }
        let generation = self.record.generation;
        for member in self.seated().filter(|member| self.members.contains_key(member)) {
            out.tell(member, Message::Break { generation });
        }
    }

    fn publish(&mut self, chosen: &[MemberId], out: &mut Out) {
        let Phase::Forming(forming) = &mut self.phase else { return };
        let (learned, stopped, before) = (forming.learned, forming.stopped, forming.before);
        let mut causes = std::mem::take(&mut forming.causes);
        let leaving = std::mem::take(&mut forming.leaving);
        let lost = causes.iter().any(|cause| matches!(cause, Cause::Lost { .. }));
        if lost {
            self.fruitless = 0;
            self.grudges.clear();
            causes.retain(|cause| *cause != Cause::LinkBroken);
        } else if causes.last() == Some(&Cause::LinkBroken) {
            self.fruitless += 1;
        }
        self.add_planned_causes(chosen, &mut causes);
        causes.dedup();
        causes.truncate(CAUSES_MAX);

        let generation = self.record.generation.next();
        let mut rank = 0;
        let mut seats = Vec::with_capacity(chosen.len());
        for m in self.members.values_mut() {
            m.seat = None;
        }
        for (index, member) in chosen.iter().enumerate() {
            let Some(m) = self.members.get_mut(member) else { continue };
            m.seat = Some(index as u32);
            seats.push(Seat {
                member: *member,
                name: m.name.clone(),
                rank: Rank(rank),
                slots: m.slots,
                address: m.address.clone(),
            });
            rank += m.slots;
        }
        let world = World { generation, seats };
        self.roster = world.roster();
        self.record.generation = generation;
        self.record.world = Some(world);
        self.record.stage = Stage::Published;
        self.record.change(WorldChange {
            generation,
            causes: causes.clone(),
            before,
            after: rank,
            learned,
            stopped,
            agreed: None,
            rebuilt: None,
            restored: None,
            first_step: None,
            resume: None,
            source: None,
            steps_lost: 0,
        });
        self.resized = false;
        self.phase = Phase::Establishing(Establishing::new(self.now, &self.timing, leaving));
        out.save();
        out.note(Note::Formed { generation, size: rank, causes });
        for (index, member) in chosen.iter().enumerate() {
            self.tell_world(*member, index as u32, out);
        }
    }

    /// What the new world's membership says of why it was formed.
    fn add_planned_causes(&self, chosen: &[MemberId], causes: &mut Vec<Cause>) {
        let Some(old) = &self.record.world else {
            causes.insert(0, Cause::Formed);
            return;
        };
        if self.resized {
            causes.push(Cause::Resized);
        }
        for seat in &old.seats {
            let Some(drain) = self.record.drains.get(&seat.member) else { continue };
            let name = seat.name.clone();
            causes.push(if drain.by_notice { Cause::Notice { name } } else { Cause::Drain { name } });
        }
        for m in chosen.iter().filter_map(|member| self.members.get(member)).filter(|m| m.seat.is_none()) {
            causes.push(Cause::Joined { name: m.name.clone() });
        }
        if causes.is_empty() {
            causes.push(Cause::Formed);
        }
    }

    pub(super) fn forming_waits_for(&self, forming: &Forming) -> Waiting {
        match self.obstacle() {
            Err(Obstacle::Settling) => {
                Waiting::Settling { suspects: forming.settling.keys().copied().collect() }
            }
            Err(Obstacle::Reattaching) => {
                Waiting::Reattaching { missing: self.survivors_without_stream().collect() }
            }
            Err(Obstacle::Hold(until)) => Waiting::Unrestorable { left: until.since(self.now) },
            Err(Obstacle::Shortage(Shortage::BelowMin { have, need })) => Waiting::BelowMin { have, need },
            Err(Obstacle::Shortage(Shortage::UnitRemainder { have, unit })) => {
                Waiting::UnitRemainder { have, unit }
            }
            Ok(_) => {
                let until = forming.last_call.map_or(self.now, |call| call.until);
                Waiting::LastCall { left: until.since(self.now) }
            }
        }
    }
}

/// How many worlds in a row may break without a loss before a member is blamed for it.
const FRUITLESS_MAX: u32 = 3;
