//! Checkpoints as a program sees them (rule T-7), with a real coordinator, real rings and real files.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{Coordinator, Job, ORDER, eventually, expected};
use reknit_checkpoint::{Condition, Listed, list};
use reknit_trainer::{NamedTensors, Options, ReduceOp, TrainError, Trainer};

/// The checkpoints of the one job that has its own in `parent`.
fn checkpoints(parent: &Path) -> Vec<Listed> {
    let dirs: Vec<PathBuf> = std::fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(dirs.len() <= 1, "{dirs:?}");
    // What goes away while it is looked at is looked at again.
    dirs.first().map_or_else(Vec::new, |dir| eventually("a look at the directory", || list(dir).ok()))
}

fn complete(parent: &Path) -> BTreeSet<u64> {
    let listed = checkpoints(parent);
    let whole = listed.iter().filter(|listed| matches!(listed.condition, Condition::Complete { .. }));
    whole.map(|listed| listed.step.0).collect()
}

#[test]
fn the_newest_are_kept_and_the_rest_goes() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(1 << 20);
    let with = |options: Options| options.checkpoints(dir.path(), 10, 3).unwrap();
    let workers = ["a", "b", "c"].map(|name| job.worker_with(name, None, with));
    job.steps(300);
    // Steps may be faster than disks.
    eventually("more checkpoints than are kept", || {
        let commits = job.coordinator.status("job").commits;
        (commits.len() == 3 && commits.iter().all(|commit| commit.step > 10)).then_some(())
    });
    job.ends();
    let last = workers.map(common::Worker::outcome)[0].steps;
    let kept: BTreeSet<u64> =
        job.coordinator.status("job").commits.iter().map(|commit| commit.step).collect();
    assert!(kept.len() == 3 && kept.iter().all(|step| step % 10 == 0 && *step <= last), "{kept:?} of {last}");
    assert!(complete(dir.path()).is_superset(&kept), "{kept:?}");
    // Besides these, one that had just become too old and one that was being written when the workers left.
    let left: BTreeSet<u64> = checkpoints(dir.path()).iter().map(|listed| listed.step.0).collect();
    assert!(left.len() <= 5, "{left:?}, of which {kept:?} count");
}

#[test]
fn t7_a_worker_that_cannot_write_holds_nobody_up_and_what_the_others_wrote_goes() {
    let (good, bad) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let job = Job::new(1 << 20);
    let a = job.worker_with("a", None, |options| options.checkpoints(good.path(), 5, 2).unwrap());
    job.steps(20);
    let its = eventually("a first checkpoint", || {
        let dir = std::fs::read_dir(good.path()).unwrap().next()?.unwrap().path();
        (!complete(good.path()).is_empty()).then_some(dir)
    });
    // Something is in the way where the second worker's part is to go.
    let place = bad.path().join(its.file_name().unwrap());
    std::fs::write(&place, "in the way").unwrap();
    let before = job.generation();
    let b = job.worker_with("b", None, |options| options.checkpoints(bad.path(), 5, 2).unwrap());
    job.new_world(before);
    let newest = *complete(good.path()).last().unwrap();
    for _ in 0..3 {
        job.steps(20);
        assert_eq!(complete(good.path()).last(), Some(&newest), "half a checkpoint is none");
    }
    // Each part that the first one writes meanwhile goes again, though there is always another one.
    let parts = || -> BTreeSet<u64> {
        checkpoints(good.path()).iter().map(|listed| listed.step.0).filter(|step| *step > newest).collect()
    };
    let seen = eventually("a part that is of no use", || Some(parts()).filter(|parts| !parts.is_empty()));
    eventually("the parts that are of no use to go", || parts().is_disjoint(&seen).then_some(()));
    // The way is free: from the next one on they are made again, by both.
    let way = bad.path().join("way");
    std::os::unix::fs::symlink(&its, &way).unwrap();
    // At once, or the second worker makes a directory there.
    std::fs::rename(&way, &place).unwrap();
    eventually("a checkpoint of two parts", || {
        let listed = checkpoints(good.path());
        listed
            .iter()
            .any(|listed| match &listed.condition {
                Condition::Complete { manifest, .. } => manifest.shards().len() == 2,
                _ => false,
            })
            .then_some(())
    });
    job.ends();
    for outcome in [a.outcome(), b.outcome()] {
        assert_eq!(outcome.sums, expected(outcome.steps), "no step was lost to all this");
    }
}

/// Trains `steps` steps with checkpoints that are hardly ever due, or leaves without a word after `leaves_after`.
fn trains(url: &str, name: &str, dir: &Path, leaves_after: Option<u64>) -> u64 {
    let options = Options::new(url, "job", ORDER).unwrap().name(name).unwrap().workers(1, 2).unwrap();
    let options = options.steps(30).checkpoints(dir, 1_000, 2).unwrap();
    // Large enough that it is not on the disk at once.
    let ballast = vec![7; 64 << 20];
    let mut state =
        NamedTensors::new().with_f64("sum", [1], vec![0.0]).with_u8("ballast", [64 << 20], ballast);
    let mut trainer = Trainer::join(options, &state).unwrap();
    while let Some(mut step) = trainer.next_step(&mut state).unwrap() {
        let mut sum: [f64; 1] = [step.samples().map(|sample| sample as f64).sum()];
        // Nobody is alone in the end, or there is nothing to be seen here.
        if step.all_reduce(&mut sum, ReduceOp::Sum).is_err() {
            continue;
        }
        state.f64_mut("sum")[0] += sum[0];
        let committed = step.commit(&state);
        if Some(committed.steps) == leaves_after {
            break;
        }
    }
    trainer.steps_done()
}

#[test]
fn t7_the_last_steps_checkpoint_is_made_by_those_who_are_left() {
    let (coordinator, dir) = (Coordinator::start(), tempfile::tempdir().unwrap());
    let (url, path) = (coordinator.url(), dir.path());
    let steps = std::thread::scope(|scope| {
        let a = scope.spawn(|| trains(url, "a", path, None));
        // Its part of the last checkpoint never comes.
        let b = scope.spawn(|| trains(url, "b", path, Some(30)));
        (a.join().unwrap(), b.join().unwrap())
    });
    assert_eq!(steps, (30, 30));
    assert_eq!(complete(path), BTreeSet::from([30]));
}

#[test]
fn a_program_gets_a_checkpoint_when_it_asks_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job::new(0);
    let with = |options: Options| options.checkpoints(dir.path(), 1_000_000, 3).unwrap();
    let workers = ["a", "b"].map(|name| job.worker_with(name, None, with));
    job.steps(20);
    assert_eq!(complete(dir.path()), BTreeSet::new());
    workers[1].handle.save();
    eventually("the checkpoint", || (complete(dir.path()).len() == 1).then_some(()));
    job.ends();
    assert!(workers.map(common::Worker::outcome).iter().all(|outcome| outcome.steps > 20));
}

#[test]
fn a_directory_that_cannot_be_written_to_is_said_before_the_job_has_the_worker() {
    let (coordinator, dir) = (Coordinator::start(), tempfile::tempdir().unwrap());
    let file = dir.path().join("a file");
    std::fs::write(&file, "").unwrap();
    for place in [file.clone(), file.join("below")] {
        let options =
            Options::new(coordinator.url(), "job", ORDER).unwrap().checkpoints(&place, 1, 1).unwrap();
        let joined = Trainer::join(options, &NamedTensors::new().with_f32("w", [1], vec![0.0]));
        let Err(TrainError::CheckpointsDir { dir, source }) = joined else { panic!("it has joined") };
        assert_eq!(dir, place);
        assert!(!source.hint().is_empty());
    }
    assert_eq!(coordinator.received().values().sum::<u64>(), 0, "nobody has said anything");
}

#[test]
fn workers_that_disagree_about_checkpoints_are_no_company() {
    let (coordinator, dir) = (Coordinator::start(), tempfile::tempdir().unwrap());
    let options = |every: Option<u64>| {
        let options = Options::new(coordinator.url(), "job", ORDER).unwrap().workers(1, 4).unwrap();
        match every {
            Some(every) => options.checkpoints(dir.path(), every, 2).unwrap(),
            None => options,
        }
    };
    let state = NamedTensors::new().with_f32("w", [1], vec![0.0]);
    let first = Trainer::join(options(Some(10)), &state).unwrap();
    for other in [Some(20), None] {
        let why = Trainer::join(options(other).name("other").unwrap(), &state).map(|_| ()).unwrap_err();
        assert!(why.to_string().contains("checkpoint interval"), "{why}");
    }
    drop(first);
}
