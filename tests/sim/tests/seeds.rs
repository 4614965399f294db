//! Every rule holds over many seeds; a seed always tells the same story; and the seeds see what they are there for.

use std::process::Command;

use reknit_sim::options::Options;
use reknit_sim::run::run;
use reknit_sim::seeds::run_all;

/// How many seeds are run here. `.ci/run` runs ten times as many with the command.
const SEEDS: u64 = 1_000;

#[test]
fn every_rule_holds_and_everything_happens_over_many_seeds() {
    let outcome = run_all(0..SEEDS, None, false, |_| {});
    let found: Vec<String> = outcome.found.iter().map(ToString::to_string).collect();
    assert!(found.is_empty(), "{} of {SEEDS} seeds break a rule:\n{}", found.len(), found.join("\n"));
    let missing = outcome.coverage.missing();
    assert!(missing.is_empty(), "{SEEDS} seeds never saw: {missing:#?}");
}

#[test]
fn a_seed_tells_the_same_story_whether_or_not_it_is_written_down() {
    for seed in 0..20 {
        let [quiet, told, again] =
            [false, true, true].map(|keep_trace| run(Options::drawn(seed), keep_trace));
        assert_eq!((told.digest, &told.lines), (again.digest, &again.lines), "seed {seed}");
        assert_eq!(quiet.digest, told.digest, "seed {seed}");
        assert!(quiet.lines.is_empty() && !told.lines.is_empty(), "seed {seed}");
    }
}

#[test]
fn the_command_of_a_failing_seed_replays_it() {
    let outcome = run_all(0..50, Some(reknit_sim::mutants::Mutant::SwapsRanks), true, |_| {});
    let found = outcome.found[0].to_string();
    let arguments = found.split("-- ").nth(1).expect("a command line");
    let replayed =
        Command::new(env!("CARGO_BIN_EXE_reknit-sim")).args(arguments.split_whitespace()).output().unwrap();
    let said = String::from_utf8_lossy(&replayed.stdout);
    let violation = &outcome.found[0].violation;
    assert_eq!(replayed.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("broken: {} after {} ms", violation.invariant, violation.at)), "{said}");
}
