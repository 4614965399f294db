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
use crate::world::{Seat, Shortage, World, select};

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
    pub(super) cold: bool,
    pub(super) last_call: Option<LastCall>,
    /// Accused members whose stream is up, and until when each may speak for itself or hang up.
    pub(super) settling: BTreeMap<MemberId, Timestamp>,
    /// Members that reported the break themselves.
    pub(super) spoken: BTreeSet<MemberId>,
    /// Nothing could be restored: not tried again before this instant.
    pub(super) hold: Option<Timestamp>,
    /// Whether the members of the last world know that it is over.
    told: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LastCall {
    /// However many still join, it ends then.
    pub(super) at_most: Timestamp,
    /// It ends then if nobody joins.
    pub(super) until: Timestamp,
}

impl Forming {
    fn new(record: &JobRecord, learned: Timestamp, stopped: Timestamp) -> Forming {
        Forming {
            causes: Vec::new(),
            learned,
            stopped,
            before: ranks_before(record),
            cold: false,
            last_call: None,
            settling: BTreeMap::new(),
            spoken: BTreeSet::new(),
            hold: None,
            told: false,
        }
    }

    /// The phase after a break. What was under way to the world that broke carries on: a change that has not yet led to
    /// a running world and the one that follows are one recovery for the people who wait.
    fn after_break(record: &JobRecord, now: Timestamp) -> Forming {
        match record.changes.back().filter(|change| change.restored.is_none()) {
            Some(change) => Forming {
                causes: change.causes.clone(),
                ..Forming::new(record, change.learned, change.stopped)
            },
            None => Forming::new(record, now, now),
        }
    }

    /// The phase of a job whose record says that no world lives.
    pub(super) fn resumed(record: &JobRecord, now: Timestamp) -> Forming {
        // Whoever attaches is told that the last world is over.
        let mut forming = Forming { cold: true, told: true, ..Forming::after_break(record, now) };
        if let Some(world) = &record.world {
            let lost = world.seats.iter().filter_map(|seat| {
                let how = record.departure(seat.member).filter(|how| *how != Departure::Drained)?;
                Some(Cause::Lost { name: seat.name.clone(), how })
            });
            forming.causes.extend(lost);
            if world.generation != record.generation {
                forming.causes.push(Cause::StoreRolledBack);
            }
        }
        forming
    }

    /// Who asks for a world may be followed by another.
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
    /// The world is over.
    pub(super) fn break_world(&mut self, cause: Cause, out: &mut Out) {
        match self.phase {
            Phase::Establishing(_) | Phase::Restoring(_) | Phase::Running(_) => {}
            Phase::Forming(_) | Phase::Closed(_) => return,
        }
        let mut forming = Forming::after_break(&self.record, self.now);
        forming.causes.push(cause);
        self.between_worlds(forming, out);
    }

    /// All members stand at a step boundary: the old world is over, the next one follows at once.
    pub(super) fn form_at_boundary(
        &mut self,
        learned: Timestamp,
        arrived: BTreeMap<MemberId, Holding>,
        out: &mut Out,
    ) {
        self.rested.extend(arrived);
        self.between_worlds(Forming::new(&self.record, learned, self.now), out);
        self.try_form(out);
    }

    fn between_worlds(&mut self, forming: Forming, out: &mut Out) {
        self.world_ran();
        self.phase = Phase::Forming(forming);
        self.record.stage = Stage::Forming;
        out.save();
        self.shorten_leases_adrift();
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
            self.doubted.clear();
            self.unreadable.clear();
        }
        if forming.last_call.is_some_and(|call| now < call.until) && self.slots_total < self.record.spec.max {
            return;
        }
        self.evict_unreachable(out);
        match self.obstacle() {
            Err(obstacle) => self.wait_for(&obstacle, out),
            Ok(chosen) if self.call_lasts(&chosen) => self.tell_break(out),
            Ok(chosen) => self.publish(&chosen, out),
        }
    }

    /// Whether others may still join: asked for when enough have.
    fn call_lasts(&mut self, chosen: &[MemberId]) -> bool {
        let more = self.ranks(chosen) < self.record.spec.max;
        let (now, last_call) = (self.now, self.timing.last_call);
        let Phase::Forming(forming) = &mut self.phase else { return false };
        if !forming.cold || !more {
            return false;
        }
        let first = LastCall { at_most: now.after(last_call * 4), until: now.after(last_call) };
        now < forming.last_call.get_or_insert(first).until
    }

    fn ranks(&self, chosen: &[MemberId]) -> u32 {
        chosen.iter().filter_map(|member| self.members.get(member)).map(|m| m.slots).sum()
    }

    fn wait_for(&mut self, obstacle: &Obstacle, out: &mut Out) {
        let Phase::Forming(forming) = &mut self.phase else { return };
        match obstacle {
            Obstacle::Shortage(_) => {
                forming.cold = true;
                forming.last_call = None;
            }
            // The call is over: what it waits for now is something else, and it is not called again after that.
            Obstacle::Settling | Obstacle::Reattaching | Obstacle::Hold(_)
                if forming.last_call.is_some_and(|call| call.until <= self.now) =>
            {
                forming.cold = false;
                forming.last_call = None;
            }
            Obstacle::Settling | Obstacle::Reattaching | Obstacle::Hold(_) => {}
        }
        self.tell_break(out);
    }

    fn obstacle(&self) -> Result<Vec<MemberId>, Obstacle> {
        let Phase::Forming(forming) = &self.phase else { return Ok(Vec::new()) };
        if !forming.settling.is_empty() {
            return Err(Obstacle::Settling);
        }
        // A survivor without a stream may hold the newest state (rule M-7): it is waited for as long as its lease lasts.
        if !self.adrift.is_empty() {
            return Err(Obstacle::Reattaching);
        }
        if let Some(until) = forming.hold {
            return Err(Obstacle::Hold(until));
        }
        if self.slots_total < self.record.spec.min {
            // Joiners come by the thousand: no pass over all of them for each.
            let leaving = self.record.drains.keys().filter_map(|member| self.members.get(member));
            let leaving: u32 = leaving.filter(|m| m.available).map(|m| m.slots).sum();
            let have = self.slots_total.saturating_sub(leaving);
            return Err(Obstacle::Shortage(Shortage::BelowMin { have, need: self.record.spec.min }));
        }
        select(&self.record.spec, &self.candidates()).map_err(Obstacle::Shortage)
    }

    /// Who could be in the next world, in rank order: survivors as they were, then the others as they came (rule M-3).
    /// Members that leave are no candidates, nor are members that could not be told or have not asked for a world yet
    /// (rule M-16).
    pub(super) fn candidates(&self) -> Vec<(MemberId, u32)> {
        let running = matches!(self.phase, Phase::Running(_));
        let mut found: Vec<((u32, u64), MemberId, u32)> = self
            .members
            .iter()
            .filter(|(member, m)| {
                // In a running world a lost stream is only a hint.
                let reachable = m.stream == Stream::Up || (running && m.seat.is_some());
                reachable && m.available && !self.record.drains.contains_key(member)
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
        let Some(change) = self.change_to(chosen) else { return };
        let (generation, size, causes) = (change.generation, change.after, change.causes.clone());
        let unplaced = self.take_places(chosen);
        let world = World { generation, seats: self.seats_of(chosen) };
        self.roster = world.roster();
        self.record.world = Some(world);
        self.record.stage = Stage::Published;
        self.record.change(change);
        self.resized = false;
        self.ask_unplaced(unplaced, out);
        self.record.generation = generation;
        self.phase = Phase::Establishing(Establishing::new(self.now, &self.timing));
        out.save();
        out.note(Note::Formed { generation, size, causes });
        for (index, member) in chosen.iter().enumerate() {
            self.tell_world(*member, index as u32, out);
        }
    }

    /// What the history will say of the world that is about to be published.
    fn change_to(&mut self, chosen: &[MemberId]) -> Option<WorldChange> {
        let Phase::Forming(forming) = &mut self.phase else { return None };
        let (learned, stopped, before) = (forming.learned, forming.stopped, forming.before);
        let mut causes = std::mem::take(&mut forming.causes);
        if causes.iter().any(|cause| matches!(cause, Cause::Lost { .. })) {
            self.fruitless = 0;
            self.grudges.clear();
            causes.retain(|cause| *cause != Cause::LinkBroken);
        } else if causes.last() == Some(&Cause::LinkBroken) {
            self.fruitless += 1;
        }
        self.add_planned_causes(chosen, &mut causes);
        causes.dedup();
        // A branch of states ends at a store that was put back: that cause must not fall to the limit.
        causes.sort_by_key(|cause| *cause != Cause::StoreRolledBack);
        causes.truncate(CAUSES_MAX);
        Some(WorldChange {
            generation: self.record.generation.next(),
            causes,
            before,
            after: self.ranks(chosen),
            learned,
            stopped,
            agreed: None,
            rebuilt: None,
            restored: None,
            first_step: None,
            resume: None,
            source: None,
            steps_lost: 0,
        })
    }

    /// Members that had a place and have none in the new world are told so, if they have not been before, and asked what
    /// they hold. They and all others that are asked get as long as those that have a place.
    fn ask_unplaced(&mut self, unplaced: Vec<MemberId>, out: &mut Out) {
        let told = matches!(&self.phase, Phase::Forming(forming) if forming.told);
        let over = self.record.generation;
        for member in unplaced {
            if !told && !self.rested.contains_key(&member) {
                out.tell(member, Message::Break { generation: over });
            }
            self.ask_what_it_holds(member);
        }
        let patience = self.now.after(self.timing.establish);
        self.unheard.values_mut().for_each(|until| *until = patience);
    }

    /// Gives the chosen members their places. Returns those who had one and have none any more.
    fn take_places(&mut self, chosen: &[MemberId]) -> Vec<MemberId> {
        let mut unplaced: BTreeSet<MemberId> = BTreeSet::new();
        for (member, m) in &mut self.members {
            if m.seat.take().is_some() {
                unplaced.insert(*member);
            }
        }
        for (index, member) in chosen.iter().enumerate() {
            if let Some(m) = self.members.get_mut(member) {
                m.seat = Some(index as u32);
            }
            unplaced.remove(member);
            self.rested.remove(member);
            self.unheard.remove(member);
        }
        unplaced.into_iter().collect()
    }

    fn seats_of(&self, chosen: &[MemberId]) -> Vec<Seat> {
        let mut rank = 0;
        let members = chosen.iter().filter_map(|member| Some((member, self.members.get(member)?)));
        members
            .map(|(member, m)| {
                let first = Rank(rank);
                rank += m.slots;
                let (name, address) = (m.name.clone(), m.address.clone());
                Seat { member: *member, name, rank: first, slots: m.slots, address }
            })
            .collect()
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
        let members = chosen.iter().filter_map(|member| self.members.get(member));
        for m in members.filter(|m| m.seat.is_none()) {
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
                Waiting::Reattaching { missing: self.adrift.iter().copied().collect() }
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
