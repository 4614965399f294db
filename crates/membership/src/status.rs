//! What an operator sees of a job at one instant.

use std::time::Duration;

use crate::ids::{Generation, HistoryId, JobId, MemberId, MemberName, Rank, Step, WorldSize};
use crate::job::{Job, Phase, Stream};
use crate::reason::{Closure, Drain, SaveTrouble, Waiting};
use crate::record::Commit;
use crate::spec::Spec;

/// Which phase a job is in, without what only the core needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PhaseName {
    /// Between two worlds.
    Forming,
    /// A world is published.
    Establishing,
    /// Its members bring their state to one step.
    Restoring,
    /// It runs.
    Running,
    /// The job is over.
    Closed(Closure),
}

/// One member as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// Who.
    pub member: MemberId,
    /// What it is called.
    pub name: MemberName,
    /// Its first rank, if it is in the world; else it waits as a spare.
    pub rank: Option<Rank>,
    /// How many ranks it brings.
    pub slots: u32,
    /// Where its data plane listens.
    pub address: String,
    /// Whether its stream is up.
    pub attached: bool,
    /// Whether its program has asked for a world.
    pub available: bool,
    /// How long its lease still lasts.
    pub lease_left: Duration,
    /// Whether and until when it leaves.
    pub drain: Option<Drain>,
    /// The last step it said it committed.
    pub step: Step,
}

/// A job as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Which job.
    pub job: JobId,
    /// Its history.
    pub history: HistoryId,
    /// Its bounds.
    pub spec: Spec,
    /// Its phase.
    pub phase: PhaseName,
    /// What it waits for.
    pub waiting: Waiting,
    /// Its last generation.
    pub generation: Generation,
    /// The size of its last world; zero if there was none.
    pub size: WorldSize,
    /// The highest committed step the coordinator has heard of. Members say it when they renew their leases.
    pub step: Step,
    /// Its members: the world in rank order, then spares as they came.
    pub members: Vec<MemberStatus>,
    /// Its committed checkpoints, oldest first.
    pub commits: Vec<Commit>,
    /// Why there is no newer one, if one could not be made since.
    pub save_trouble: Option<SaveTrouble>,
}

impl Job {
    /// Which phase the job is in.
    pub fn phase(&self) -> PhaseName {
        match &self.phase {
            Phase::Forming(_) => PhaseName::Forming,
            Phase::Establishing(_) => PhaseName::Establishing,
            Phase::Restoring(_) => PhaseName::Restoring,
            Phase::Running(_) => PhaseName::Running,
            Phase::Closed(closure) => PhaseName::Closed(*closure),
        }
    }

    /// What an operator sees of the job, at most `members_max` members of it.
    pub fn status(&self, members_max: usize) -> Status {
        let world = self.record.world.as_ref();
        let mut members: Vec<((u32, u64), MemberStatus)> = self
            .members
            .iter()
            .map(|(member, m)| {
                let seat = m.seat.and_then(|seat| world?.seats.get(seat as usize));
                let status = MemberStatus {
                    member: *member,
                    name: m.name.clone(),
                    rank: seat.map(|seat| seat.rank),
                    slots: m.slots,
                    address: m.address.clone(),
                    attached: m.stream == Stream::Up,
                    available: m.available,
                    lease_left: m.lease.since(self.now),
                    drain: self.record.drains.get(member).copied(),
                    step: m.step,
                };
                ((m.seat.unwrap_or(u32::MAX), m.arrival), status)
            })
            .collect();
        members.sort_by_key(|(order, _)| *order);
        Status {
            job: self.record.job.clone(),
            history: self.record.history,
            spec: self.record.spec,
            phase: self.phase(),
            waiting: self.waiting(),
            generation: self.record.generation,
            size: world.map(|world| world.size()).unwrap_or_default(),
            step: self.top_step,
            members: members.into_iter().take(members_max).map(|(_, status)| status).collect(),
            commits: self.record.commits.clone(),
            save_trouble: self.savings.trouble.clone(),
        }
    }
}
