//! `reknit bench restore`: how fast a joiner gets its state from the others' memory.
//!
//! The holders train; a joiner with a state as large comes, gets it striped over all of them, every byte digested at
//! both ends, and leaves again by a SIGKILL; then the next one. What counts is the coordinator's own record: from the
//! instant at which every member had answered the world (the plan goes out) until every byte had arrived and was
//! verified. Beside it stands one plain loopback stream between two memories as large, measured between any two joiners,
//! while the holders' steps are slow and leave the machine alone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use reknit_membership::holding::Source;
use serde::Serialize;

use super::args::Restore;
use super::fleet::{Fleet, Make};
use super::limits;
use super::result::{Figures, Row, Target};
use super::stats::Spread;

/// How long the holders' steps take: long enough that they use next to nothing of the machine.
const STEP: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize)]
pub(super) struct RestoreFigures {
    bytes: u64,
    holders: u32,
    joiners: u32,
    restore_ms: Spread,
    restore_bytes_per_s: Spread,
    /// One loopback stream, in the same run.
    stream_bytes_per_s: Spread,
    /// Of the two medians.
    ratio: f64,
}

pub(super) fn restore(args: &Restore, dir: &Path) -> Result<RestoreFigures> {
    let (bytes, joiners) = if args.common.quick {
        (args.bytes.min(64 << 20), args.joiners.min(2))
    } else {
        (args.bytes, args.joiners)
    };
    let mut stream = limits::Stream::start(dir, usize::try_from(bytes)?)?;
    let make = Make {
        workers: args.holders,
        most: args.holders + 1,
        state_bytes: bytes,
        summed: (bytes / 4).min(1024) as usize,
        step: STEP,
    };
    let mut fleet = Fleet::start(dir, make)?;
    let (mut times, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..joiners {
        streams.push(stream.rate()?);
        times.push(join(&mut fleet)?.as_secs_f64());
        streams.push(stream.rate()?);
    }
    let rates = times.iter().map(|seconds| bytes as f64 / seconds);
    let missing = "nobody joined";
    let restore_bytes_per_s = Spread::of(rates).context(missing)?;
    let stream_bytes_per_s = Spread::of(streams).context(missing)?;
    Ok(RestoreFigures {
        bytes,
        holders: args.holders,
        joiners,
        restore_ms: Spread::of(times.iter().map(|seconds| seconds * 1e3)).context(missing)?,
        restore_bytes_per_s,
        stream_bytes_per_s,
        ratio: restore_bytes_per_s.p50 / stream_bytes_per_s.p50,
    })
}

/// Lets one worker join, get the state, and die; says how long getting it took.
fn join(fleet: &mut Fleet) -> Result<Duration> {
    let joiner = fleet.launch()?;
    fleet.pass()?;
    let change = fleet.history()?.pop().context("a coordinator without a history")?;
    anyhow::ensure!(
        change.source == Some(Source::Memory),
        "the state came from somewhere else than the holders"
    );
    let (from, to) =
        (change.rebuilt.context("no ring was built")?, change.restored.context("nothing was restored")?);
    fleet.kill(joiner)?;
    fleet.pass()?;
    fleet.bury(joiner)?;
    Ok(to.since(from))
}

impl Figures for RestoreFigures {
    const NAME: &'static str = "restore";

    fn rows(&self) -> Vec<Row> {
        let gb = |spread: &Spread| {
            let Spread { min, p50, max, .. } = spread.map(|rate| rate / 1e9);
            format!("{p50:.2} GB/s ({min:.2} to {max:.2})")
        };
        let Spread { n, p50, .. } = self.restore_ms;
        vec![
            Row::new(
                format!("{} bytes from {} holders", self.bytes, self.holders),
                format!("{p50:.1} ms: {} (n={n})", gb(&self.restore_bytes_per_s)),
            )
            .beside(format!("one loopback stream: {}", gb(&self.stream_bytes_per_s))),
            Row::new("  of the stream's rate", format!("{:.2}", self.ratio))
                .target(Target::AtLeast { limit: 0.7, measured: self.ratio }),
        ]
    }
}
