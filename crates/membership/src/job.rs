//! The state machine of one job. See the crate's picture; one file per phase:
//!
//! | file | what it decides |
//! |---|---|
//! | `job/members.rs` | who is a member: joins, leases, losses, notices |
//! | `job/forming.rs` | when enough are there, and the next world |
//! | `job/establishing.rs` | when all have answered it, and from which state it resumes |
//! | `job/restoring.rs` | when all have reached that state, and what to do if one cannot |
//! | `job/running.rs` | planned changes at a step boundary, the end of the job |
//! | `job/saving.rs` | when a checkpoint counts |
//! | `job/operate.rs` | what operators ask for |

mod establishing;
mod forming;
mod members;
mod operate;
mod restoring;
mod running;
mod saving;

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{Effect, Event, Message, Transition};
use crate::holding::Holding;
use crate::ids::{Generation, Lineage, MemberId, MemberName, Step, Timestamp};
use crate::reason::{Closure, Note, Waiting};
use crate::record::{JobRecord, Stage};
use crate::spec::Timing;
use crate::world::{Roster, World};

use establishing::Establishing;
use forming::Forming;
use restoring::Restoring;
use running::Running;
use saving::Savings;

/// One job: what is saved of it, and what its present coordinator knows beyond that.
///
/// Time only moves through the `now` of [`Job::step`]; an earlier `now` than the last one counts as the last one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Job {
    pub(crate) record: JobRecord,
    pub(crate) timing: Timing,
    pub(crate) members_max: u32,
    pub(crate) now: Timestamp,
    pub(crate) members: BTreeMap<MemberId, Member>,
    /// Who goes by which name.
    names: BTreeMap<MemberName, MemberId>,
    /// Counts joins: newcomers get their ranks in the order in which they came.
    arrivals: u64,
    /// Ranks that all available members bring together: an upper bound that costs no pass over them.
    slots_total: u32,
    pub(crate) phase: Phase,
    pub(crate) savings: Savings,
    /// No lease runs out before this instant; leases are looked through only then.
    lease_scan: Timestamp,
    /// Until then a member that has not come back yet may still do so.
    takeover_until: Timestamp,
    /// Until then members that this coordinator has never heard of may come back with the newest state: only those of
    /// the last published world are in the record …
    blind_until: Timestamp,
    /// … unless that world had run, and one of them is there.
    took_over_run: bool,
    roster: Roster,
    /// Members of the last published world that have no stream.
    adrift: BTreeSet<MemberId>,
    /// What members hold that said so when their world was over, as long as they have no place in a new one.
    rested: BTreeMap<MemberId, Holding>,
    /// Members that were in a world, have no place in the last one and have not yet said what they hold: it may be the
    /// newest state (rule M-7). And until when that is waited for.
    unheard: BTreeMap<MemberId, Timestamp>,
    /// Members whose memory was found wrong, until a world runs.
    distrusted: BTreeSet<MemberId>,
    /// Members that failed as a source once and were given a second chance, until a world runs.
    doubted: BTreeSet<MemberId>,
    /// Checkpoints that nobody could read, until a world runs.
    unreadable: BTreeSet<(Generation, Step)>,
    /// Worlds in a row that broke although nobody was lost, and how often each member was accused in them.
    fruitless: u32,
    grudges: BTreeMap<MemberId, u32>,
    /// The highest step that any member has said it committed.
    pub(crate) top_step: Step,
    /// Whether the bounds changed since the last world.
    resized: bool,
}

/// A live member.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Member {
    pub(crate) name: MemberName,
    pub(crate) slots: u32,
    pub(crate) address: String,
    pub(crate) arrival: u64,
    pub(crate) stream: Stream,
    /// Until when it is counted without a word from it.
    pub(crate) lease: Timestamp,
    /// The last world it is known to have been told of.
    pub(crate) heard: Generation,
    /// Whether its program has asked for a world.
    pub(crate) available: bool,
    /// Its place in the last published world.
    pub(crate) seat: Option<u32>,
    /// The last step it said it committed.
    pub(crate) step: Step,
}

/// What this coordinator knows of a member's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stream {
    /// It has not come back since this coordinator started: no hint of anything.
    Unseen,
    /// It is there.
    Up,
    /// It has ended: a hint, and together with a neighbour's report a death.
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Forming(Forming),
    Establishing(Establishing),
    Restoring(Restoring),
    Running(Running),
    Closed(Closure),
}

/// Collects what follows from an event.
#[derive(Default)]
pub(crate) struct Out {
    save: bool,
    then: Vec<Effect>,
}

impl Out {
    /// The record changed in a way that must be saved before anything is told.
    pub(crate) fn save(&mut self) {
        self.save = true;
    }

    pub(crate) fn tell(&mut self, member: MemberId, message: Message) {
        self.then.push(Effect::Tell { member, message });
    }

    pub(crate) fn note(&mut self, note: Note) {
        self.then.push(Effect::Note(note));
    }
}

/// How many members a job may have unless the driver says otherwise.
pub const MEMBERS_MAX: u32 = 20_000;

impl Job {
    /// Takes a job up from its record, new or saved, at `now`.
    ///
    /// Every lease is lengthened once: members of the last world have [`Timing::takeover`] to attach again, and a world
    /// that ran goes on running meanwhile.
    pub fn restore(record: JobRecord, timing: Timing, members_max: u32, now: Timestamp) -> Job {
        let takeover = now.after(timing.takeover);
        let mut members = BTreeMap::new();
        for (index, seat) in record.world.iter().flat_map(|world| world.seats.iter().enumerate()) {
            if record.departure(seat.member).is_some() {
                continue;
            }
            members.insert(
                seat.member,
                Member {
                    name: seat.name.clone(),
                    slots: seat.slots,
                    address: seat.address.clone(),
                    arrival: index as u64,
                    stream: Stream::Unseen,
                    lease: takeover,
                    heard: Generation(0),
                    available: true,
                    seat: Some(index as u32),
                    step: Step(0),
                },
            );
        }
        let phase = match record.stage {
            Stage::Forming => Phase::Forming(Forming::resumed(&record, now)),
            Stage::Published => Phase::Establishing(Establishing::resumed(&record, now, &timing)),
            Stage::Running => Phase::Running(Running::new()),
            Stage::Closed(closure) => Phase::Closed(closure),
        };
        if matches!(phase, Phase::Closed(_)) {
            members.clear();
        }
        let mut job = Job {
            timing,
            members_max,
            now,
            names: members
                .iter()
                .map(|(member, m): (&MemberId, &Member)| (m.name.clone(), *member))
                .collect(),
            arrivals: members.len() as u64,
            slots_total: members.values().map(|m| m.slots).sum(),
            lease_scan: takeover,
            takeover_until: takeover,
            // As long as no world has run, there is no state that could be missed.
            blind_until: if record.resume.lineage == Lineage(0) { now } else { takeover },
            took_over_run: record.changes.back().is_none_or(|change| change.restored.is_some()),
            adrift: members.keys().copied().collect(),
            members,
            phase,
            savings: Savings::default(),
            roster: record.world.as_ref().map(World::roster).unwrap_or_default(),
            rested: BTreeMap::new(),
            unheard: BTreeMap::new(),
            distrusted: BTreeSet::new(),
            doubted: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            fruitless: 0,
            grudges: BTreeMap::new(),
            top_step: record.commits.last().map_or(record.resume.step, |c| c.step.max(record.resume.step)),
            resized: false,
            record,
        };
        // What was asked for and has not been done yet is asked for again. Nobody is attached, so nobody is told.
        job.review(true, &mut Out::default());
        job
    }

    /// What follows from `event` at `now`.
    pub fn step(&mut self, now: Timestamp, event: Event) -> Transition {
        self.now = self.now.max(now);
        let mut out = Out::default();
        match event {
            Event::Attach { member, join } => self.attach(member, join, &mut out),
            Event::Detached { member } => self.detached(member, &mut out),
            Event::Renew { member, generation, step } => self.renew(member, generation, step, &mut out),
            Event::Available { member } => self.available(member, &mut out),
            Event::Leave { member } => self.leave(member, &mut out),
            Event::Ready { member, generation, holding } => self.ready(member, generation, holding, &mut out),
            Event::Restored { member, generation, attempt, resume, moved } => {
                self.restored(member, generation, attempt, resume, &moved, &mut out);
            }
            Event::RestoreFailed { member, generation, attempt, culprit } => {
                self.restore_failed(member, generation, attempt, culprit, &mut out);
            }
            Event::Broken { member, generation, suspects } => {
                self.broken(member, generation, &suspects, &mut out);
            }
            Event::Boundary { member, generation, holding } => {
                self.boundary(member, generation, holding, &mut out);
            }
            Event::FirstStep { member, generation, step } => {
                self.first_step(member, generation, step, &mut out)
            }
            Event::Finished { member, generation, step } => self.finished(member, generation, step, &mut out),
            Event::ShardWritten { member, generation, step, report } => {
                self.shard_written(member, generation, step, report, &mut out);
            }
            Event::SaveFailed { member, generation, step } => {
                self.save_failed(member, generation, step, &mut out)
            }
            Event::ManifestWritten { member, generation, step, manifest } => {
                self.manifest_written(member, generation, step, manifest, &mut out);
            }
            Event::Notice { member, deadline } => self.notice(member, deadline, &mut out),
            Event::Operate { request, operation } => self.operate(request, operation, &mut out),
            Event::Stalled { by } => self.stalled(by),
            Event::Tick => self.tick(&mut out),
        }
        let save = out.save.then(|| self.record.clone());
        Transition { save, then: out.then }
    }

    /// When [`Event::Tick`] is due at the latest.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let phase = match &self.phase {
            Phase::Forming(forming) => forming.deadline(),
            Phase::Establishing(establishing) => Some(self.establishing_deadline(establishing)),
            Phase::Restoring(restoring) => Some(self.restoring_deadline(restoring)),
            Phase::Running(running) => running.deadline(&self.timing),
            Phase::Closed(_) => return None,
        };
        let leases = (!self.members.is_empty()).then_some(self.lease_scan);
        [phase, leases].into_iter().flatten().min()
    }

    /// Stamps the time at which the last published world was saved and told. It only serves the history: the driver
    /// calls it when the save has succeeded.
    pub fn published(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
        if let Some(change) = self.record.changes.back_mut() {
            change.agreed.get_or_insert(self.now);
        }
    }

    /// What is saved of the job.
    pub fn record(&self) -> &JobRecord {
        &self.record
    }

    /// The times by which it waits.
    pub fn timing(&self) -> &Timing {
        &self.timing
    }

    /// How many members it has, spares included.
    pub fn member_count(&self) -> usize {
        self.members.len()
    }

    /// What it waits for.
    pub fn waiting(&self) -> Waiting {
        match &self.phase {
            Phase::Forming(forming) => self.forming_waits_for(forming),
            Phase::Establishing(establishing) => self.establishing_waits_for(establishing),
            Phase::Restoring(restoring) => self.restoring_waits_for(restoring),
            Phase::Running(running) => self.running_waits_for(running),
            Phase::Closed(_) => Waiting::Nothing,
        }
    }

    /// Members of the last published world, in rank order, for which `has` is false.
    fn seated_except(&self, has: impl Fn(MemberId) -> bool) -> Vec<MemberId> {
        self.seated().filter(|member| !has(*member)).collect()
    }

    /// Members of the last published world, in rank order.
    pub(crate) fn seated(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.record.world.iter().flat_map(|world| world.seats.iter().map(|seat| seat.member))
    }

    /// How many members the last published world has.
    fn seats(&self) -> usize {
        self.record.world.as_ref().map_or(0, |world| world.seats.len())
    }

    fn is_seated(&self, member: MemberId) -> bool {
        self.members.get(&member).is_some_and(|m| m.seat.is_some())
    }

    fn is_reachable(&self, member: MemberId) -> bool {
        self.members.get(&member).is_some_and(|m| m.stream == Stream::Up)
    }

    fn tick(&mut self, out: &mut Out) {
        self.expire_leases(out);
        match &self.phase {
            Phase::Forming(_) => self.try_form(out),
            Phase::Establishing(_) => self.establish_overdue(out),
            Phase::Restoring(_) => self.restore_overdue(out),
            Phase::Running(_) => self.running_due(out),
            Phase::Closed(_) => {}
        }
    }

    fn close(&mut self, closure: Closure, out: &mut Out) {
        self.record.stage = Stage::Closed(closure);
        self.record.drains.clear();
        out.save();
        out.note(Note::Closed(closure));
        for (member, _) in std::mem::take(&mut self.members) {
            out.tell(member, Message::Closed(closure));
        }
        self.slots_total = 0;
        self.names.clear();
        self.adrift.clear();
        self.rested.clear();
        self.unheard.clear();
        self.savings = Savings::default();
        self.phase = Phase::Closed(closure);
    }
}

#[cfg(test)]
mod walk_tests;
