//! Checkpoints in the background: a thread that reports written parts, writes manifests and deletes what is too old.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reknit_checkpoint::manifest::{Manifest, ManifestMeta, PublishError, publish_manifest};
use reknit_checkpoint::{
    CommitRef, Layout, SaveError, SaveMeta, Saved, Saver, SaverOptions, ShardReport as PartReport, Stall,
    State, retain,
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
    /// Where they go.
    pub(crate) dir: PathBuf,
    /// After how many steps.
    pub(crate) every: u64,
}

/// The thread's end.
pub(crate) struct SavesThread {
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

impl Saves {
    /// Both ends. The thread listens to what is sent to `inbox`.
    pub(crate) fn new(
        dir: PathBuf,
        every: u64,
        job: JobId,
        layout: Layout,
        sender: mpsc::Sender<ToSaves>,
        inbox: mpsc::Receiver<ToSaves>,
    ) -> Result<(Saves, SavesThread), SaveError> {
        let notify = Box::new(move || {
            // When the thread is gone, so is the program.
            let _ = sender.send(ToSaves::Written);
        });
        let options = SaverOptions { notify: Some(notify), ..SaverOptions::default() };
        let saver = Arc::new(Mutex::new(Saver::new(dir.clone(), layout.clone(), options)?));
        let thread = SavesThread { saver: Arc::clone(&saver), dir: dir.clone(), job, layout, inbox };
        Ok((Saves { saver, dir, every }, thread))
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
    pub(crate) fn run(self, hub: &std::sync::Weak<Hub>) {
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
                ToSaves::Publish { generation, step, shards } => {
                    if let Some(saved) = written.get(&(generation, step)) {
                        self.publish(&hub, saved, &shards);
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
            Ok(manifest) => publish_when_visible(&self.dir, &manifest).map_err(|why| why.to_string()),
            Err(why) => Err(why.to_string()),
        };
        match published {
            Ok(digest) => hub.bring(|session| session.manifest_written(generation, step, digest)),
            Err(why) => {
                tracing::warn!(%step, error = %why, "the checkpoint's manifest could not be written");
                hub.bring(|session| session.save_failed(generation, step));
            }
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
                    tracing::warn!(error = %why, "an old checkpoint could not be deleted; trying again next time");
                }
            }
            Err(why) => tracing::warn!(error = %why, "old checkpoints could not be looked for"),
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

fn part_failed(hub: &Arc<Hub>, why: &SaveError) {
    tracing::warn!(error = %why, hint = why.hint(), "this rank's part of a checkpoint could not be written");
    // Which one it was does not matter: there is at most one that waits for this rank.
    hub.bring(|session| session.own_save_failed());
}
