//! `reknit bench collectives`: all-reduces by size, world, type and transport, beside what the machine allows and, with
//! `--peers`, beside Gloo and Open MPI.
//!
//! ```text
//!   a round:  limits ─► for each world: streams alone ─► each contender in turn, all sizes of it
//!                                                          ├─ reknit, by each transport     (rank: our processes)
//!   the next round begins with another one                 ├─ Gloo                          (peers/gloo.py)
//!                                                          └─ Open MPI, each algorithm      (peers/mpi.c)
//! ```
//! All are timed alike: in place, every rank a process, back-to-back calls after a first one whose sum is looked at and
//! some more to warm up; each rank's median, and of these the slowest rank's. A figure is the median of the rounds', and
//! Open MPI's is that of its best algorithm for the size.

mod contender;
mod limits;
mod plot;
mod streams;
mod table;
mod targets;
mod timed;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Collectives;
use super::numbers::NumberType;
use super::peers::{Peers, Sum, Task};
use super::rank::{Budget, Compared, Ring};
use super::result::{Figures, Output, Row};
use super::stats::Spread;
use super::transport::Transport;
use super::word::WordFigures;
use crate::print;
use contender::{Contender, Line};
use limits::{Limits, Measured};
use timed::{Samples, Timed};

pub(super) use streams::play as play_mover;

/// For how long one contender sums numbers of one size in one round.
const BUDGET: Budget = Budget { time_ms: 200, calls_min: 5, calls_max: 20_000 };
const QUICK_BUDGET: Budget = Budget { time_ms: 10, calls_min: 3, calls_max: 200 };
/// The largest size of a quick run.
const QUICK_BYTES: u64 = 1 << 20;
/// From what size on an all-reduce is a matter of streams.
const STREAM_BYTES: u64 = 1 << 20;
/// How large groups are formed to see how long that takes, and how often in one round.
const FORMED_WORLDS: [u32; 2] = [4, 64];
const FORMINGS: usize = 3;
/// What is summed with the control word and without, and how often in one round.
const WORD_BYTES: u64 = 1 << 20;
const WORD_PAIRS: usize = 400;
const QUICK_WORD_PAIRS: usize = 20;

#[derive(Debug, Serialize)]
pub(super) struct CollectivesFigures {
    rounds: u32,
    rows: Vec<Timed>,
    limits: Limits,
    /// How long groups take to form, between processes that are there.
    forming: Vec<Forming>,
    /// An all-reduce with the control word and without.
    overhead_of_elasticity: Vec<Overhead>,
    /// The versions of what it is compared with.
    peers: BTreeMap<&'static str, String>,
}

#[derive(Debug, Serialize)]
struct Forming {
    transport: Transport,
    world: u32,
    ms: Spread,
}

#[derive(Debug, Serialize)]
struct Overhead {
    transport: Transport,
    #[serde(flatten)]
    word: WordFigures,
}

/// How many bytes each rank must send, and receive, for an all-reduce of so many.
fn bus_bytes(world: u32, bytes: u64) -> f64 {
    let n = f64::from(world);
    2.0 * (n - 1.0) / n * bytes as f64
}

pub(super) fn collectives(
    args: &Collectives,
    peers: Option<&Peers>,
    dir: &Path,
) -> Result<CollectivesFigures> {
    let plot = args.plot.as_deref().map(Output::open).transpose()?;
    if let Some(peers) = peers {
        peers.mpi.compile(dir)?;
    }
    let run = Run::of(args, peers, dir);
    let figures = run.figures()?;
    if let Some(plot) = plot {
        plot.write(&plot::svg(&figures.rows))?;
    }
    Ok(figures)
}

/// What is measured.
struct Run<'a> {
    worlds: Vec<u32>,
    sums: Vec<Sum>,
    contenders: Vec<Contender>,
    rounds: u32,
    budget: Budget,
    word_pairs: usize,
    quick: bool,
    peers: Option<&'a Peers>,
    dir: &'a Path,
}

impl<'a> Run<'a> {
    fn of(args: &Collectives, peers: Option<&'a Peers>, dir: &'a Path) -> Run<'a> {
        let quick = args.common.quick;
        Run {
            worlds: BTreeSet::from_iter(args.worlds.iter().copied()).into_iter().collect(),
            sums: sums(&args.types, &args.sizes, if quick { QUICK_BYTES } else { u64::MAX }),
            contenders: contender::all(&args.transports, peers.is_some()),
            rounds: if quick { 1 } else { args.rounds },
            budget: if quick { QUICK_BUDGET } else { BUDGET },
            word_pairs: if quick { QUICK_WORD_PAIRS } else { WORD_PAIRS },
            quick,
            peers,
            dir,
        }
    }

    fn figures(&self) -> Result<CollectivesFigures> {
        let (mut samples, mut measured) = (Samples::default(), Measured::default());
        let mut compared: BTreeMap<(u32, Transport), Compared> = BTreeMap::new();
        let mut formed: BTreeMap<(u32, Transport), Vec<f64>> = BTreeMap::new();
        for round in 0..self.rounds {
            if self.rounds > 1 {
                print::talk(format_args!("round {} of {}", round + 1, self.rounds));
            }
            measured.measure(self.dir, self.quick)?;
            for (world, transport) in self.formings() {
                let times = formed.entry((world, transport)).or_default();
                for _ in 0..FORMINGS {
                    times.push(Ring::form(self.dir, world, transport)?.formed_in().as_secs_f64() * 1e3);
                }
            }
            for world in &self.worlds {
                measured.measure_ring(self.dir, *world, &self.stream_sizes(), self.budget)?;
                for contender in contender::in_turn(&self.contenders, round, self.rounds) {
                    let sums: Vec<Sum> =
                        self.sums.iter().copied().filter(|sum| contender.has(sum.number)).collect();
                    let task = Task { world: *world, sums: &sums, budget: self.budget, dir: self.dir };
                    let times = match contender.line {
                        Line::Reknit(transport) => {
                            let (times, word) = self.reknit(&task, transport)?;
                            if let Some(word) = word {
                                let all = compared.entry((*world, transport)).or_default();
                                all.with.extend(word.with);
                                all.without.extend(word.without);
                            }
                            times
                        }
                        Line::Gloo => self.peers()?.gloo.time(&task)?,
                        Line::Mpi(wire) => self.peers()?.mpi.time(&task, wire, contender.algorithm)?,
                    };
                    for (sum, time_us) in sums.iter().zip(times) {
                        samples.add(contender, *world, *sum, time_us);
                    }
                }
            }
        }
        let limits = measured.limits()?;
        let overhead = |((world, transport), compared): ((u32, Transport), Compared)| {
            Ok(Overhead { transport, word: WordFigures::of(world, WORD_BYTES, &compared)? })
        };
        let forming = |((world, transport), times): ((u32, Transport), Vec<f64>)| {
            let ms = Spread::of(times).context("no group was formed")?;
            Ok(Forming { transport, world, ms })
        };
        let version = |peers: &Peers| {
            [("gloo", format!("PyTorch {}", peers.gloo.version)), ("mpi", peers.mpi.version.clone())]
        };
        Ok(CollectivesFigures {
            rounds: self.rounds,
            rows: samples.timed(|world, bytes| limits.ring_us(world, bytes)),
            limits,
            forming: formed.into_iter().map(forming).collect::<Result<_>>()?,
            overhead_of_elasticity: compared.into_iter().map(overhead).collect::<Result<_>>()?,
            peers: self.peers.map(version).into_iter().flatten().collect(),
        })
    }

    fn peers(&self) -> Result<&Peers> {
        self.peers.context("a peer that was not asked for")
    }

    /// Which groups are formed to see how long that takes. A buffer comes later, and makes no difference.
    fn formings(&self) -> Vec<(u32, Transport)> {
        let transports = [Transport::Tcp, Transport::Shm];
        let asked =
            transports.into_iter().filter(|t| self.contenders.iter().any(|c| c.line == Line::Reknit(*t)));
        let worlds = if self.quick { &FORMED_WORLDS[..1] } else { &FORMED_WORLDS[..] };
        asked.flat_map(|transport| worlds.iter().map(move |world| (*world, transport))).collect()
    }

    /// The sizes at which our ring over TCP is compared with its streams alone.
    fn stream_sizes(&self) -> Vec<u64> {
        let over_tcp = self.contenders.iter().any(|c| c.line.is_ours_over_tcp());
        let sizes =
            self.sums.iter().map(|sum| sum.bytes()).filter(|bytes| over_tcp && *bytes >= STREAM_BYTES);
        BTreeSet::from_iter(sizes).into_iter().collect()
    }

    /// How long our sums take, in microseconds, and one with the control word and without. In shared memory the word is in
    /// what ranks look at anyway, and cannot be left out.
    fn reknit(&self, task: &Task<'_>, transport: Transport) -> Result<(Vec<f64>, Option<Compared>)> {
        let mut ring = Ring::form(self.dir, task.world, transport)?;
        let mut times = Vec::new();
        for Sum { number, elements } in task.sums {
            times.push(ring.time(*number, usize::try_from(*elements)?, task.budget)? / 1e3);
        }
        let elements = (WORD_BYTES / NumberType::F32.bytes()) as usize;
        let word = match transport {
            Transport::Tcp => Some(ring.compare(elements, self.word_pairs)?),
            Transport::TcpBuffer | Transport::Shm | Transport::ShmBuffer => None,
        };
        Ok((times, word))
    }
}

/// The sums of these types that are nearest to these sizes, none larger than `bytes_max`.
fn sums(types: &[NumberType], sizes: &[u64], bytes_max: u64) -> Vec<Sum> {
    let sum =
        |number: &NumberType, bytes: &u64| Sum { number: *number, elements: (bytes / number.bytes()).max(1) };
    let sums: BTreeSet<Sum> =
        types.iter().flat_map(|number| sizes.iter().map(move |bytes| sum(number, bytes))).collect();
    sums.into_iter().filter(|sum| sum.bytes() <= bytes_max).collect()
}

impl Figures for CollectivesFigures {
    const NAME: &'static str = "collectives";

    fn rows(&self) -> Vec<Row> {
        table::rows(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_as_many_whole_numbers_as_fit_and_at_least_one() {
        let sum = |number, elements| Sum { number, elements };
        assert_eq!(
            sums(&[NumberType::F64, NumberType::F32], &[4, 1030, 8, 1 << 21], 1 << 20),
            [
                sum(NumberType::F32, 1),
                sum(NumberType::F32, 2),
                sum(NumberType::F32, 257),
                sum(NumberType::F64, 1),
                sum(NumberType::F64, 128)
            ]
        );
    }

    #[test]
    fn the_bus_carries_2_n_minus_1_nths() {
        assert_eq!([bus_bytes(2, 100), bus_bytes(4, 100)], [100.0, 150.0]);
    }
}
