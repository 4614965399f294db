//! The play: what happens to the fleet, one act after the other.
//!
//! Each act waits until the world that the one before it led to has done some steps, does its harm, and waits until
//! training goes on. Nothing is timed by guess: every wait is for something that the workers wrote down or that the
//! coordinator says.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use reknit_membership::Timestamp;
use reknit_membership::record::WorldChange;
use reknit_membership::status::{PhaseName, Status};
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use reknit_proto::{inspect, v1};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::evidence::Tail;
use super::fleet::{POLL, Training, Worker};
use super::screen::Screen;
use crate::processes::Coordinator;

/// How long training may take to go on after an act.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many steps a world does before the next act.
const STEPS_BETWEEN: u64 = 30;
/// A worker that has been at one step for so long, while another one is stopped, is inside the step's all-reduce.
const INSIDE_ALL_REDUCE: Duration = Duration::from_millis(200);
/// How long the coordinator stays away.
const COORDINATOR_AWAY: Duration = Duration::from_secs(2);

/// What was done to the fleet, and when: at the instant before the signal was sent.
#[derive(Debug, Clone)]
pub(super) struct Act {
    pub(super) title: &'static str,
    pub(super) at: Timestamp,
    /// The first generation that can be due to it.
    pub(super) after_generation: u64,
}

/// What the acts came to, beyond what the history and the evidence say.
#[derive(Debug, Clone, Default)]
pub(super) struct Acts {
    pub(super) acts: Vec<Act>,
    /// Generations that passed while the coordinator was away and came back.
    pub(super) generations_spent_on_coordinator_restart: u64,
    /// Steps that were done while the coordinator was away.
    pub(super) steps_without_coordinator: u64,
    /// When it was killed, and when it listened again.
    pub(super) coordinator_away: Option<(Timestamp, Timestamp)>,
    /// The newest checkpoint that was committed when all workers were killed.
    pub(super) committed_before_the_end: u64,
    /// What the killed worker was at: a step that it had begun, and that nobody could finish with it.
    pub(super) killed_inside: Option<super::evidence::Attempt>,
}

/// The fleet on the stage.
pub(super) struct Stage<'a> {
    screen: &'a Screen,
    training: Training,
    coordinator: Coordinator,
    workers: Vec<Worker>,
    tail: Tail,
    runtime: Runtime,
    acts: Acts,
    world_size: u32,
}

impl<'a> Stage<'a> {
    pub(super) fn new(training: Training, screen: &'a Screen) -> Result<Stage<'a>> {
        let coordinator = Coordinator::start(&training.dir)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let tail = Tail::new(&training.dir);
        let acts = Acts::default();
        Ok(Stage { screen, training, coordinator, workers: Vec::new(), tail, runtime, acts, world_size: 0 })
    }

    fn start(&mut self, name: &str) -> Result<()> {
        self.workers.push(Worker::start(&self.training, self.coordinator.address(), name)?);
        Ok(())
    }

    fn worker(&mut self, name: &str) -> Result<&mut Worker> {
        self.workers
            .iter_mut()
            .find(|worker| worker.name() == name)
            .with_context(|| format!("no worker {name}"))
    }

    /// Takes a worker off the stage, and its process with it.
    fn remove(&mut self, name: &str) {
        self.workers.retain(|worker| worker.name() != name);
    }

    /// Notes that something is done to the fleet now.
    fn begin(&mut self, title: &'static str) -> Result<()> {
        let after_generation = self.status()?.generation.0;
        self.screen.say(title);
        self.acts.acts.push(Act { title, at: now(), after_generation });
        Ok(())
    }

    fn ask<T>(&self, ask: impl AsyncFnOnce(Channel) -> Result<T>) -> Result<T> {
        let address = format!("http://{}", self.coordinator.address());
        self.runtime.block_on(async {
            let channel = Channel::from_shared(address)?.connect().await?;
            ask(channel).await
        })
    }

    fn status(&self) -> Result<Status> {
        let request = v1::StatusRequest { job: self.training.job.clone(), members_max: 0 };
        let asked = self.ask(async |channel| {
            Ok(InspectClient::new(channel).status(request).await.map(tonic::Response::into_inner))
        })?;
        match asked {
            Ok(reply) => Ok(inspect::status(reply)?),
            Err(status) => bail!("the coordinator does not tell the status: {}", status.message()),
        }
    }

    /// Every change of the world so far.
    pub(super) fn history(&self) -> Result<Vec<WorldChange>> {
        let request = v1::HistoryRequest { job: self.training.job.clone() };
        let reply =
            self.ask(async |channel| Ok(InspectClient::new(channel).history(request).await?.into_inner()))?;
        Ok(reply.changes.into_iter().map(inspect::change).collect::<Result<_, _>>()?)
    }

    /// Looks at the workers' progress until `enough` says so.
    fn until(&mut self, what: &str, mut enough: impl FnMut(&mut Stage<'a>) -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        loop {
            self.tail.read()?;
            let (steps, generation, loss) =
                (self.tail.steps_done(), self.tail.generation(), self.tail.loss());
            self.screen.step(steps, self.world_size, generation, loss);
            if enough(self)? {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                bail!("waited {PATIENCE:?} for {what}; see the logs in {}", self.training.dir.display());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits until a world of `size` workers has done some steps.
    fn until_running(&mut self, size: u32) -> Result<()> {
        self.until(&format!("a world of {size}"), |stage| {
            let Ok(status) = stage.status() else { return Ok(false) };
            stage.world_size = status.size.0;
            let runs = status.phase == PhaseName::Running && status.size.0 == size;
            Ok(runs && stage.tail.generation() == status.generation.0)
        })?;
        let from = self.tail.steps_done();
        let generation = self.tail.generation();
        self.until("some steps", |stage| {
            if stage.tail.generation() != generation {
                bail!("the world changed although nothing was done to it");
            }
            Ok(stage.tail.steps_done() >= from + STEPS_BETWEEN)
        })
    }
}

fn now() -> Timestamp {
    Timestamp::default().after(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// All acts, in order.
pub(super) fn play(stage: &mut Stage<'_>) -> Result<Acts> {
    four_workers_come_together(stage)?;
    one_is_killed_in_the_middle_of_an_all_reduce(stage)?;
    a_replacement_joins(stage, "w4")?;
    one_is_given_notice(stage)?;
    a_replacement_joins(stage, "w5")?;
    the_coordinator_is_killed(stage)?;
    one_hangs(stage)?;
    all_are_killed_at_once(stage)?;
    the_rest_finishes(stage)?;
    Ok(std::mem::take(&mut stage.acts))
}

fn four_workers_come_together(stage: &mut Stage<'_>) -> Result<()> {
    stage.screen.say("four workers start");
    stage.acts.acts.push(Act { title: "start", at: now(), after_generation: 0 });
    for name in ["w0", "w1", "w2", "w3"] {
        stage.start(name)?;
    }
    stage.until_running(4)
}

/// A worker whose neighbour has been stopped cannot finish its all-reduce: it is in the middle of one for sure.
fn one_is_killed_in_the_middle_of_an_all_reduce(stage: &mut Stage<'_>) -> Result<()> {
    let (victim, holder) = ("w2", "w0");
    stage.worker(holder)?.stop()?;
    stage.until("the victim to be inside its all-reduce", |stage| {
        Ok(stage.tail.at_work(victim).is_some_and(|(_, since)| since > INSIDE_ALL_REDUCE))
    })?;
    stage.acts.killed_inside = stage.tail.at_work(victim).map(|(attempt, _)| attempt);
    stage.begin("SIGKILL in an all-reduce")?;
    stage.worker(victim)?.kill()?;
    stage.worker(holder)?.resume()?;
    stage.until_running(3)?;
    stage.remove(victim);
    Ok(())
}

fn a_replacement_joins(stage: &mut Stage<'_>, name: &'static str) -> Result<()> {
    stage.begin("a replacement joins")?;
    stage.start(name)?;
    stage.until_running(4)
}

fn one_is_given_notice(stage: &mut Stage<'_>) -> Result<()> {
    let leaver = "w1";
    stage.begin("notice of 120 s")?;
    let request =
        v1::NoticeRequest { job: stage.training.job.clone(), member: leaver.to_owned(), left_ms: 120_000 };
    stage.ask(async |channel| Ok(OperateClient::new(channel).notice(request).await.map(|_| ())?))?;
    stage.until_running(3)?;
    stage.worker(leaver)?.wait_end(PATIENCE)?;
    stage.remove(leaver);
    Ok(())
}

fn the_coordinator_is_killed(stage: &mut Stage<'_>) -> Result<()> {
    let before = stage.status()?.generation.0;
    stage.tail.read()?;
    let steps = stage.tail.steps_done();
    stage.screen.say("SIGKILL of the coordinator; it comes back in 2 s");
    let killed = now();
    stage.coordinator.kill()?;
    let away = Instant::now();
    stage.until("the coordinator to have been away", |_| Ok(away.elapsed() >= COORDINATOR_AWAY))?;
    stage.acts.steps_without_coordinator = stage.tail.steps_done() - steps;
    stage.coordinator.restart()?;
    stage.acts.coordinator_away = Some((killed, now()));
    stage.until("all members to come back", |stage| {
        let Ok(status) = stage.status() else { return Ok(false) };
        Ok(status.members.iter().filter(|member| member.attached).count() == 4)
    })?;
    stage.until_running(4)?;
    stage.acts.generations_spent_on_coordinator_restart = stage.status()?.generation.0 - before;
    Ok(())
}

fn one_hangs(stage: &mut Stage<'_>) -> Result<()> {
    let sleeper = "w3";
    stage.begin("SIGSTOP: a hang")?;
    stage.worker(sleeper)?.stop()?;
    stage.until_running(3)?;
    stage.begin("it wakes and comes back")?;
    stage.worker(sleeper)?.resume()?;
    stage.until_running(4)
}

fn all_are_killed_at_once(stage: &mut Stage<'_>) -> Result<()> {
    stage.until("a committed checkpoint", |stage| {
        Ok(stage.status().is_ok_and(|status| !status.commits.is_empty()))
    })?;
    stage.begin("SIGKILL of all; three come back")?;
    for worker in &stage.workers {
        worker.kill()?;
    }
    let commits = stage.status()?.commits;
    stage.acts.committed_before_the_end = commits.last().context("the committed checkpoint is gone")?.step.0;
    let names: Vec<String> = stage.workers.iter().map(|worker| worker.name().to_owned()).collect();
    stage.workers.clear();
    for name in names.iter().take(3) {
        stage.start(name)?;
    }
    stage.until_running(3)
}

fn the_rest_finishes(stage: &mut Stage<'_>) -> Result<()> {
    stage.screen.say("and now the rest of the training, undisturbed");
    stage.until("the training to end", |stage| {
        for worker in &mut stage.workers {
            worker.check_end()?;
        }
        let mut ended = true;
        for worker in &mut stage.workers {
            ended &= worker.has_ended()?;
        }
        Ok(ended)
    })
}
