//! The manifest as JSON. The text is what is digested and kept; what is read from it is checked as if a stranger had
//! written it.

use reknit_membership::{BadName, Digest, Generation, HistoryId, JobId, Lineage, Rank, Step, WorldSize};
use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestMeta, RANKS_MAX, ShardEntry, chunk_numbers, is_header_size};
use crate::dtype::TensorSpec;
use crate::fingerprint::Fingerprint;
use crate::layout::{ByteRange, Layout, LayoutError};
use crate::names;
use crate::values::{Values, ValuesError};

/// The largest manifest that is read, in bytes.
pub const MANIFEST_BYTES_MAX: u64 = 128 << 20;

/// The one format there is so far.
const FORMAT: u64 = 1;

#[derive(Deserialize)]
struct AnyFormat {
    format: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireManifest {
    format: u64,
    written_by: String,
    job: String,
    history: String,
    step: u64,
    lineage: u64,
    generation: u64,
    world_size: u32,
    state_bytes: u64,
    state_digest: String,
    chunk_bytes: u64,
    tensors: Vec<TensorSpec>,
    values: Values,
    shards: Vec<WireShard>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireShard {
    file: String,
    file_bytes: u64,
    digest: String,
    start: u64,
    end: u64,
    /// The chunks' digests, one after the other: a list of them would be mostly punctuation.
    chunks: String,
}

/// Why bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadManifest {
    /// More than [`MANIFEST_BYTES_MAX`].
    #[error("it has more than {MANIFEST_BYTES_MAX} bytes")]
    TooLarge,
    /// Not JSON, or not the fields of a manifest.
    #[error("it is not JSON of the form of a manifest")]
    Json(#[from] serde_json::Error),
    /// A format of a later version.
    #[error("it has format {found}, this version reads format {FORMAT}")]
    UnknownFormat {
        /// The format it says it has.
        found: u64,
    },
    /// The job's name is none.
    #[error("its job's name is none")]
    Job(#[from] BadName),
    /// The tensors make no layout.
    #[error("its tensors are not those of a state")]
    Layout(#[from] LayoutError),
    /// The values are over the limits.
    #[error("its values are not those of a state")]
    Values(#[from] ValuesError),
    /// A field does not fit the others.
    #[error("its field {field:?} is not what the others ask for")]
    Inconsistent {
        /// The field.
        field: &'static str,
    },
}

impl Manifest {
    /// The bytes of the manifest's file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let shard = |shard: &ShardEntry| WireShard {
            file: shard.file.clone(),
            file_bytes: shard.file_bytes,
            digest: shard.digest.to_string(),
            start: shard.range.start,
            end: shard.range.end,
            chunks: shard.chunks.iter().map(Digest::to_string).collect(),
        };
        let wire = WireManifest {
            format: FORMAT,
            written_by: self.written_by.clone(),
            job: self.meta.job.to_string(),
            history: format!("{:016x}", self.meta.history.0),
            step: self.meta.step.0,
            lineage: self.meta.lineage.0,
            generation: self.meta.generation.0,
            world_size: self.meta.world_size.0,
            state_bytes: self.layout.total_bytes(),
            state_digest: self.state_digest.to_string(),
            chunk_bytes: self.layout.chunk_bytes(),
            tensors: self.layout.specs().to_vec(),
            values: self.values.clone(),
            shards: self.shards.iter().map(shard).collect(),
        };
        let mut bytes = serde_json::to_vec_pretty(&wire).expect("strings, numbers and lists are JSON");
        bytes.push(b'\n');
        bytes
    }

    /// The manifest that `bytes` spell, if every field fits the others.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, BadManifest> {
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(BadManifest::TooLarge);
        }
        // The format comes first: a field that a later one added is not the thing to complain of.
        let AnyFormat { format } = serde_json::from_slice(bytes)?;
        if format != FORMAT {
            return Err(BadManifest::UnknownFormat { found: format });
        }
        checked(serde_json::from_slice(bytes)?)
    }
}

fn checked(wire: WireManifest) -> Result<Manifest, BadManifest> {
    let inconsistent = |field| BadManifest::Inconsistent { field };
    let meta = ManifestMeta {
        job: JobId::new(&wire.job)?,
        history: HistoryId(hex64(&wire.history).ok_or(inconsistent("history"))?),
        step: Step(wire.step),
        lineage: Lineage(wire.lineage),
        generation: Generation(wire.generation),
        world_size: WorldSize(wire.world_size),
    };
    let layout = Layout::new(wire.tensors)?;
    let world_size = wire.world_size as usize;
    if wire.world_size == 0 || wire.world_size > RANKS_MAX || wire.shards.len() != world_size {
        return Err(inconsistent("world_size"));
    }
    if wire.state_bytes != layout.total_bytes() {
        return Err(inconsistent("state_bytes"));
    }
    if wire.chunk_bytes != layout.chunk_bytes() {
        return Err(inconsistent("chunk_bytes"));
    }
    let mut start = 0;
    let mut shards = Vec::with_capacity(world_size);
    for (rank, shard) in (0u32..).zip(wire.shards) {
        let shard = checked_shard(&layout, Rank(rank), meta.world_size, start, shard)?;
        start = shard.range.end;
        shards.push(shard);
    }
    if start != layout.total_bytes() {
        return Err(inconsistent("end"));
    }
    let chunks = shards.iter().flat_map(|shard| &shard.chunks).copied().collect();
    let fingerprint = Fingerprint::from_parts(&layout, chunks, &wire.values)?;
    if hex128(&wire.state_digest) != Some(fingerprint.state()) {
        return Err(inconsistent("state_digest"));
    }
    let (state_digest, written_by) = (fingerprint.state(), wire.written_by);
    Ok(Manifest { meta, layout, shards, values: wire.values, state_digest, written_by })
}

/// The shard of this rank, if it goes on at `start` and ends where chunks meet.
fn checked_shard(
    layout: &Layout,
    rank: Rank,
    world_size: WorldSize,
    start: u64,
    wire: WireShard,
) -> Result<ShardEntry, BadManifest> {
    let inconsistent = |field| BadManifest::Inconsistent { field };
    // A name is not looked for but compared: it can lead nowhere else.
    if wire.file != names::shard(rank, world_size) {
        return Err(inconsistent("file"));
    }
    let range = ByteRange::new(wire.start, wire.end);
    if range.start != start || !layout.holds(range) {
        return Err(inconsistent("start"));
    }
    if !range.end.is_multiple_of(layout.chunk_bytes()) && range.end != layout.total_bytes() {
        return Err(inconsistent("end"));
    }
    if !is_header_size(wire.file_bytes.checked_sub(range.len())) {
        return Err(inconsistent("file_bytes"));
    }
    let digest = hex128(&wire.digest).ok_or(inconsistent("digest"))?;
    let chunks: Option<Vec<Digest>> = wire.chunks.as_bytes().chunks(32).map(hex128_bytes).collect();
    let chunks = chunks.filter(|chunks| chunks.len() == chunk_numbers(layout, range).len());
    let chunks = chunks.ok_or(inconsistent("chunks"))?;
    Ok(ShardEntry { file: wire.file, range, file_bytes: wire.file_bytes, digest, chunks })
}

fn hex128(text: &str) -> Option<Digest> {
    hex128_bytes(text.as_bytes())
}

fn hex128_bytes(text: &[u8]) -> Option<Digest> {
    hex(text, 32).map(Digest)
}

fn hex64(text: &str) -> Option<u64> {
    hex(text.as_bytes(), 16).and_then(|number| u64::try_from(number).ok())
}

/// The number that just `digits` lower-case digits spell.
fn hex(text: &[u8], digits: usize) -> Option<u128> {
    let digit = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() != digits {
        return None;
    }
    text.iter().try_fold(0u128, |number, byte| Some(number << 4 | u128::from(digit(byte)?)))
}
