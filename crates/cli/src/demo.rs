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

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::args::Demo;
use crate::failure::{Failure, Kind};
use crate::print;
use crate::processes::{self, Coordinator};

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
    let report_file = args.report.clone().unwrap_or_else(|| PathBuf::from("reknit-demo.html"));
    // Better said now than in a minute.
    args.to.iter().chain([&report_file]).try_for_each(|file| writable(file))?;
    let dir = stage_dir(args.dir.as_deref())?;
    processes::end_on_interrupt()?;
    let outcome = match run(args, &worker, &dir) {
        Ok(outcome) => outcome,
        Err(why) => {
            if let Some(file) = &args.to {
                // Whoever reads it learns at least that it did not hold, and why.
                let json = serde_json::json!({ "ok": false, "complaints": [format!("{why:#}")] });
                let _ = std::fs::write(file, json.to_string());
            }
            if std::fs::metadata(&report_file).is_ok_and(|file| file.len() == 0) {
                let _ = std::fs::remove_file(&report_file);
            }
            return Err(Failure::new(Kind::Failed, why, logs_hint(&dir)));
        }
    };
    outcome.print();
    if let Some(file) = &args.to {
        let json = serde_json::to_string_pretty(&outcome.json()).context("the outcome has no JSON")?;
        std::fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    std::fs::write(&report_file, report::html(&outcome))
        .with_context(|| format!("cannot write {}", report_file.display()))?;
    print::talk(format_args!("report: {}", report_file.display()));
    if !outcome.ok() {
        let error = anyhow::anyhow!("not everything held: {}", outcome.complaints().join("; "));
        return Err(Failure::new(Kind::Failed, error, logs_hint(&dir)));
    }
    if args.dir.is_none() {
        // What is left behind in a temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok(())
}

fn logs_hint(dir: &Path) -> String {
    format!("the logs are in {}", dir.display())
}

fn writable(file: &Path) -> Result<(), Failure> {
    let opened = File::options().create(true).append(true).open(file);
    opened.map(|_| ()).map_err(|why| {
        let error = anyhow::Error::from(why).context(format!("cannot write {}", file.display()));
        Failure::new(Kind::Failed, error, "name another file with --json or --report")
    })
}

/// A directory that nothing is in yet: an older run's store would know its job as ended.
fn stage_dir(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let dir = match named {
        Some(dir) => dir.to_owned(),
        None => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            std::env::temp_dir().join(format!("reknit-demo-{}-{now}", std::process::id()))
        }
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries = std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    if entries.next().is_some() {
        let error = anyhow::anyhow!("{} is not empty", dir.display());
        return Err(Failure::new(Kind::Usage, error, "name a directory that is empty or not there yet"));
    }
    Ok(dir)
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
