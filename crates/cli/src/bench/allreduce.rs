//! `reknit bench allreduce`: the TCP ring's times by size and number of ranks, each rank a process.
//!
//! Latencies stand beside one way of a message over loopback, of which a ring of n ranks needs 2(n-1) in a row; bus
//! bandwidths (2(n-1)/n of the size per rank, over the time) beside the rate of a single loopback stream.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Allreduce;
use super::limits;
use super::rank::Ring;
use super::result::{Figures, Row};
use super::stats::Spread;
use super::transport::Transport;

/// How many bytes all calls of one size move together, about, and how many calls there are at least and at most.
const BYTES_A_SIZE: u64 = 1 << 30;
const CALLS_MIN: u64 = 7;
const CALLS_MAX: u64 = 2_000;
/// How large the memories are between which the machine's own rates are measured.
const LIMIT_BYTES: usize = 256 << 20;
const LIMIT_TIMES: usize = 3;

#[derive(Debug, Serialize)]
pub(super) struct AllreduceFigures {
    /// One loopback stream between two memories, in bytes a second.
    stream_bytes_per_s: Spread,
    /// One core that copies memory.
    copy_bytes_per_s: Spread,
    /// One message to another process and back.
    round_trip_us: Spread,
    results: Vec<Timed>,
}

#[derive(Debug, Serialize)]
struct Timed {
    ranks: u32,
    bytes: u64,
    /// The median call of the slowest rank, and how its calls are spread.
    time_us: f64,
    spread_us: Spread,
    busbw_bytes_per_s: f64,
    /// Of the loopback stream's rate.
    of_stream: f64,
    /// How many times as long as 2(n-1) messages one after the other.
    of_latency: f64,
}

pub(super) fn allreduce(args: &Allreduce, dir: &Path) -> Result<AllreduceFigures> {
    let quick = args.common.quick;
    let limit_bytes = if quick { LIMIT_BYTES / 16 } else { LIMIT_BYTES };
    let (stream, copy, round_trip) = machine_limits(dir, limit_bytes)?;
    let mut results = Vec::new();
    for ranks in &args.ranks {
        let mut ring = Ring::form(dir, *ranks, Transport::Tcp)?;
        for bytes in &args.sizes {
            if quick && *bytes > 4 << 20 {
                continue;
            }
            let most = if quick { CALLS_MIN } else { CALLS_MAX };
            let calls = (BYTES_A_SIZE / (bytes * u64::from(*ranks))).clamp(CALLS_MIN, most);
            let by_rank = ring.sum((bytes / 4).max(1) as usize, calls as usize)?;
            results.push(timed(*ranks, *bytes, &by_rank, stream.p50, round_trip.p50)?);
        }
    }
    Ok(AllreduceFigures {
        stream_bytes_per_s: stream,
        copy_bytes_per_s: copy,
        round_trip_us: round_trip,
        results,
    })
}

/// The rate of a stream, the rate of a copy, and a round trip in microseconds.
fn machine_limits(dir: &Path, bytes: usize) -> Result<(Spread, Spread, Spread)> {
    let mut stream = limits::Stream::start(dir, bytes)?;
    let (from, mut to) = (vec![1; bytes], vec![2; bytes]);
    let (mut rates, mut copies) = (Vec::new(), Vec::new());
    for _ in 0..LIMIT_TIMES {
        rates.push(stream.rate()?);
        copies.push(limits::copy_rate(&from, &mut to));
    }
    let round_trips = limits::round_trips(dir, 1000)?.into_iter().map(|took| took.as_secs_f64() * 1e6);
    let missing = "the machine's limits were not measured";
    Ok((
        Spread::of(rates).context(missing)?,
        Spread::of(copies).context(missing)?,
        Spread::of(round_trips).context(missing)?,
    ))
}

fn timed(ranks: u32, bytes: u64, by_rank: &[Vec<u64>], stream: f64, round_trip_us: f64) -> Result<Timed> {
    let us = |times: &Vec<u64>| Spread::of(times.iter().map(|ns| *ns as f64 / 1e3));
    let slowest = by_rank.iter().filter_map(us).max_by(|a, b| a.p50.total_cmp(&b.p50));
    let spread_us = slowest.context("no rank was timed")?;
    let time_us = spread_us.p50;
    let n = f64::from(ranks);
    let busbw = 2.0 * (n - 1.0) / n * bytes as f64 / (time_us / 1e6);
    let latency_us = 2.0 * (n - 1.0) * round_trip_us / 2.0;
    Ok(Timed {
        ranks,
        bytes,
        time_us,
        spread_us,
        busbw_bytes_per_s: busbw,
        of_stream: busbw / stream,
        of_latency: time_us / latency_us,
    })
}

impl Figures for AllreduceFigures {
    const NAME: &'static str = "allreduce";

    fn rows(&self) -> Vec<Row> {
        let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
        let mut rows = vec![
            Row::new("one loopback stream", gb(self.stream_bytes_per_s.p50))
                .beside(format!("one core copies {}", gb(self.copy_bytes_per_s.p50))),
            Row::new("one round trip", format!("{:.1} µs", self.round_trip_us.p50)),
        ];
        for Timed { ranks, bytes, spread_us, busbw_bytes_per_s, of_stream, of_latency, .. } in &self.results {
            let Spread { p25, p50, p75, .. } = spread_us;
            let beside = if *bytes < 1 << 20 {
                format!("{of_latency:.1} × 2(n-1) messages in a row")
            } else {
                format!("busbw {}: {of_stream:.2} × one stream", gb(*busbw_bytes_per_s))
            };
            let what = format!("{ranks} ranks, {bytes} bytes");
            rows.push(Row::new(what, format!("{p50:.1} µs ({p25:.1} to {p75:.1})")).beside(beside));
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_rank_counts_and_the_bus_carries_2_n_minus_1_nths() {
        let by_rank = [vec![1_000_000; 3], vec![2_000_000; 3]];
        let timed = timed(2, 1_000_000, &by_rank, 1e9, 100.0).unwrap();
        assert_eq!((timed.time_us, timed.busbw_bytes_per_s), (2000.0, 5e8));
        assert_eq!((timed.of_stream, timed.of_latency), (0.5, 20.0));
    }
}
