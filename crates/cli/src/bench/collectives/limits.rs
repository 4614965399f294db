//! The limits beside which the all-reduces stand, measured once in every round: rates in GB/s (10⁹ bytes a second), times
//! in microseconds.

use std::collections::BTreeMap;
use std::hint::{black_box, spin_loop};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use super::super::limits;
use super::super::rank::Budget;
use super::super::stats::{Spread, median};
use super::bus_bytes;
use super::streams::Streams;

/// Memory that fits no cache, and memory that fits a core's own.
const LARGE_BYTES: usize = 128 << 20;
const CACHED_BYTES: usize = 256 << 10;
/// Roughly how many bytes a second a stream moves, to tell how often it can be timed.
const GUESSED_RATE: f64 = 2e9;
/// How many bytes all passes over a memory move together, about.
const MOVED_BYTES: usize = 512 << 20;
/// How many bytes one stream moves between two looks at the clock.
const STREAM_BYTES: usize = 64 << 20;
const STREAM_TIMES: usize = 5;
const ROUND_TRIPS: usize = 2_000;
const PING_PONGS: u32 = 100_000;

/// What the machine allows. A number is the median over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Limits {
    /// One core copies memory that fits no cache, each of two cores does, and one copies in its cache.
    memcpy_gbs: f64,
    memcpy_each_of_two_gbs: f64,
    memcpy_cached_gbs: f64,
    /// The same for `a += b` of f32; bytes of one operand.
    add_gbs: f64,
    add_each_of_two_gbs: f64,
    add_cached_gbs: f64,
    /// One loopback stream between two processes.
    tcp_one_way_gbs: f64,
    /// Each way, when both go at once.
    tcp_both_ways_gbs: f64,
    /// A flag in shared memory from one core to another.
    shm_ping_pong_one_way_us: f64,
    /// 64 bytes to another process over loopback and back.
    tcp_round_trip_us: f64,
    /// What the ring's streams alone take for an all-reduce's bytes.
    tcp_ring: Vec<RingLimit>,
    /// How each is spread over the rounds.
    spread: BTreeMap<Limit, Spread>,
}

/// The bytes of an all-reduce, moved as its ring moves them and not summed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct RingLimit {
    world: u32,
    /// What would be summed.
    bytes: u64,
    median_us: f64,
    busbw_gbs: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Limit {
    MemcpyGbs,
    MemcpyEachOfTwoGbs,
    MemcpyCachedGbs,
    AddGbs,
    AddEachOfTwoGbs,
    AddCachedGbs,
    TcpOneWayGbs,
    TcpBothWaysGbs,
    ShmPingPongOneWayUs,
    TcpRoundTripUs,
}

/// What the rounds have measured so far.
#[derive(Debug, Default)]
pub(super) struct Measured {
    values: BTreeMap<Limit, Vec<f64>>,
    /// In microseconds, by world and bytes.
    rings: BTreeMap<(u32, u64), Vec<f64>>,
}

impl Measured {
    /// Measures everything once more.
    pub(super) fn measure(&mut self, logs: &Path, quick: bool) -> Result<()> {
        let part = if quick { 16 } else { 1 };
        let mut add = |limit, value| self.values.entry(limit).or_default().push(value);
        let large = LARGE_BYTES / part;
        for (work, one, two, cached) in [
            (copy as Work, Limit::MemcpyGbs, Limit::MemcpyEachOfTwoGbs, Limit::MemcpyCachedGbs),
            (sum as Work, Limit::AddGbs, Limit::AddEachOfTwoGbs, Limit::AddCachedGbs),
        ] {
            add(one, memory_rate(work, large, 1, MOVED_BYTES / part)?);
            add(two, memory_rate(work, large, 2, MOVED_BYTES / part)?);
            add(cached, memory_rate(work, CACHED_BYTES, 1, MOVED_BYTES / part)?);
        }
        let stream_bytes = STREAM_BYTES / part;
        let mut stream = limits::Stream::start(logs, stream_bytes)?;
        let rates: Vec<f64> = (0..STREAM_TIMES).map(|_| stream.rate()).collect::<Result<_>>()?;
        add(Limit::TcpOneWayGbs, median(rates).context("no stream was measured")? / 1e9);
        drop(stream);
        let both = Streams::start(logs, 2)?.time(stream_bytes, stream_bytes, STREAM_TIMES)?;
        add(Limit::TcpBothWaysGbs, stream_bytes as f64 / both);
        add(Limit::ShmPingPongOneWayUs, ping_pong_us(PING_PONGS / part as u32)?);
        let trips = limits::round_trips(logs, ROUND_TRIPS / part)?;
        let trip = median(trips.into_iter().map(|took| took.as_secs_f64() * 1e6));
        add(Limit::TcpRoundTripUs, trip.context("no round trip was measured")?);
        Ok(())
    }

    /// Measures what a ring's streams take for all-reduces of these sizes, once more.
    pub(super) fn measure_ring(
        &mut self,
        logs: &Path,
        world: u32,
        sizes: &[u64],
        budget: Budget,
    ) -> Result<()> {
        if sizes.is_empty() {
            return Ok(());
        }
        let mut streams = Streams::start(logs, world)?;
        for bytes in sizes {
            let moved = bus_bytes(world, *bytes);
            let guess = Duration::from_secs_f64(moved / GUESSED_RATE);
            let (span, times) = (usize::try_from(*bytes)?, usize::try_from(budget.calls(guess))?);
            let took = streams.time(moved as usize, span, times)?;
            self.rings.entry((world, *bytes)).or_default().push(took / 1e3);
        }
        Ok(())
    }

    pub(super) fn limits(&self) -> Result<Limits> {
        let spread: BTreeMap<Limit, Spread> = self
            .values
            .iter()
            .filter_map(|(limit, values)| Some((*limit, Spread::of(values.iter().copied())?)))
            .collect();
        let of = |limit| {
            let spread: &Spread =
                spread.get(&limit).with_context(|| format!("{limit:?} was not measured"))?;
            Ok::<f64, anyhow::Error>(spread.p50)
        };
        Ok(Limits {
            memcpy_gbs: of(Limit::MemcpyGbs)?,
            memcpy_each_of_two_gbs: of(Limit::MemcpyEachOfTwoGbs)?,
            memcpy_cached_gbs: of(Limit::MemcpyCachedGbs)?,
            add_gbs: of(Limit::AddGbs)?,
            add_each_of_two_gbs: of(Limit::AddEachOfTwoGbs)?,
            add_cached_gbs: of(Limit::AddCachedGbs)?,
            tcp_one_way_gbs: of(Limit::TcpOneWayGbs)?,
            tcp_both_ways_gbs: of(Limit::TcpBothWaysGbs)?,
            shm_ping_pong_one_way_us: of(Limit::ShmPingPongOneWayUs)?,
            tcp_round_trip_us: of(Limit::TcpRoundTripUs)?,
            tcp_ring: self.tcp_ring(),
            spread,
        })
    }
}

impl Measured {
    fn tcp_ring(&self) -> Vec<RingLimit> {
        let ring = |(&(world, bytes), times): (&(u32, u64), &Vec<f64>)| {
            let median_us = median(times.iter().copied())?;
            Some(RingLimit { world, bytes, median_us, busbw_gbs: bus_bytes(world, bytes) / median_us / 1e3 })
        };
        self.rings.iter().filter_map(ring).collect()
    }
}

impl Limits {
    /// What the streams of such a ring take, in microseconds, if that was measured.
    pub(super) fn ring_us(&self, world: u32, bytes: u64) -> Option<f64> {
        let ring = self.tcp_ring.iter().find(|ring| (ring.world, ring.bytes) == (world, bytes))?;
        Some(ring.median_us)
    }

    /// What, how much, and what else there is to say: for the table.
    pub(super) fn lines(&self) -> [[String; 3]; 4] {
        let gb = |rate: f64| format!("{rate:.1} GB/s");
        let memory = |what: &str, one, two, cached| {
            [what.to_owned(), gb(one), format!("{} each of two cores, {} cached", gb(two), gb(cached))]
        };
        let Limits { memcpy_gbs, memcpy_each_of_two_gbs, memcpy_cached_gbs, .. } = *self;
        let Limits { add_gbs, add_each_of_two_gbs, add_cached_gbs, .. } = *self;
        let Limits { tcp_one_way_gbs, tcp_both_ways_gbs, .. } = *self;
        let Limits { shm_ping_pong_one_way_us, tcp_round_trip_us, .. } = *self;
        [
            memory("one core copies", memcpy_gbs, memcpy_each_of_two_gbs, memcpy_cached_gbs),
            memory("one core adds f32", add_gbs, add_each_of_two_gbs, add_cached_gbs),
            [
                "one loopback stream".to_owned(),
                gb(tcp_one_way_gbs),
                format!("{} each way when both go at once", gb(tcp_both_ways_gbs)),
            ],
            [
                "a flag in shared memory, one way".to_owned(),
                format!("{shm_ping_pong_one_way_us:.3} µs"),
                format!("a loopback round trip takes {tcp_round_trip_us:.1} µs"),
            ],
        ]
    }
}

/// One pass over two memories.
type Work = fn(&[f32], &mut [f32]);

fn copy(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}

fn sum(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// The rate of the slowest of so many cores that pass over memories of their own at the same time.
fn memory_rate(work: Work, bytes: usize, cores: usize, moved: usize) -> Result<f64> {
    let passes = (moved / bytes).max(3);
    let start = Barrier::new(cores);
    let rate = || {
        let (from, mut to) = (vec![1f32; bytes / 4], vec![2f32; bytes / 4]);
        start.wait();
        let took = (0..passes).map(|_| {
            let began = Instant::now();
            work(black_box(&from), black_box(&mut to));
            began.elapsed().as_nanos() as f64
        });
        Some(bytes as f64 / median(took)?)
    };
    let rates: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(rate)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let rates = rates.into_iter().map(|rate| rate.ok().flatten()).collect::<Option<Vec<f64>>>();
    rates.and_then(|rates| rates.into_iter().min_by(f64::total_cmp)).context("no memory was passed over")
}

/// A flag that shares its cache line with nothing else.
#[derive(Default)]
#[repr(align(128))]
struct Flag(AtomicU32);

impl Flag {
    /// Waits for a value. With fewer cores than two the other side needs this one.
    fn wait_for(&self, value: u32) {
        const SPINS: u32 = 10_000;
        let mut spins = 0u32;
        while self.0.load(Ordering::Acquire) != value {
            spins += 1;
            if spins.is_multiple_of(SPINS) {
                std::thread::yield_now();
            }
            spin_loop();
        }
    }
}

/// One way of a flag between two threads: the caches do not know a thread's memory from a process's that is shared.
fn ping_pong_us(times: u32) -> Result<f64> {
    let (ping, pong) = (Flag::default(), Flag::default());
    let batch = (times / 100).max(1);
    let times = times / batch * batch;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            for time in 1..=times {
                ping.wait_for(time);
                pong.0.store(time, Ordering::Release);
            }
        });
        let mut took = Vec::new();
        let mut began = Instant::now();
        for time in 1..=times {
            ping.0.store(time, Ordering::Release);
            pong.wait_for(time);
            if time % batch == 0 {
                took.push(began.elapsed().as_secs_f64() * 1e6 / f64::from(batch) / 2.0);
                began = Instant::now();
            }
        }
        other.join().map_err(|_| anyhow!("the other side panicked"))?;
        median(took).context("no flag was passed")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_pass_and_memory_moves() {
        assert!(ping_pong_us(200).unwrap() > 0.0);
        for work in [copy as Work, sum as Work] {
            assert!(memory_rate(work, 4096, 2, 8192).unwrap() > 0.0);
        }
    }

    #[test]
    fn a_limit_that_was_not_measured_is_an_error() {
        assert!(Measured::default().limits().is_err());
    }
}
