//! The command line as an operator types it: what is said, where, and with which exit code.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use reknit_e2e::{Coordinator, reknit};

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
    assert!(config.stdout.contains("silence                 1.5s"), "{}", config.stdout);
    let completions = reknit(&["completions", "bash"]);
    assert!(completions.stdout.contains("_reknit"), "a completion script");
    assert_eq!(reknit(&["serve", "--silence", "1ms"]).code, 2);
}
