//! The record of a job as a store keeps it: versioned, and readable for every later server.

use prost::Message as _;
use reknit_membership::reason::Departure;
use reknit_membership::record::{JobRecord, Stage};
use reknit_membership::world::World;
use reknit_membership::{Generation, HistoryId, MemberId};

use crate::rendezvous::SecretBytes;
use crate::v1;
use crate::words::{self, BadMessage, Checked, need, wrong};

/// The format that this server writes. It reads this one and all before it.
pub const FORMAT: u32 = 1;

/// Encodes a record together with the secret from which the secrets of the job's generations are derived.
pub fn encode(record: &JobRecord, secret: &SecretBytes) -> Vec<u8> {
    let (stage, closure) = match record.stage {
        Stage::Forming => (v1::job_record::Stage::Forming, None),
        Stage::Published => (v1::job_record::Stage::Published, None),
        Stage::Running => (v1::job_record::Stage::Running, None),
        Stage::Closed(closure) => (v1::job_record::Stage::Closed, words::from_closure(closure)),
    };
    let gone = |(member, how): &(MemberId, Departure)| v1::job_record::Gone {
        member: member.0,
        how: words::from_departure(*how),
    };
    v1::JobRecord {
        format: FORMAT,
        job: record.job.as_str().to_owned(),
        history: record.history.0,
        spec: Some(words::from_spec(record.spec)),
        shape: record.shape.map(words::from_shape),
        generation: record.generation.0,
        world_generation: record.world.as_ref().map_or(0, |world| world.generation.0),
        seats: record.world.iter().flat_map(|world| world.seats.iter().map(words::from_seat)).collect(),
        stage: stage.into(),
        closure,
        resume: words::from_resume(record.resume),
        source: record.source.map(words::from_source),
        closing: record.closing,
        commits: record.commits.iter().map(words::from_commit).collect(),
        drains: record.drains.iter().map(|(member, drain)| (member.0, words::from_drain(*drain))).collect(),
        departed: record.departed.iter().map(gone).collect(),
        changes: record.changes.iter().map(words::from_world_change).collect(),
        secret: secret.to_vec(),
    }
    .encode_to_vec()
}

/// Decodes a record.
///
/// # Errors
/// [`BadMessage`] if the bytes are damaged, or were written by a newer server.
pub fn decode(bytes: &[u8]) -> Checked<(JobRecord, SecretBytes)> {
    let wire = v1::JobRecord::decode(bytes)?;
    if wire.format == 0 || wire.format > FORMAT {
        let why = format!(
            "the record has format {}, this server reads up to {FORMAT}; use a newer one",
            wire.format
        );
        return wrong("format", why);
    }
    let secret = <SecretBytes>::try_from(wire.secret.as_slice());
    let secret = secret.or_else(|_| wrong("secret", "it must have 32 bytes"))?;
    let stage = match wire.stage() {
        v1::job_record::Stage::Unspecified => return wrong("stage", "unknown"),
        v1::job_record::Stage::Forming => Stage::Forming,
        v1::job_record::Stage::Published => Stage::Published,
        v1::job_record::Stage::Running => Stage::Running,
        v1::job_record::Stage::Closed => Stage::Closed(words::closure(wire.closure)?),
    };
    let seats = wire.seats.into_iter().map(words::seat).collect::<Checked<Vec<_>>>()?;
    let world =
        (wire.world_generation > 0).then_some(World { generation: Generation(wire.world_generation), seats });
    let gone = |gone: v1::job_record::Gone| {
        Ok::<_, BadMessage>((MemberId(gone.member), words::departure(gone.how)?))
    };
    let record = JobRecord {
        job: words::job(&wire.job)?,
        history: HistoryId(wire.history),
        spec: words::spec(need("spec", wire.spec)?),
        shape: wire.shape.map(words::shape).transpose()?,
        generation: Generation(wire.generation),
        world,
        stage,
        resume: words::resume(wire.resume)?,
        source: wire.source.map(words::source).transpose()?,
        closing: wire.closing,
        commits: wire.commits.into_iter().map(words::commit).collect::<Checked<_>>()?,
        drains: wire
            .drains
            .into_iter()
            .map(|(member, drain)| (MemberId(member), words::drain(drain)))
            .collect(),
        departed: wire.departed.into_iter().map(gone).collect::<Checked<_>>()?,
        changes: wire.changes.into_iter().map(words::world_change).collect::<Checked<_>>()?,
    };
    Ok((record, secret))
}
