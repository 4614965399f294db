//! The words that all services share, to the wire and back.

use reknit_membership::holding::{Moved, Resume, ShardReport, Source};
use reknit_membership::reason::{Cause, Closure, Departure, Drain};
use reknit_membership::record::{Commit, WorldChange};
use reknit_membership::spec::{SHARDS_MAX, Shape, Sharding, Spec};
use reknit_membership::world::{Peer, Seat};
use reknit_membership::{Digest, Generation, JobId, Lineage, MemberId, MemberName, Rank, Step, Timestamp};

use crate::v1;

/// Why bytes from outside are not a message of this contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadMessage {
    /// A field that must be there is not.
    #[error("the field `{0}` is missing")]
    Missing(&'static str),
    /// A field holds what it must not.
    #[error("the field `{field}` is wrong: {why}")]
    Wrong {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The bytes are not even protobuf.
    #[error("not a protobuf message")]
    Garbled(#[from] prost::DecodeError),
}

pub(crate) type Checked<T> = Result<T, BadMessage>;

pub(crate) fn wrong<T>(field: &'static str, why: impl ToString) -> Checked<T> {
    Err(BadMessage::Wrong { field, why: why.to_string() })
}

pub(crate) fn need<T>(field: &'static str, value: Option<T>) -> Checked<T> {
    value.ok_or(BadMessage::Missing(field))
}

/// The longest address a member may give, in bytes.
pub(crate) const ADDRESS_BYTES_MAX: usize = 256;

pub(crate) fn address(text: String) -> Checked<String> {
    if text.is_empty() || text.len() > ADDRESS_BYTES_MAX {
        return wrong("address", format!("it must have 1 to {ADDRESS_BYTES_MAX} bytes"));
    }
    // Operators see it on their terminals.
    if !text.chars().all(|c| c.is_ascii_graphic()) {
        return wrong("address", "it must be plain characters without spaces");
    }
    Ok(text)
}

pub(crate) fn job(text: &str) -> Checked<JobId> {
    JobId::new(text).or_else(|why| wrong("job", why))
}

pub(crate) fn name(text: &str) -> Checked<MemberName> {
    MemberName::new(text).or_else(|why| wrong("name", why))
}

pub(crate) fn digest(wire: Option<v1::Digest>) -> Checked<Digest> {
    let bytes = need("digest", wire)?.value;
    match <[u8; 16]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Ok(Digest(u128::from_be_bytes(bytes))),
        Err(_) => wrong("digest", format!("it must have 16 bytes, not {}", bytes.len())),
    }
}

pub(crate) fn from_digest(digest: Digest) -> Option<v1::Digest> {
    Some(v1::Digest { value: digest.0.to_be_bytes().to_vec() })
}

pub(crate) fn spec(wire: v1::Spec) -> Spec {
    Spec { min: wire.min, max: wire.max, unit: wire.unit, keep: wire.keep }
}

pub(crate) fn from_spec(spec: Spec) -> v1::Spec {
    v1::Spec { min: spec.min, max: spec.max, unit: spec.unit, keep: spec.keep }
}

pub(crate) fn shape(wire: v1::Shape) -> Checked<Shape> {
    let sharding = match wire.shards {
        0 => Sharding::Replicated,
        count if count <= SHARDS_MAX => Sharding::Sharded { count },
        count => return wrong("shards", format!("{count} shards, at most {SHARDS_MAX} are allowed")),
    };
    Ok(Shape {
        tensors: digest(wire.tensors)?,
        count: wire.count,
        bytes: wire.bytes,
        recipe: digest(wire.recipe)?,
        sharding,
    })
}

pub(crate) fn from_shape(shape: Shape) -> v1::Shape {
    v1::Shape {
        tensors: from_digest(shape.tensors),
        count: shape.count,
        bytes: shape.bytes,
        recipe: from_digest(shape.recipe),
        shards: match shape.sharding {
            Sharding::Replicated => 0,
            Sharding::Sharded { count } => count,
        },
    }
}

pub(crate) fn resume(wire: Option<v1::Resume>) -> Checked<Resume> {
    let wire = need("resume", wire)?;
    Ok(Resume { lineage: Lineage(wire.lineage), step: Step(wire.step) })
}

pub(crate) fn from_resume(resume: Resume) -> Option<v1::Resume> {
    Some(v1::Resume { lineage: resume.lineage.0, step: resume.step.0 })
}

pub(crate) fn commit(wire: v1::Commit) -> Checked<Commit> {
    Ok(Commit {
        step: Step(wire.step),
        generation: Generation(wire.generation),
        shards: wire.shards,
        manifest: digest(wire.manifest)?,
        at: Timestamp(wire.at_us),
    })
}

pub(crate) fn from_commit(commit: &Commit) -> v1::Commit {
    v1::Commit {
        step: commit.step.0,
        generation: commit.generation.0,
        shards: commit.shards,
        manifest: from_digest(commit.manifest),
        at_us: commit.at.0,
    }
}

pub(crate) fn peer(wire: v1::Peer) -> Checked<Peer> {
    Ok(Peer { member: MemberId(wire.member), rank: Rank(wire.rank), address: address(wire.address)? })
}

pub(crate) fn from_peer(peer: &Peer) -> v1::Peer {
    v1::Peer { member: peer.member.0, rank: peer.rank.0, address: peer.address.clone() }
}

pub(crate) fn seat(wire: v1::Seat) -> Checked<Seat> {
    Ok(Seat {
        member: MemberId(wire.member),
        name: name(&wire.name)?,
        rank: Rank(wire.rank),
        slots: wire.slots,
        address: address(wire.address)?,
    })
}

pub(crate) fn from_seat(seat: &Seat) -> v1::Seat {
    v1::Seat {
        member: seat.member.0,
        name: seat.name.as_str().to_owned(),
        rank: seat.rank.0,
        slots: seat.slots,
        address: seat.address.clone(),
    }
}

pub(crate) fn drain(wire: v1::Drain) -> Drain {
    Drain { deadline: wire.deadline_us.map(Timestamp), by_notice: wire.by_notice }
}

pub(crate) fn from_drain(drain: Drain) -> v1::Drain {
    v1::Drain { deadline_us: drain.deadline.map(|at| at.0), by_notice: drain.by_notice }
}

pub(crate) fn departure(wire: Option<v1::Departure>) -> Checked<Departure> {
    use v1::departure::How;
    let wire = need("departure", wire)?;
    Ok(match wire.how() {
        How::Unspecified => return wrong("departure.how", "unknown"),
        How::Died => Departure::Died,
        How::Silent => Departure::Silent,
        How::Gone => Departure::Gone,
        How::Unready => Departure::Unready,
        How::Unrestored => Departure::Unrestored,
        How::Stuck => Departure::Stuck,
        How::Unreachable => Departure::Unreachable,
        How::Replaced => Departure::Replaced { by: MemberId(wire.by) },
        How::Left => Departure::Left,
        How::Drained => Departure::Drained,
        How::Evicted => Departure::Evicted,
        How::Diverged => Departure::Diverged,
        How::StateLost => Departure::StateLost,
    })
}

pub(crate) fn from_departure(departure: Departure) -> Option<v1::Departure> {
    use v1::departure::How;
    let (how, by) = match departure {
        Departure::Died => (How::Died, 0),
        Departure::Silent => (How::Silent, 0),
        Departure::Gone => (How::Gone, 0),
        Departure::Unready => (How::Unready, 0),
        Departure::Unrestored => (How::Unrestored, 0),
        Departure::Stuck => (How::Stuck, 0),
        Departure::Unreachable => (How::Unreachable, 0),
        Departure::Replaced { by } => (How::Replaced, by.0),
        Departure::Left => (How::Left, 0),
        Departure::Drained => (How::Drained, 0),
        Departure::Evicted => (How::Evicted, 0),
        Departure::Diverged => (How::Diverged, 0),
        Departure::StateLost => (How::StateLost, 0),
    };
    Some(v1::Departure { how: how.into(), by })
}

pub(crate) fn closure(wire: Option<v1::Closure>) -> Checked<Closure> {
    use v1::closure::How;
    let wire = need("closure", wire)?;
    match wire.how() {
        How::Unspecified => wrong("closure.how", "unknown"),
        How::Completed => Ok(Closure::Completed { step: Step(wire.step) }),
        How::Closed => Ok(Closure::Closed),
        How::ByMembers => Ok(Closure::ByMembers),
    }
}

pub(crate) fn from_closure(closure: Closure) -> Option<v1::Closure> {
    use v1::closure::How;
    let (how, step) = match closure {
        Closure::Completed { step } => (How::Completed, step.0),
        Closure::Closed => (How::Closed, 0),
        Closure::ByMembers => (How::ByMembers, 0),
    };
    Some(v1::Closure { how: how.into(), step })
}

pub(crate) fn cause(wire: v1::Cause) -> Checked<Cause> {
    use v1::cause::Kind;
    Ok(match wire.kind() {
        Kind::Unspecified => return wrong("cause.kind", "unknown"),
        Kind::Formed => Cause::Formed,
        Kind::Joined => Cause::Joined { name: name(&wire.name)? },
        Kind::Lost => Cause::Lost { name: name(&wire.name)?, how: departure(wire.how)? },
        Kind::Notice => Cause::Notice { name: name(&wire.name)? },
        Kind::Drain => Cause::Drain { name: name(&wire.name)? },
        Kind::Resized => Cause::Resized,
        Kind::LinkBroken => Cause::LinkBroken,
        Kind::Diverged => Cause::Diverged,
        Kind::Unrestored => Cause::Unrestored,
        Kind::StoreRolledBack => Cause::StoreRolledBack,
    })
}

pub(crate) fn from_cause(cause: &Cause) -> v1::Cause {
    use v1::cause::Kind;
    let (kind, name, how) = match cause {
        Cause::Formed => (Kind::Formed, None, None),
        Cause::Joined { name } => (Kind::Joined, Some(name), None),
        Cause::Lost { name, how } => (Kind::Lost, Some(name), from_departure(*how)),
        Cause::Notice { name } => (Kind::Notice, Some(name), None),
        Cause::Drain { name } => (Kind::Drain, Some(name), None),
        Cause::Resized => (Kind::Resized, None, None),
        Cause::LinkBroken => (Kind::LinkBroken, None, None),
        Cause::Diverged => (Kind::Diverged, None, None),
        Cause::Unrestored => (Kind::Unrestored, None, None),
        Cause::StoreRolledBack => (Kind::StoreRolledBack, None, None),
    };
    v1::Cause { kind: kind.into(), name: name.map(|n| n.as_str().to_owned()).unwrap_or_default(), how }
}

pub(crate) fn source(wire: v1::Source) -> Checked<Source> {
    use v1::source::Kind;
    Ok(match wire.kind() {
        Kind::Unspecified => return wrong("source.kind", "unknown"),
        Kind::Memory => Source::Memory,
        Kind::Checkpoint => Source::Checkpoint { step: Step(wire.step) },
        Kind::AbandonedMemory => Source::AbandonedMemory,
        Kind::Initial => Source::Initial,
    })
}

pub(crate) fn from_source(source: Source) -> v1::Source {
    use v1::source::Kind;
    let (kind, step) = match source {
        Source::Memory => (Kind::Memory, 0),
        Source::Checkpoint { step } => (Kind::Checkpoint, step.0),
        Source::AbandonedMemory => (Kind::AbandonedMemory, 0),
        Source::Initial => (Kind::Initial, 0),
    };
    v1::Source { kind: kind.into(), step }
}

pub(crate) fn world_change(wire: v1::WorldChange) -> Checked<WorldChange> {
    Ok(WorldChange {
        generation: Generation(wire.generation),
        causes: wire.causes.into_iter().map(cause).collect::<Checked<_>>()?,
        before: wire.before,
        after: wire.after,
        learned: Timestamp(wire.learned_us),
        stopped: Timestamp(wire.stopped_us),
        agreed: wire.agreed_us.map(Timestamp),
        rebuilt: wire.rebuilt_us.map(Timestamp),
        restored: wire.restored_us.map(Timestamp),
        first_step: wire.first_step_us.map(Timestamp),
        resume: wire.resume.map(|r| resume(Some(r))).transpose()?,
        source: wire.source.map(source).transpose()?,
        steps_lost: wire.steps_lost,
    })
}

pub(crate) fn from_world_change(change: &WorldChange) -> v1::WorldChange {
    v1::WorldChange {
        generation: change.generation.0,
        causes: change.causes.iter().map(from_cause).collect(),
        before: change.before,
        after: change.after,
        learned_us: change.learned.0,
        stopped_us: change.stopped.0,
        agreed_us: change.agreed.map(|at| at.0),
        rebuilt_us: change.rebuilt.map(|at| at.0),
        restored_us: change.restored.map(|at| at.0),
        first_step_us: change.first_step.map(|at| at.0),
        resume: change.resume.and_then(from_resume),
        source: change.source.map(from_source),
        steps_lost: change.steps_lost,
    }
}

pub(crate) fn shard_report(wire: v1::ShardReport) -> Checked<ShardReport> {
    Ok(ShardReport { bytes: wire.bytes, file: digest(wire.file)?, state: digest(wire.state)? })
}

pub(crate) fn from_shard_report(report: &ShardReport) -> v1::ShardReport {
    v1::ShardReport { bytes: report.bytes, file: from_digest(report.file), state: from_digest(report.state) }
}

pub(crate) fn moved(wire: v1::Moved) -> Checked<Moved> {
    Ok(Moved {
        from: MemberId(wire.from),
        bytes: wire.bytes,
        sent: digest(wire.sent)?,
        got: digest(wire.got)?,
    })
}

pub(crate) fn from_moved(moved: &Moved) -> v1::Moved {
    v1::Moved {
        from: moved.from.0,
        bytes: moved.bytes,
        sent: from_digest(moved.sent),
        got: from_digest(moved.got),
    }
}
