//! An elastic training program: learns handwritten digits with as many workers as there happen to be.
//!
//! Start a coordinator (`reknit serve`), then this program as often as you like; kill some, start more. What makes it
//! elastic are the few lines of the loop in `main`; the rest is what any training program has.

mod data;
mod evidence;
mod model;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use reknit_trainer::{Credentials, DataOrder, Options, Trainer};

use data::Digits;
use evidence::Evidence;

/// Learns handwritten digits, elastically
#[derive(Parser)]
struct Args {
    /// The coordinator
    #[arg(long, env = "REKNIT_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    coordinator: String,
    /// The job to join
    #[arg(long, env = "REKNIT_JOB", default_value = "digits")]
    job: String,
    /// What to call this worker [default: host and process id]
    #[arg(long)]
    name: Option<String>,
    /// The fewest workers to train with
    #[arg(long, default_value_t = 1)]
    min: u32,
    /// The most workers to train with
    #[arg(long, default_value_t = 64)]
    max: u32,
    /// Images in one step, over all workers
    #[arg(long, default_value_t = 60)]
    batch: u64,
    /// How many steps to train
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Where this worker's data plane listens; by default it is reached from this machine only
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: std::net::SocketAddr,
    /// The host, or HOST:PORT, by which other machines reach it
    #[arg(long)]
    advertise: Option<String>,
    /// Where checkpoints go
    #[arg(long)]
    checkpoints: Option<PathBuf>,
    /// Make a checkpoint after so many steps
    #[arg(long, default_value_t = 50)]
    checkpoint_every: u64,
    /// Do not begin a step before the last one has taken so many milliseconds: slows a fast machine down
    #[arg(long, default_value_t = 0)]
    step_ms: u64,
    /// Write down which images each step used
    #[arg(long)]
    evidence: Option<PathBuf>,
}

#[expect(clippy::print_stdout, reason = "what a program of its kind says goes to its user")]
fn main() -> Result<()> {
    let stderr = std::io::stderr;
    let colours = stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(stderr).with_ansi(colours).log_internal_errors(false).init();
    let args = Args::parse();
    let digits = Digits::load();
    let mut evidence = Evidence::new(args.evidence.as_deref(), digits.train())?;
    let mut state = model::initial();

    let order = DataOrder { dataset: digits.train(), global_batch: args.batch, seed: 7 };
    let mut options = Options::new(&args.coordinator, &args.job, order)?
        .workers(args.min, args.max)?
        .credentials(Credentials::from_env()?)
        .steps(args.steps)
        .listen(args.listen, args.advertise);
    if let Some(name) = &args.name {
        options = options.name(name)?;
    }
    if let Some(dir) = &args.checkpoints {
        options = options.checkpoints(dir, args.checkpoint_every, 3)?;
    }

    let mut trainer = Trainer::join(options, &state)?;
    while let Some(mut step) = trainer.next_step(&mut state)? {
        let began = std::time::Instant::now();
        let samples: Vec<u64> = step.samples().collect();
        let (images, labels) = digits.batch(&samples)?;
        let (index, generation, size) = (step.index(), step.generation(), step.world_size());
        evidence.tried(index, generation, step.rank(), size, &samples)?;

        let mut mean = model::gradients(&state, &images, &labels)?;
        // The world broke? Then the same step comes again, in the next world.
        let Ok(()) = step.all_reduce_mean(&mut mean) else { continue };
        let loss = model::apply(&mut state, &mean);
        let committed = step.commit(&state);

        evidence.committed(index, generation, loss)?;
        if committed.steps.is_multiple_of(100) {
            println!("step {} loss {loss:.4} generation {generation} workers {size}", committed.steps);
        }
        std::thread::sleep(Duration::from_millis(args.step_ms).saturating_sub(began.elapsed()));
    }

    if trainer.steps_done() == args.steps {
        let (images, labels) = digits.test()?;
        let accuracy = model::accuracy(&state, &images, &labels)?;
        evidence.accuracy(accuracy)?;
        println!("accuracy {accuracy:.4} on images that no step has seen");
    }
    Ok(())
}
