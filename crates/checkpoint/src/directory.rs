//! What is in a job's directory: listing it for people, and keeping it small.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use reknit_membership::{Digest, Generation, Rank, Step, WorldSize};

use crate::digest::digest;
use crate::files::FileError;
use crate::load::{LoadError, parse_manifest, read_manifest};
use crate::manifest::Manifest;
use crate::names::{self, Entry};
use crate::newest::CommitRef;

/// One checkpoint's directory.
#[derive(Debug)]
pub struct Listed {
    /// The state's step.
    pub step: Step,
    /// The world that made it.
    pub generation: Generation,
    /// The directory.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether it can be loaded, as far as a look at names and lengths tells.
    pub condition: Condition,
}

/// The condition of a checkpoint's files.
#[derive(Debug)]
#[non_exhaustive]
pub enum Condition {
    /// Every file is there with its length. Whether it counts, only the coordinator knows; whether its bytes are
    /// right, only loading it shows, or [`verify`](crate::verify).
    Complete {
        /// What it consists of.
        manifest: Box<Manifest>,
        /// The manifest's digest, as the coordinator keeps it for a commit.
        digest: Digest,
    },
    /// It has no manifest: it is being written, or its writing was broken off.
    Unpublished {
        /// How many ranks' files are there.
        shards: usize,
    },
    /// It has a manifest and cannot be loaded.
    Damaged {
        /// Why.
        error: LoadError,
    },
}

/// The checkpoints in the job's directory `dir`, oldest first. What is not ours is passed over; a directory that is not
/// there has none.
///
/// # Errors
/// If the directory cannot be read.
pub fn list(dir: &Path) -> Result<Vec<Listed>, FileError> {
    let mut listed = Vec::new();
    for (step, generation, path) in checkpoints(dir)? {
        let entries = entries(&path)?;
        let bytes =
            entries.iter().filter(|(_, entry, _)| *entry != Entry::Foreign).map(|(_, _, len)| len).sum();
        let shards = entries.iter().filter(|(_, entry, _)| *entry == Entry::Shard).count();
        let condition = if entries.iter().any(|(_, entry, _)| *entry == Entry::Manifest) {
            look(&path, step, generation)
                .map(|(manifest, digest)| Condition::Complete { manifest: Box::new(manifest), digest })
                .unwrap_or_else(|error| Condition::Damaged { error })
        } else {
            Condition::Unpublished { shards }
        };
        listed.push(Listed { step, generation, path, bytes, condition });
    }
    Ok(listed)
}

fn look(place: &Path, step: Step, generation: Generation) -> Result<(Manifest, Digest), LoadError> {
    let file = place.join(names::MANIFEST);
    let bytes = read_manifest(&file)?;
    let manifest = parse_manifest(&file, &bytes, step, generation)?;
    for shard in manifest.shards() {
        let (file, expected) = (place.join(&shard.file), shard.file_bytes);
        match crate::shard_file::open_regular(&file)?.1 {
            found if found < expected => return Err(LoadError::Truncated { file, expected, found }),
            found if found > expected => {
                return Err(LoadError::Garbled { file, what: "has bytes after its end" });
            }
            _ => {}
        }
    }
    Ok((manifest, digest(&bytes)))
}

/// What [`retain`] did.
#[derive(Debug, Default)]
pub struct Retained {
    /// The checkpoints, published or not, that are gone, oldest first.
    pub removed: Vec<(Step, Generation)>,
    /// Bytes that were freed.
    pub freed_bytes: u64,
    /// Files that were in the way of removing a directory and were left, as they are not ours.
    pub foreign: Vec<PathBuf>,
    /// What could not be removed; the next call tries again.
    pub failed: Vec<FileError>,
}

/// Removes from the job's directory `dir` what is older than the newest checkpoint of `keep` and not in `keep`: older
/// checkpoints, saves that were never published, and what broken writers left behind.
///
/// What is newer than the newest of `keep` is not touched (somebody may be writing it), nor is a file of a name that
/// is not ours. With nothing to keep, nothing is removed.
///
/// # Errors
/// If the directory cannot be read. What cannot be removed is no error but told in [`Retained::failed`].
pub fn retain(dir: &Path, keep: &[CommitRef]) -> Result<Retained, FileError> {
    let mut retained = Retained::default();
    let kept: BTreeSet<(Generation, Step)> = keep.iter().map(CommitRef::age).collect();
    let Some(newest) = kept.last() else { return Ok(retained) };
    for (step, generation, path) in checkpoints(dir)? {
        let age = (generation, step);
        if age > *newest {
            continue;
        }
        if kept.contains(&age) {
            // Committed, so nobody writes to it: what is aside was left behind.
            retained.remove_files(&path, |entry| entry == Entry::Temporary)?;
        } else if retained.remove_checkpoint(&path)? {
            retained.removed.push((step, generation));
        }
    }
    for (name, path) in children(dir)? {
        // Whoever made it has looked at what it came to know by now, or will not miss it.
        if names::is_probe(&name) {
            retained.remove_file(&path, 0);
        }
    }
    Ok(retained)
}

/// Removes from the job's directory `dir` what one rank has written of a checkpoint that will never be whole, and the
/// checkpoint's directory with the last rank's part. What is not there is gone already.
///
/// Only the rank that wrote the part may call this, and only once it is certain that nobody commits the checkpoint.
///
/// # Errors
/// If it is there and cannot be removed; [`retain`] will try again.
pub fn remove_part(
    dir: &Path,
    step: Step,
    generation: Generation,
    rank: Rank,
    world_size: WorldSize,
) -> Result<(), FileError> {
    let place = dir.join(names::checkpoint(step, generation));
    let part = place.join(names::shard(rank, world_size));
    match fs::remove_file(&part) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(FileError::new("remove", &part, e)),
        _ => {}
    }
    match fs::remove_dir(&place) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
            Err(FileError::new("remove", &place, e))
        }
        _ => Ok(()),
    }
}

impl Retained {
    /// Removes a checkpoint's files and then its directory; whether it is gone.
    fn remove_checkpoint(&mut self, path: &Path) -> Result<bool, FileError> {
        // The manifest first: what is half removed must not look like a checkpoint.
        self.remove_files(path, |entry| entry == Entry::Manifest)?;
        self.remove_files(path, |entry| entry != Entry::Foreign)?;
        let left = entries(path)?;
        if left.is_empty() {
            return Ok(self.gone(path, fs::remove_dir(path)));
        }
        let foreign = left.into_iter().filter(|(_, entry, _)| *entry == Entry::Foreign);
        self.foreign.extend(foreign.map(|(path, _, _)| path));
        Ok(false)
    }

    fn remove_files(&mut self, path: &Path, which: impl Fn(Entry) -> bool) -> Result<(), FileError> {
        for (path, _, bytes) in entries(path)?.into_iter().filter(|(_, entry, _)| which(*entry)) {
            self.remove_file(&path, bytes);
        }
        Ok(())
    }

    fn remove_file(&mut self, path: &Path, bytes: u64) {
        if self.gone(path, fs::remove_file(path)) {
            self.freed_bytes += bytes;
        }
    }

    /// Whether what was removed is gone; if somebody else was faster, it is.
    fn gone(&mut self, path: &Path, result: io::Result<()>) -> bool {
        match result {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                self.failed.push(FileError::new("remove", path, e));
                false
            }
            _ => true,
        }
    }
}

/// The directories of checkpoints in `dir`, oldest first.
fn checkpoints(dir: &Path) -> Result<Vec<(Step, Generation, PathBuf)>, FileError> {
    let mut found = Vec::new();
    for (name, path) in children(dir)? {
        // Not through a link: what it leads to is not ours.
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        if let Some((step, generation)) = names::parse_checkpoint(&name)
            && is_dir
        {
            found.push((step, generation, path));
        }
    }
    found.sort_by_key(|(step, generation, _)| (*generation, *step));
    Ok(found)
}

/// What is in a checkpoint's directory: path, what its name stands for, and length in bytes.
fn entries(path: &Path) -> Result<Vec<(PathBuf, Entry, u64)>, FileError> {
    let entry = |(name, path): (String, PathBuf)| match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_file() => (path, names::entry(&name), metadata.len()),
        // Links and directories of our names are not ours; what has just gone away is nobody's.
        Ok(_) | Err(_) => (path, Entry::Foreign, 0),
    };
    Ok(children(path)?.into_iter().map(entry).collect())
}

/// The names and paths in a directory, sorted; none if it is not there. Names that are not text are not ours.
fn children(dir: &Path) -> Result<Vec<(String, PathBuf)>, FileError> {
    let failed = |e| FileError::new("list", dir, e);
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut children = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        children.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    children.sort();
    Ok(children)
}
