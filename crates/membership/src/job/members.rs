//! Who is a member: joins and returns, leases, losses, notices.

use std::time::Duration;

use super::{Job, Member, Out, Phase, Stream};
use crate::event::{Join, Message};
use crate::holding::Holding;
use crate::ids::{Generation, MemberId, MemberName, Rank, Step, Timestamp};
use crate::reason::{Cause, Departure, Drain, Note, Refusal};
use crate::record::Stage;
use crate::world::Peer;

/// How far ahead of the store a returning member's generation may be: a store that was put back from a backup has
/// missed some generations, but not a million of them.
pub(crate) const GENERATION_JUMP_MAX: u64 = 1 << 20;

impl Job {
    pub(super) fn attach(&mut self, member: MemberId, join: Join, out: &mut Out) {
        if let Some(refusal) = self.is_of_another_job(&join) {
            out.tell(member, Message::Refused(refusal));
            return;
        }
        let told = join.history.map_or(Generation(0), |_| join.generation);
        // Nobody is told to go before that is saved: who was told so knows more than this store, too. It is to be learned
        // even from somebody who is then refused.
        let went = join.running && told == self.record.generation && self.record.stage == Stage::Published;
        if told > self.record.generation || went {
            self.store_rolled_back(told, out);
        }
        if let Some(refusal) = self.refuses(member, &join) {
            out.tell(member, Message::Refused(refusal));
            return self.try_form(out);
        }
        let is_new = !self.members.contains_key(&member);
        if is_new {
            self.admit(member, &join, out);
        }
        if let Some(m) = self.members.get_mut(&member) {
            m.stream = Stream::Up;
            m.heard = m.heard.max(told);
            self.adrift.remove(&member);
        }
        let asks = join.available && self.becomes_available(member);
        self.extend_lease(member);
        let renew_every = self.timing.renew_every(self.members.len());
        out.tell(member, Message::Attached { history: self.record.history, renew_every });
        self.retell(member, told, join.running, out);
        self.after_attach(member, asks, out);
        self.tell_draining(member, out);
    }

    /// Whether this is news.
    fn becomes_available(&mut self, member: MemberId) -> bool {
        let Some(m) = self.members.get_mut(&member).filter(|m| !m.available) else { return false };
        m.available = true;
        self.slots_total = self.slots_total.saturating_add(m.slots);
        true
    }

    pub(super) fn available(&mut self, member: MemberId, out: &mut Out) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if self.becomes_available(member) {
            self.after_attach(member, true, out);
        }
    }

    /// What a member that has come, or come back, or `asks` for a world now makes possible. A repeated join changes
    /// nothing (rule M-9).
    fn after_attach(&mut self, member: MemberId, asks: bool, out: &mut Out) {
        self.release_if_drained(member, out);
        let Some(seated) = self.members.get(&member).map(|m| m.seat.is_some()) else { return };
        match &mut self.phase {
            Phase::Forming(forming) => {
                if asks {
                    forming.last_call_again(self.now, &self.timing);
                    // It may be able to read what nobody else could.
                    forming.hold = forming.hold.map(|_| self.now);
                }
                self.try_form(out);
            }
            Phase::Establishing(_) => self.resume_if_ready(out),
            Phase::Running(running) if running.asked() => {
                // The wish for a boundary may have gone to a stream that was dead already.
                if running.asked_of(member) {
                    out.tell(member, Message::Boundary { generation: self.record.generation });
                }
                self.ask_boundary(out);
            }
            Phase::Running(_) if !seated => self.consider_spare(member, asks, out),
            // It may have replaced one that others get their state from.
            Phase::Restoring(_) => self.restore_on(out),
            Phase::Running(_) | Phase::Closed(_) => {}
        }
    }

    /// Why an introduction has nothing to do with this job as it is now, if so.
    fn is_of_another_job(&self, join: &Join) -> Option<Refusal> {
        if let Phase::Closed(closure) = self.phase {
            return Some(Refusal::JobClosed(closure));
        }
        if let Some(theirs) = join.history.filter(|theirs| *theirs != self.record.history) {
            return Some(Refusal::OtherHistory { ours: self.record.history, theirs });
        }
        let far_ahead = self.record.generation.0.saturating_add(GENERATION_JUMP_MAX);
        if join.generation.0 > far_ahead {
            let ours = self.record.history;
            return Some(Refusal::OtherHistory { ours, theirs: join.history.unwrap_or(ours) });
        }
        None
    }

    /// Why a member of this job is refused, if it is (rule M-8).
    fn refuses(&self, member: MemberId, join: &Join) -> Option<Refusal> {
        if let Some(how) = self.record.departure(member) {
            return Some(Refusal::Departed(how));
        }
        if self.members.contains_key(&member) {
            return None;
        }
        if let Err(why) = join.spec.checked() {
            return Some(Refusal::BadSpec(why));
        }
        if join.slots == 0 || join.slots > self.record.spec.max {
            return Some(Refusal::BadSlots { slots: join.slots });
        }
        if let Some(ours) = self.record.shape {
            let theirs = join.shape;
            if (ours.tensors, ours.sharding) != (theirs.tensors, theirs.sharding) {
                return Some(Refusal::OtherShape { ours, theirs });
            }
            if ours.recipe != theirs.recipe {
                return Some(Refusal::OtherRecipe);
            }
        }
        if self.members.len() >= self.members_max as usize && self.named(&join.name).is_none() {
            return Some(Refusal::TooManyMembers { limit: self.members_max });
        }
        None
    }

    fn admit(&mut self, member: MemberId, join: &Join, out: &mut Out) {
        if let Some(older) = self.named(&join.name) {
            self.lose(older, Departure::Replaced { by: member }, out);
        }
        self.record.shape.get_or_insert(join.shape);
        self.arrivals += 1;
        out.note(Note::Joined { member, name: join.name.clone() });
        self.names.insert(join.name.clone(), member);
        self.members.insert(
            member,
            Member {
                name: join.name.clone(),
                slots: join.slots,
                address: join.address.clone(),
                arrival: self.arrivals,
                stream: Stream::Up,
                lease: self.now,
                heard: Generation(0),
                available: false,
                seat: None,
                step: Step(0),
            },
        );
    }

    /// A member was in a world that this store has never heard of: the store is older than the member's memory.
    /// Numbers that were used must not be used again (rule M-2), and nobody is in the world the record speaks of.
    fn store_rolled_back(&mut self, seen: Generation, out: &mut Out) {
        out.note(Note::StoreRolledBack { knew: self.record.generation, seen });
        match &mut self.phase {
            Phase::Running(_) | Phase::Establishing(_) | Phase::Restoring(_) => {
                self.break_world(Cause::StoreRolledBack, out);
            }
            Phase::Forming(forming) => forming.causes.push(Cause::StoreRolledBack),
            Phase::Closed(_) => {}
        }
        self.record.generation = seen;
        // Its other members are yet to show themselves, and may hold newer states than those that the record knows of.
        self.blind_until = self.now.after(self.timing.takeover);
        self.took_over_run = false;
        out.save();
    }

    /// A new stream has missed what was told to the old one.
    fn retell(&mut self, member: MemberId, told: Generation, running: bool, out: &mut Out) {
        let generation = self.record.generation;
        let Some(seat) = self.members.get(&member).and_then(|m| m.seat) else {
            if told > Generation(0) {
                // It was in a world that is over, and may have missed that.
                out.tell(member, Message::Break { generation: told });
                self.ask_what_it_holds(member);
            }
            if let Phase::Restoring(restoring) = &self.phase
                && restoring.counts_on(member)
            {
                out.tell(member, Message::Serve { generation });
            }
            return self.retell_publish(member, out);
        };
        match &self.phase {
            Phase::Forming(_) if told > Generation(0) => out.tell(member, Message::Break { generation }),
            Phase::Forming(_) | Phase::Closed(_) => {}
            Phase::Establishing(_) => self.tell_world(member, seat, out),
            Phase::Restoring(restoring) => {
                let plan = restoring.plan_of(member, generation);
                self.tell_world(member, seat, out);
                if let Some(plan) = plan {
                    out.tell(member, Message::Plan(plan));
                }
            }
            Phase::Running(_) if told == generation && running => {}
            Phase::Running(_) => {
                self.tell_world(member, seat, out);
                out.tell(member, Message::Go { generation, resume: self.record.resume });
            }
        }
        self.retell_publish(member, out);
    }

    /// A member that is to leave is told so, unless it has been let go in the same breath: its program may want to do
    /// something before.
    fn tell_draining(&self, member: MemberId, out: &mut Out) {
        if let Some(drain) = self.record.drains.get(&member) {
            let left = drain.deadline.map(|at| at.since(self.now));
            out.tell(member, Message::Draining { left });
        }
    }

    /// A member without a place that was in a world may hold the newest state. It was told that its world is over, and
    /// says what it holds as soon as its program rests. Who never heard of a world has nothing to say.
    pub(super) fn ask_what_it_holds(&mut self, member: MemberId) {
        let in_a_world = self.members.get(&member).is_some_and(|m| m.heard > Generation(0));
        if in_a_world && !self.rested.contains_key(&member) {
            let until = self.now.after(self.timing.establish);
            self.unheard.entry(member).or_insert(until);
        }
    }

    /// A member whose world is over says what it holds.
    pub(super) fn rests(&mut self, member: MemberId, holding: Holding, out: &mut Out) {
        self.unheard.remove(&member);
        self.learn_step(&holding);
        self.rested.insert(member, holding);
        match self.phase {
            Phase::Establishing(_) => self.resume_if_ready(out),
            Phase::Restoring(_) => self.restore_on(out),
            Phase::Forming(_) | Phase::Running(_) | Phase::Closed(_) => {}
        }
    }

    /// What is the newest step that anybody has.
    pub(super) fn learn_step(&mut self, holding: &Holding) {
        match holding {
            Holding::State { resume, .. } if resume.lineage == self.record.resume.lineage => {
                self.top_step = self.top_step.max(resume.step);
            }
            Holding::State { .. } | Holding::Fresh { .. } | Holding::Nothing => {}
        }
    }

    /// Members without a place in the world that serve what they hold, with their addresses.
    pub(super) fn outside(&self) -> Vec<(Peer, Holding)> {
        self.rested
            .iter()
            .filter_map(|(member, holding)| {
                let address = self.members.get(member)?.address.clone();
                Some((Peer::outside(*member, address), holding.clone()))
            })
            .collect()
    }

    pub(super) fn tell_world(&self, member: MemberId, seat: u32, out: &mut Out) {
        if let Some(world) = &self.record.world {
            let renew_every = self.timing.renew_every(self.members.len());
            out.tell(member, Message::World(world.place(seat as usize, self.roster, renew_every)));
        }
    }

    pub(super) fn named(&self, name: &MemberName) -> Option<MemberId> {
        self.names.get(name).copied()
    }

    pub(super) fn detached(&mut self, member: MemberId, out: &mut Out) {
        let Some(m) = self.members.get_mut(&member) else { return };
        m.stream = Stream::Ended;
        let seated = m.seat.is_some();
        if seated {
            self.adrift.insert(member);
        }
        let alone = self.seats() == 1;
        let waited_for = match &mut self.phase {
            Phase::Forming(forming) if forming.settling.contains_key(&member) => {
                self.lose(member, Departure::Died, out);
                return self.try_form(out);
            }
            Phase::Running(running) => {
                let stopping = running.stopping();
                if running.asked_of(member) {
                    self.ask_boundary(out);
                }
                !seated || alone || stopping
            }
            Phase::Forming(_) | Phase::Establishing(_) | Phase::Restoring(_) | Phase::Closed(_) => true,
        };
        if waited_for {
            self.shorten_lease(member);
        }
        self.try_form(out);
    }

    pub(super) fn renew(&mut self, member: MemberId, generation: Generation, step: Step, out: &mut Out) {
        let current = self.record.generation;
        let Some(m) = self.members.get_mut(&member) else {
            return self.refuse_stranger(member, out);
        };
        m.heard = m.heard.max(generation);
        m.step = step;
        if m.seat.is_some() && generation == current && matches!(self.phase, Phase::Running(_)) {
            self.top_step = self.top_step.max(step);
        }
        self.extend_lease(member);
    }

    /// Somebody who is no member, or none any more, is told so and changes nothing (rule M-8).
    pub(super) fn refuse_stranger(&self, member: MemberId, out: &mut Out) {
        let refusal = match self.phase {
            Phase::Closed(closure) => Refusal::JobClosed(closure),
            Phase::Forming(_) | Phase::Establishing(_) | Phase::Restoring(_) | Phase::Running(_) => {
                Refusal::Departed(self.record.departure(member).unwrap_or(Departure::Silent))
            }
        };
        out.tell(member, Message::Refused(refusal));
    }

    pub(super) fn leave(&mut self, member: MemberId, out: &mut Out) {
        if self.members.contains_key(&member) {
            self.lose(member, Departure::Left, out);
            self.after_loss(out);
        }
    }

    pub(super) fn notice(&mut self, member: MemberId, deadline: Timestamp, out: &mut Out) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.drain(member, Drain { deadline: Some(deadline), by_notice: true }, out);
    }

    /// Marks a member as leaving. The earliest deadline counts; a repetition changes nothing (rule M-10).
    pub(super) fn drain(&mut self, member: MemberId, drain: Drain, out: &mut Out) {
        let deadline = match self.record.drains.get(&member) {
            Some(known) => match (known.deadline, drain.deadline) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            None => drain.deadline,
        };
        let by_notice =
            drain.by_notice || self.record.drains.get(&member).is_some_and(|known| known.by_notice);
        let drain = Drain { deadline, by_notice };
        let is_news = self.record.drains.insert(member, drain) != Some(drain);
        if is_news {
            out.save();
        }
        self.release_if_drained(member, out);
        match self.phase {
            Phase::Running(_) => self.review(true, out),
            Phase::Forming(_) => self.try_form(out),
            Phase::Establishing(_) => self.resume_if_ready(out),
            Phase::Restoring(_) | Phase::Closed(_) => {}
        }
        if is_news {
            self.tell_draining(member, out);
        }
    }

    pub(super) fn extend_lease(&mut self, member: MemberId) {
        let lease = self.timing.lease(self.members.len());
        if let Some(m) = self.members.get_mut(&member) {
            m.lease = m.lease.max(self.now.after(lease));
            self.lease_scan = self.lease_scan.min(m.lease);
        }
    }

    /// Everybody waits for the members of the last world: those without a stream get only so long to come back.
    pub(super) fn shorten_leases_adrift(&mut self) {
        for member in self.adrift.clone() {
            self.shorten_lease(member);
        }
    }

    /// Others wait for a member that has no stream: it gets only so long to come back.
    pub(super) fn shorten_lease(&mut self, member: MemberId) {
        let at_most = self.now.after(self.timing.reattach);
        if let Some(m) = self.members.get_mut(&member) {
            m.lease = m.lease.min(match m.stream {
                Stream::Unseen => at_most.max(self.takeover_until),
                Stream::Up | Stream::Ended => at_most,
            });
            self.lease_scan = self.lease_scan.min(m.lease);
        }
    }

    pub(super) fn expire_leases(&mut self, out: &mut Out) {
        if self.now < self.lease_scan {
            return;
        }
        let expired: Vec<(MemberId, Departure)> = self
            .members
            .iter()
            .filter(|(_, m)| m.lease <= self.now)
            .map(|(id, m)| (*id, if m.stream == Stream::Up { Departure::Silent } else { Departure::Gone }))
            .collect();
        for (member, how) in &expired {
            self.lose(*member, *how, out);
        }
        self.lease_scan = self.members.values().map(|m| m.lease).min().unwrap_or(Timestamp(u64::MAX));
        if !expired.is_empty() {
            self.after_loss(out);
        }
    }

    /// Nobody could be heard for a while, so nobody can have been late.
    pub(super) fn stalled(&mut self, by: Duration) {
        self.each_deadline(&mut |at| *at = at.after(by));
    }

    /// Every instant at which somebody's time is up.
    pub(super) fn each_deadline(&mut self, change: &mut dyn FnMut(&mut Timestamp)) {
        self.members.values_mut().for_each(|m| change(&mut m.lease));
        self.unheard.values_mut().for_each(&mut *change);
        change(&mut self.lease_scan);
        [&mut self.takeover_until, &mut self.blind_until]
            .into_iter()
            .filter(|at| **at > self.now)
            .for_each(&mut *change);
        match &mut self.phase {
            Phase::Forming(forming) => forming.settling.values_mut().for_each(change),
            Phase::Establishing(establishing) => establishing.each_deadline(change),
            Phase::Restoring(restoring) => change(&mut restoring.deadline),
            Phase::Running(running) => running.each_deadline(change),
            Phase::Closed(_) => {}
        }
    }

    /// Strikes a member off. If it had a seat in a living world, that world is over.
    pub(super) fn lose(&mut self, member: MemberId, how: Departure, out: &mut Out) {
        let Some(lost) = self.members.remove(&member) else { return };
        if lost.available {
            self.slots_total = self.slots_total.saturating_sub(lost.slots);
        }
        out.note(Note::Departed { member, name: lost.name.clone(), how });
        let last_word = match how {
            Departure::Drained => Message::Released,
            Departure::Died
            | Departure::Silent
            | Departure::Gone
            | Departure::Unready
            | Departure::Unrestored
            | Departure::Stuck
            | Departure::Unreachable
            | Departure::Replaced { .. }
            | Departure::Left
            | Departure::Evicted
            | Departure::Diverged
            | Departure::StateLost => Message::Refused(Refusal::Departed(how)),
        };
        out.tell(member, last_word);
        self.record.depart(member, how);
        self.forget(member, &lost.name);
        self.saving_lost(member, out);
        if lost.seat.is_none() {
            if self.members.is_empty() && self.record.generation == Generation(0) {
                // Nobody is left of those who said what the job looks like.
                self.record.shape = None;
            }
            return;
        }
        out.save();
        let cause = Cause::Lost { name: lost.name, how };
        match &mut self.phase {
            Phase::Forming(forming) => {
                forming.settling.remove(&member);
                forming.causes.push(cause);
            }
            Phase::Establishing(_) | Phase::Restoring(_) | Phase::Running(_) => self.break_world(cause, out),
            Phase::Closed(_) => {}
        }
    }

    fn forget(&mut self, member: MemberId, name: &MemberName) {
        if self.names.get(name) == Some(&member) {
            self.names.remove(name);
        }
        self.adrift.remove(&member);
        self.rested.remove(&member);
        self.unheard.remove(&member);
        self.distrusted.remove(&member);
        self.doubted.remove(&member);
        self.grudges.remove(&member);
    }

    /// What a loss makes possible or necessary.
    pub(super) fn after_loss(&mut self, out: &mut Out) {
        match self.phase {
            Phase::Forming(_) => self.try_form(out),
            Phase::Running(_) => self.review(false, out),
            Phase::Establishing(_) => self.resume_if_ready(out),
            Phase::Restoring(_) => self.restore_on(out),
            Phase::Closed(_) => {}
        }
    }

    pub(super) fn broken(
        &mut self,
        member: MemberId,
        generation: Generation,
        suspects: &[Rank],
        out: &mut Out,
    ) {
        if !self.members.contains_key(&member) {
            return self.refuse_stranger(member, out);
        }
        self.extend_lease(member);
        if generation != self.record.generation || !self.is_seated(member) {
            return;
        }
        let Some(world) = self.record.world.as_ref().filter(|world| world.generation == generation) else {
            return;
        };
        let accused: Vec<MemberId> = suspects
            .iter()
            .filter_map(|rank| world.member_at(*rank))
            .filter(|suspect| *suspect != member && self.members.contains_key(suspect))
            .collect();
        match self.phase {
            Phase::Running(_) | Phase::Establishing(_) | Phase::Restoring(_) => {
                self.break_world(Cause::LinkBroken, out);
            }
            Phase::Forming(_) => {}
            Phase::Closed(_) => return,
        }
        let settle = self.now.after(self.timing.settle);
        let mut dead = Vec::new();
        if let Phase::Forming(forming) = &mut self.phase {
            // Who speaks lives: it saw the break, too, because the break ran round the ring.
            forming.spoken.insert(member);
            forming.settling.remove(&member);
            for suspect in accused {
                *self.grudges.entry(suspect).or_default() += 1;
                match self.members.get(&suspect).map(|m| m.stream) {
                    Some(Stream::Ended) => dead.push(suspect),
                    Some(Stream::Up) if !forming.spoken.contains(&suspect) => {
                        forming.settling.entry(suspect).or_insert(settle);
                    }
                    Some(Stream::Up | Stream::Unseen) | None => {}
                }
            }
        }
        for suspect in dead {
            self.lose(suspect, Departure::Died, out);
        }
        self.try_form(out);
    }
}
