//! The list that makes shards a checkpoint.
//!
//! ```text
//! step-00000120-g7/manifest.json ──names──► rank-00000-of-00002.safetensors   bytes [0, 4 MiB)  of the state
//!        ▲                                  rank-00001-of-00002.safetensors   bytes [4, 7 MiB)  of the state
//!        │ digest of these exact bytes              │ header │ chunk │ chunk │ …   each chunk's digest is in the
//!  the coordinator's record of the commit                                           manifest, and the header's
//! ```
//!
//! One number that the coordinator saves, the manifest's digest, so covers every byte of every file.

mod wire;

use std::path::{Path, PathBuf};

use reknit_membership::{Digest, Generation, HistoryId, JobId, Lineage, Rank, Step, WorldSize};

use crate::files::{FileError, Files, RealFiles, publish};
use crate::fingerprint::Fingerprint;
use crate::header::HEADER_BYTES_MAX;
use crate::layout::{ByteRange, Layout};
use crate::names;
use crate::plan::shards;
use crate::to_usize;
use crate::values::{Values, ValuesError};

pub use wire::{BadManifest, MANIFEST_BYTES_MAX};

/// The most ranks that may write one checkpoint.
pub const RANKS_MAX: u32 = 65_536;

/// Which state of which job a checkpoint is of. When it was made is not told: whoever writes a manifest of the same parts
/// writes the same bytes, so a publisher that died half way can be replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestMeta {
    /// The job.
    pub job: JobId,
    /// The store that the job's record lives in.
    pub history: HistoryId,
    /// How many steps the state has seen.
    pub step: Step,
    /// The branch of the job's history.
    pub lineage: Lineage,
    /// The world that made it.
    pub generation: Generation,
    /// How many ranks wrote it.
    pub world_size: WorldSize,
}

/// What one rank wrote for a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShardReport {
    /// The rank.
    pub rank: Rank,
    /// Size of its file in bytes.
    pub file_bytes: u64,
    /// Digest that covers every byte of its file: folded from those of the header and of the data's chunks, so that
    /// a part can be verified alone.
    pub digest: Digest,
    /// Digest of the whole state as this rank had it: ranks are compared at every commit.
    pub state_digest: Digest,
}

/// One rank's part, as the manifest lists it. The list's order is that of the ranks and of the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardEntry {
    /// The file's name, in the manifest's directory.
    pub file: String,
    /// Which bytes of the state's logical byte space it holds.
    pub range: ByteRange,
    /// The file's size in bytes.
    pub file_bytes: u64,
    /// See [`ShardReport::digest`].
    pub digest: Digest,
    /// The digest of each of its chunks.
    pub chunks: Vec<Digest>,
}

impl ShardEntry {
    /// Where in the file the data starts, in bytes: all before it is the header.
    pub fn data_at(&self) -> u64 {
        self.file_bytes - self.range.len()
    }
}

/// A whole and consistent list of what a checkpoint consists of. There is no other kind: both ways to get one check.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    meta: ManifestMeta,
    layout: Layout,
    shards: Vec<ShardEntry>,
    values: Values,
    state_digest: Digest,
    written_by: String,
}

/// Why reports do not make a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AssembleError {
    /// A world that cannot write a checkpoint.
    #[error("a world of {world_size} ranks cannot write a checkpoint, 1 to {RANKS_MAX} can")]
    WorldSize {
        /// Its size.
        world_size: WorldSize,
    },
    /// A rank has not reported.
    #[error("rank {rank} has not reported its part")]
    Missing {
        /// The rank.
        rank: Rank,
    },
    /// A rank reported twice, or is not of this world.
    #[error("rank {rank} reported twice or is not of this world")]
    Unexpected {
        /// The rank.
        rank: Rank,
    },
    /// Ranks do not hold the state that the assembling rank holds.
    #[error("the state differs between ranks: {ranks:?} do not hold what the assembling rank holds")]
    Diverged {
        /// Those ranks. If they are the majority, the assembling rank is the one to doubt.
        ranks: Vec<Rank>,
    },
    /// A file is too short for its part or its header too long.
    #[error("rank {rank} reported a file of {file_bytes} bytes, which cannot be")]
    FileSize {
        /// The rank.
        rank: Rank,
        /// The size it reported.
        file_bytes: u64,
    },
    /// Fingerprint, layout and values are not those of one state.
    #[error("the fingerprint is not of this layout and these values")]
    OtherState,
    /// The values are over the limits.
    #[error(transparent)]
    Values(#[from] ValuesError),
}

impl Manifest {
    /// The manifest of what the ranks of one world wrote (`reports`, one of each rank, in any order) of a state with
    /// this layout, fingerprint and values.
    ///
    /// # Errors
    /// If a rank is missing or held another state than the one with this fingerprint (rule K-9).
    pub fn assemble(
        meta: ManifestMeta,
        layout: &Layout,
        fingerprint: &Fingerprint,
        values: Values,
        reports: &[ShardReport],
    ) -> Result<Manifest, AssembleError> {
        let state_digest = fingerprint.state();
        let own = Fingerprint::from_parts(layout, fingerprint.chunks().to_vec(), &values)?;
        if own.state() != state_digest || fingerprint.chunks().len() != layout.chunks(layout.all()).count() {
            return Err(AssembleError::OtherState);
        }
        let by_rank = sorted(reports, meta.world_size)?;
        let diverged = by_rank.iter().filter(|report| report.state_digest != state_digest);
        let ranks: Vec<Rank> = diverged.map(|report| report.rank).collect();
        if !ranks.is_empty() {
            return Err(AssembleError::Diverged { ranks });
        }
        let parts = by_rank.into_iter().zip(shards(layout, meta.world_size.0));
        let entries = parts.map(|(report, range)| entry(&meta, layout, fingerprint, report, range));
        let shards = entries.collect::<Result<Vec<_>, _>>()?;
        let written_by = concat!("reknit-checkpoint ", env!("CARGO_PKG_VERSION")).to_owned();
        Ok(Manifest { meta, layout: layout.clone(), shards, values, state_digest, written_by })
    }

    /// Which state of which job it is of.
    pub fn meta(&self) -> &ManifestMeta {
        &self.meta
    }

    /// The layout of the state's tensors.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What each rank wrote, by rank.
    pub fn shards(&self) -> &[ShardEntry] {
        &self.shards
    }

    /// The state's small structured values.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// The digest of the whole state: a state loaded from this checkpoint has it.
    pub fn state_digest(&self) -> Digest {
        self.state_digest
    }

    /// The program that wrote it, and its version.
    pub fn written_by(&self) -> &str {
        &self.written_by
    }

    /// The name of the directory, within the job's, that the checkpoint's files are in.
    pub fn dir_name(&self) -> String {
        names::checkpoint(self.meta.step, self.meta.generation)
    }
}

/// The reports by rank, one of each.
fn sorted(reports: &[ShardReport], world_size: WorldSize) -> Result<Vec<&ShardReport>, AssembleError> {
    if world_size.0 == 0 || world_size.0 > RANKS_MAX {
        return Err(AssembleError::WorldSize { world_size });
    }
    let mut by_rank: Vec<Option<&ShardReport>> = vec![None; world_size.0 as usize];
    for report in reports {
        let place = by_rank.get_mut(report.rank.0 as usize).filter(|place| place.is_none());
        *place.ok_or(AssembleError::Unexpected { rank: report.rank })? = Some(report);
    }
    let missing = |(rank, report): (usize, Option<_>)| {
        report.ok_or(AssembleError::Missing { rank: Rank(u32::try_from(rank).unwrap_or(u32::MAX)) })
    };
    by_rank.into_iter().enumerate().map(missing).collect()
}

fn entry(
    meta: &ManifestMeta,
    layout: &Layout,
    fingerprint: &Fingerprint,
    report: &ShardReport,
    range: ByteRange,
) -> Result<ShardEntry, AssembleError> {
    let ShardReport { rank, file_bytes, digest, .. } = *report;
    if !is_header_size(file_bytes.checked_sub(range.len())) {
        return Err(AssembleError::FileSize { rank, file_bytes });
    }
    let file = names::shard(rank, meta.world_size);
    let chunks = fingerprint.chunks()[chunk_numbers(layout, range)].to_vec();
    Ok(ShardEntry { file, range, file_bytes, digest, chunks })
}

/// Which of the state's chunks `range`, cut on the grid of chunks, consists of.
pub(crate) fn chunk_numbers(layout: &Layout, range: ByteRange) -> std::ops::Range<usize> {
    let size = layout.chunk_bytes();
    let first = to_usize(range.start.div_ceil(size));
    first..first + to_usize(range.len().div_ceil(size))
}

/// Whether a file may have that much before its data.
fn is_header_size(bytes: Option<u64>) -> bool {
    bytes.is_some_and(|bytes| (8..=HEADER_BYTES_MAX + 8).contains(&bytes))
}

/// Why a manifest was not published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// A rank reported a file that cannot be seen from here.
    #[error("{} is not there, though its rank reported it", file.display())]
    ShardMissing {
        /// The file.
        file: PathBuf,
    },
    /// A rank reported a file of another length.
    #[error("{} has {found} bytes, its rank reported {expected}", file.display())]
    ShardLength {
        /// The file.
        file: PathBuf,
        /// The length reported, in bytes.
        expected: u64,
        /// The length found, in bytes.
        found: u64,
    },
    /// The manifest is larger than what is read back.
    #[error("a manifest of {bytes} bytes is too large: no more than {MANIFEST_BYTES_MAX} are read back")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The manifest's file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl PublishError {
    /// What an operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            PublishError::ShardMissing { .. } => "all ranks must write to one directory that they share",
            PublishError::ShardLength { .. } => "does the shared file system show fresh files late?",
            PublishError::TooLarge { .. } => "keep fewer tensors, or less in the structured values",
            PublishError::File(error) => error.hint(),
        }
    }
}

/// Writes the manifest beside its shards and gives the digest to be committed: of exactly the bytes in its file. Until
/// the coordinator has saved that digest, the checkpoint does not count (rule K-5).
///
/// Looks first whether the shards are where readers will look for them, with the lengths that were reported.
pub fn publish_manifest(dir: &Path, manifest: &Manifest) -> Result<Digest, PublishError> {
    publish_manifest_with(&RealFiles { direct: false }, dir, manifest)
}

pub(crate) fn publish_manifest_with(
    files: &dyn Files,
    dir: &Path,
    manifest: &Manifest,
) -> Result<Digest, PublishError> {
    let place = dir.join(manifest.dir_name());
    for shard in manifest.shards() {
        let file = place.join(&shard.file);
        match files.len(&file) {
            Ok(found) if found == shard.file_bytes => {}
            Ok(found) => return Err(PublishError::ShardLength { file, expected: shard.file_bytes, found }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(PublishError::ShardMissing { file });
            }
            Err(e) => return Err(FileError::new("look at", &file, e).into()),
        }
    }
    let bytes = manifest.to_bytes();
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(PublishError::TooLarge { bytes: bytes.len() });
    }
    publish(files, &place, names::MANIFEST, &bytes, || Ok::<(), PublishError>(()))?;
    Ok(crate::digest::digest(&bytes))
}

#[cfg(test)]
mod tests;
