//! From what the rounds measured to one figure for each line, world and size.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::numbers::NumberType;
use super::super::peers::{Algorithm, Sum};
use super::super::stats::Spread;
use super::bus_bytes;
use super::contender::{Contender, Line};

/// One row of the results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Timed {
    #[serde(rename = "impl")]
    implementation: &'static str,
    transport: &'static str,
    pub(super) world: u32,
    pub(super) bytes: u64,
    #[serde(rename = "type")]
    pub(super) number: NumberType,
    /// The median of the rounds'.
    pub(super) median_us: f64,
    /// What is summed, over the time.
    pub(super) algbw_gbs: f64,
    /// What a rank must send and receive, over the time.
    pub(super) busbw_gbs: f64,
    /// The quartiles of the rounds'.
    pub(super) p25_us: f64,
    pub(super) p75_us: f64,
    pub(super) rounds: usize,
    /// Which of Open MPI's was the best one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) algorithm: Option<&'static str>,
    /// The ring's streams alone would have taken so much of the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) of_streams: Option<f64>,
    #[serde(skip)]
    pub(super) line: Line,
}

impl Timed {
    pub(super) fn of(line: Line, world: u32, sum: Sum, spread_us: Spread) -> Timed {
        let (implementation, transport) = line.names();
        let Spread { n, p25, p50, p75, .. } = spread_us;
        let bytes = sum.bytes();
        Timed {
            implementation,
            transport,
            world,
            bytes,
            number: sum.number,
            median_us: p50,
            // Bytes in a microsecond are megabytes in a second.
            algbw_gbs: bytes as f64 / p50 / 1e3,
            busbw_gbs: bus_bytes(world, bytes) / p50 / 1e3,
            p25_us: p25,
            p75_us: p75,
            rounds: n,
            algorithm: None,
            of_streams: None,
            line,
        }
    }

    /// What must be the same for two to be compared.
    pub(super) fn cell(&self) -> (NumberType, u32, u64) {
        (self.number, self.world, self.bytes)
    }
}

/// The times in microseconds that the rounds have measured.
#[derive(Debug, Default)]
pub(super) struct Samples {
    times: BTreeMap<Cell, BTreeMap<Algorithm, Vec<f64>>>,
}

/// Whose times they are, and of what; in the order of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cell {
    number: NumberType,
    world: u32,
    sum: Sum,
    line: Line,
}

impl Samples {
    pub(super) fn add(&mut self, contender: Contender, world: u32, sum: Sum, time_us: f64) {
        let Contender { line, algorithm } = contender;
        let cell = Cell { number: sum.number, world, sum, line };
        let by_algorithm = self.times.entry(cell).or_default();
        by_algorithm.entry(algorithm).or_default().push(time_us);
    }

    /// A figure for each line, world and sum, by type, world and size: of several algorithms, the best one's. `ring_us` is
    /// what the streams of our ring take alone, for a world and a size.
    pub(super) fn timed(&self, ring_us: impl Fn(u32, u64) -> Option<f64>) -> Vec<Timed> {
        let timed = |(cell, by_algorithm): (&Cell, &BTreeMap<Algorithm, Vec<f64>>)| {
            let Cell { world, sum, line, .. } = *cell;
            let spreads =
                by_algorithm.iter().filter_map(|(a, times)| Some((*a, Spread::of(times.iter().copied())?)));
            let (algorithm, spread_us) = spreads.min_by(|(_, a), (_, b)| a.p50.total_cmp(&b.p50))?;
            let timed = Timed::of(line, world, sum, spread_us);
            let streams_us = if line.is_ours_over_tcp() { ring_us(world, sum.bytes()) } else { None };
            let of_streams = streams_us.map(|streams_us| streams_us / timed.median_us);
            let is_mpi = matches!(line, Line::Mpi(_));
            Some(Timed { algorithm: is_mpi.then_some(algorithm.name()), of_streams, ..timed })
        };
        self.times.iter().filter_map(timed).collect()
    }
}

/// How many times as fast ours is.
pub(super) fn ratio(ours: &Timed, theirs: &Timed) -> f64 {
    theirs.median_us / ours.median_us
}

#[cfg(test)]
mod tests {
    use super::super::super::peers::Wire;
    use super::super::super::transport::Transport;
    use super::*;

    #[test]
    fn the_middle_round_counts_and_of_several_algorithms_the_best_one() {
        let mut samples = Samples::default();
        let sum = Sum { number: NumberType::F32, elements: 1 << 18 };
        let mut add = |line, algorithm, times: [f64; 3]| {
            times.map(|time_us| samples.add(Contender { line, algorithm }, 4, sum, time_us))
        };
        add(Line::Mpi(Wire::Tcp), Algorithm::Default, [700.0, 500.0, 900.0]);
        add(Line::Mpi(Wire::Tcp), Algorithm::Ring, [400.0, 4000.0, 400.0]);
        add(Line::Reknit(Transport::Tcp), Algorithm::Default, [200.0, 100.0, 300.0]);
        let timed = samples.timed(|world, bytes| (world == 4 && bytes == 1 << 20).then_some(150.0));
        let [ours, theirs] = timed.as_slice() else { panic!("{timed:?}") };
        assert_eq!((ours.line, ours.median_us, ours.algorithm), (Line::Reknit(Transport::Tcp), 200.0, None));
        assert_eq!((ours.p25_us, ours.p75_us, ours.rounds), (100.0, 300.0, 3));
        assert_eq!((ours.of_streams, theirs.of_streams), (Some(0.75), None));
        assert_eq!((theirs.median_us, theirs.algorithm), (400.0, Some("ring")));
        assert_eq!(ours.algbw_gbs, 5.24288);
        assert!((ours.busbw_gbs / ours.algbw_gbs - 1.5).abs() < 1e-9);
        assert_eq!(ratio(ours, theirs), 2.0);
    }
}
