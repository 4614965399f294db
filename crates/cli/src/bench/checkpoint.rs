//! `reknit bench checkpoint`: how long a checkpoint holds training up, how fast it is durable, how fast it loads.
//!
//! One rank saves all of a state, as a world of one does: the stall is a digest of all of it and a copy. In a world of
//! four the rank digests as much and copies a quarter. Beside them: a plain copy, a plain synced write and a plain read
//! of as many bytes on the same disk.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reknit_checkpoint::manifest::{Manifest, ManifestMeta, publish_manifest};
use reknit_checkpoint::{
    Layout, NamedTensors, Part, SaveMeta, Saved, Saver, SaverOptions, State, load_into, open, state_digest,
};
use reknit_membership::{Generation, HistoryId, JobId, Lineage, Rank, Step, WorldSize};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;

use super::args::Checkpoint;
use super::limits;
use super::random::Random;
use super::result::{Figures, Row};
use super::stats::Spread;

/// How long one write may take.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, Serialize)]
pub(super) struct CheckpointFigures {
    bytes: u64,
    saves: u32,
    /// How long training stands still, for a gigabyte of state: in a world of one, and of four.
    stall_s_per_gb: Spread,
    stall_of_four_s_per_gb: Spread,
    /// From the beginning of a save until its file is safe.
    durable_bytes_per_s: Spread,
    /// Loading, with every byte verified: from the disk, and from the page cache.
    load_bytes_per_s: Spread,
    load_cached_bytes_per_s: Spread,
    /// What the machine allows.
    copy_s_per_gb: Spread,
    write_bytes_per_s: Spread,
    read_bytes_per_s: Spread,
    read_cached_bytes_per_s: Spread,
    /// The stall in plain copies, and the rates as parts of the plain ones; of the medians.
    stall_of_copy: f64,
    durable_of_write: f64,
    load_of_read: f64,
    load_cached_of_read: f64,
}

#[derive(Default)]
struct Times {
    stalls: Vec<f64>,
    stalls_of_four: Vec<f64>,
    durables: Vec<f64>,
    loads: Vec<f64>,
    loads_cached: Vec<f64>,
    copies: Vec<f64>,
    writes: Vec<f64>,
    reads: Vec<f64>,
    reads_cached: Vec<f64>,
}

pub(super) fn checkpoint(args: &Checkpoint, dir: &Path) -> Result<CheckpointFigures> {
    let (bytes, saves) = if args.common.quick {
        (args.bytes.min(64 << 20), args.saves.min(2))
    } else {
        (args.bytes, args.saves)
    };
    let numbers = (bytes / 4).max(1);
    let mut state = NamedTensors::new().with_f32("state", [numbers], vec![0.0; usize::try_from(numbers)?]);
    Random::new(1).fill(state.raw_mut("state"));
    let mut loaded = state.clone();
    let layout = Layout::new(state.tensors())?;
    let mut saver = Saver::new(dir.join("checkpoints"), layout.clone(), SaverOptions::default())?;
    saver.prepare(WorldSize(1));

    let mut times = Times::default();
    for step in 1..=u64::from(saves) {
        let gb = layout.total_bytes() as f64 / 1e9;
        // The copy is made into memory of its own, which is there already, as the saver's is.
        times.copies.push(gb_time(gb, limits::copy_rate(state.raw("state"), loaded.raw_mut("state"))));
        times.writes.push(limits::write_rate(dir, state.raw("state"))?);

        let (stall, saved) = save(&mut saver, &state, step, WorldSize(4))?;
        times.stalls_of_four.push(stall.as_secs_f64() / gb);
        std::fs::remove_dir_all(place(dir, &saved))?;

        let began = Instant::now();
        let (stall, saved) = save(&mut saver, &state, step, WorldSize(1))?;
        times.durables.push(layout.total_bytes() as f64 / began.elapsed().as_secs_f64());
        times.stalls.push(stall.as_secs_f64() / gb);
        load(dir, &layout, &saved, &mut loaded, &mut times)?;
        std::fs::remove_dir_all(place(dir, &saved))?;
    }
    ensure!(state_digest(&loaded, &layout)? == state_digest(&state, &layout)?, "another state was loaded");
    times.figures(bytes, saves)
}

fn gb_time(gb: f64, bytes_per_s: f64) -> f64 {
    gb * 1e9 / bytes_per_s / gb
}

/// Saves one rank's part, and waits until it is safe.
fn save(saver: &mut Saver, state: &dyn State, step: u64, world_size: WorldSize) -> Result<(Duration, Saved)> {
    let meta = SaveMeta {
        job: JobId::new("bench")?,
        step: Step(step),
        lineage: Lineage(1),
        generation: Generation(1),
        rank: Rank(0),
        world_size,
    };
    let stall = saver.begin(meta, state)?.took;
    match saver.wait(PATIENCE) {
        Some(saved) => Ok((stall, saved?)),
        None => bail!("a checkpoint was not written within {PATIENCE:?}"),
    }
}

/// Where a saved part lies.
fn place(dir: &Path, saved: &Saved) -> std::path::PathBuf {
    let SaveMeta { step, generation, .. } = saved.meta;
    dir.join("checkpoints").join(format!("step-{:08}-g{}", step.0, generation.0))
}

/// Loads what was saved by a world of one, and reads its file plainly: each from the disk, and then again.
fn load(
    dir: &Path,
    layout: &Layout,
    saved: &Saved,
    into: &mut NamedTensors,
    times: &mut Times,
) -> Result<()> {
    let checkpoints = dir.join("checkpoints");
    let meta = ManifestMeta {
        job: saved.meta.job.clone(),
        history: HistoryId(1),
        step: saved.meta.step,
        lineage: saved.meta.lineage,
        generation: saved.meta.generation,
        world_size: saved.meta.world_size,
    };
    let values = saved.values.clone();
    let manifest =
        Manifest::assemble(meta, layout, &saved.fingerprint, values, std::slice::from_ref(&saved.report))?;
    let digest = publish_manifest(&checkpoints, &manifest)?;
    let (step, generation) = (saved.meta.step, saved.meta.generation);
    let file = place(dir, saved).join(&manifest.shards()[0].file);
    // What lies below this machine's page cache may have a cache, too: it has seen the file once before either is timed.
    forget(&file)?;
    limits::read_rate(&file, into.raw_mut("state"))?;
    for (loads, reads, is_cached) in [
        (&mut times.loads, &mut times.reads, false),
        (&mut times.loads_cached, &mut times.reads_cached, true),
    ] {
        let forget = || if is_cached { Ok(()) } else { forget(&file) };
        forget()?;
        let began = Instant::now();
        let manifest = open(&checkpoints, step, generation, digest)?;
        load_into(&checkpoints, &manifest, Part::All, into)?;
        loads.push(layout.total_bytes() as f64 / began.elapsed().as_secs_f64());
        forget()?;
        reads.push(limits::read_rate(&file, into.raw_mut("state"))?);
    }
    // The plain reads have left the file's header in it.
    load_into(&checkpoints, &manifest, Part::All, into)?;
    Ok(())
}

/// Has the page cache forget a file.
fn forget(file: &Path) -> Result<()> {
    let open = std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    fadvise(&open, 0, None, Advice::DontNeed)?;
    Ok(())
}

impl Times {
    fn figures(self, bytes: u64, saves: u32) -> Result<CheckpointFigures> {
        let spread = |values: Vec<f64>| Spread::of(values).context("nothing was saved");
        let (stall, durable, load, cached) =
            (spread(self.stalls)?, spread(self.durables)?, spread(self.loads)?, spread(self.loads_cached)?);
        let (copy, write, read, read_cached) =
            (spread(self.copies)?, spread(self.writes)?, spread(self.reads)?, spread(self.reads_cached)?);
        Ok(CheckpointFigures {
            bytes,
            saves,
            stall_s_per_gb: stall,
            stall_of_four_s_per_gb: spread(self.stalls_of_four)?,
            durable_bytes_per_s: durable,
            load_bytes_per_s: load,
            load_cached_bytes_per_s: cached,
            copy_s_per_gb: copy,
            write_bytes_per_s: write,
            read_bytes_per_s: read,
            read_cached_bytes_per_s: read_cached,
            stall_of_copy: stall.p50 / copy.p50,
            durable_of_write: durable.p50 / write.p50,
            load_of_read: load.p50 / read.p50,
            load_cached_of_read: cached.p50 / read_cached.p50,
        })
    }
}

impl Figures for CheckpointFigures {
    const NAME: &'static str = "checkpoint";

    fn rows(&self) -> Vec<Row> {
        let ms = |spread: &Spread| {
            let Spread { min, p50, max, .. } = spread.map(|seconds| seconds * 1e3);
            format!("{p50:.0} ms/GB ({min:.0} to {max:.0})")
        };
        let gb = |spread: &Spread| {
            let Spread { min, p50, max, .. } = spread.map(|rate| rate / 1e9);
            format!("{p50:.2} GB/s ({min:.2} to {max:.2})")
        };
        vec![
            Row::new("stall, alone", ms(&self.stall_s_per_gb)).beside(format!(
                "a plain copy: {}; {:.1} ×",
                ms(&self.copy_s_per_gb),
                self.stall_of_copy
            )),
            Row::new("stall, one of four", ms(&self.stall_of_four_s_per_gb)),
            Row::new("durable", gb(&self.durable_bytes_per_s)).beside(format!(
                "a plain synced write: {}; {:.2} ×",
                gb(&self.write_bytes_per_s),
                self.durable_of_write
            )),
            Row::new("verified load, from disk", gb(&self.load_bytes_per_s)).beside(format!(
                "a plain read: {}; {:.2} ×",
                gb(&self.read_bytes_per_s),
                self.load_of_read
            )),
            Row::new("verified load, cached", gb(&self.load_cached_bytes_per_s)).beside(format!(
                "a plain read: {}; {:.2} ×",
                gb(&self.read_cached_bytes_per_s),
                self.load_cached_of_read
            )),
        ]
    }
}
