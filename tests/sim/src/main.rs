//! Looks for seeds that break a rule, and replays them.

#![allow(clippy::print_stdout, reason = "what was found is this command's output")]

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use reknit_sim::mutants::Mutant;
use reknit_sim::options::Options;
use reknit_sim::run::run;
use reknit_sim::seeds::run_all;

/// The whole system under virtual time: looks for seeds that break a rule, and replays them
#[derive(Parser)]
struct Args {
    /// Run this seed alone
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Show all that happens in it
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Run these seeds, the last one excluded
    #[arg(long, value_parser = range, default_value = "0..1000")]
    seeds: Range<u64>,
    /// Go on after a seed that breaks a rule
    #[arg(long)]
    keep_going: bool,
    /// Break this rule on purpose
    #[arg(long)]
    mutant: Option<Mutant>,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let parsed = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    parsed.ok_or_else(|| "two numbers and two dots between them, like 0..1000".to_owned())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let holds = match args.seed {
        Some(seed) => replay(seed, args.mutant, args.trace),
        None => search(args.seeds, args.mutant, args.keep_going),
    };
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn replay(seed: u64, mutant: Option<Mutant>, trace: bool) -> bool {
    let options = Options::drawn(seed).with_mutant(mutant);
    println!("{options}");
    let report = run(options, trace);
    report.lines.iter().for_each(|line| println!("{line}"));
    println!(
        "{} ms of virtual time, {} things happened, {} generations, {} steps; fingerprint {:016x}",
        report.virtual_ms, report.events, report.generations, report.steps, report.digest
    );
    match &report.violation {
        Some(violation) => {
            println!("broken: {} after {} ms: {}", violation.invariant, violation.at, violation.what)
        }
        None => println!("every rule holds"),
    }
    report.violation.is_none()
}

fn search(seeds: Range<u64>, mutant: Option<Mutant>, keep_going: bool) -> bool {
    let began = Instant::now();
    let outcome = run_all(seeds, mutant, !keep_going, |found| println!("{found}"));
    for (what, count) in &outcome.coverage.counts {
        println!("{count:>10}  {what}");
    }
    println!(
        "{} seeds in {:.1} s: {} hours of virtual time, {} things happened; {} seeds break a rule",
        outcome.runs,
        began.elapsed().as_secs_f64(),
        outcome.virtual_ms / 3_600_000,
        outcome.events,
        outcome.found.len()
    );
    outcome.found.is_empty()
}
