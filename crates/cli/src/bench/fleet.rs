//! A coordinator and workers of one job, each a process of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reknit_membership::record::WorldChange;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::{inspect, v1};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::clock::Mark;
use super::company::{Company, PlayerId, Role};
use super::worker::{WorkerOrder, WorkerSays, WorkerSetup, WorldBegun, journalled};
use crate::processes::Coordinator;

/// How long a world may take to form, whatever happens: far longer than it ever should.
const PATIENCE: Duration = Duration::from_secs(120);

/// The job's name.
const JOB: &str = "bench";

/// What the workers of a fleet are like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Make {
    /// How many workers make the job's first world, and its largest.
    pub(super) workers: u32,
    pub(super) most: u32,
    pub(super) state_bytes: u64,
    /// How many numbers each step sums.
    pub(super) summed: usize,
    /// How long each step takes at least.
    pub(super) step: Duration,
}

pub(super) struct Fleet {
    make: Make,
    dir: PathBuf,
    coordinator: Coordinator,
    company: Company<WorkerSays>,
    /// Workers that are, or are about to be, in the world.
    live: BTreeSet<PlayerId>,
    /// Workers that have said goodbye, and why.
    ended: BTreeMap<PlayerId, String>,
    generation: u64,
    runtime: Runtime,
}

/// How the fleet came from one world to another.
pub(super) struct Passage {
    /// What each worker said of each world on the way, the last of which is where the fleet is now.
    begun: Vec<(PlayerId, WorldBegun)>,
    /// Workers that are in the world the passage led to.
    live: BTreeSet<PlayerId>,
}

impl Passage {
    fn last_generation(&self) -> u64 {
        self.begun.iter().map(|(_, begun)| begun.generation).max().unwrap_or_default()
    }

    fn by_worker(&self, worker: PlayerId) -> impl Iterator<Item = &WorldBegun> {
        self.begun.iter().filter(move |(who, _)| *who == worker).map(|(_, begun)| begun)
    }

    /// When the last of its workers had committed a step of the new world.
    pub(super) fn last_step_at(&self) -> Option<Mark> {
        let last = self.last_generation();
        self.begun.iter().filter(|(_, begun)| begun.generation == last).map(|(_, begun)| begun.at).max()
    }

    /// How much longer than others the step took during which the world changed, for the worker for which it took
    /// longest. Nothing if nobody was in both worlds.
    pub(super) fn stall(&self) -> Option<Duration> {
        let stall = |worker: PlayerId| {
            let before = self.by_worker(worker).next()?.before.as_ref()?;
            let took = self.by_worker(worker).last()?.at.since(before.at);
            Some(took.saturating_sub(Duration::from_nanos(before.median_step_ns)))
        };
        self.live.iter().filter_map(|worker| stall(*worker)).max()
    }

    /// The usual time of a step before.
    pub(super) fn median_step(&self) -> Option<Duration> {
        let median =
            |(_, begun): &(PlayerId, WorldBegun)| begun.before.as_ref().map(|before| before.median_step_ns);
        self.begun.iter().filter_map(median).max().map(Duration::from_nanos)
    }

    /// How many steps that somebody had committed were committed again. `others` says what was committed by workers
    /// that did not come along.
    pub(super) fn steps_lost(&self, others: Option<u64>) -> u64 {
        let generations: BTreeSet<u64> = self.begun.iter().map(|(_, begun)| begun.generation).collect();
        let mut lost = 0;
        for (index, generation) in generations.iter().enumerate() {
            let begun =
                || self.begun.iter().map(|(_, begun)| begun).filter(|begun| begun.generation == *generation);
            let before = begun().filter_map(|begun| begun.before.as_ref()).map(|before| before.steps);
            // What left did so before the first of these worlds.
            let before = before.chain(others.filter(|_| index == 0)).max();
            let first = begun().map(|begun| begun.steps).min();
            if let (Some(before), Some(first)) = (before, first) {
                lost += (before + 1).saturating_sub(first);
            }
        }
        lost
    }

    /// How many worlds it took; more than one if a world broke before its first step.
    pub(super) fn worlds(&self) -> u64 {
        self.begun.iter().map(|(_, begun)| begun.generation).collect::<BTreeSet<_>>().len() as u64
    }
}

impl Fleet {
    /// A fleet whose first world runs.
    pub(super) fn start(dir: &Path, make: Make) -> Result<Fleet> {
        let coordinator = Coordinator::start(dir)?;
        let company = Company::new(Role::Worker, dir);
        let runtime = Runtime::new()?;
        let (dir, live, ended) = (dir.to_owned(), BTreeSet::new(), BTreeMap::new());
        let mut fleet = Fleet { make, dir, coordinator, company, live, ended, generation: 0, runtime };
        for _ in 0..make.workers {
            fleet.launch()?;
        }
        fleet.pass()?;
        Ok(fleet)
    }

    fn journal(&self, worker: PlayerId) -> PathBuf {
        self.dir.join(format!("worker-{worker}.steps"))
    }

    /// One more worker.
    pub(super) fn launch(&mut self) -> Result<PlayerId> {
        let worker = self.company.upcoming();
        let setup = WorkerSetup {
            coordinator: format!("http://{}", self.coordinator.address()),
            job: JOB.to_owned(),
            name: format!("w{worker}"),
            // After a loss the world goes on without waiting for a replacement.
            min: (self.make.workers - 1).max(1),
            max: self.make.most,
            state_bytes: self.make.state_bytes,
            summed: self.make.summed,
            step: self.make.step,
            journal: self.journal(worker),
            commits: None,
        };
        let id = self.company.start(&setup)?;
        self.live.insert(id);
        Ok(id)
    }

    pub(super) fn live(&self) -> Vec<PlayerId> {
        self.live.iter().copied().collect()
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self, worker: PlayerId) -> Result<()> {
        self.company.kill(worker)?;
        self.live.remove(&worker);
        Ok(())
    }

    /// Forgets a worker that was killed; says how many steps it had committed.
    pub(super) fn bury(&mut self, worker: PlayerId) -> Result<u64> {
        self.company.remove(worker);
        journalled(&self.journal(worker))
    }

    /// Waits until a worker that was given notice has left; says how many steps it had committed.
    pub(super) fn see_off(&mut self, worker: PlayerId) -> Result<u64> {
        while !self.ended.contains_key(&worker) {
            self.hear()?;
        }
        match self.ended.get(&worker).map(String::as_str) {
            Some("Some(Released)") => self.bury(worker),
            why => bail!("worker {worker} was to be released, but {why:?}"),
        }
    }

    /// Gives a worker notice that its machine will be taken.
    pub(super) fn give_notice(&mut self, worker: PlayerId) -> Result<()> {
        self.company.tell(worker, &WorkerOrder::Notice)?;
        self.company.let_go(worker)?;
        self.live.remove(&worker);
        Ok(())
    }

    /// What a worker says next.
    fn hear(&mut self) -> Result<(PlayerId, WorkerSays)> {
        let (who, says) = self.company.hear(PATIENCE)?;
        match &says {
            WorkerSays::Ended { why } if self.live.contains(&who) => bail!("worker {who} has ended: {why}"),
            WorkerSays::Ended { why } => {
                self.ended.insert(who, why.clone());
            }
            WorkerSays::World(_) | WorkerSays::Reached { .. } => {}
        }
        Ok((who, says))
    }

    /// Waits until all live workers have done a step of one new world that consists of them.
    pub(super) fn pass(&mut self) -> Result<Passage> {
        let mut passage = Passage { begun: Vec::new(), live: self.live.clone() };
        loop {
            let (who, says) = self.hear()?;
            if let WorkerSays::World(begun) = says
                && begun.generation > self.generation
            {
                passage.begun.push((who, begun));
            }
            if self.has_arrived(&passage) {
                self.generation = passage.last_generation();
                return Ok(passage);
            }
        }
    }

    fn has_arrived(&self, passage: &Passage) -> bool {
        let last = passage.last_generation();
        let there = |begun: &WorldBegun| begun.generation == last && begun.size as usize == self.live.len();
        let arrived: BTreeMap<PlayerId, bool> =
            passage.begun.iter().map(|(who, begun)| (*who, there(begun))).collect();
        self.live.iter().all(|worker| arrived.get(worker) == Some(&true))
    }

    /// Lets the world run until `until`.
    ///
    /// # Errors
    /// If it does not.
    pub(super) fn run_until(&mut self, until: Instant) -> Result<()> {
        while let Some(heard) = self.company.hear_until(until) {
            match heard.said {
                Some(WorkerSays::World(begun)) => self.expect_no_change(&begun)?,
                None if self.live.contains(&heard.from) => {
                    bail!("worker {} has ended for no reason", heard.from)
                }
                Some(WorkerSays::Reached { .. } | WorkerSays::Ended { .. }) | None => {}
            }
        }
        Ok(())
    }

    /// Lets the world do so many steps, and says how long that took.
    pub(super) fn run_steps(&mut self, steps: u64) -> Result<Duration> {
        let teller = *self.live.first().context("nobody is left")?;
        let began = Mark::now();
        self.company.tell(teller, &WorkerOrder::TellAfter { steps })?;
        loop {
            match self.hear()? {
                (who, WorkerSays::Reached { at, .. }) if who == teller => return Ok(at.since(began)),
                (_, WorkerSays::World(begun)) => self.expect_no_change(&begun)?,
                (_, WorkerSays::Reached { .. } | WorkerSays::Ended { .. }) => {}
            }
        }
    }

    fn expect_no_change(&self, begun: &WorldBegun) -> Result<()> {
        if begun.generation > self.generation {
            bail!("the world changed although nothing was done to it");
        }
        Ok(())
    }

    fn ask<T>(&self, ask: impl AsyncFnOnce(InspectClient<Channel>) -> Result<T>) -> Result<T> {
        let address = format!("http://{}", self.coordinator.address());
        self.runtime.block_on(async {
            let channel = Channel::from_shared(address)?.connect().await?;
            ask(InspectClient::new(channel)).await
        })
    }

    /// The newest changes of the world, oldest first.
    pub(super) fn history(&self) -> Result<Vec<WorldChange>> {
        let request = v1::HistoryRequest { job: JOB.to_owned() };
        let reply = self.ask(async |mut client| Ok(client.history(request).await?.into_inner()))?;
        Ok(reply.changes.into_iter().map(inspect::change).collect::<Result<_, _>>()?)
    }

    /// What the coordinator has counted so far.
    pub(super) fn counts(&self) -> Result<v1::ServerStatus> {
        self.ask(async |mut client| Ok(client.server(v1::ServerRequest {}).await?.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::worker::Before;
    use super::*;

    fn begun(generation: u64, steps: u64, at_ms: u64, before: Option<(u64, u64)>) -> WorldBegun {
        let before = before.map(|(steps, at_ms)| Before {
            steps,
            at: Mark(at_ms * 1_000_000),
            median_step_ns: 1_000_000,
        });
        WorldBegun { generation, size: 2, steps, at: Mark(at_ms * 1_000_000), before }
    }

    fn passage(begun: Vec<(u32, WorldBegun)>) -> Passage {
        let begun: Vec<_> = begun.into_iter().map(|(who, begun)| (PlayerId(who), begun)).collect();
        let live = begun.iter().map(|(who, _)| *who).collect();
        Passage { begun, live }
    }

    #[test]
    fn a_stall_is_what_the_step_took_beyond_the_median_for_whom_it_took_longest() {
        let passage = passage(vec![
            (0, begun(2, 8, 110, Some((7, 100)))),
            (1, begun(2, 8, 112, Some((7, 99)))),
            (2, begun(2, 8, 111, None)),
        ]);
        assert_eq!(passage.stall(), Some(Duration::from_millis(12)));
        assert_eq!(passage.last_step_at(), Some(Mark(112_000_000)));
        assert_eq!((passage.steps_lost(None), passage.worlds()), (0, 1));
    }

    #[test]
    fn a_step_that_somebody_had_committed_and_that_is_done_again_is_lost() {
        // One survivor was a step ahead of the other; the world goes on from it.
        let ahead = || vec![(0, begun(2, 9, 110, Some((8, 100)))), (1, begun(2, 9, 110, Some((7, 100))))];
        assert_eq!(passage(ahead()).steps_lost(Some(8)), 0);
        assert_eq!(passage(ahead()).steps_lost(Some(9)), 1, "who is gone had done one more");
        let behind = vec![(0, begun(2, 8, 110, Some((8, 100)))), (1, begun(2, 8, 110, Some((7, 100))))];
        assert_eq!(passage(behind).steps_lost(None), 1);
    }

    #[test]
    fn worlds_on_the_way_count_for_the_whole_passage() {
        let passage =
            passage(vec![(0, begun(2, 8, 110, Some((7, 100)))), (0, begun(3, 9, 140, Some((8, 110))))]);
        assert_eq!(passage.stall(), Some(Duration::from_millis(39)));
        assert_eq!((passage.steps_lost(None), passage.worlds()), (0, 2));
    }
}
