//! The command line as an operator types it: what is said, where, and with which exit code.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use reknit_e2e::{Coordinator, eventually, programs, reknit};
use serde_json::Value;

/// The last line of an error says what to do.
fn has_hint(stderr: &str) -> bool {
    stderr.lines().last().is_some_and(|line| line.starts_with("hint: "))
}

#[test]
fn a_port_in_use_is_told_with_its_own_exit_code() {
    let coordinator = Coordinator::start();
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().display().to_string();
    let ran = reknit(&["serve", "--listen", &coordinator.address().to_string(), "--store", &store]);
    assert_eq!(ran.code, 6, "{ran:?}");
    assert!(ran.stderr.contains("in use by another process") && has_hint(&ran.stderr), "{}", ran.stderr);
}

#[test]
fn two_servers_on_one_store_are_one_too_many() {
    let coordinator = Coordinator::start();
    let ran =
        reknit(&["serve", "--listen", "127.0.0.1:0", "--store", &coordinator.store().display().to_string()]);
    assert_eq!(ran.code, 6, "{ran:?}");
    assert!(ran.stderr.contains("in use by another coordinator") && has_hint(&ran.stderr), "{}", ran.stderr);
}

#[test]
fn a_store_that_cannot_be_written_is_told_with_its_directory() {
    let ran = reknit(&["serve", "--listen", "127.0.0.1:0", "--store", "/proc/no-such-place"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("/proc/no-such-place") && has_hint(&ran.stderr), "{}", ran.stderr);
}

#[test]
fn an_etcd_that_cannot_be_used_is_told_before_anything_is_served() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = ["--advertise", "http://127.0.0.1:7070"];
    let serve = |args: &[&str]| reknit(&[&["serve", "--listen", "127.0.0.1:0"], args].concat());
    let nobody = serve(&[&url[..], &["--store", &format!("etcd://{free}")]].concat());
    assert_eq!(nobody.code, 3, "{nobody:?}");
    assert!(
        nobody.stderr.contains("no node of etcd answers") && has_hint(&nobody.stderr),
        "{}",
        nobody.stderr
    );
    for (args, said) in [
        (&["--store", "etcd://host"][..], "etcd://HOST:2379"),
        (&["--store", "postgres://host:1"], "no store"),
        (&["--store", "etcd://host:1", "--advertise", "host:1"], "no URL"),
        (&["--store", "etcd://host:1", "--advertise", "http://host:1", "--lease", "100ms"], "out of range"),
        (&["--store", "etcd://host:1"], "--advertise"),
        (&["--store", "etcd://host:1", "--etcd-user", "me"], "--etcd-password-file"),
    ] {
        let ran = serve(args);
        assert_eq!(ran.code, 2, "{args:?}: {ran:?}");
        assert!(ran.stderr.contains(said), "{args:?}: {}", ran.stderr);
    }
    let store = format!("etcds://{free}");
    let lost = serve(&[&url[..], &["--store", &store, "--etcd-ca", "/no/such/file"]].concat());
    assert_eq!(lost.code, 2, "{lost:?}");
    assert!(lost.stderr.contains("/no/such/file") && has_hint(&lost.stderr), "{}", lost.stderr);
}

#[test]
fn a_corrupt_store_is_told_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("reknit.redb");
    std::fs::write(&file, b"no store at all").unwrap();
    let ran = reknit(&["serve", "--listen", "127.0.0.1:0", "--store", &dir.path().display().to_string()]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("damaged") && has_hint(&ran.stderr), "{}", ran.stderr);
    assert_eq!(std::fs::read(&file).unwrap(), b"no store at all");
}

#[test]
fn an_address_that_others_can_reach_needs_a_word_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().display().to_string();
    let ran = reknit(&["serve", "--listen", "0.0.0.0:0", "--store", &store]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("--insecure"), "{}", ran.stderr);
}

#[test]
fn no_coordinator_an_unknown_job_and_a_wrong_word_each_have_their_code() {
    let nobody = reknit(&["status", "--coordinator", "http://127.0.0.1:9"]);
    assert_eq!(nobody.code, 3, "{nobody:?}");
    assert!(nobody.stderr.contains("reknit serve"), "{}", nobody.stderr);

    let coordinator = Coordinator::start();
    let unknown = coordinator.reknit(&["status", "no-such-job"]);
    assert_eq!(unknown.code, 4, "{unknown:?}");
    assert!(unknown.stderr.contains("no-such-job") && has_hint(&unknown.stderr), "{}", unknown.stderr);
    assert_eq!(coordinator.reknit(&["status"]).code, 0);
    assert_eq!(reknit(&["no-such-command"]).code, 2);
    assert_eq!(coordinator.reknit(&["status", "not a job"]).code, 2);
}

#[test]
fn an_operator_sees_who_is_in_and_can_act_on_them() {
    let coordinator = Coordinator::start();
    let bounds = ["--min", "1", "--max", "2", "--step-ms", "5", "--steps", "1000000"];
    let mut a = coordinator.worker("job", "a", &bounds);
    let mut b = coordinator.worker("job", "b", &bounds);
    let status = coordinator.runs_with("job", 2);
    let names: Vec<&str> =
        status["members"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect();
    assert_eq!(
        {
            let mut sorted = names.clone();
            sorted.sort_unstable();
            sorted
        },
        ["a", "b"]
    );

    let human = coordinator.reknit(&["status", "job"]);
    assert!(
        human.stdout.contains("running") && human.stdout.contains("waits for   nothing"),
        "{}",
        human.stdout
    );

    let stranger = coordinator.reknit(&["drain", "job", "nobody"]);
    assert_eq!(stranger.code, 4, "{stranger:?}");
    let named = ["a, b", "b, a"].iter().any(|names| stranger.stderr.contains(names));
    assert!(named, "the members there are: {}", stranger.stderr);

    let backwards = coordinator.reknit(&["resize", "job", "--min", "3", "--max", "2"]);
    assert_eq!(backwards.code, 2, "{backwards:?}");
    assert!(backwards.stderr.contains("min 3 is above max 2"), "{}", backwards.stderr);

    assert_eq!(coordinator.reknit(&["drain", "job", "b"]).code, 0);
    assert!(b.ended().success(), "a drained worker ends well: {}", b.log());
    coordinator.runs_with("job", 1);

    let early = coordinator.reknit(&["forget", "job"]);
    assert_eq!(early.code, 5, "{early:?}");
    assert_eq!(coordinator.reknit(&["close", "job"]).code, 0);
    assert!(a.ended().success(), "{}", a.log());
    let history = coordinator.history("job");
    assert!(history.len() >= 2 && history.iter().all(|change| change["generation"].as_u64() > Some(0)));
    assert_eq!(coordinator.reknit(&["forget", "job"]).code, 0);
    assert_eq!(coordinator.reknit(&["status", "job"]).code, 4);
}

#[test]
fn the_configuration_and_completions_can_be_printed() {
    let config = reknit(&["serve", "--print-config", "--silence", "1500ms"]);
    assert_eq!(config.code, 0);
    assert!(config.stdout.contains("silence_ms              1500"), "{}", config.stdout);
    let completions = reknit(&["completions", "bash"]);
    assert!(completions.stdout.contains("_reknit"), "a completion script");
    assert_eq!(reknit(&["serve", "--silence", "1ms"]).code, 2);
}

/// The value that a command prints with `--json`.
fn json(coordinator: &Coordinator, args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.push("--json");
    let ran = coordinator.reknit(&all);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|why| panic!("{args:?} prints {:?}: {why}", ran.stdout))
}

#[test]
fn every_command_that_talks_to_a_coordinator_can_print_json() {
    let coordinator = Coordinator::start();
    let dir = coordinator.dir().join("checkpoints").display().to_string();
    let endless = [
        "--min",
        "1",
        "--step-ms",
        "2",
        "--steps",
        "1000000",
        "--checkpoints",
        &dir,
        "--checkpoint-every",
        "1000000",
    ];
    let mut workers = ["a", "b", "c", "d"].map(|name| coordinator.worker("job", name, &endless));
    coordinator.runs_with("job", 4);
    let done = serde_json::json!({ "done": true });

    assert_eq!(json(&coordinator, &["status"])[0]["job"], "job");
    assert_eq!(json(&coordinator, &["status", "job"])["members"].as_array().unwrap().len(), 4);
    assert_eq!(json(&coordinator, &["history", "job"])[0]["generation"], 1);
    assert_eq!(json(&coordinator, &["checkpoints", "job"]), serde_json::json!([]));
    assert_eq!(json(&coordinator, &["save", "job"]), done);
    coordinator.has_checkpoint("job", 1);
    let written = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path().display().to_string();
    let listed = json(&coordinator, &["checkpoints", "--dir", &written]);
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed[0]["condition"], "complete", "{listed}");
    // One bit of it is enough to be found, and to be an error.
    let step = PathBuf::from(listed[0]["path"].as_str().unwrap());
    let files = std::fs::read_dir(&step).unwrap().map(|entry| entry.unwrap().path());
    let shard = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).min().unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let ran = coordinator.reknit(&["checkpoints", "--dir", &written]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stdout.contains("damaged") && has_hint(&ran.stderr), "{}{}", ran.stdout, ran.stderr);

    // A drain that is taken back at once may still have been asked for: nobody leaves.
    assert_eq!(json(&coordinator, &["drain", "job", "a"]), done);
    assert_eq!(json(&coordinator, &["undrain", "job", "a"]), done);
    assert_eq!(json(&coordinator, &["notice", "job", "b", "--in", "90s"]), done);
    assert!(workers[1].ended().success());
    assert_eq!(json(&coordinator, &["evict", "job", "c"]), done);
    assert!(!workers[2].ended().success());
    assert_eq!(json(&coordinator, &["resize", "job", "--min", "1", "--max", "1"]), done);
    coordinator.runs_with("job", 1);
    assert_eq!(json(&coordinator, &["close", "job"]), done);
    for worker in [0, 3] {
        workers[worker].ended();
    }
    assert_eq!(json(&coordinator, &["status", "job"])["closure"], "closed by an operator");
    let watched = coordinator.reknit(&["watch", "job"]);
    assert!(watched.code == 0 && watched.stdout.contains("closed by an operator"), "{watched:?}");
    assert_eq!(json(&coordinator, &["forget", "job"]), done);
    assert_eq!(json(&coordinator, &["status"]), serde_json::json!([]));

    let config = reknit(&["serve", "--print-config", "--json"]);
    let config: Value = serde_json::from_str(&config.stdout).unwrap();
    assert_eq!(config["silence_ms"], 3000);
}

#[test]
fn who_watches_sees_changes_and_ends_with_its_reader_or_the_coordinator() {
    let mut coordinator = Coordinator::start();
    let _worker = coordinator.worker("job", "a", &["--min", "1", "--step-ms", "2", "--steps", "1000000"]);
    coordinator.runs_with("job", 1);
    let watch = || {
        let mut command = Command::new(programs().join("reknit"));
        command.args(["watch", "job", "--json", "--coordinator", &coordinator.url()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (mut watched, mut short) = (watch(), watch());
    let mut lines = BufReader::new(watched.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let status: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(status["phase"], "running");
    }
    // `reknit watch | head -1`
    let mut first = String::new();
    BufReader::new(short.stdout.take().unwrap()).read_line(&mut first).unwrap();
    let ended =
        eventually("a watch without a reader to end", || short.try_wait().unwrap().ok_or(String::new()));
    assert!(ended.success(), "a reader that has gone away is no error");

    coordinator.kill();
    for line in lines {
        line.unwrap();
    }
    assert_eq!(watched.wait().unwrap().code(), Some(3), "it says that the coordinator is gone");
}

#[test]
fn data_that_cannot_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ran = Command::new(programs().join("reknit"))
        .args(["serve", "--print-config"])
        .stdout(full)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(1));
    assert!(has_hint(&String::from_utf8_lossy(&ran.stderr)), "{ran:?}");
}

#[test]
fn a_log_that_nobody_reads_any_more_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Command::new(programs().join("reknit"))
        .args(["serve", "--announce", "--listen", "127.0.0.1:0", "--store", "memory"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    // `reknit serve 2>&1 | tee log`, and tee is gone.
    drop(server.stderr.take());
    let url = format!("http://{}", address.trim());
    let worker = |name: &str| {
        Command::new(programs().join("reknit-digits"))
            .args(["--coordinator", &url, "--job", "job", "--name", name, "--steps", "40", "--step-ms", "20"])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    // Every join, world and loss is a line that cannot be written.
    let mut workers = [worker("a"), worker("b")];
    for worker in &mut workers {
        let ended = eventually("a worker to end", || worker.try_wait().unwrap().ok_or(String::new()));
        assert!(ended.success());
    }
    let status = reknit(&["status", "job", "--coordinator", &url]);
    assert!(status.stdout.contains("completed at step 40"), "{status:?}");
    server.kill().unwrap();
    server.wait().unwrap();
}
