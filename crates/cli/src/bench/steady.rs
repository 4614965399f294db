//! `reknit bench steady`: what a world costs while nothing happens to it.
//!
//! *Nothing per step*: the coordinator counts what it receives, by kind. While the workers do many steps, only renewals
//! rise, and those by time: as many as the leases need, however fast the steps are.
//!
//! *The control word*: the same all-reduce, with the word in its stream and without: see `word`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::args::Steady;
use super::fleet::{Fleet, Make};
use super::rank::Ring;
use super::result::{Figures, Row, Target};
use super::stats::Spread;
use super::transport::Transport;
use super::word::WordFigures;

#[derive(Debug, Serialize)]
pub(super) struct SteadyFigures {
    workers: u32,
    steps: u64,
    steps_per_second: f64,
    /// What the coordinator received meanwhile, by kind.
    received: BTreeMap<String, u64>,
    /// Without renewals, which go by time.
    received_per_step: f64,
    renewals_per_second: f64,
    sent: u64,
    saves: u64,
    word: WordFigures,
    /// How much longer the all-reduce takes because of the word, in percent.
    word_cost_percent: f64,
}

pub(super) fn steady(args: &Steady, dir: &Path) -> Result<SteadyFigures> {
    let (steps, pairs) =
        if args.common.quick { (args.steps.min(500), args.pairs.min(40)) } else { (args.steps, args.pairs) };
    let make = Make {
        workers: args.workers,
        most: args.workers,
        state_bytes: 4096,
        summed: 256,
        step: Duration::ZERO,
    };
    let mut fleet = Fleet::start(dir, make)?;
    // The first steps are reported, so they are not among those that are counted.
    fleet.run_steps(10)?;
    let before = fleet.counts()?;
    let took = fleet.run_steps(steps)?.as_secs_f64();
    let after = fleet.counts()?;
    drop(fleet);
    let received = risen(&before.received.into_iter().collect(), &after.received.into_iter().collect());
    let renewals = received.get("renew").copied().unwrap_or_default();
    let others = received.values().sum::<u64>() - renewals;

    let mut ring = Ring::form(dir, args.workers, Transport::Tcp)?;
    let compared = ring.compare((args.bytes / 4).max(1) as usize, pairs as usize)?;
    let word = WordFigures::of(args.workers, args.bytes, &compared)?;
    Ok(SteadyFigures {
        workers: args.workers,
        steps,
        steps_per_second: steps as f64 / took,
        received,
        received_per_step: others as f64 / steps as f64,
        renewals_per_second: renewals as f64 / took,
        sent: after.sent - before.sent,
        saves: after.saves - before.saves,
        word_cost_percent: word.cost_percent.p50,
        word,
    })
}

/// By how much each count has risen.
fn risen(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let rise =
        |(kind, count): (&String, &u64)| (kind.clone(), count - before.get(kind).copied().unwrap_or(0));
    after.iter().map(rise).collect()
}

impl Figures for SteadyFigures {
    const NAME: &'static str = "steady";

    fn rows(&self) -> Vec<Row> {
        let at_most = |limit, measured| Target::AtMost { limit, measured };
        let kinds: Vec<String> =
            self.received.iter().filter(|(_, n)| **n > 0).map(|(kind, n)| format!("{n} × {kind}")).collect();
        let kinds = if kinds.is_empty() { "nothing".to_owned() } else { kinds.join(", ") };
        let WordFigures { ranks, bytes, with_us, without_us, cost_percent, .. } = &self.word;
        let Spread { n, p25, p50, p75, .. } = cost_percent;
        vec![
            Row::new(format!("received during {} steps", self.steps), kinds).beside(format!(
                "{:.0} steps/s, {:.1} renewals/s; sent {}, saved {}",
                self.steps_per_second, self.renewals_per_second, self.sent, self.saves
            )),
            Row::new("received per step, without renewals", format!("{}", self.received_per_step))
                .target(at_most(0.0, self.received_per_step)),
            Row::new(
                format!("control word, {bytes} bytes, {ranks} ranks"),
                format!("{p50:+.2} % (quartiles {p25:+.2} to {p75:+.2} in {n} parts)"),
            )
            .beside(format!("{:.0} µs with, {:.0} µs without", with_us.p50, without_us.p50))
            .target(at_most(1.0, *p50)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_rise_by_kind() {
        let counts = |pairs: &[(&str, u64)]| pairs.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect();
        let before: BTreeMap<String, u64> = counts(&[("renew", 3), ("join", 4)]);
        let after = counts(&[("renew", 10), ("join", 4), ("ready", 2)]);
        assert_eq!(risen(&before, &after), counts(&[("renew", 7), ("join", 0), ("ready", 2)]));
    }
}
