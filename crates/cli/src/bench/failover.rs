//! `reknit bench failover`: how long nobody leads when the leading coordinator dies, and what training notices of it.
//!
//! Three coordinators on an etcd of three, four workers that train. Again and again the leader is killed at an instant
//! drawn by lot; the others are asked every few milliseconds whether they lead. One that was killed is started again a
//! good second later, as a follower. Then the leader is stopped several times instead: nothing of it ends then, and only
//! its lease says that it does not lead any more.
//!
//! Training has nothing to do with any of this. So the times of its steps in the second that follows a kill are compared
//! with those in the second before, in the same run: the slowest of a hundred with the slowest of a hundred.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde::Serialize;

use super::args::Failover;
use super::clock::{Mark, ms};
use super::company::{Company, Role};
use super::etcd::Etcd;
use super::random::Random;
use super::replicas::{Leader, Replicas};
use super::result::{Figures, Row, Target};
use super::stats::Spread;
use super::worker::{Commit, WorkerSays, WorkerSetup, commits};

const JOB: &str = "bench";
/// How long a step takes at least: short, and yet not all of the processor.
const STEP: Duration = Duration::from_millis(2);
/// What follows a kill, and what comes before it.
const WINDOW: Duration = Duration::from_secs(1);
/// How much longer than that all is left in peace, and how much longer by lot.
const PEACE: Duration = Duration::from_millis(200);
const PEACE_MORE: Duration = Duration::from_millis(300);

#[derive(Debug, Serialize)]
pub(super) struct FailoverFigures {
    kills: u32,
    stops: u32,
    coordinators: u32,
    workers: u32,
    lease_ms: u64,
    seed: u64,
    /// From the kill until another coordinator answers that it leads.
    failover_ms: Spread,
    /// Until all members have their streams again.
    reattached_ms: Spread,
    generations_spent: u64,
    steps_lost: u64,
    /// The 99th percentile of step times in the second after a kill over that in the second before.
    step_time_ratio_p99: f64,
    step_after_kill_ms: Spread,
    step_undisturbed_ms: Spread,
    /// From the stop until another coordinator answers that it leads.
    stopped_failover_ms: Spread,
    stopped_reattached_ms: Spread,
}

pub(super) fn failover(args: &Failover, dir: &Path) -> Result<FailoverFigures> {
    let (kills, stops) =
        if args.common.quick { (args.kills.min(2), args.stops.min(1)) } else { (args.kills, args.stops) };
    let etcd = Etcd::start(dir)?;
    let mut run = Run::start(dir, args, &etcd.store())?;
    let (_, generation) = run.leader_of_all()?;
    let (mut killed, mut stopped) = (Vec::new(), Vec::new());
    for _ in 0..kills {
        killed.push(run.kill_leader()?);
    }
    for _ in 0..stops {
        stopped.push(run.stop_leader()?);
    }
    let (_, last_generation) = run.leader_of_all()?;
    let commits = run.commits()?;
    let at: Vec<Mark> = killed.iter().map(|change| change.at).collect();
    let after = step_times(&commits, &at, |step, kill| step.ends > kill && step.begins < kill.after(WINDOW));
    let undisturbed =
        step_times(&commits, &at, |step, kill| step.ends <= kill && step.begins.after(WINDOW) >= kill);
    let times = |of: &[Change], time: fn(&Change) -> Mark| {
        Spread::of(of.iter().map(|change| ms(time(change).since(change.at)))).context("nothing happened")
    };
    let (after, undisturbed) = (Spread::of(after), Spread::of(undisturbed));
    let (after, undisturbed) =
        (after.context("no steps were done")?, undisturbed.context("no steps were done")?);
    Ok(FailoverFigures {
        kills,
        stops,
        coordinators: args.coordinators,
        workers: args.workers,
        lease_ms: args.lease.as_millis() as u64,
        seed: args.seed,
        failover_ms: times(&killed, |change| change.led)?,
        reattached_ms: times(&killed, |change| change.reattached)?,
        generations_spent: last_generation - generation,
        steps_lost: steps_lost(&commits),
        step_time_ratio_p99: after.p99 / undisturbed.p99,
        step_after_kill_ms: after,
        step_undisturbed_ms: undisturbed,
        stopped_failover_ms: times(&stopped, |change| change.led)?,
        stopped_reattached_ms: times(&stopped, |change| change.reattached)?,
    })
}

/// A change of leader: when it was made necessary, when another one led, and when it had all members.
struct Change {
    at: Mark,
    led: Mark,
    reattached: Mark,
}

struct Run {
    replicas: Replicas,
    company: Company<WorkerSays>,
    commits: Vec<PathBuf>,
    leader: Leader,
    random: Random,
}

impl Run {
    fn start(dir: &Path, args: &Failover, store: &str) -> Result<Run> {
        let replicas = Replicas::start(dir, args.coordinators, store, args.lease)?;
        let (leader, _) = replicas.leader_after(0)?;
        let mut company = Company::new(Role::Worker, dir);
        let mut files = Vec::new();
        for number in 0..args.workers {
            let commits = dir.join(format!("worker-{number}.commits"));
            company.start(&WorkerSetup {
                coordinator: replicas.addresses(),
                job: JOB.to_owned(),
                name: format!("w{number}"),
                min: args.workers,
                max: args.workers,
                state_bytes: 4096,
                summed: 256,
                step: STEP,
                journal: dir.join(format!("worker-{number}.steps")),
                commits: Some(commits.clone()),
            })?;
            files.push(commits);
        }
        Ok(Run { replicas, company, commits: files, leader, random: Random::new(args.seed) })
    }

    fn workers(&self) -> u32 {
        self.commits.len() as u32
    }

    /// The leader when it has all members, and the generation then.
    fn leader_of_all(&self) -> Result<(Leader, u64)> {
        let (generation, _) = self.replicas.all_attached(self.leader.index, JOB, self.workers())?;
        Ok((self.leader, generation))
    }

    /// Lets training go on until then.
    fn rest_until(&self, until: Instant) -> Result<()> {
        while let Some(heard) = self.company.hear_until(until) {
            // A change of world is counted in the end.
            let ended = matches!(heard.said, None | Some(WorkerSays::Ended { .. }));
            ensure!(!ended, "worker {} has ended for no reason", heard.from);
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<()> {
        let more = Duration::from_micros(self.random.below(PEACE_MORE.as_micros() as u64));
        self.rest_until(Instant::now() + WINDOW + PEACE + more)
    }

    /// Waits for the leader that follows the one to which something happened at this instant.
    fn succeed(&mut self, at: Mark) -> Result<Change> {
        let (leader, led) = self.replicas.leader_after(self.leader.epoch)?;
        self.leader = leader;
        let (_, reattached) = self.replicas.all_attached(leader.index, JOB, self.workers())?;
        Ok(Change { at, led, reattached })
    }

    fn kill_leader(&mut self) -> Result<Change> {
        self.rest()?;
        let (victim, at, began) = (self.leader.index, Mark::now(), Instant::now());
        self.replicas.kill(victim)?;
        let change = self.succeed(at)?;
        // What it takes to start a process is not part of what follows a kill.
        self.rest_until(began + WINDOW)?;
        self.replicas.restart(victim)?;
        self.replicas.follows(victim)?;
        Ok(change)
    }

    fn stop_leader(&mut self) -> Result<Change> {
        self.rest()?;
        let (stopped, at) = (self.leader.index, Mark::now());
        self.replicas.signal(stopped, Signal::STOP)?;
        let change = self.succeed(at)?;
        self.replicas.signal(stopped, Signal::CONT)?;
        self.replicas.follows(stopped)?;
        Ok(change)
    }

    fn commits(&self) -> Result<Vec<Vec<Commit>>> {
        self.commits.iter().map(|file| commits(file)).collect()
    }
}

/// From one commit of a worker to its next.
#[derive(Debug, Clone, Copy)]
struct StepTime {
    begins: Mark,
    ends: Mark,
}

/// How long those steps took, in milliseconds, that belong to any of these instants.
fn step_times(
    commits: &[Vec<Commit>],
    instants: &[Mark],
    belongs: impl Fn(StepTime, Mark) -> bool,
) -> Vec<f64> {
    let steps = commits.iter().flat_map(|of_one| of_one.iter().zip(of_one.iter().skip(1)));
    let steps = steps.map(|(before, this)| StepTime { begins: before.at, ends: this.at });
    let belonging = steps.filter(|step| instants.iter().any(|instant| belongs(*step, *instant)));
    belonging.map(|step| ms(step.ends.since(step.begins))).collect()
}

/// How many committed steps were committed again in a later generation.
fn steps_lost(commits: &[Vec<Commit>]) -> u64 {
    let all = || commits.iter().flatten();
    let mut generations: Vec<u64> = all().map(|commit| commit.generation).collect();
    generations.sort_unstable();
    generations.dedup();
    let lost = |generation: &u64| {
        let before = all().filter(|commit| commit.generation < *generation).map(|commit| commit.steps).max();
        let first = all().filter(|commit| commit.generation == *generation).map(|commit| commit.steps).min();
        before.zip(first).map_or(0, |(before, first)| (before + 1).saturating_sub(first))
    };
    generations.iter().map(lost).sum()
}

impl Figures for FailoverFigures {
    const NAME: &'static str = "failover";

    fn rows(&self) -> Vec<Row> {
        let at_most = |limit, measured| Target::AtMost { limit, measured };
        let spread =
            |s: &Spread| format!("p50 {:.0}  p99 {:.0}  max {:.0} ms (n={})", s.p50, s.p99, s.max, s.n);
        let (after, before) = (&self.step_after_kill_ms, &self.step_undisturbed_ms);
        let lease = format!("the lease: {} ms", self.lease_ms);
        vec![
            Row::new("leader killed, to another leading", spread(&self.failover_ms))
                .beside(lease.clone())
                .target(at_most(500.0, self.failover_ms.p50)),
            Row::new("  to all members back", spread(&self.reattached_ms)),
            Row::new("steps in the second after, p99", format!("{:.2} ms", after.p99))
                .beside(format!(
                    "{:.2} ms in the second before: {:.2} ×",
                    before.p99, self.step_time_ratio_p99
                ))
                .target(at_most(1.5, self.step_time_ratio_p99)),
            Row::new("generations spent", self.generations_spent.to_string())
                .target(at_most(0.0, self.generations_spent as f64)),
            Row::new("steps lost", self.steps_lost.to_string()).target(at_most(0.0, self.steps_lost as f64)),
            Row::new("leader stopped, to another leading", spread(&self.stopped_failover_ms))
                .beside(lease)
                .target(at_most(self.lease_ms as f64 + 300.0, self.stopped_failover_ms.max)),
            Row::new("  to all members back", spread(&self.stopped_reattached_ms)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(at_ms: u64, generation: u64, steps: u64) -> Commit {
        Commit { at: Mark(at_ms * 1_000_000), generation, steps }
    }

    #[test]
    fn a_step_that_is_committed_again_is_lost() {
        let kept =
            [vec![commit(1, 1, 1), commit(2, 1, 2), commit(3, 2, 3)], vec![commit(1, 1, 1), commit(3, 2, 3)]];
        assert_eq!(steps_lost(&kept), 0);
        let lost = [vec![commit(1, 1, 1), commit(2, 1, 2)], vec![commit(1, 1, 1), commit(3, 2, 2)]];
        assert_eq!(steps_lost(&lost), 1);
        assert_eq!(steps_lost(&[]), 0);
    }

    #[test]
    fn a_step_belongs_to_the_instants_that_it_touches() {
        let commits = [vec![commit(10, 1, 1), commit(13, 1, 2), commit(18, 1, 3), commit(19, 1, 4)]];
        let at = [Mark(15_000_000)];
        assert_eq!(step_times(&commits, &at, |step, at| step.ends > at), [5.0, 1.0]);
        assert_eq!(step_times(&commits, &at, |step, at| step.ends <= at), [3.0]);
        assert_eq!(step_times(&commits, &[], |_, _| true), [0.0; 0]);
    }
}
