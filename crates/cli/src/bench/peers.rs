//! The libraries that an all-reduce is compared with, each run by a small program of its own kind that times its calls
//! the way the ranks time theirs.

mod gloo;
mod mpi;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ChildStdout;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;

use super::numbers::NumberType;
use super::rank::Budget;
use crate::failure::{Failure, Kind};

pub(super) use gloo::Gloo;
pub(super) use mpi::{Algorithm, Mpi, Wire};

/// How long a program may take to start, or for the calls of one size.
const PATIENCE: Duration = Duration::from_secs(300);

/// The libraries, found on this machine.
pub(super) struct Peers {
    pub(super) gloo: Gloo,
    pub(super) mpi: Mpi,
}

impl Peers {
    /// Both of them, or what is missing and how it is installed.
    pub(super) fn find(python: &Path) -> Result<Peers, Failure> {
        match (Gloo::find(python), Mpi::find()) {
            (Ok(gloo), Ok(mpi)) => Ok(Peers { gloo, mpi }),
            (gloo, mpi) => {
                let missing = [gloo.err(), mpi.err()];
                let (mut whats, mut hints) = (Vec::new(), Vec::new());
                for Missing { what, hint } in missing.into_iter().flatten() {
                    whats.push(what);
                    hints.push(hint);
                }
                let why = anyhow!("--peers wants what is not here: {}", whats.join("; "));
                Err(Failure::new(Kind::Failed, why, hints.join("; ")))
            }
        }
    }
}

/// A library that is not there.
#[derive(Debug)]
struct Missing {
    what: String,
    hint: String,
}

/// So many numbers of a type that are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sum {
    pub(super) number: NumberType,
    pub(super) elements: u64,
}

impl Sum {
    pub(super) fn bytes(self) -> u64 {
        self.elements * self.number.bytes()
    }
}

/// The sums that are to be timed, one after the other, by so many ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) world: u32,
    pub(super) sums: &'a [Sum],
    pub(super) budget: Budget,
    /// Where programs and logs are kept.
    pub(super) dir: &'a Path,
}

impl Task<'_> {
    /// The same for both programs: `BUDGET_MS CALLS_MIN CALLS_MAX TYPE:ELEMENTS...`.
    fn words(&self) -> Vec<String> {
        let Budget { time_ms, calls_min, calls_max } = self.budget;
        let sums = self.sums.iter().map(|sum| format!("{}:{}", sum.number.name(), sum.elements));
        [time_ms, calls_min, calls_max].iter().map(u64::to_string).chain(sums).collect()
    }
}

/// What a program says of one sum.
#[derive(Debug, Deserialize)]
struct Said {
    #[serde(rename = "type")]
    number: NumberType,
    elements: u64,
    median_us: f64,
}

/// A program's standard output, line by line.
struct Lines {
    lines: Receiver<String>,
    /// What the program says to people.
    log: PathBuf,
}

impl Lines {
    fn of(output: ChildStdout, log: PathBuf) -> Lines {
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Lines { lines, log }
    }

    /// The time of each sum in microseconds, in their order.
    fn times(&self, who: &str, sums: &[Sum]) -> Result<Vec<f64>> {
        sums.iter().map(|sum| self.time(who, *sum)).collect()
    }

    fn time(&self, who: &str, sum: Sum) -> Result<f64> {
        let line = self.lines.recv_timeout(PATIENCE).map_err(|_| {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().filter(|line| !line.trim().is_empty()).take(5).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            anyhow!("{who} has not summed {sum:?}: {}", last.join(" / "))
        })?;
        time_of(&line, sum).with_context(|| format!("{who} says {line:?}"))
    }
}

fn time_of(line: &str, sum: Sum) -> Result<f64> {
    let Said { number, elements, median_us } = serde_json::from_str(line)?;
    ensure!(Sum { number, elements } == sum, "it was to sum {sum:?}");
    ensure!(median_us.is_finite() && median_us > 0.0, "that is no time");
    Ok(median_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_must_be_about_the_sum_it_was_given() {
        let sum = Sum { number: NumberType::Bf16, elements: 3 };
        assert_eq!(sum.bytes(), 6);
        let of = |line| time_of(line, sum);
        assert_eq!(of(r#"{"type": "bf16", "elements": 3, "median_us": 1.5}"#).unwrap(), 1.5);
        for wrong in [
            r#"{"type": "f16", "elements": 3, "median_us": 1.5}"#,
            r#"{"type": "bf16", "elements": 4, "median_us": 1.5}"#,
            r#"{"type": "bf16", "elements": 3, "median_us": 0}"#,
            "Killed",
        ] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn both_programs_are_told_the_same() {
        let sums =
            [Sum { number: NumberType::F32, elements: 1 }, Sum { number: NumberType::U8, elements: 7 }];
        let budget = Budget { time_ms: 100, calls_min: 5, calls_max: 1000 };
        let task = Task { world: 2, sums: &sums, budget, dir: Path::new("/") };
        assert_eq!(task.words(), ["100", "5", "1000", "f32:1", "u8:7"]);
    }

    #[test]
    fn what_is_missing_is_named_with_how_to_install_it() {
        let Missing { what, hint } = Gloo::find(Path::new("/nowhere/python3")).err().unwrap();
        assert!(what.contains("/nowhere/python3") && hint.contains("pip install torch"), "{what}: {hint}");
    }
}
