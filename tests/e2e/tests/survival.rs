//! What a fleet does to a job: deaths, restarts, broken disks. `reknit demo` shows the usual ones in one run; here are
//! those that need a hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use reknit_e2e::{Coordinator, PATIENCE, Process, eventually, programs};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use rustix::process::Signal;
use serde_json::Value;

const ENDLESS: [&str; 10] =
    ["--min", "1", "--max", "4", "--step-ms", "2", "--steps", "1000000", "--checkpoint-every", "20"];

fn saving(coordinator: &Coordinator, name: &str) -> Process {
    let dir = coordinator.dir().join("checkpoints").display().to_string();
    let mut args = ENDLESS.to_vec();
    args.extend(["--checkpoints", &dir]);
    coordinator.worker("job", name, &args)
}

/// The directories of checkpoints, oldest first.
fn checkpoints(coordinator: &Coordinator) -> Vec<PathBuf> {
    let directories = |dir: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect()
    };
    let [own] = &directories(&coordinator.dir().join("checkpoints"))[..] else {
        panic!("one job has one directory")
    };
    let mut all = directories(own);
    all.sort();
    all
}

fn flip_a_bit(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_the_newest_checkpoint_sends_all_to_the_one_before_with_a_warning() {
    let coordinator = Coordinator::start();
    let mut workers = [saving(&coordinator, "a"), saving(&coordinator, "b")];
    coordinator.runs_with("job", 2);
    coordinator.has_checkpoint("job", 60);
    for worker in &mut workers {
        worker.kill();
    }
    let newest = coordinator.has_checkpoint("job", 60);
    let damaged = checkpoints(&coordinator)
        .into_iter()
        .find(|path| path.display().to_string().contains(&format!("step-{newest:08}-")))
        .unwrap();
    let shard = std::fs::read_dir(&damaged)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .unwrap();
    flip_a_bit(&shard);

    let workers = [saving(&coordinator, "a"), saving(&coordinator, "b")];
    coordinator.runs_with("job", 2);
    // Who comes first may go on alone, and the other one joins it.
    let loaded = eventually("the restore to be written down", || {
        let history = coordinator.history("job");
        let from_checkpoint =
            |change: &&Value| change["source"].as_str().is_some_and(|s| s.starts_with("checkpoint"));
        history.iter().rev().find(from_checkpoint).cloned().ok_or_else(|| format!("{history:?}"))
    });
    let resumed = loaded["resumed_at"].as_u64().unwrap();
    assert!(
        resumed > 0 && resumed < newest,
        "resumed at {resumed}, the damaged checkpoint is of step {newest}"
    );
    let logs: String = workers.iter().map(Process::log).collect();
    let file = shard.file_name().unwrap().to_str().unwrap();
    assert!(
        logs.contains("could not be loaded") && logs.contains(file),
        "the warning names the file: {logs}"
    );
}

#[test]
fn a_disk_that_is_full_costs_checkpoints_but_no_step() {
    let coordinator = Coordinator::start();
    let dir = coordinator.dir().join("full");
    std::fs::create_dir(&dir).unwrap();
    // A file system of 64 KiB, seen by this worker only.
    let script = format!(
        "mount -t tmpfs -o size=64k tmpfs '{0}' && exec '{1}' --coordinator {2} --job job --name a {3} --checkpoints '{0}'",
        dir.display(),
        programs().join("reknit-digits").display(),
        coordinator.url(),
        ENDLESS.join(" ")
    );
    let may_mount =
        Command::new("unshare").args(["-rm", "true"]).status().is_ok_and(|status| status.success());
    assert!(
        may_mount,
        "this test needs `unshare -rm` (util-linux, and user namespaces) for a full disk of its own"
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]);
    let worker = coordinator.spawn_worker(command, "a");
    let generation = coordinator.runs_with("job", 1)["generation"].clone();
    eventually("the worker to say that its disk is full", || {
        let log = worker.log();
        if log.contains("could not be written") { Ok(()) } else { Err(log) }
    });
    let before = coordinator.status("job").unwrap()["step"].as_u64().unwrap();
    let status = eventually("training to go on", || {
        let status = coordinator.status("job")?;
        if status["step"].as_u64().unwrap() > before + 50 { Ok(status) } else { Err(status.to_string()) }
    });
    assert_eq!(
        (&status["generation"], status["checkpoints"].as_array().map(Vec::len)),
        (&generation, Some(0))
    );
    assert_eq!(status["save_trouble"]["member"], "a", "an operator sees whose disk it is: {status}");
}

#[test]
fn the_coordinator_dies_again_and_again_and_training_does_not_notice() {
    let mut coordinator = Coordinator::start();
    let mut workers = [saving(&coordinator, "a"), saving(&coordinator, "b"), saving(&coordinator, "c")];
    let generation = coordinator.runs_with("job", 3)["generation"].clone();
    for _ in 0..5 {
        let before = coordinator.status("job").unwrap()["step"].as_u64().unwrap();
        coordinator.kill();
        coordinator.restart();
        eventually("everybody to be back, and training to have gone on", || {
            let status = coordinator.status("job")?;
            let attached =
                status["members"].as_array().unwrap().iter().filter(|m| m["state"] == "in").count();
            assert_eq!(status["generation"], generation, "no generation is spent");
            let went_on = status["step"].as_u64().unwrap() > before;
            if attached == 3 && went_on { Ok(()) } else { Err(status.to_string()) }
        });
    }
    assert!(workers.iter_mut().all(Process::runs));
}

#[test]
fn an_orderly_stop_of_the_coordinator_is_no_different() {
    let mut coordinator = Coordinator::start();
    let _worker = saving(&coordinator, "a");
    let generation = coordinator.runs_with("job", 1)["generation"].clone();
    coordinator.process().signal(Signal::TERM);
    assert!(coordinator.process().ended().success(), "{}", coordinator.process().log());
    coordinator.restart();
    assert_eq!(coordinator.runs_with("job", 1)["generation"], generation);
}

#[test]
fn a_worker_that_hung_comes_back_as_a_new_member_and_fetches_what_it_missed() {
    let coordinator = Coordinator::start_with_silence("500ms");
    let first = saving(&coordinator, "a");
    let second = saving(&coordinator, "b");
    coordinator.runs_with("job", 2);
    second.signal(Signal::STOP);
    coordinator.runs_with("job", 1);
    second.signal(Signal::CONT);
    coordinator.runs_with("job", 2);
    let last = coordinator.history("job").last().unwrap().clone();
    assert_eq!(last["source"], "memory", "{last}");
    assert_eq!(last["steps_lost"], 0, "{last}");
    drop((first, second));
}

/// Rule D-5 of the coordinator.
#[test]
fn d5_the_coordinator_hears_nothing_of_the_steps_but_renewals_by_time() {
    let coordinator = Coordinator::start();
    let endless = ["--min", "2", "--steps", "1000000"];
    let _workers = ["a", "b"].map(|name| coordinator.worker("job", name, &endless));
    let running = coordinator.runs_with("job", 2);
    let received = || -> BTreeMap<String, u64> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = InspectClient::connect(coordinator.url()).await.unwrap();
            client.server(v1::ServerRequest {}).await.unwrap().into_inner().received.into_iter().collect()
        })
    };
    let step = || coordinator.status("job").unwrap()["step"].as_u64().unwrap();
    eventually("the first steps, which are reported", || {
        let first = received()["first_step"];
        if first >= 2 { Ok(()) } else { Err(format!("{first} of 2")) }
    });
    let (before, from) = (received(), step());
    eventually("many steps", || {
        let now = step();
        if now > from + 200 { Ok(()) } else { Err(format!("at {now}, was at {from}")) }
    });
    let after = received();
    for (kind, count) in &after {
        assert!(kind == "renew" || before.get(kind) == Some(count), "{kind}: {before:?} became {after:?}");
    }
    assert!(after["renew"] > before["renew"], "the step is known from renewals");
    assert_eq!(coordinator.status("job").unwrap()["generation"], running["generation"]);
}

#[test]
fn a_worker_that_is_stopped_does_not_keep_the_coordinator_from_stopping() {
    let mut coordinator = Coordinator::start();
    let worker = coordinator.worker("job", "a", &ENDLESS);
    coordinator.runs_with("job", 1);
    worker.signal(Signal::STOP);
    coordinator.process().signal(Signal::TERM);
    // It answers no ping any more; that alone would take a minute to be noticed.
    let began = Instant::now();
    assert!(coordinator.process().ended().success());
    assert!(began.elapsed() < PATIENCE / 3, "it took {:?}", began.elapsed());
    worker.signal(Signal::CONT);
}
