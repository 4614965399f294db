//! Many seeds, on as many threads as there are cores.

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use clap::ValueEnum;

use crate::coverage::Coverage;
use crate::mutants::Mutant;
use crate::options::Options;
use crate::queue::Ms;
use crate::run::run;
use crate::sim::Violation;

/// A seed that breaks a rule. It shows the command that replays it.
#[derive(Debug, Clone)]
pub struct Found {
    /// Which.
    pub seed: u64,
    /// The rule that was broken on purpose, if one was.
    pub mutant: Option<Mutant>,
    /// The rule that does not hold.
    pub violation: Violation,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { invariant, what, at } = &self.violation;
        writeln!(f, "seed {} breaks {invariant} after {at} ms: {what}", self.seed)?;
        write!(f, "  replay: cargo run --release -p reknit-sim -- --trace --seed {}", self.seed)?;
        match self.mutant.and_then(|mutant| mutant.to_possible_value()) {
            Some(mutant) => write!(f, " --mutant {}", mutant.get_name()),
            None => Ok(()),
        }
    }
}

/// What became of all of them.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many were run.
    pub runs: u64,
    /// Those that break a rule, in order.
    pub found: Vec<Found>,
    /// What happened at least once.
    pub coverage: Coverage,
    /// How much happened.
    pub events: u64,
    /// How long it took in virtual time.
    pub virtual_ms: Ms,
}

/// Runs all of them, or until one breaks a rule if `stops`; `shows` is called with each that does.
pub fn run_all(
    seeds: Range<u64>,
    mutant: Option<Mutant>,
    stops: bool,
    shows: impl Fn(&Found) + Sync,
) -> Outcome {
    let next = AtomicU64::new(seeds.start);
    let over = AtomicBool::new(false);
    let outcome = Mutex::new(Outcome::default());
    let work = || {
        while !over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let report = run(Options::drawn(seed).with_mutant(mutant), false);
            let mut outcome = outcome.lock().expect("nobody panics while holding it");
            outcome.runs += 1;
            outcome.coverage.add(&report.coverage);
            outcome.events += report.events;
            outcome.virtual_ms += report.virtual_ms;
            if let Some(violation) = report.violation {
                let found = Found { seed, mutant, violation };
                shows(&found);
                outcome.found.push(found);
                over.store(stops, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (0..cores).for_each(|_| {
            scope.spawn(work);
        });
    });
    let mut outcome = outcome.into_inner().expect("nobody panicked while holding it");
    outcome.found.sort_by_key(|found| found.seed);
    outcome
}
