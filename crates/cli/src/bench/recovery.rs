//! `reknit bench recovery`: how long training stands still when a worker is killed, leaves or joins.
//!
//! Four workers do tiny steps with an all-reduce each. Again and again one of them, drawn by lot, is killed at an instant
//! drawn by lot; when the others train again, a replacement joins. Then workers leave in good order after a notice. The
//! instants come from the workers themselves, by the clock that all processes of the machine share, and what counts is
//! the worker that is last.
//!
//! Beside it stands the floor: what no implementation of this design on this machine can do without. A killed process
//! is seen to be gone by the end of its connection, three messages go to another process and back (the report and the
//! world, the answer and the barrier, one for the all-reduce), and the ranks that are left connect to a ring.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use reknit_membership::Timestamp;
use reknit_membership::record::WorldChange;
use serde::Serialize;

use super::args::Recovery;
use super::clock::{Mark, ms};
use super::fleet::{Fleet, Make};
use super::limits;
use super::random::Random;
use super::result::{Figures, Row, Target};
use super::stats::{Spread, median};

/// How long a world runs at least, and how much longer by lot, before the next thing happens.
const RUN_LEAST: Duration = Duration::from_millis(20);
const RUN_MORE: Duration = Duration::from_millis(60);
/// How often each part of the floor is measured, before and again after the rest.
const FLOOR_TIMES: usize = 20;

#[derive(Debug, Serialize)]
pub(super) struct RecoveryFigures {
    workers: u32,
    kills: u32,
    leaves: u32,
    seed: u64,
    /// From the kill to the first committed step of the new world, on the survivor that was last.
    loss_to_step_ms: Spread,
    floor_ms: f64,
    /// How many times the floor the median takes.
    ratio: f64,
    floor: Floor,
    /// Where the time goes, by the coordinator's clock; the medians.
    loss_parts_ms: Parts,
    /// How much longer the step takes at which the world changes by plan.
    planned_leave_stall_ms: Spread,
    join_stall_ms: Spread,
    /// Committed steps that had to be done again: for planned changes, and for kills.
    steps_lost: u64,
    steps_lost_by_kills: u64,
    /// Worlds that broke before they had done a step.
    extra_worlds: u64,
    median_step_ms: f64,
}

/// What cannot be done without.
#[derive(Debug, Serialize)]
struct Floor {
    exit_seen_ms: Spread,
    round_trip_ms: Spread,
    ring_connect_ms: Spread,
}

/// A recovery, cut at what the coordinator notes in its history.
#[derive(Debug, Serialize)]
struct Parts {
    /// From the kill until the coordinator knew.
    detect: f64,
    /// Until the new world was saved.
    agree: f64,
    /// Until all members had built its ring.
    rebuild: f64,
    /// Until all had the state.
    restore: f64,
    /// Until the coordinator heard of the first step.
    first_step: f64,
}

/// What one change by plan came to.
struct Planned {
    stall: Duration,
    steps_lost: u64,
    extra_worlds: u64,
}

pub(super) fn recovery(args: &Recovery, dir: &Path) -> Result<RecoveryFigures> {
    let (kills, leaves) =
        if args.common.quick { (args.kills.min(3), args.leaves.min(2)) } else { (args.kills, args.leaves) };
    let survivors = args.workers as usize - 1;
    let mut floor = FloorTimes::default();
    floor.measure(dir, survivors)?;
    let make = Make {
        workers: args.workers,
        most: args.workers,
        state_bytes: 4096,
        summed: 256,
        step: Duration::ZERO,
    };
    let mut run = Run { fleet: Fleet::start(dir, make)?, random: Random::new(args.seed) };

    let (mut losses, mut joins, mut steps, mut lost_by_kills, mut extra_worlds) =
        (Vec::new(), Vec::new(), Vec::new(), 0, 0);
    let mut parts = PartsTimes::default();
    for _ in 0..kills {
        let loss = run.kill_one()?;
        losses.push(ms(loss.took));
        steps.push(ms(loss.median_step));
        parts.add(&loss)?;
        lost_by_kills += loss.steps_lost;
        extra_worlds += loss.extra_worlds;
        joins.push(run.let_one_join()?);
    }
    let mut leaving = Vec::new();
    for _ in 0..leaves {
        leaving.push(run.let_one_leave()?);
        joins.push(run.let_one_join()?);
    }
    drop(run);
    floor.measure(dir, survivors)?;

    let floor = floor.spread()?;
    let floor_ms = floor.exit_seen_ms.p50 + 3.0 * floor.round_trip_ms.p50 + floor.ring_connect_ms.p50;
    let loss_to_step_ms = Spread::of(losses).context("nobody was killed")?;
    let planned = || leaving.iter().chain(&joins);
    Ok(RecoveryFigures {
        workers: args.workers,
        kills,
        leaves,
        seed: args.seed,
        loss_to_step_ms,
        floor_ms,
        ratio: loss_to_step_ms.p50 / floor_ms,
        floor,
        loss_parts_ms: parts.medians()?,
        planned_leave_stall_ms: stalls(&leaving)?,
        join_stall_ms: stalls(&joins)?,
        steps_lost: planned().map(|planned| planned.steps_lost).sum(),
        steps_lost_by_kills: lost_by_kills,
        extra_worlds: extra_worlds + planned().map(|planned| planned.extra_worlds).sum::<u64>(),
        median_step_ms: median(steps).context("no steps were done")?,
    })
}

fn stalls(planned: &[Planned]) -> Result<Spread> {
    Spread::of(planned.iter().map(|planned| ms(planned.stall))).context("nothing happened by plan")
}

/// A fleet, and the lot.
struct Run {
    fleet: Fleet,
    random: Random,
}

/// What one kill came to.
struct Loss {
    took: Duration,
    median_step: Duration,
    steps_lost: u64,
    extra_worlds: u64,
    /// The kill, by the wall clock, and what the coordinator noted of what followed.
    killed: Timestamp,
    change: WorldChange,
}

impl Run {
    fn run_a_while(&mut self) -> Result<()> {
        let more = Duration::from_micros(self.random.below(RUN_MORE.as_micros() as u64));
        self.fleet.run_until(Instant::now() + RUN_LEAST + more)
    }

    fn kill_one(&mut self) -> Result<Loss> {
        let victim = self.random.one_of(&self.fleet.live()).context("nobody is left to kill")?;
        self.run_a_while()?;
        let (killed, at) = (wall_clock(), Mark::now());
        self.fleet.kill(victim)?;
        let passage = self.fleet.pass()?;
        let by_victim = self.fleet.bury(victim)?;
        Ok(Loss {
            took: passage.last_step_at().context("no step was done")?.since(at),
            median_step: passage.median_step().unwrap_or_default(),
            steps_lost: passage.steps_lost(Some(by_victim)),
            extra_worlds: passage.worlds() - 1,
            killed,
            change: self.fleet.history()?.pop().context("a coordinator without a history")?,
        })
    }

    fn let_one_join(&mut self) -> Result<Planned> {
        self.run_a_while()?;
        self.fleet.launch()?;
        let passage = self.fleet.pass()?;
        let stall = passage.stall().context("nobody was there before")?;
        Ok(Planned { stall, steps_lost: passage.steps_lost(None), extra_worlds: passage.worlds() - 1 })
    }

    fn let_one_leave(&mut self) -> Result<Planned> {
        let leaver = self.random.one_of(&self.fleet.live()).context("nobody is left to leave")?;
        self.run_a_while()?;
        self.fleet.give_notice(leaver)?;
        let passage = self.fleet.pass()?;
        let stall = passage.stall().context("nobody was there before")?;
        let by_leaver = self.fleet.see_off(leaver)?;
        Ok(Planned {
            stall,
            steps_lost: passage.steps_lost(Some(by_leaver)),
            extra_worlds: passage.worlds() - 1,
        })
    }
}

fn wall_clock() -> Timestamp {
    Timestamp::default().after(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

#[derive(Default)]
struct FloorTimes {
    exits: Vec<f64>,
    round_trips: Vec<f64>,
    connects: Vec<f64>,
}

impl FloorTimes {
    fn measure(&mut self, logs: &Path, ranks: usize) -> Result<()> {
        for _ in 0..FLOOR_TIMES {
            self.exits.push(ms(limits::exit_seen(logs)?));
            self.connects.push(ms(limits::ring_connect(ranks)?));
        }
        self.round_trips.extend(limits::round_trips(logs, 50 * FLOOR_TIMES)?.into_iter().map(ms));
        Ok(())
    }

    fn spread(self) -> Result<Floor> {
        let spread = |values: Vec<f64>| Spread::of(values).context("the floor was not measured");
        Ok(Floor {
            exit_seen_ms: spread(self.exits)?,
            round_trip_ms: spread(self.round_trips)?,
            ring_connect_ms: spread(self.connects)?,
        })
    }
}

#[derive(Default)]
struct PartsTimes([Vec<f64>; 5]);

impl PartsTimes {
    fn add(&mut self, loss: &Loss) -> Result<()> {
        let WorldChange { learned, agreed, rebuilt, restored, first_step, .. } = loss.change;
        let instants = [Some(loss.killed), Some(learned), agreed, rebuilt, restored, first_step];
        // The coordinator may not have heard of the first step yet.
        for ((times, from), to) in self.0.iter_mut().zip(instants).zip(&instants[1..]) {
            if let (Some(from), Some(to)) = (from, *to) {
                times.push(ms(to.since(from)));
            }
        }
        Ok(())
    }

    fn medians(self) -> Result<Parts> {
        let [detect, agree, rebuild, restore, first_step] =
            self.0.map(|times| median(times).context("the coordinator noted nothing"));
        Ok(Parts {
            detect: detect?,
            agree: agree?,
            rebuild: rebuild?,
            restore: restore?,
            first_step: first_step?,
        })
    }
}

impl Figures for RecoveryFigures {
    const NAME: &'static str = "recovery";

    fn rows(&self) -> Vec<Row> {
        let spread =
            |s: &Spread| format!("p50 {:.1}  p99 {:.1}  max {:.1} ms (n={})", s.p50, s.p99, s.max, s.n);
        let at_most = |limit, measured| Target::AtMost { limit, measured };
        let Parts { detect, agree, rebuild, restore, first_step } = self.loss_parts_ms;
        let Floor { exit_seen_ms, round_trip_ms, ring_connect_ms } = &self.floor;
        let loss = &self.loss_to_step_ms;
        vec![
            Row::new("loss to step, p50", spread(loss))
                .beside(format!("floor {:.2} ms: {:.1} ×", self.floor_ms, self.ratio))
                .target(at_most(25.0, loss.p50)),
            Row::new("loss to step, p99", format!("{:.1} ms", loss.p99)).target(at_most(150.0, loss.p99)),
            Row::new(
                "  its parts",
                format!(
                    "detect {detect:.1}, agree {agree:.1}, rebuild {rebuild:.1}, restore {restore:.1}, \
                     first step {first_step:.1} ms"
                ),
            ),
            Row::new(
                "  the floor's",
                format!(
                    "exit seen {:.2}, 3 round trips of {:.3}, ring connect {:.2} ms",
                    exit_seen_ms.p50, round_trip_ms.p50, ring_connect_ms.p50
                ),
            ),
            Row::new("planned leave, stall", spread(&self.planned_leave_stall_ms))
                .beside(format!("a step: {:.2} ms", self.median_step_ms))
                .target(at_most(15.0, self.planned_leave_stall_ms.p50)),
            Row::new("join, stall", spread(&self.join_stall_ms))
                .target(at_most(15.0, self.join_stall_ms.p50)),
            Row::new("steps lost by plan", self.steps_lost.to_string())
                .beside(format!(
                    "by kills: {}; extra worlds: {}",
                    self.steps_lost_by_kills, self.extra_worlds
                ))
                .target(at_most(0.0, self.steps_lost as f64)),
        ]
    }
}
