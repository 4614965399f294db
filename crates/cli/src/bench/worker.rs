//! The part of a training program. It does what a user's program does, with a state and steps of a chosen size, and
//! says when the world changed for it.
//!
//! While nothing changes it says nothing, so that it does not disturb what is measured. What it has committed it also
//! writes to a file, 8 bytes at one place: that survives a SIGKILL and costs a microsecond.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use reknit_trainer::{DataOrder, Handle, NamedTensors, Options, Trainer};
use serde::{Deserialize, Serialize};

use super::clock::Mark;
use super::company::{orders, say, setup};
use super::random::Random;
use super::stats::median;

/// From how many of the last steps the median is taken.
const RECENT_STEPS: usize = 256;

/// What the program is told first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerSetup {
    pub(super) coordinator: String,
    pub(super) job: String,
    pub(super) name: String,
    pub(super) min: u32,
    pub(super) max: u32,
    pub(super) state_bytes: u64,
    /// How many numbers each step sums; not more than the state has.
    pub(super) summed: usize,
    /// How long each step takes at least.
    pub(super) step: Duration,
    /// Where the committed steps are noted.
    pub(super) journal: PathBuf,
    /// Where every committed step is noted with its instant, if it is wanted: see [`commits`].
    pub(super) commits: Option<PathBuf>,
}

/// A step that was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Commit {
    pub(super) at: Mark,
    pub(super) generation: u64,
    /// How many steps are committed, this one included.
    pub(super) steps: u64,
}

impl Commit {
    const BYTES: usize = 24;

    fn bytes(self) -> [u8; Commit::BYTES] {
        let mut bytes = [0; Commit::BYTES];
        for (eight, number) in bytes.chunks_exact_mut(8).zip([self.at.0, self.generation, self.steps]) {
            eight.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn read(bytes: &[u8; Commit::BYTES]) -> Commit {
        let number =
            |at: usize| bytes[at..].iter().take(8).rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Commit { at: Mark(number(0)), generation: number(8), steps: number(16) }
    }
}

/// Every step that a worker has committed so far.
pub(super) fn commits(file: &Path) -> Result<Vec<Commit>> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    // What is behind the last whole one is being written.
    Ok(bytes.as_chunks().0.iter().map(Commit::read).collect())
}

/// What it is told later.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum WorkerOrder {
    /// The cloud will take this machine.
    Notice,
    /// Say [`WorkerSays::Reached`] after so many more steps.
    TellAfter { steps: u64 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum WorkerSays {
    /// The first step of a world is committed.
    World(WorldBegun),
    /// As many steps were done as [`WorkerOrder::TellAfter`] said.
    Reached { steps: u64, at: Mark },
    /// The membership has ended.
    Ended { why: String },
}

/// A world as one worker saw it begin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorldBegun {
    pub(super) generation: u64,
    pub(super) size: u32,
    /// How many steps are committed, the first one of this world included, and when that one was.
    pub(super) steps: u64,
    pub(super) at: Mark,
    /// What this worker did last in the world before, if it was in one.
    pub(super) before: Option<Before>,
}

/// The end of a world.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Before {
    /// How many steps were committed, and when the last of them was.
    pub(super) steps: u64,
    pub(super) at: Mark,
    /// How long the last steps took, from commit to commit, in the middle.
    pub(super) median_step_ns: u64,
}

/// How many steps a worker had committed, also if it was killed.
pub(super) fn journalled(journal: &Path) -> Result<u64> {
    let mut bytes = [0; 8];
    let file = File::open(journal).with_context(|| format!("cannot read {}", journal.display()))?;
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(u64::from_le_bytes(bytes)),
        Err(why) if why.kind() == std::io::ErrorKind::UnexpectedEof => Ok(0),
        Err(why) => Err(why.into()),
    }
}

pub(super) fn play() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let setup: WorkerSetup = setup()?;
    let order = DataOrder { dataset: 1 << 20, global_batch: 64, seed: 1 };
    let options = Options::new(&setup.coordinator, &setup.job, order)?
        .workers(setup.min, setup.max)?
        .name(&setup.name)?;
    let mut state = initial_state(setup.state_bytes);
    let mut gradient = vec![0f32; setup.summed];
    let mut trainer = Trainer::join(options, &state)?;
    let tell_at = Arc::new(AtomicU64::new(u64::MAX));
    let progress = Progress::new(&setup, Arc::clone(&tell_at))?;
    obey(trainer.handle(), Arc::clone(&progress.steps), tell_at)?;
    train(&mut trainer, &mut state, &mut gradient, setup.step, progress)?;
    say(&WorkerSays::Ended { why: format!("{:?}", trainer.end()) })
}

/// A state whose memory is really there, and that compresses to nothing else.
fn initial_state(bytes: u64) -> NamedTensors {
    let numbers = (bytes / 4).max(1);
    let mut state = NamedTensors::new().with_f32("state", [numbers], vec![0.0; numbers as usize]);
    let mut random = Random::new(bytes);
    random.fill(state.raw_mut("state"));
    // Whatever bits these are as numbers: those that are computed with are plain.
    let plain = state.f32_mut("state");
    let plain = plain.len().min(1 << 20);
    state.f32_mut("state")[..plain].fill(1.0);
    state
}

fn train(
    trainer: &mut Trainer,
    state: &mut NamedTensors,
    gradient: &mut [f32],
    least: Duration,
    mut progress: Progress,
) -> Result<()> {
    while let Some(mut step) = trainer.next_step(state)? {
        let (generation, size) = (step.generation(), step.world_size());
        gradient.fill(1.0);
        // Stands for what a step computes.
        std::thread::sleep(least);
        let Ok(()) = step.all_reduce_mean(gradient) else { continue };
        for (weight, change) in state.f32_mut("state").iter_mut().zip(&*gradient) {
            *weight -= 1e-6 * change;
        }
        let committed = step.commit(state);
        progress.committed(generation, size, committed.steps)?;
    }
    Ok(())
}

/// Follows orders on a thread of its own, and ends the process with the last of them: nobody listens any more.
fn obey(handle: Handle, steps: Arc<AtomicU64>, tell_at: Arc<AtomicU64>) -> Result<()> {
    let obey = move || {
        for order in orders() {
            match order {
                Ok(WorkerOrder::Notice) => handle.notice(Duration::from_secs(120)),
                Ok(WorkerOrder::TellAfter { steps: more }) => {
                    tell_at.store(steps.load(Ordering::Relaxed) + more, Ordering::Relaxed);
                }
                Err(why) => tracing::error!(error = %why, "an order cannot be read"),
            }
        }
        std::process::exit(0);
    };
    std::thread::Builder::new().name("orders".to_owned()).spawn(obey)?;
    Ok(())
}

/// What was committed, and when.
struct Progress {
    journal: File,
    commits: Option<File>,
    steps: Arc<AtomicU64>,
    tell_at: Arc<AtomicU64>,
    /// The world of the last step.
    generation: u64,
    /// When the last steps of that world were committed.
    recent: VecDeque<Mark>,
}

impl Progress {
    fn new(setup: &WorkerSetup, tell_at: Arc<AtomicU64>) -> Result<Progress> {
        let create =
            |file: &Path| File::create(file).with_context(|| format!("cannot write {}", file.display()));
        let journal = create(&setup.journal)?;
        let commits = setup.commits.as_deref().map(create).transpose()?;
        let recent = VecDeque::with_capacity(RECENT_STEPS);
        Ok(Progress { journal, commits, steps: Arc::default(), tell_at, generation: 0, recent })
    }

    fn committed(&mut self, generation: u64, size: u32, steps: u64) -> Result<()> {
        let at = Mark::now();
        self.journal.write_all_at(&steps.to_le_bytes(), 0)?;
        if let Some(commits) = &mut self.commits {
            commits.write_all(&Commit { at, generation, steps }.bytes())?;
        }
        let steps_before = self.steps.swap(steps, Ordering::Relaxed);
        if generation != self.generation {
            let before = self.before(steps_before);
            say(&WorkerSays::World(WorldBegun { generation, size, steps, at, before }))?;
            self.generation = generation;
            self.recent.clear();
        }
        if self.recent.len() == RECENT_STEPS {
            self.recent.pop_front();
        }
        self.recent.push_back(at);
        if steps >= self.tell_at.load(Ordering::Relaxed) {
            self.tell_at.store(u64::MAX, Ordering::Relaxed);
            say(&WorkerSays::Reached { steps, at })?;
        }
        Ok(())
    }

    fn before(&self, steps: u64) -> Option<Before> {
        let at = *self.recent.back()?;
        let pairs = self.recent.iter().zip(self.recent.iter().skip(1));
        let median_step_ns = median(pairs.map(|(a, b)| b.since(*a).as_nanos() as f64)).unwrap_or(0.0) as u64;
        Some(Before { steps, at, median_step_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_read_as_they_are_written() {
        let commit = Commit { at: Mark(0x0102_0304_0506_0708), generation: 3, steps: u64::MAX };
        assert_eq!(Commit::read(&commit.bytes()), commit);
    }
}
