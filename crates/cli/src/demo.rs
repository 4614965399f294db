//! `reknit demo`: a training run that lives through everything a spot fleet does, in front of your eyes.
//!
//! It is a user of reknit like any other: it starts a coordinator and workers as processes of their own, sends them
//! signals, asks the coordinator what an operator would ask, and reads what the workers wrote down.

mod acts;
mod evidence;
mod fleet;
mod outcome;
mod report;
mod screen;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::args::Demo;
use crate::failure::{Failure, Kind};
use crate::print;
use crate::processes::Coordinator;

use acts::Stage;
use evidence::Evidence;
use fleet::{Training, Worker};
use outcome::Outcome;
use screen::Screen;

/// How many workers the fleet has when all is well.
const WORKERS: usize = 4;
/// How long a run without faults may take.
const UNDISTURBED_PATIENCE: Duration = Duration::from_secs(300);
/// How much accuracy the faults may cost: sums are made in another order in a world of another size, so the last bits
/// differ, and with them a few guesses.
const ACCURACY_TOLERANCE: f64 = 0.02;

pub(crate) fn demo(args: &Demo) -> Result<(), Failure> {
    let worker = find_worker(args.worker.as_deref())?;
    let kept = args.dir.clone();
    let dir = match &kept {
        Some(dir) => dir.clone(),
        None => std::env::temp_dir().join(format!("reknit-demo-{}", std::process::id())),
    };
    let outcome = run(args, &worker, &dir)?;
    outcome.print();
    let report_file = args.report.clone().unwrap_or_else(|| PathBuf::from("reknit-demo.html"));
    std::fs::write(&report_file, report::html(&outcome))
        .with_context(|| format!("cannot write {}", report_file.display()))?;
    print::talk(format_args!("report: {}", report_file.display()));
    if let Some(file) = &args.to {
        let json = serde_json::to_string_pretty(&outcome.json()).context("the outcome has no JSON")?;
        std::fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if kept.is_none() {
        // What is left behind in a temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&dir);
    }
    if outcome.ok() {
        return Ok(());
    }
    let error = anyhow::anyhow!("not everything held: {}", outcome.complaints().join("; "));
    Err(Failure::new(Kind::Failed, error, "run it again with --dir DIR and look at the logs that stay there"))
}

/// The example program: beside this one, unless another is named.
fn find_worker(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()?.with_file_name("reknit-digits"),
    };
    if path.is_file() {
        return Ok(path);
    }
    let error = anyhow::anyhow!("the example program is not at {}", path.display());
    let hint = "build it with `cargo build --release`, or name it with --worker";
    Err(Failure::new(Kind::Failed, error, hint))
}

fn run(args: &Demo, worker: &Path, dir: &Path) -> Result<Outcome> {
    let began = Instant::now();
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let screen = Screen::new(args.steps);
    screen.say("first, the same training with nobody disturbing it");
    let accuracy_undisturbed = undisturbed(args, worker, &dir.join("undisturbed"), &screen)?;
    screen.say(&format!("undisturbed accuracy {accuracy_undisturbed:.4}"));

    screen.say("now the fleet: four workers, and everything that happens to spot machines");
    let dir = dir.join("disturbed");
    let training = Training {
        program: worker.to_owned(),
        dir: dir.clone(),
        job: "digits".to_owned(),
        steps: args.steps,
        step_ms: args.step_ms,
        min: 2,
        max: WORKERS as u32,
    };
    let mut stage = Stage::new(training, &screen)?;
    let acted = acts::play(&mut stage);
    let history = stage.history();
    drop(stage);
    let acts = acted?;
    screen.done();
    let evidence = Evidence::read_dir(&dir)?;
    Ok(Outcome::new(outcome::Facts {
        acts,
        history: history?,
        evidence,
        accuracy_undisturbed,
        accuracy_tolerance: ACCURACY_TOLERANCE,
        steps: args.steps,
        took: began.elapsed(),
    }))
}

/// The accuracy that the training reaches when nothing happens.
fn undisturbed(args: &Demo, worker: &Path, dir: &Path, screen: &Screen) -> Result<f64> {
    let training = Training {
        program: worker.to_owned(),
        dir: dir.to_owned(),
        job: "undisturbed".to_owned(),
        steps: args.steps,
        step_ms: 0,
        min: WORKERS as u32,
        max: WORKERS as u32,
    };
    let coordinator = Coordinator::start(dir)?;
    let mut workers = Vec::new();
    for index in 0..WORKERS {
        workers.push(Worker::start(&training, coordinator.address(), &format!("w{index}"))?);
    }
    let began = Instant::now();
    let mut tail = evidence::Tail::new(dir);
    for worker in &mut workers {
        while !worker.has_ended()? {
            if began.elapsed() > UNDISTURBED_PATIENCE {
                bail!(
                    "the undisturbed training did not end within {UNDISTURBED_PATIENCE:?}; see {}",
                    dir.display()
                );
            }
            tail.read()?;
            screen.step(tail.steps_done(), WORKERS as u32, 1, tail.loss());
            std::thread::sleep(fleet::POLL);
        }
        worker.check_end()?;
    }
    Evidence::read_dir(dir)?.accuracy().context("no worker wrote down its accuracy")
}
