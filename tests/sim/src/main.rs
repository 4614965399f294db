//! The simulation's command.
#![allow(clippy::print_stdout)]

use clap::Parser;
use reknit_sim::coverage::Coverage;
use reknit_sim::mutants::Mutant;
use reknit_sim::options::Options;
use reknit_sim::run::run;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long)]
    trace: bool,
    #[arg(long, default_value = "0..100")]
    seeds: String,
    #[arg(long)]
    mutant: Option<Mutant>,
    #[arg(long)]
    keep_going: bool,
}

fn main() {
    let args = Args::parse();
    if let Some(seed) = args.seed {
        let options = Options::drawn(seed).with_mutant(args.mutant);
        println!("{options}");
        let report = run(options, args.trace);
        for line in &report.lines {
            println!("{line}");
        }
        println!(
            "{:?} {} ms, {} events, {} generations, {} steps",
            report.violation, report.virtual_ms, report.events, report.generations, report.steps
        );
        return;
    }
    let (a, b) = args.seeds.split_once("..").expect("A..B");
    let (a, b): (u64, u64) = (a.parse().expect("number"), b.parse().expect("number"));
    let mut coverage = Coverage::default();
    let began = std::time::Instant::now();
    let mut events = 0;
    let mut virt = 0;
    let mut bad: std::collections::BTreeMap<&str, Vec<u64>> = Default::default();
    for seed in a..b {
        let t = std::time::Instant::now();
        let report = run(Options::drawn(seed).with_mutant(args.mutant), false);
        if t.elapsed().as_millis() > 400 {
            println!("slow seed {seed}: {:?} {} events {} ms", t.elapsed(), report.events, report.virtual_ms);
        }
        coverage.add(&report.coverage);
        events += report.events;
        virt += report.virtual_ms;
        if let Some(v) = &report.violation {
            let mut what = v.what.clone();
            what.truncate(250);
            println!("seed {seed}: {} at {}: {what}", v.invariant, v.at);
            bad.entry(v.invariant).or_default().push(seed);
            if !args.keep_going {
                break;
            }
        }
    }
    println!("{:#?}", coverage.counts);
    println!("{:?}, {events} events, {virt} virtual ms", began.elapsed());
    for (k, v) in &bad {
        println!("{k}: {} {:?}", v.len(), &v[..v.len().min(12)]);
    }
}
