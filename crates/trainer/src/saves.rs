//! Checkpoints in the background: a thread that reports written parts, writes manifests and deletes what is too old.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use reknit_checkpoint::manifest::{Manifest, ManifestMeta, PublishError, publish_manifest};
use reknit_checkpoint::{
    CommitRef, Layout, SaveError, SaveMeta, Saved, Saver, SaverOptions, ShardReport as PartReport, Stall,
    State, remove_part, retain,
};
use reknit_membership::holding::ShardReport;
use reknit_membership::record::Commit;
use reknit_membership::{Digest, Generation, HistoryId, JobId, Rank, Step, WorldSize};

use crate::hub::{Hub, ToSaves, lock};

/// How long files of other ranks are waited for.
const LATE_FILES: Duration = Duration::from_secs(5);

/// Parts that are written and may still become part of a checkpoint: seldom more than one.
const WRITTEN_MAX: usize = 4;

/// The program's end: begins saves.
pub(crate) struct Saves {
    saver: Arc<Mutex<Saver>>,
}

/// The thread's end.
struct SavesThread {
    saver: Arc<Mutex<Saver>>,
    dir: PathBuf,
    job: JobId,
    layout: Layout,
    inbox: mpsc::Receiver<ToSaves>,
}

/// Where the checkpoints of one job's record lie: a directory of its own, so that two jobs, or two lives of a job in two
/// stores, never meet.
pub(crate) fn directory(parent: &Path, job: &JobId, history: HistoryId) -> PathBuf {
    parent.join(format!("{job}-{:016x}", history.0))
}

/// Checkpoints of the same job's that belong to another record of it: after the coordinator's store was lost, or the job
/// forgotten, nobody loads them, and nobody should find that out by missing them.
pub(crate) fn warn_of_others(dir: &Path, job: &JobId) {
    let (Some(parent), false) = (dir.parent(), dir.exists()) else { return };
    let is_other = |name: &str| {
        let history = name.strip_prefix(job.as_str()).and_then(|rest| rest.strip_prefix('-'));
        history.is_some_and(|history| history.len() == 16 && history.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let mut others = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_other));
    if let Some(other) = others.next() {
        tracing::warn!(
            older = %other.path().display(),
            "there are checkpoints of an earlier job of this name, which are not used: the coordinator's store does not know them"
        );
    }
}

impl Saves {
    /// The program's end; the thread is started, and listens to what is sent to `inbox`. That is taken only if the
    /// directory can be used.
    pub(crate) fn start(
        hub: &Arc<Hub>,
        dir: PathBuf,
        job: JobId,
        layout: Layout,
        inbox: &mut Option<mpsc::Receiver<ToSaves>>,
    ) -> Result<Saves, SaveError> {
        let weak = Arc::downgrade(hub);
        let notify = Box::new({
            let weak = weak.clone();
            // When the hub is gone, so is the program.
            move || weak.upgrade().into_iter().for_each(|hub| hub.tell_saves(ToSaves::Written))
        });
        let options = SaverOptions { notify: Some(notify), ..SaverOptions::default() };
        let saver = Arc::new(Mutex::new(Saver::new(dir.clone(), layout.clone(), options)?));
        let inbox = inbox.take().ok_or(SaveError::WriterGone)?;
        let thread = SavesThread { saver: Arc::clone(&saver), dir, job, layout, inbox };
        std::thread::Builder::new()
            .name("reknit-saves".to_owned())
            .spawn(move || thread.run(&weak))
            .map_err(SaveError::NoWriter)?;
        Ok(Saves { saver })
    }

    /// Gets the memory for this rank's part, so that the first save need not.
    pub(crate) fn prepare(&self, size: WorldSize) {
        lock(&self.saver).prepare(size);
    }

    /// Copies this rank's part and lets it be written. Nothing is begun while the part before is still being written.
    pub(crate) fn begin(&self, meta: SaveMeta, state: &dyn State) -> Result<Stall, SaveError> {
        lock(&self.saver).begin(meta, state)
    }
}

impl SavesThread {
    /// Its life, which ends with the program's.
    fn run(self, hub: &Weak<Hub>) {
        let mut written: BTreeMap<(Generation, Step), Saved> = BTreeMap::new();
        while let Ok(work) = self.inbox.recv() {
            let Some(hub) = hub.upgrade() else { return };
            match work {
                ToSaves::Written => {
                    let polled = lock(&self.saver).poll();
                    match polled {
                        Some(Ok(saved)) => self.part_written(&hub, saved, &mut written),
                        Some(Err(why)) => part_failed(&hub, &why),
                        None => {}
                    }
                }
                ToSaves::Publish { generation, step, shards } => match written.get(&(generation, step)) {
                    Some(saved) => self.publish(&hub, saved, &shards),
                    // What is needed for it is not kept any more: nobody must wait for it.
                    None => hub.bring(|session| session.save_failed(generation, step)),
                },
                ToSaves::GivenUp { generation, step } => {
                    if let Some(saved) = written.remove(&(generation, step)) {
                        self.delete_part(&saved.meta);
                    }
                }
                ToSaves::Committed { kept } => {
                    let newest = kept.last().map(|commit| commit.step).unwrap_or_default();
                    written.retain(|(_, step), _| *step > newest);
                    self.delete_old(&hub, &kept);
                }
                ToSaves::End => return,
            }
        }
    }

    fn part_written(&self, hub: &Arc<Hub>, saved: Saved, written: &mut BTreeMap<(Generation, Step), Saved>) {
        let (generation, step) = (saved.meta.generation, saved.meta.step);
        let report = ShardReport {
            bytes: saved.report.file_bytes,
            file: saved.report.digest,
            state: saved.report.state_digest,
        };
        while written.len() >= WRITTEN_MAX {
            written.pop_first();
        }
        written.insert((generation, step), saved);
        hub.bring(|session| session.shard_written(generation, step, report));
    }

    fn publish(&self, hub: &Arc<Hub>, saved: &Saved, shards: &[ShardReport]) {
        let (generation, step) = (saved.meta.generation, saved.meta.step);
        let history = hub.look(crate::session::Session::history).unwrap_or_default();
        let meta = ManifestMeta {
            job: self.job.clone(),
            history,
            step,
            lineage: saved.meta.lineage,
            generation,
            world_size: saved.meta.world_size,
        };
        let reports: Vec<PartReport> = shards
            .iter()
            .zip(0..)
            .map(|(shard, rank)| PartReport {
                rank: Rank(rank),
                file_bytes: shard.bytes,
                digest: shard.file,
                state_digest: shard.state,
            })
            .collect();
        let manifest =
            Manifest::assemble(meta, &self.layout, &saved.fingerprint, saved.values.clone(), &reports);
        let published = match manifest {
            Ok(manifest) => publish_when_visible(&self.dir, &manifest)
                .map_err(|why| format!("{}; {}", explained(&why), why.hint())),
            Err(why) => Err(explained(&why)),
        };
        match published {
            Ok(digest) => hub.bring(|session| session.manifest_written(generation, step, digest)),
            Err(why) => {
                tracing::warn!(%step, error = %why, "the checkpoint's manifest could not be written");
                hub.bring(|session| session.save_failed(generation, step));
            }
        }
    }

    fn delete_part(&self, meta: &SaveMeta) {
        let removed = remove_part(&self.dir, meta.step, meta.generation, meta.rank, meta.world_size);
        if let Err(why) = removed {
            tracing::warn!(
                error = explained(&why),
                hint = why.hint(),
                "a part that is of no use stays on the disk"
            );
        }
    }

    /// One member deletes: the one with rank 0.
    fn delete_old(&self, hub: &Arc<Hub>, kept: &[Commit]) {
        if hub.look(|session| session.place().is_none_or(|place| place.rank != Rank(0))) {
            return;
        }
        let kept: Vec<CommitRef> = kept
            .iter()
            .map(|commit| CommitRef {
                step: commit.step,
                generation: commit.generation,
                manifest: commit.manifest,
            })
            .collect();
        match retain(&self.dir, &kept) {
            Ok(retained) => {
                for why in retained.failed {
                    tracing::warn!(
                        error = explained(&why),
                        hint = why.hint(),
                        "an old checkpoint could not be deleted; trying again next time"
                    );
                }
            }
            Err(why) => {
                tracing::warn!(
                    error = explained(&why),
                    hint = why.hint(),
                    "old checkpoints could not be looked for"
                );
            }
        }
    }
}

/// Network file systems show the fresh files of other machines late.
fn publish_when_visible(dir: &Path, manifest: &Manifest) -> Result<Digest, PublishError> {
    let began = Instant::now();
    loop {
        match publish_manifest(dir, manifest) {
            Err(PublishError::ShardMissing { .. } | PublishError::ShardLength { .. })
                if began.elapsed() < LATE_FILES =>
            {
                std::thread::sleep(LATE_FILES / 50);
            }
            published => return published,
        }
    }
}

/// An error and what is behind it.
pub(crate) fn explained(why: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(why.source(), |cause| cause.source());
    causes.fold(why.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn part_failed(hub: &Arc<Hub>, why: &SaveError) {
    tracing::warn!(
        error = explained(why),
        hint = why.hint(),
        "this rank's part of a checkpoint could not be written"
    );
    // Which one it was does not matter: there is at most one that waits for this rank.
    hub.bring(|session| session.own_save_failed());
}
