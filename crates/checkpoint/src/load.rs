//! Loading a checkpoint, or a range of it, into a state.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reknit_membership::{Digest, Generation, Step};

use crate::digest::digest;
use crate::dtype::TensorSpec;
use crate::layout::ByteRange;
use crate::manifest::{BadManifest, MANIFEST_BYTES_MAX, Manifest};
use crate::names;
use crate::plan::{FileRead, reads};
use crate::saver::first_difference;
use crate::shard_file::{ShardFile, open_regular};
use crate::state::State;
use crate::stream::write_at;
use crate::to_usize;

/// How much of a checkpoint to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All tensors, and the values.
    All,
    /// These bytes of the logical byte space, without the values (see [`Manifest::values`]).
    Range(ByteRange),
}

/// What was loaded. Every byte of it was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadReport {
    /// Bytes of the state that were loaded.
    pub bytes: u64,
    /// Files that were read.
    pub files: usize,
    /// How long it took.
    pub took: Duration,
}

/// Why a checkpoint did not load. If it was being loaded into a state, that state may be partly overwritten (with
/// verified bytes) and must not be used until something else was loaded into it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file is not there.
    #[error("{} is missing", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
    },
    /// A file is shorter than it was.
    #[error("{} is cut short: it has {found} of {expected} bytes", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// The length it was written with, in bytes.
        expected: u64,
        /// The length it has, in bytes.
        found: u64,
    },
    /// A file is not of the form it was written in.
    #[error("{} {what}", file.display())]
    Garbled {
        /// The file.
        file: PathBuf,
        /// What it is or has.
        what: &'static str,
    },
    /// Bytes of a file are not those that were written.
    #[error("bytes {range} of {} are not what was written: their digest is {found}, not {expected}", file.display())]
    DigestMismatch {
        /// The file.
        file: PathBuf,
        /// The bytes that were digested.
        range: ByteRange,
        /// The digest they had when they were written.
        expected: Digest,
        /// The digest they have.
        found: Digest,
    },
    /// The manifest has the digest that was committed, but this version cannot use it.
    #[error("{} cannot be used", file.display())]
    BadManifest {
        /// The manifest's file.
        file: PathBuf,
        /// What is wrong with it.
        source: Box<BadManifest>,
    },
    /// The manifest has the digest that was committed, but is of another step or generation.
    #[error("{} is the manifest of step {step} in generation {generation}", file.display())]
    OtherCheckpoint {
        /// The manifest's file.
        file: PathBuf,
        /// The step it is of.
        step: Step,
        /// The generation that made it.
        generation: Generation,
    },
    /// The checkpoint has other tensors than the state. Nothing was loaded.
    #[error("{} has other tensors than the program: {difference}", file.display())]
    WrongShapes {
        /// The manifest's file.
        file: PathBuf,
        /// The first tensor that differs.
        difference: Box<ShapeDifference>,
    },
    /// The range asked for is not within the state. Nothing was loaded.
    #[error("bytes {range} are not within the state that {} is of", file.display())]
    NoSuchRange {
        /// The manifest's file.
        file: PathBuf,
        /// The range.
        range: ByteRange,
    },
    /// A file could not be read.
    #[error("cannot read {}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The first tensor that a checkpoint and a program do not have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeDifference {
    /// The tensor's index.
    pub tensor: usize,
    /// What the checkpoint has there.
    pub checkpoint: Option<TensorSpec>,
    /// What the program has there.
    pub program: Option<TensorSpec>,
}

impl std::fmt::Display for ShapeDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |spec: &Option<TensorSpec>| match spec {
            Some(spec) => format!("{:?} {}{:?}", spec.name, spec.dtype.name(), spec.shape),
            None => "nothing".to_owned(),
        };
        let (checkpoint, program) = (text(&self.checkpoint), text(&self.program));
        write!(f, "tensor {} is {checkpoint} there and {program} in the program", self.tensor)
    }
}

impl LoadError {
    /// The file that is to blame, or that shows what is wrong.
    pub fn file(&self) -> &Path {
        match self {
            LoadError::Missing { file }
            | LoadError::Truncated { file, .. }
            | LoadError::Garbled { file, .. }
            | LoadError::DigestMismatch { file, .. }
            | LoadError::BadManifest { file, .. }
            | LoadError::OtherCheckpoint { file, .. }
            | LoadError::WrongShapes { file, .. }
            | LoadError::NoSuchRange { file, .. }
            | LoadError::Io { file, .. } => file,
        }
    }

    /// What an operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            LoadError::Missing { .. } => "is the directory the one that the job saved to, and mounted here?",
            LoadError::Truncated { .. } => "put the file back from a copy, or go back to an older checkpoint",
            LoadError::Garbled { .. } | LoadError::DigestMismatch { .. } => {
                "the disk or a program changed the file: put it back from a copy, or go back to an older checkpoint"
            }
            LoadError::BadManifest { .. } => "a newer version of reknit wrote it: use that version",
            LoadError::OtherCheckpoint { .. } => "files were moved between checkpoints: move them back",
            LoadError::WrongShapes { .. } => "run the program that saved it, or start a new job",
            LoadError::NoSuchRange { .. } => "this is a bug of the program that embeds the library",
            LoadError::Io { .. } => "look for disk or network errors in the system's log",
        }
    }
}

/// The manifest of the checkpoint that `generation` made of `step`, in the job's directory `dir`: the one with the
/// digest `expected`, which the coordinator keeps.
pub fn open(dir: &Path, step: Step, generation: Generation, expected: Digest) -> Result<Manifest, LoadError> {
    let file = dir.join(names::checkpoint(step, generation)).join(names::MANIFEST);
    let bytes = read_manifest(&file)?;
    let found = digest(&bytes);
    if found != expected {
        let range = ByteRange::new(0, bytes.len() as u64);
        return Err(LoadError::DigestMismatch { file, range, expected, found });
    }
    parse_manifest(&file, &bytes, step, generation)
}

/// The bytes of a manifest's file, if they are not too many.
pub(crate) fn read_manifest(file: &Path) -> Result<Vec<u8>, LoadError> {
    let (reader, _) = open_regular(file)?;
    let mut bytes = Vec::new();
    let read = reader.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|source| LoadError::Io { file: file.to_owned(), source })?;
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(LoadError::Garbled { file: file.to_owned(), what: "is too large for a manifest" });
    }
    Ok(bytes)
}

/// The manifest in `bytes`, if it is that of this step and generation.
pub(crate) fn parse_manifest(
    file: &Path,
    bytes: &[u8],
    step: Step,
    generation: Generation,
) -> Result<Manifest, LoadError> {
    let manifest = Manifest::parse(bytes)
        .map_err(|source| LoadError::BadManifest { file: file.to_owned(), source: Box::new(source) })?;
    let found = manifest.meta();
    if (found.step, found.generation) != (step, generation) {
        let (step, generation) = (found.step, found.generation);
        return Err(LoadError::OtherCheckpoint { file: file.to_owned(), step, generation });
    }
    Ok(manifest)
}

/// Reads every byte of the checkpoint and compares it with what was written, without a state to load it into.
///
/// # Errors
/// If a file is not as it was written.
pub fn verify(dir: &Path, manifest: &Manifest) -> Result<LoadReport, LoadError> {
    let start = Instant::now();
    let place = dir.join(manifest.dir_name());
    let mut buffer = Vec::new();
    for (shard, entry) in manifest.shards().iter().enumerate() {
        let file = ShardFile::open(&place, manifest, shard, &mut buffer)?;
        for chunk in manifest.layout().chunks(entry.range) {
            file.chunk(chunk, &mut buffer)?;
        }
    }
    let bytes = manifest.layout().total_bytes();
    Ok(LoadReport { bytes, files: manifest.shards().len(), took: start.elapsed() })
}

/// Loads a part of a checkpoint in the job's directory `dir` into `state`. Each chunk is verified before a byte of it
/// reaches the state (rule K-7), and each is read once.
///
/// After [`Part::All`] the state's digest is [`Manifest::state_digest`]; there is no need to compute it.
///
/// # Errors
/// If a file is not as it was written. The state may be partly overwritten then; see [`LoadError`].
///
/// # Panics
/// If the state offers other bytes than its specification says.
pub fn load_into(
    dir: &Path,
    manifest: &Manifest,
    part: Part,
    state: &mut dyn State,
) -> Result<LoadReport, LoadError> {
    let start = Instant::now();
    let layout = manifest.layout();
    let place = dir.join(manifest.dir_name());
    let (here, there) = (state.tensors(), layout.specs());
    if let Some(tensor) = first_difference(there, &here) {
        let (checkpoint, program) = (there.get(tensor).cloned(), here.get(tensor).cloned());
        let difference = Box::new(ShapeDifference { tensor, checkpoint, program });
        return Err(LoadError::WrongShapes { file: place.join(names::MANIFEST), difference });
    }
    let range = match part {
        Part::All => layout.all(),
        Part::Range(range) if layout.holds(range) => range,
        Part::Range(range) => {
            return Err(LoadError::NoSuchRange { file: place.join(names::MANIFEST), range });
        }
    };
    let mut buffer = Vec::new();
    let mut files = 0;
    if part == Part::All {
        // The files of ranks that had nothing to write belong to the checkpoint too.
        for shard in (0..manifest.shards().len()).filter(|shard| manifest.shards()[*shard].range.is_empty()) {
            ShardFile::open(&place, manifest, shard, &mut buffer)?;
            files += 1;
        }
    }
    for FileRead { shard, at, len, .. } in reads(manifest, range) {
        let file = ShardFile::open(&place, manifest, shard, &mut buffer)?;
        let wanted = ByteRange::new(at, at + len);
        for chunk in layout.chunks(wanted) {
            let bytes = file.chunk(chunk, &mut buffer)?;
            let used = chunk.intersect(wanted);
            let bytes = &bytes[to_usize(used.start - chunk.start)..][..to_usize(used.len())];
            write_at(state, layout, used.start, bytes);
        }
        files += 1;
    }
    if part == Part::All {
        state.set_values(manifest.values().clone());
    }
    Ok(LoadReport { bytes: range.len(), files, took: start.elapsed() })
}
