//! `reknit bench swarm`: how one coordinator does with thousands of members.
//!
//! The members only speak the protocol, each on a connection of its own, as the trainer's link would: they join, answer
//! worlds, begin to run, renew their leases. Nothing between them is real, so a member that is lost is a connection that
//! ends, and its neighbours say at the same time that their ring broke, as their sockets would have told them.

mod members;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::args::Swarm;
use super::clock::{Mark, ms};
use super::company::{Company, PlayerId, Role};
use super::etcd::Etcd;
use super::machine::{cpu_time, resident_bytes};
use super::random::Random;
use super::replicas::Replicas;
use super::result::{Figures, Row, Target};
use super::stats::Spread;
use crate::descriptors;
use crate::processes::Coordinator;

pub(super) use members::play as play_members;
use members::{Says, Setup};

/// How long the whole swarm may take for anything.
const PATIENCE: Duration = Duration::from_secs(300);
/// Descriptors that a process needs beside its members' connections.
const DESCRIPTORS_BESIDE: u64 = 64;

#[derive(Debug, Serialize)]
pub(super) struct SwarmFigures {
    members: u32,
    processes: u32,
    /// Which kind of store the coordinator had.
    store: StoreKind,
    /// From the instant at which the last member said that it joins until every member was told to go.
    form_ms: f64,
    /// From a loss until every member was told of it, in the middle of all losses.
    loss_fanout_ms: f64,
    loss_fanout_spread_ms: Option<Spread>,
    /// From a loss until every member was told to go again.
    loss_to_running_spread_ms: Option<Spread>,
    /// How much the coordinator's resident memory grew, per member.
    rss_bytes_per_member: f64,
    rss_bytes_empty: u64,
    rss_bytes_full: u64,
    /// The same after the losses.
    rss_bytes_last: u64,
    /// How many cores the coordinator used while nothing happened, and for how long that was looked at.
    heartbeat_cores: f64,
    steady_s: f64,
    /// From the first join to the last.
    joins_per_second: f64,
}

/// Where the coordinator kept its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum StoreKind {
    Embedded,
    Etcd,
    /// As the user said.
    Other,
}

/// A coordinator on the store that was asked for, and the etcd that was started for it.
fn coordinator(args: &Swarm, dir: &Path) -> Result<(Coordinator, StoreKind, Option<Etcd>)> {
    let on = |store: &str| Coordinator::start_on(dir, "coordinator", store, &[]);
    match args.store.as_deref() {
        None => Ok((Coordinator::start(dir)?, StoreKind::Embedded, None)),
        Some("etcd") => {
            let etcd = Etcd::start(dir)?;
            Ok((leading(on(&etcd.store())?)?, StoreKind::Etcd, Some(etcd)))
        }
        Some(store) if store.starts_with("etcd://") => Ok((leading(on(store)?)?, StoreKind::Etcd, None)),
        Some(store) => Ok((on(store)?, StoreKind::Other, None)),
    }
}

/// Waits until the only coordinator leads.
fn leading(coordinator: Coordinator) -> Result<Coordinator> {
    let replicas = Replicas::of(vec![coordinator])?;
    replicas.leader_after(0)?;
    replicas.into_coordinators().pop().context("one there is")
}

pub(super) fn swarm(args: &Swarm, dir: &Path) -> Result<SwarmFigures> {
    let (members, losses, steady) = if args.common.quick {
        (args.members.min(200), args.losses.min(2), Duration::from_secs(2))
    } else {
        (args.members, args.losses, Duration::from_secs(args.steady_s))
    };
    check_descriptors(members, args.processes)?;
    let (coordinator, store, _etcd) = coordinator(args, dir)?;
    let rss_bytes_empty = resident_bytes(coordinator.id())?;
    let mut swarm = Running::start(dir, &coordinator, members, args.processes, losses)?;
    let formed = swarm.until_running(1)?;
    let joined = swarm.joined.clone();
    let first_join = joined.iter().map(|(first, _)| *first).min().context("nobody joined")?;
    let last_join = joined.iter().map(|(_, last)| *last).max().context("nobody joined")?;

    // What the last messages left behind is still being worked off.
    swarm.rest(Duration::from_secs(1))?;
    let rss_bytes_full = resident_bytes(coordinator.id())?;
    let (began, used) = (Instant::now(), cpu_time(coordinator.id())?);
    swarm.rest(steady)?;
    let (steady_s, used) = (began.elapsed().as_secs_f64(), cpu_time(coordinator.id())? - used);

    let mut random = Random::new(1);
    let (mut fanouts, mut recoveries) = (Vec::new(), Vec::new());
    for _ in 0..losses {
        let lost = swarm.lose_one(&mut random)?;
        fanouts.push(ms(lost.told));
        recoveries.push(ms(lost.running));
    }
    let (fanout, recovery) = (Spread::of(fanouts), Spread::of(recoveries));
    let rss_bytes_last = resident_bytes(coordinator.id())?;
    Ok(SwarmFigures {
        members,
        processes: args.processes,
        store,
        form_ms: ms(formed.since(last_join)),
        loss_fanout_ms: fanout.map(|spread| spread.p50).context("nobody was lost")?,
        loss_fanout_spread_ms: fanout,
        loss_to_running_spread_ms: recovery,
        rss_bytes_per_member: rss_bytes_full.saturating_sub(rss_bytes_empty) as f64 / f64::from(members),
        rss_bytes_empty,
        rss_bytes_full,
        rss_bytes_last,
        heartbeat_cores: used.as_secs_f64() / steady_s,
        steady_s,
        joins_per_second: f64::from(members) / last_join.since(first_join).as_secs_f64().max(1e-6),
    })
}

/// A coordinator has one descriptor per member, a process of members too.
fn check_descriptors(members: u32, processes: u32) -> Result<()> {
    let limit = descriptors::raise_limit()?;
    let each = u64::from(members.div_ceil(processes)) + DESCRIPTORS_BESIDE;
    let coordinator = u64::from(members) + DESCRIPTORS_BESIDE;
    ensure!(
        coordinator <= limit,
        "the coordinator would need {coordinator} descriptors, and a process may have {limit} here (ulimit -Hn): \
         ask for fewer --members"
    );
    ensure!(
        each <= limit,
        "each process of members would need {each} descriptors, and may have {limit} here (ulimit -Hn): \
         ask for more --processes"
    );
    Ok(())
}

/// A swarm whose members are all there.
struct Running {
    company: Company<Says>,
    /// The processes, and how many members each still has.
    processes: Vec<(PlayerId, u32)>,
    /// When the first and the last member of each process joined.
    joined: Vec<(Mark, Mark)>,
    generation: u64,
}

/// What followed a loss.
struct Lost {
    told: Duration,
    running: Duration,
}

impl Running {
    fn start(
        dir: &Path,
        coordinator: &Coordinator,
        members: u32,
        processes: u32,
        losses: u32,
    ) -> Result<Running> {
        let mut company = Company::new(Role::Members, dir);
        let mut places = Vec::new();
        for process in 0..processes {
            let share = |process| (u64::from(members) * u64::from(process) / u64::from(processes)) as u32;
            let (first, end) = (share(process), share(process + 1));
            let coordinator = format!("http://{}", coordinator.address());
            // The world forms at once when all are there, and again when a few are gone.
            let (min, max) = (members.saturating_sub(losses).max(1), members);
            let setup = Setup { coordinator, job: "swarm".to_owned(), first, count: end - first, min, max };
            places.push((company.start(&setup)?, end - first));
        }
        Ok(Running { company, processes: places, joined: Vec::new(), generation: 0 })
    }

    /// Waits until all members run in a world of at least this generation, and says since when.
    fn until_running(&mut self, generation: u64) -> Result<Mark> {
        let mut last = None;
        let mut running = 0;
        while running < self.processes.len() {
            match self.company.hear(PATIENCE)?.1 {
                Says::Joined { first, last } => self.joined.push((first, last)),
                Says::Running { generation: theirs, at } if theirs >= generation => {
                    self.generation = theirs;
                    last = last.max(Some(at));
                    running += 1;
                }
                Says::Running { .. } | Says::Told { .. } | Says::Place { .. } => {}
            }
        }
        last.context("a swarm without processes")
    }

    /// Lets time pass.
    fn rest(&mut self, pause: Duration) -> Result<()> {
        let until = Instant::now() + pause;
        while let Some(heard) = self.company.hear_until(until) {
            ensure!(heard.said.is_some(), "members have ended for no reason");
        }
        Ok(())
    }

    fn lose_one(&mut self, random: &mut Random) -> Result<Lost> {
        let generation = self.generation;
        let with_members: Vec<usize> =
            (0..self.processes.len()).filter(|p| self.processes[*p].1 > 1).collect();
        let chosen = random.one_of(&with_members).context("nobody is left to lose")?;
        let process = self.processes[chosen].0;
        // Where it is in the ring is asked before, so that the report needs no further question.
        self.company.tell(process, &members::Order::Choose { lot: random.next() })?;
        let (member, rank, neighbours) = loop {
            if let (_, Says::Place { member, rank, neighbours }) = self.company.hear(PATIENCE)? {
                break (member, rank, neighbours);
            }
        };
        let began = Mark::now();
        self.company.tell(process, &members::Order::Lose { member })?;
        self.processes[chosen].1 -= 1;
        let everybody: Vec<PlayerId> = self.processes.iter().map(|(process, _)| *process).collect();
        for process in everybody {
            self.company.tell(process, &members::Order::Report { generation, rank, by: neighbours })?;
        }
        let (mut told, mut running) = (Vec::new(), Vec::new());
        while told.len().min(running.len()) < self.processes.len() {
            match self.company.hear(PATIENCE)?.1 {
                Says::Told { over, at } if over == generation => told.push(at),
                Says::Running { generation: theirs, at } if theirs > generation => {
                    self.generation = theirs;
                    running.push(at);
                }
                Says::Told { .. } | Says::Running { .. } | Says::Joined { .. } | Says::Place { .. } => {}
            }
        }
        let last =
            |marks: Vec<Mark>| marks.into_iter().max().map(|at| at.since(began)).context("nobody was told");
        Ok(Lost { told: last(told)?, running: last(running)? })
    }
}

impl Figures for SwarmFigures {
    const NAME: &'static str = "swarm";

    fn rows(&self) -> Vec<Row> {
        let at_most = |limit, measured| Target::AtMost { limit, measured };
        let spread = |spread: &Option<Spread>| match spread {
            Some(Spread { n, min, p50, max, .. }) => format!("{p50:.0} ms ({min:.0} to {max:.0}, n={n})"),
            None => String::new(),
        };
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        vec![
            Row::new(
                format!("{} members, last join to all running", self.members),
                format!("{:.0} ms", self.form_ms),
            )
            .beside(format!("{:.0} joins/s in {} processes", self.joins_per_second, self.processes))
            .target(at_most(if self.store == StoreKind::Etcd { 4000.0 } else { 3000.0 }, self.form_ms)),
            Row::new("loss to everyone told", spread(&self.loss_fanout_spread_ms))
                .beside(format!("to all running: {}", spread(&self.loss_to_running_spread_ms)))
                .target(at_most(1000.0, self.loss_fanout_ms)),
            Row::new("memory per member", format!("{:.0} bytes", self.rss_bytes_per_member))
                .beside(format!(
                    "{:.1} MiB empty, {:.1} full, {:.1} after the losses; a bare tonic stream: about 32 kB",
                    mib(self.rss_bytes_empty),
                    mib(self.rss_bytes_full),
                    mib(self.rss_bytes_last)
                ))
                .target(at_most(40_960.0, self.rss_bytes_per_member)),
            Row::new("heartbeats", format!("{:.3} cores over {:.0} s", self.heartbeat_cores, self.steady_s))
                .target(at_most(0.3, self.heartbeat_cores)),
        ]
    }
}
