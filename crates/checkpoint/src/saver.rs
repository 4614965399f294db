//! Saving a rank's part in the background.
//!
//! ```text
//! begin ─► digest the whole state, copy this rank's part ─► the caller goes on
//!                                     │
//!                              writer thread: write aside ─► sync ─► rename ─► sync the directory ─► poll gives the
//!                                                                                                    report
//! ```
//!
//! The buffer travels to the writer and back, so that there is nothing to lock: while it is away, the saver is busy.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use reknit_membership::{Digest, Generation, JobId, Lineage, Rank, Step, WorldSize};

use crate::digest::{digest, fold_file};
use crate::files::{FileError, Files, RealFiles, prepare_dir_with, publish};
use crate::fingerprint::{Fingerprint, scan};
use crate::header::header;
use crate::layout::Layout;
use crate::manifest::{RANKS_MAX, ShardReport, chunk_numbers};
use crate::names;
use crate::plan::shards;
use crate::staging::Staging;
use crate::state::State;
use crate::to_usize;
use crate::values::{Values, ValuesError};

/// Which part of which checkpoint to save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveMeta {
    /// The job.
    pub job: JobId,
    /// How many steps the state has seen.
    pub step: Step,
    /// The branch of the job's history.
    pub lineage: Lineage,
    /// The world that saves.
    pub generation: Generation,
    /// This rank.
    pub rank: Rank,
    /// How many ranks share the work.
    pub world_size: WorldSize,
}

/// How a [`Saver`] works.
pub struct SaverOptions {
    /// Write past the page cache where the file system can do that: steadier, and the training's memory stays its own.
    /// Default: yes.
    pub direct_io: bool,
    /// Called on the writer's thread each time [`Saver::poll`] has something to give. Default: nothing.
    pub notify: Option<Box<dyn Fn() + Send>>,
}

impl Default for SaverOptions {
    fn default() -> SaverOptions {
        SaverOptions { direct_io: true, notify: None }
    }
}

impl fmt::Debug for SaverOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SaverOptions").field("direct_io", &self.direct_io).finish_non_exhaustive()
    }
}

/// What a save cost the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// How long the caller was held up.
    pub took: Duration,
    /// Bytes of the state that were copied: this rank's part.
    pub copied_bytes: u64,
    /// Bytes of the state that were digested: all of it.
    pub digested_bytes: u64,
    /// Digest of the whole state.
    pub state_digest: Digest,
}

/// A part that is written and safe from a crash.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Which part of which checkpoint.
    pub meta: SaveMeta,
    /// What to report to the coordinator.
    pub report: ShardReport,
    /// The state's fingerprint, for the rank that assembles the manifest.
    pub fingerprint: Fingerprint,
    /// The state's values, for the rank that assembles the manifest.
    pub values: Values,
}

/// Why a part was not saved. What was published before is untouched, and a later save may succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The part before is still being written, or nobody has asked [`Saver::poll`] what became of it.
    #[error("the save before this one is not over yet")]
    Busy,
    /// The world cannot be, or the rank is not in it.
    #[error("there is no rank {rank} in a world of {world_size} that can save a checkpoint")]
    NoSuchRank {
        /// The rank.
        rank: Rank,
        /// The world's size.
        world_size: WorldSize,
    },
    /// The state has other tensors than the layout that the saver was made with.
    #[error(
        "the state's tensors are not those of the saver's layout; tensor {tensor} is the first that differs"
    )]
    OtherLayout {
        /// The first tensor that differs, as an index.
        tensor: usize,
    },
    /// The state's values are over the limits.
    #[error(transparent)]
    Values(#[from] ValuesError),
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// [`Saver::abandon`] was called.
    #[error("the save was abandoned")]
    Abandoned,
    /// The writer's thread could not be started.
    #[error("the thread that writes checkpoints cannot be started")]
    NoWriter(#[source] std::io::Error),
    /// The writer's thread ended by a panic.
    #[error("the thread that writes checkpoints is gone")]
    WriterGone,
}

impl SaveError {
    /// What an operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            SaveError::Busy => "save less often, or to a faster disk",
            SaveError::NoSuchRank { .. } => "this is a bug of the program that embeds the library",
            SaveError::OtherLayout { .. } => "a state must keep its tensors while the job lives",
            SaveError::Values(_) => "keep what is large in a tensor",
            SaveError::File(error) => error.hint(),
            SaveError::Abandoned => "nothing to do: the world that saved is over",
            SaveError::NoWriter(_) => "raise the limit on threads (ulimit -u)",
            SaveError::WriterGone => "look for its panic in the program's output, and restart the program",
        }
    }

    /// Whether a later save may succeed without anybody changing the program.
    pub fn is_retryable(&self) -> bool {
        match self {
            SaveError::Busy | SaveError::File(_) | SaveError::Abandoned => true,
            SaveError::NoSuchRank { .. }
            | SaveError::OtherLayout { .. }
            | SaveError::Values(_)
            | SaveError::NoWriter(_)
            | SaveError::WriterGone => false,
        }
    }
}

/// Saves parts of a state on a thread of its own, one at a time.
///
/// When it is dropped, a save that is under way is given up.
pub struct Saver {
    layout: Layout,
    /// The buffer, while no save is under way.
    staging: Option<Staging>,
    /// Tells the save that is under way to stop.
    abandoned: Arc<AtomicBool>,
    to_writer: Sender<Work>,
    from_writer: Receiver<Finished>,
    is_writer_gone: bool,
}

struct Work {
    staging: Staging,
    image_bytes: usize,
    saved: Saved,
    abandoned: Arc<AtomicBool>,
}

struct Finished {
    staging: Staging,
    outcome: Result<Saved, SaveError>,
}

impl Saver {
    /// A saver of states with this layout into the job's directory `dir`, which is made if need be. All ranks use one
    /// directory that they share, and no two jobs use the same.
    ///
    /// # Errors
    /// If the directory cannot be made or written to.
    pub fn new(dir: PathBuf, layout: Layout, options: SaverOptions) -> Result<Saver, SaveError> {
        let files = RealFiles { direct: options.direct_io };
        prepare_dir_with(&files, &dir)?;
        Saver::with_files(Box::new(files), dir, layout, options.notify)
    }

    pub(crate) fn with_files(
        files: Box<dyn Files>,
        dir: PathBuf,
        layout: Layout,
        notify: Option<Box<dyn Fn() + Send>>,
    ) -> Result<Saver, SaveError> {
        let (to_writer, work) = mpsc::channel();
        let (finished, from_writer) = mpsc::channel();
        let teller = Teller { finished: Some(finished), notify };
        let writer = move || writer(&*files, &dir, &work, &teller);
        let thread = std::thread::Builder::new().name("reknit-save".to_owned());
        thread.spawn(writer).map_err(SaveError::NoWriter)?;
        let (staging, abandoned) = (Some(Staging::default()), Arc::default());
        Ok(Saver { layout, staging, abandoned, to_writer, from_writer, is_writer_gone: false })
    }

    /// The layout of the states it saves.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Gets the memory that the first save in a world of this size needs, so that [`Saver::begin`] need not: fresh
    /// memory is slow. Does nothing while a save is under way.
    pub fn prepare(&mut self, world_size: WorldSize) {
        let most = shards(&self.layout, world_size.0.min(RANKS_MAX)).into_iter().map(|part| part.len()).max();
        if let (Some(staging), Some(most)) = (&mut self.staging, most) {
            // A header is small beside the part, and its length depends on which part it is.
            staging.reserve(to_usize(most) + (1 << 20));
        }
    }

    /// Whether a save is under way, or over and not yet taken by [`Saver::poll`].
    pub fn is_busy(&self) -> bool {
        self.staging.is_none()
    }

    /// Digests the whole state and copies this rank's part of it; the caller may change the state when this returns.
    /// The copy is then written in the background; [`Saver::poll`] tells what became of it.
    ///
    /// # Errors
    /// [`SaveError::Busy`] while the save before is under way or not taken; or if what is asked for cannot be.
    ///
    /// # Panics
    /// If the state offers other bytes than its specification says.
    pub fn begin(&mut self, meta: SaveMeta, state: &dyn State) -> Result<Stall, SaveError> {
        let start = Instant::now();
        if self.is_writer_gone {
            return Err(SaveError::WriterGone);
        }
        let staging = self.staging.as_mut().ok_or(SaveError::Busy)?;
        let (rank, world_size) = (meta.rank, meta.world_size);
        if rank.0 >= world_size.0 || world_size.0 > RANKS_MAX {
            return Err(SaveError::NoSuchRank { rank, world_size });
        }
        if let Some(tensor) = first_difference(self.layout.specs(), &state.tensors()) {
            return Err(SaveError::OtherLayout { tensor });
        }
        let own = shards(&self.layout, world_size.0)[rank.0 as usize];
        let header = header(&meta, &self.layout, own);
        let image_bytes = header.len() + to_usize(own.len());
        let (head, data) = staging.image(image_bytes).split_at_mut(header.len());
        head.copy_from_slice(&header);
        let (fingerprint, values) = scan(state, &self.layout, own, data)?;
        let own_chunks = &fingerprint.chunks()[chunk_numbers(&self.layout, own)];
        let state_digest = fingerprint.state();
        let report = ShardReport {
            rank,
            file_bytes: image_bytes as u64,
            digest: fold_file(digest(&header), own_chunks),
            state_digest,
        };
        self.abandoned = Arc::default();
        let saved = Saved { meta, report, fingerprint, values };
        let staging = self.staging.take().ok_or(SaveError::Busy)?;
        let work = Work { staging, image_bytes, saved, abandoned: self.abandoned.clone() };
        self.to_writer.send(work).map_err(|_| SaveError::WriterGone)?;
        let (copied_bytes, digested_bytes) = (own.len(), self.layout.total_bytes());
        Ok(Stall { took: start.elapsed(), copied_bytes, digested_bytes, state_digest })
    }

    /// What became of the save that was begun, if it is over and this was not told before.
    pub fn poll(&mut self) -> Option<Result<Saved, SaveError>> {
        if !self.is_busy() {
            return None;
        }
        match self.from_writer.try_recv() {
            Ok(finished) => Some(self.take_back(finished)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(self.writer_gone()),
        }
    }

    /// As [`Saver::poll`], but waits up to `limit` for the save to be over.
    pub fn wait(&mut self, limit: Duration) -> Option<Result<Saved, SaveError>> {
        if !self.is_busy() {
            return None;
        }
        match self.from_writer.recv_timeout(limit) {
            Ok(finished) => Some(self.take_back(finished)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.writer_gone()),
        }
    }

    /// Gives up the save that is under way: its world is over, so it can never count. [`Saver::poll`] tells when it has
    /// stopped; it may still say that the part was saved.
    pub fn abandon(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    fn take_back(&mut self, finished: Finished) -> Result<Saved, SaveError> {
        self.staging = Some(finished.staging);
        finished.outcome
    }

    fn writer_gone(&mut self) -> Result<Saved, SaveError> {
        self.is_writer_gone = true;
        Err(SaveError::WriterGone)
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // Not waited for: a write to a dead network disk may take for ever.
        self.abandon();
    }
}

impl fmt::Debug for Saver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saver").field("is_busy", &self.is_busy()).finish_non_exhaustive()
    }
}

/// The index of the first element that is not in both lists.
pub(crate) fn first_difference<T: PartialEq>(one: &[T], other: &[T]) -> Option<usize> {
    let differ = one.iter().zip(other).position(|(a, b)| a != b);
    differ.or((one.len() != other.len()).then(|| one.len().min(other.len())))
}

/// How the writer's thread tells the saver, and whoever waits for it, that a save is over.
struct Teller {
    finished: Option<Sender<Finished>>,
    notify: Option<Box<dyn Fn() + Send>>,
}

impl Teller {
    /// Whether there still is a saver that wants to know.
    fn tell(&self, outcome: Finished) -> bool {
        let told = self.finished.as_ref().is_some_and(|finished| finished.send(outcome).is_ok());
        if let Some(notify) = self.notify.as_ref().filter(|_| told) {
            notify();
        }
        told
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        // A panic ends a save too: whoever waits must not wait for ever. First the channel, so that a poll shows it.
        self.finished = None;
        if let Some(notify) = self.notify.as_ref().filter(|_| std::thread::panicking()) {
            notify();
        }
    }
}

/// The writer's thread: one piece of work after the other, until the saver is gone.
fn writer(files: &dyn Files, dir: &Path, work: &Receiver<Work>, teller: &Teller) {
    while let Ok(Work { staging, image_bytes, saved, abandoned }) = work.recv() {
        let image = staging.image_ref(image_bytes);
        let go_on = || if abandoned.load(Ordering::Relaxed) { Err(SaveError::Abandoned) } else { Ok(()) };
        let outcome = write_part(files, dir, &saved.meta, image, go_on).map(|()| saved);
        if !teller.tell(Finished { staging, outcome }) {
            return;
        }
    }
}

fn write_part(
    files: &dyn Files,
    dir: &Path,
    meta: &SaveMeta,
    image: &[u8],
    go_on: impl FnMut() -> Result<(), SaveError>,
) -> Result<(), SaveError> {
    let place = dir.join(names::checkpoint(meta.step, meta.generation));
    files.create_dir(&place).map_err(|e| FileError::new("create", &place, e))?;
    publish(files, &place, &names::shard(meta.rank, meta.world_size), image, go_on)?;
    // Whoever made the directory may have crashed before it was durable, so each rank sees to it.
    files.sync_dir(dir).map_err(|e| FileError::new("sync", dir, e))?;
    Ok(())
}

#[cfg(test)]
mod tests;
