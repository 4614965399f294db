//! Several coordinators on one store, of which one leads.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use rustix::process::Signal;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use super::clock::Mark;
use crate::processes::Coordinator;

/// How long anything may take: far longer than it ever should.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often each coordinator is asked.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// After that, one that does not answer counts as one that does not.
const ANSWER_WITHIN: Duration = Duration::from_millis(100);

/// Who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) index: usize,
    /// Rises with each leader.
    pub(super) epoch: u64,
}

pub(super) struct Replicas {
    coordinators: Vec<Coordinator>,
    channels: Vec<Channel>,
    runtime: Runtime,
}

impl Replicas {
    /// Starts so many, one of which leads soon.
    pub(super) fn start(dir: &Path, count: u32, store: &str, lease: Duration) -> Result<Replicas> {
        let lease = format!("{}ms", lease.as_millis());
        let coordinators = (1..=count)
            .map(|number| {
                Coordinator::start_on(dir, &format!("coordinator-{number}"), store, &["--lease", &lease])
            })
            .collect::<Result<Vec<Coordinator>>>()?;
        Replicas::of(coordinators)
    }

    /// These, which are on one store.
    pub(super) fn of(coordinators: Vec<Coordinator>) -> Result<Replicas> {
        let runtime = Runtime::new()?;
        let channels = {
            // A channel begins to work at once, in the background.
            let _inside = runtime.enter();
            let channel = |coordinator: &Coordinator| {
                let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address()))?;
                Ok(endpoint.connect_timeout(ANSWER_WITHIN).connect_lazy())
            };
            coordinators.iter().map(channel).collect::<Result<Vec<Channel>>>()?
        };
        Ok(Replicas { coordinators, channels, runtime })
    }

    /// The coordinators themselves: nobody is to be asked any more.
    pub(super) fn into_coordinators(self) -> Vec<Coordinator> {
        self.coordinators
    }

    /// Where they are, as members are told.
    pub(super) fn addresses(&self) -> String {
        let url = |coordinator: &Coordinator| format!("http://{}", coordinator.address());
        self.coordinators.iter().map(url).collect::<Vec<_>>().join(",")
    }

    pub(super) fn kill(&mut self, index: usize) -> Result<()> {
        self.coordinators[index].kill()
    }

    /// Starts one again that was killed, and waits until it answers.
    pub(super) fn restart(&mut self, index: usize) -> Result<()> {
        self.coordinators[index].restart()
    }

    pub(super) fn signal(&self, index: usize, signal: Signal) -> Result<()> {
        self.coordinators[index].signal(signal)
    }

    /// Asks all again and again until `enough` is content with an answer, and says when that came. Each is asked on its
    /// own: one that is dead or stopped holds nobody up.
    fn until<T: Send + 'static>(
        &self,
        what: &str,
        enough: impl Fn(usize, &v1::ServerStatus) -> Option<T> + Copy + Send + 'static,
    ) -> Result<(T, Mark)> {
        self.runtime.block_on(async {
            let mut asking = JoinSet::new();
            for (index, channel) in self.channels.iter().cloned().enumerate() {
                asking.spawn(async move {
                    let mut client = InspectClient::new(channel);
                    loop {
                        let answer = client.server(v1::ServerRequest {});
                        if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER_WITHIN, answer).await
                            && let Some(found) = enough(index, &answer.into_inner())
                        {
                            return (found, Mark::now());
                        }
                        tokio::time::sleep(ASK_EVERY).await;
                    }
                });
            }
            match tokio::time::timeout(PATIENCE, asking.join_next()).await {
                Ok(Some(found)) => Ok(found?),
                Ok(None) | Err(_) => bail!("waited {PATIENCE:?} for {what}"),
            }
        })
    }

    /// Who leads, and is newer than this epoch; and when that was known.
    pub(super) fn leader_after(&self, epoch: u64) -> Result<(Leader, Mark)> {
        let leads = move |index, says: &v1::ServerStatus| {
            let is_new = says.role == "leading" && says.epoch > epoch;
            is_new.then_some(Leader { index, epoch: says.epoch })
        };
        self.until("another leader", leads)
    }

    /// Waits until this one says that it does not lead.
    pub(super) fn follows(&self, index: usize) -> Result<()> {
        let follows =
            move |asked, says: &v1::ServerStatus| (asked == index && says.role == "following").then_some(());
        self.until("a coordinator to follow", follows).map(drop)
    }

    /// Waits until a job runs with so many members, each of which has its stream to this one. Returns the generation, and
    /// when that was so.
    pub(super) fn all_attached(&self, index: usize, job: &str, members: u32) -> Result<(u64, Mark)> {
        let until = Instant::now() + PATIENCE;
        let channel = self.channels[index].clone();
        self.runtime.block_on(async {
            let mut client = InspectClient::new(channel);
            let mut last = None;
            while Instant::now() < until {
                let request = v1::StatusRequest { job: job.to_owned(), members_max: 0 };
                if let Ok(Ok(status)) = tokio::time::timeout(ANSWER_WITHIN, client.status(request)).await {
                    let (status, at) = (status.into_inner(), Mark::now());
                    let attached = status.members.iter().filter(|member| member.attached).count();
                    let is_whole = status.phase() == v1::Phase::Running && status.size == members;
                    if is_whole && attached == members as usize {
                        return Ok((status.generation, at));
                    }
                    last = Some((status.phase, status.size, attached));
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
            let last = last.with_context(|| format!("coordinator {index} says nothing of {job}"))?;
            bail!("waited {PATIENCE:?} for {members} members; last saw (phase, size, attached) {last:?}")
        })
    }
}
