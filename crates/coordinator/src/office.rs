//! Who leads, as the services of this server see it.
//!
//! With a store of its own a server always leads. With one that several coordinators share, it leads while it holds the
//! leader's key; else it follows, says who leads, and shows what is saved of jobs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tonic::Status;
use tonic::metadata::MetadataValue;

use crate::etcd::EtcdError;
use crate::etcd::cluster::Cluster;
use crate::etcd::election::{Candidate, Leader, Lost, Reign};
use crate::etcd::link::{Acquaintance, Fate, follow};
use crate::job::{Surroundings, source_text};
use crate::jobs::Jobs;
use crate::store::{Epoch, Etcd};
use crate::tls::Peers;

/// What this server is at present.
#[derive(Clone)]
enum Standing {
    /// It leads, and serves these jobs.
    Leading(Box<Jobs>),
    /// Another one leads, or nobody does.
    Following {
        /// The leader's URL, if there is one.
        leader: Option<String>,
        /// Why there is none, as far as that is known.
        why: Option<String>,
    },
}

/// What the services ask for the jobs.
#[derive(Clone)]
pub(crate) struct Office {
    /// What does not depend on who leads. Its store is for reading.
    pub(crate) around: Surroundings,
    standing: watch::Receiver<Standing>,
}

impl Office {
    /// A server that has its store for itself.
    pub(crate) fn for_good(jobs: Jobs) -> Office {
        let around = jobs.around.clone();
        Office { around, standing: watch::channel(Standing::Leading(Box::new(jobs))).1 }
    }

    /// The jobs, if this server leads.
    ///
    /// # Errors
    /// Says who leads: in words, and in the metadata that clients follow.
    pub(crate) fn jobs(&self) -> Result<Jobs, Status> {
        match &*self.standing.borrow() {
            Standing::Leading(jobs) => Ok(Jobs::clone(jobs)),
            Standing::Following { leader: Some(leader), .. } => Err(self
                .redirected(Status::unavailable(format!("this coordinator does not lead; {leader} does")))),
            Standing::Following { leader: None, why } => {
                let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
                Err(Status::unavailable(format!("no coordinator leads at present{why}")))
            }
        }
    }

    /// Adds to an answer who leads, if it is another one.
    pub(crate) fn redirected(&self, mut status: Status) -> Status {
        self.redirect(status.metadata_mut());
        status
    }

    /// Names the leader in the metadata, if it is another one; with nothing, if none is known.
    pub(crate) fn redirect(&self, metadata: &mut tonic::metadata::MetadataMap) {
        if let Standing::Following { leader, .. } = &*self.standing.borrow()
            && let Ok(leader) = MetadataValue::try_from(leader.as_deref().unwrap_or_default())
        {
            metadata.insert(reknit_proto::LEADER_KEY, leader);
        }
    }

    /// The leader's URL, if another one leads.
    pub(crate) fn leader(&self) -> Option<String> {
        match &*self.standing.borrow() {
            Standing::Leading(_) => None,
            Standing::Following { leader, .. } => leader.clone(),
        }
    }

    /// Tells whether this server leads, now and whenever that changes; returns when it cannot change any more.
    pub(crate) async fn tell_leads(&self, mut told: impl FnMut(bool)) {
        let mut standing = self.standing.clone();
        loop {
            told(matches!(&*standing.borrow_and_update(), Standing::Leading(_)));
            if standing.changed().await.is_err() {
                return;
            }
        }
    }

    /// Which reign this is, if this server leads.
    pub(crate) fn epoch(&self) -> Option<Epoch> {
        match &*self.standing.borrow() {
            Standing::Leading(jobs) => Some(jobs.around.epoch),
            Standing::Following { .. } => None,
        }
    }
}

/// A server's part in the election, for as long as it runs.
pub(crate) struct Election {
    candidate: Candidate,
    cluster: Arc<Cluster>,
    around: Surroundings,
    peers: Peers,
    lease: Duration,
    standing: watch::Sender<Standing>,
    /// Whether it has neither followed nor led yet.
    is_new: AtomicBool,
}

/// How a time of leading ends.
enum End {
    /// The lease is gone.
    Lost(Lost),
    /// Nobody is heard any more.
    Unheard,
    /// The server stops.
    Stopped,
}

/// For which part of the time that a silent member may live a leader may hear nobody, and how often it looks in that time.
const UNHEARD_SHARE: f64 = 0.7;
const UNHEARD_LOOKS: u32 = 20;

/// How long to wait before etcd is asked again when it does not answer.
const ETCD_RETRY: Duration = Duration::from_millis(200);
/// The least time between two looks at the leader's key, whatever hints there are.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

impl Election {
    /// A server that stands for election, and what its services ask.
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        url: String,
        lease: Duration,
        around: Surroundings,
        peers: Peers,
    ) -> (Election, Office) {
        let candidate = Candidate::new(Arc::clone(&cluster), url, lease);
        let (standing, seen) = watch::channel(Standing::Following { leader: None, why: None });
        let office = Office { around: around.clone(), standing: seen };
        let is_new = AtomicBool::new(true);
        (Election { candidate, cluster, around, peers, lease, standing, is_new }, office)
    }

    /// How long a silent leader leads on.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Follows and leads by turns until `stop` is ready; then hands over, if this server leads.
    pub(crate) async fn run(self, mut stop: oneshot::Receiver<()>) {
        loop {
            let reign = tokio::select! {
                reign = self.follow_until_elected() => reign,
                _ = &mut stop => return,
            };
            if self.lead(reign, &mut stop).await.is_none() {
                return;
            }
        }
    }

    async fn follow_until_elected(&self) -> Reign {
        loop {
            match self.try_for_the_lead().await {
                Ok(Some(reign)) => return reign,
                Ok(None) => tokio::time::sleep(LOOK_PAUSE).await,
                Err(why) => {
                    let text = source_text(&why);
                    if self.follows(None, Some(text.clone())) {
                        tracing::warn!(error = %text, "who leads is not known");
                    }
                    tokio::time::sleep(ETCD_RETRY).await;
                }
            }
        }
    }

    /// Looks who leads, and if nobody does, tries to. If somebody does, returns when there is a reason to look again.
    async fn try_for_the_lead(&self) -> Result<Option<Reign>, EtcdError> {
        let (leader, seen) = self.candidate.leader().await?;
        let Some(leader) = leader else {
            return Ok(self.candidate.campaign().await?.ok());
        };
        if leader.url == self.candidate.url() {
            if self.is_new.swap(false, Ordering::Relaxed) {
                tracing::warn!(
                    url = leader.url,
                    "the leader is an earlier start of this server: its lease is ended"
                );
                self.candidate.depose(&leader).await;
            } else {
                // Ending its lease, too, would be answered in kind.
                tracing::error!(
                    url = leader.url,
                    "another coordinator is reached under this server's URL: give each one its own with --advertise"
                );
                tokio::time::sleep(self.lease).await;
            }
            return Ok(None);
        }
        self.is_new.store(false, Ordering::Relaxed);
        self.follows(Some(leader.url.clone()), None);
        // How long it has been silent goes on while the key is looked at.
        let mut dead = std::pin::pin!(self.until_dead(&leader));
        let mut seen = seen;
        loop {
            tokio::select! {
                () = self.candidate.changed(seen) => {}
                // A watch may miss what it was set for.
                () = tokio::time::sleep(self.lease) => {}
                () = &mut dead => {
                    self.candidate.depose(&leader).await;
                    return Ok(self.candidate.campaign().await?.ok());
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
            let (now, seen_now) = self.candidate.leader().await?;
            if now.as_ref() != Some(&leader) {
                return Ok(None);
            }
            seen = seen_now;
        }
    }

    /// Returns when the leader's process is gone, or is silent and has not renewed its lease.
    async fn until_dead(&self, leader: &Leader) {
        let mut acquaintance = Acquaintance::new();
        loop {
            let endpoint = match self.peers.endpoint(&leader.url) {
                Ok(endpoint) => endpoint,
                Err(why) => {
                    tracing::warn!(url = leader.url, error = %why, "the leader cannot be followed; its lease must run out");
                    return std::future::pending().await;
                }
            };
            match follow(endpoint, self.lease, &mut acquaintance).await {
                Fate::Gone => {
                    tracing::warn!(url = leader.url, "the leader's process is gone");
                    return;
                }
                Fate::Silent if self.candidate.has_lapsed(leader).await => {
                    tracing::warn!(url = leader.url, "the leader is silent and does not renew its lease");
                    return;
                }
                // Only the way between the two is cut: etcd hears it.
                Fate::Silent => tokio::time::sleep(ETCD_RETRY).await,
            }
        }
    }

    /// Says so to the services, and whether that is news.
    fn follows(&self, leader: Option<String>, why: Option<String>) -> bool {
        self.standing.send_if_modified(|standing| {
            let same =
                matches!(standing, Standing::Following { leader: l, why: w } if *l == leader && *w == why);
            if !same {
                if let Some(leader) = &leader {
                    tracing::info!(%leader, "following");
                }
                *standing = Standing::Following { leader, why };
            }
            !same
        })
    }

    /// Leads until the lease is lost, or to the end (nothing).
    async fn lead(&self, mut reign: Reign, stop: &mut oneshot::Receiver<()>) -> Option<()> {
        let epoch = reign.epoch;
        let store = Arc::new(Etcd::new(Arc::clone(&self.cluster), Some(epoch)));
        let jobs = Jobs::new(self.around.reigning(store, epoch));
        tracing::info!(epoch = epoch.0, "leading");
        self.is_new.store(false, Ordering::Relaxed);
        self.standing.send_replace(Standing::Leading(Box::new(jobs.clone())));
        let taking_up = tokio::spawn(take_up(jobs.clone()));
        let end = tokio::select! {
            biased;
            lost = self.candidate.renew(&mut reign) => End::Lost(lost),
            () = jobs.was_deposed() => End::Lost(Lost::Taken),
            () = self.unheard() => End::Unheard,
            _ = &mut *stop => End::Stopped,
        };
        taking_up.abort();
        match end {
            End::Stopped => {
                jobs.stop().await;
                // Others take over as soon as they see it.
                self.candidate.resign(&reign).await;
                self.follows(None, Some("this coordinator is stopping".to_owned()));
                None
            }
            End::Lost(lost) => {
                tracing::warn!(epoch = epoch.0, ?lost, "leading no more");
                self.follows(None, Some("the leader's lease was lost a moment ago".to_owned()));
                jobs.abandon().await;
                Some(())
            }
            End::Unheard => {
                tracing::warn!(
                    epoch = epoch.0,
                    "none of several members is heard any more: this coordinator is cut off from them, most likely; another one \
                     may lead"
                );
                self.follows(None, Some("the leader could hear no member".to_owned()));
                jobs.abandon().await;
                self.candidate.resign(&reign).await;
                // If there is no other one that can, this one tries again; members have a new time to come back then.
                tokio::select! {
                    () = tokio::time::sleep(self.lease) => Some(()),
                    _ = stop => None,
                }
            }
        }
    }

    /// Returns when there are several members, and none of them has said anything for most of the time that a silent member
    /// may live, although some had since this server leads. That all of them die at once is less likely than that this
    /// server is cut off from them: it makes way before it takes them for dead. The next leader gives them time to come,
    /// and believes what it sees.
    async fn unheard(&self) {
        let counters = &self.around.counters;
        let look_every = self.around.timing.silence / UNHEARD_LOOKS;
        let at_first = counters.heard();
        let mut heard = at_first;
        let mut since = Instant::now();
        let mut looked = Instant::now();
        loop {
            tokio::time::sleep(look_every).await;
            // Who was held up itself has not listened.
            let was_held_up = looked.elapsed() > look_every * 2;
            looked = Instant::now();
            let now = counters.heard();
            if now != heard || now == at_first || counters.members() < 2 || was_held_up {
                (heard, since) = (now, looked);
            } else if since.elapsed() >= self.around.timing.lease(counters.members()).mul_f64(UNHEARD_SHARE) {
                return;
            }
        }
    }
}

/// Takes up all jobs, so that who does not come back is missed. Who does come back before that is not kept waiting: a job
/// is taken up when somebody asks for it.
async fn take_up(jobs: Jobs) {
    loop {
        match jobs.load_all().await {
            Ok(known) => return tracing::info!(jobs = known, "all jobs are taken up"),
            Err(why) => {
                tracing::error!(error = %source_text(&why), "not all jobs could be taken up; trying again");
                tokio::time::sleep(ETCD_RETRY).await;
            }
        }
    }
}
