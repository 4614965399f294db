//! What operators see, to the wire and back.

use std::time::Duration;

use reknit_membership::reason::{SaveTrouble, Waiting};
use reknit_membership::record::WorldChange;
use reknit_membership::status::{MemberStatus, PhaseName, Status};
use reknit_membership::world::Seat;
use reknit_membership::{Generation, HistoryId, MemberId, Rank, Step, WorldSize};

use crate::v1;
use crate::words::{self, Checked, need, wrong};

/// How many members a waiting reason names at most.
const NAMED_MAX: usize = 64;

/// Writes a job's status. `members_total` is how many members there are, listed or not.
pub fn from_status(status: &Status, members_total: u32) -> v1::JobStatus {
    let closure = match status.phase {
        PhaseName::Closed(closure) => words::from_closure(closure),
        PhaseName::Forming | PhaseName::Establishing | PhaseName::Restoring | PhaseName::Running => None,
    };
    v1::JobStatus {
        job: status.job.as_str().to_owned(),
        history: status.history.0,
        spec: Some(words::from_spec(status.spec)),
        phase: from_phase(status.phase).into(),
        closure,
        waiting: Some(from_waiting(&status.waiting)),
        generation: status.generation.0,
        size: status.size.0,
        step: status.step.0,
        members: status.members.iter().map(from_member).collect(),
        members_total,
        commits: status.commits.iter().map(words::from_commit).collect(),
        save_trouble: status.save_trouble.as_ref().map(|trouble| v1::SaveTrouble {
            step: trouble.step.0,
            member: trouble.member.as_str().to_owned(),
        }),
        saved_age_us: None,
    }
}

fn save_trouble(wire: v1::SaveTrouble) -> Checked<SaveTrouble> {
    Ok(SaveTrouble { step: Step(wire.step), member: words::name(&wire.member)? })
}

/// Reads a job's status.
pub fn status(wire: v1::JobStatus) -> Checked<Status> {
    Ok(Status {
        phase: phase(&wire)?,
        job: words::job(&wire.job)?,
        history: HistoryId(wire.history),
        spec: words::spec(need("spec", wire.spec)?),
        waiting: waiting(need("waiting", wire.waiting)?)?,
        generation: Generation(wire.generation),
        size: WorldSize(wire.size),
        step: Step(wire.step),
        members: wire.members.into_iter().map(member).collect::<Checked<_>>()?,
        commits: wire.commits.into_iter().map(words::commit).collect::<Checked<_>>()?,
        save_trouble: wire.save_trouble.map(save_trouble).transpose()?,
    })
}

/// Writes one change of the world.
pub fn from_change(change: &WorldChange) -> v1::WorldChange {
    words::from_world_change(change)
}

/// Reads one change of the world.
pub fn change(wire: v1::WorldChange) -> Checked<WorldChange> {
    words::world_change(wire)
}

/// Writes one seat of a roster.
pub fn from_seat(seat: &Seat) -> v1::Seat {
    words::from_seat(seat)
}

/// Reads one seat of a roster.
pub fn seat(wire: v1::Seat) -> Checked<Seat> {
    words::seat(wire)
}

/// The wire's name of a phase.
pub fn from_phase(phase: PhaseName) -> v1::Phase {
    match phase {
        PhaseName::Forming => v1::Phase::Forming,
        PhaseName::Establishing => v1::Phase::Establishing,
        PhaseName::Restoring => v1::Phase::Restoring,
        PhaseName::Running => v1::Phase::Running,
        PhaseName::Closed(_) => v1::Phase::Closed,
    }
}

fn phase(wire: &v1::JobStatus) -> Checked<PhaseName> {
    Ok(match wire.phase() {
        v1::Phase::Unspecified => return wrong("phase", "unknown"),
        v1::Phase::Forming => PhaseName::Forming,
        v1::Phase::Establishing => PhaseName::Establishing,
        v1::Phase::Restoring => PhaseName::Restoring,
        v1::Phase::Running => PhaseName::Running,
        v1::Phase::Closed => PhaseName::Closed(words::closure(wire.closure)?),
    })
}

fn from_member(member: &MemberStatus) -> v1::MemberStatus {
    v1::MemberStatus {
        member: member.member.0,
        name: member.name.as_str().to_owned(),
        rank: member.rank.map(|rank| rank.0),
        slots: member.slots,
        address: member.address.clone(),
        attached: member.attached,
        available: member.available,
        lease_left_us: micros(member.lease_left),
        drain: member.drain.map(words::from_drain),
        step: member.step.0,
    }
}

fn member(wire: v1::MemberStatus) -> Checked<MemberStatus> {
    Ok(MemberStatus {
        member: MemberId(wire.member),
        name: words::name(&wire.name)?,
        rank: wire.rank.map(Rank),
        slots: wire.slots,
        address: wire.address,
        attached: wire.attached,
        available: wire.available,
        lease_left: Duration::from_micros(wire.lease_left_us),
        drain: wire.drain.map(words::drain),
        step: Step(wire.step),
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn from_waiting(waiting: &Waiting) -> v1::Waiting {
    use v1::waiting::Kind;
    let mut wire = v1::Waiting::default();
    let mut named = |members: &[MemberId]| {
        wire.members = members.iter().take(NAMED_MAX).map(|m| m.0).collect();
        wire.members_total = members.len() as u32;
    };
    let kind = match waiting {
        Waiting::Nothing => Kind::Nothing,
        Waiting::BelowMin { have, need } => {
            (wire.have, wire.need) = (*have, *need);
            Kind::BelowMin
        }
        Waiting::UnitRemainder { have, unit } => {
            (wire.have, wire.need) = (*have, *unit);
            Kind::UnitRemainder
        }
        Waiting::LastCall { left } => {
            wire.left_us = micros(*left);
            Kind::LastCall
        }
        Waiting::Reattaching { missing } => {
            named(missing);
            Kind::Reattaching
        }
        Waiting::Settling { suspects } => {
            named(suspects);
            Kind::Settling
        }
        Waiting::Unrestorable { left } => {
            wire.left_us = micros(*left);
            Kind::Unrestorable
        }
        Waiting::Ready { missing } => {
            named(missing);
            Kind::Ready
        }
        Waiting::Restored { missing } => {
            named(missing);
            Kind::Restored
        }
        Waiting::Merge { left } => {
            wire.left_us = micros(*left);
            Kind::Merge
        }
        Waiting::Boundary { missing } => {
            named(missing);
            Kind::Boundary
        }
        Waiting::Finish { missing } => {
            named(missing);
            Kind::Finish
        }
    };
    wire.set_kind(kind);
    wire
}

fn waiting(wire: v1::Waiting) -> Checked<Waiting> {
    use v1::waiting::Kind;
    let left = Duration::from_micros(wire.left_us);
    let members = || wire.members.iter().map(|m| MemberId(*m)).collect();
    Ok(match wire.kind() {
        Kind::Unspecified => return wrong("waiting.kind", "unknown"),
        Kind::Nothing => Waiting::Nothing,
        Kind::BelowMin => Waiting::BelowMin { have: wire.have, need: wire.need },
        Kind::UnitRemainder => Waiting::UnitRemainder { have: wire.have, unit: wire.need },
        Kind::LastCall => Waiting::LastCall { left },
        Kind::Reattaching => Waiting::Reattaching { missing: members() },
        Kind::Settling => Waiting::Settling { suspects: members() },
        Kind::Unrestorable => Waiting::Unrestorable { left },
        Kind::Ready => Waiting::Ready { missing: members() },
        Kind::Restored => Waiting::Restored { missing: members() },
        Kind::Merge => Waiting::Merge { left },
        Kind::Boundary => Waiting::Boundary { missing: members() },
        Kind::Finish => Waiting::Finish { missing: members() },
    })
}
