//! Who leads: one key under a lease.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, LeaseTimeToLiveResponse, PutOptions, Txn, TxnOp, WatchOptions};
use tokio::time::{Instant, timeout_at};

use super::cluster::{Cluster, EtcdError, first_read};
use crate::store::Epoch;

/// Whoever holds the leader's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leader {
    /// How it is reached.
    pub(crate) url: String,
    /// Which reign it is.
    pub(crate) epoch: Epoch,
    /// The lease that the key is under.
    pub(crate) lease: i64,
}

/// The right to write, until somebody ends it or time does.
#[derive(Debug)]
pub(crate) struct Reign {
    pub(crate) epoch: Epoch,
    lease: i64,
    /// How long the lease lives after a renewal.
    ttl: Duration,
    /// Until then nobody else can have been given the lease's key, by our own clock: etcd counts from a later instant.
    pub(crate) valid_until: Instant,
}

impl Reign {
    /// How often it is renewed: three times in vain before it is lost.
    pub(crate) fn renew_every(&self) -> Duration {
        self.ttl / 4
    }

    /// Until when an answer to what is sent now is waited for.
    fn patience(&self, sent: Instant) -> Instant {
        self.valid_until.min(sent + self.renew_every())
    }

    fn is_over(&self) -> bool {
        self.valid_until <= Instant::now()
    }
}

/// One coordinator's part in the election.
pub(crate) struct Candidate {
    cluster: Arc<Cluster>,
    url: String,
    lease: Duration,
}

impl Candidate {
    pub(crate) fn new(cluster: Arc<Cluster>, url: String, lease: Duration) -> Candidate {
        Candidate { cluster, url, lease }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Who leads, as etcd has it now, and etcd's revision then.
    pub(crate) async fn leader(&self) -> Result<(Option<Leader>, i64), EtcdError> {
        let key = self.cluster.key("leader");
        let found = self
            .cluster
            .call(|mut client| {
                let key = key.clone();
                async move { client.get(key, None).await }
            })
            .await?;
        Ok((found.kvs().first().map(leader), found.header().map_or(0, etcd_client::ResponseHeader::revision)))
    }

    /// Takes the lead if nobody has it; else says who has.
    pub(crate) async fn campaign(&self) -> Result<Result<Reign, Leader>, EtcdError> {
        let asked = Instant::now();
        let seconds = self.lease.as_secs_f64().ceil() as i64;
        let granted =
            self.cluster.call(|mut client| async move { client.lease_grant(seconds, None).await }).await?;
        let (lease, ttl) = (granted.id(), Duration::from_secs(granted.ttl().unsigned_abs()));
        if granted.ttl() > seconds {
            tracing::warn!(asked_s = seconds, granted_s = granted.ttl(), "etcd grants no lease this short");
        }
        let key = self.cluster.key("leader");
        let put = TxnOp::put(key.clone(), self.url.clone(), Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new()
            .when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then([put])
            .or_else([TxnOp::get(key, None)]);
        let done = self.cluster.transact(txn).await?;
        let reign = |epoch| Reign { epoch, lease, ttl, valid_until: asked + ttl };
        if done.succeeded() {
            let revision = done.header().map_or(0, |header| header.revision().unsigned_abs());
            return Ok(Ok(reign(Epoch(revision))));
        }
        match first_read(&done).as_ref().map(leader) {
            // The first attempt was carried out, and only its answer was lost.
            Some(found) if found.lease == lease => Ok(Ok(reign(found.epoch))),
            Some(found) => {
                self.end_lease(lease).await;
                Ok(Err(found))
            }
            // A transaction is answered as of one instant; what it compares and what it reads agree.
            None => Err(self.cluster.unreachable("it answers an election with nothing")),
        }
    }

    /// Ends a reign that is over, or that its leader hands over.
    pub(crate) async fn resign(&self, reign: &Reign) {
        self.end_lease(reign.lease).await;
    }

    /// Ends a leader's lease for it. Whether it is dead or not: it can write nothing from then on.
    pub(crate) async fn depose(&self, leader: &Leader) {
        self.end_lease(leader.lease).await;
    }

    async fn end_lease(&self, lease: i64) {
        if let Err(why) =
            self.cluster.call(|mut client| async move { client.lease_revoke(lease).await }).await
        {
            // Most likely it has ended already; if not, time will end it.
            tracing::debug!(error = %why, "a lease could not be ended");
        }
    }

    /// Whether the leader has not renewed its lease for so long that less than a second is left of it.
    pub(crate) async fn has_lapsed(&self, leader: &Leader) -> bool {
        let lease = leader.lease;
        let left =
            self.cluster.call(|mut client| async move { client.lease_time_to_live(lease, None).await }).await;
        left.as_ref().map(LeaseTimeToLiveResponse::ttl).is_ok_and(|seconds| seconds <= 0)
    }

    /// Renews a reign until that fails, and returns then. Until then the reign's `valid_until` is moved on.
    pub(crate) async fn renew(&self, reign: &mut Reign) -> Lost {
        let mut said_of = Instant::now();
        loop {
            let until = reign.valid_until;
            let at = self.cluster.current_node();
            match renew_on_one_stream(&self.cluster, at, reign).await {
                Ok(()) => return Lost::Taken,
                Err(_) if reign.is_over() => return Lost::Unrenewed,
                // Once for every renewal that does not come at first.
                Err(why) if std::mem::replace(&mut said_of, until) != until => {
                    tracing::warn!(error = %why, "the leader's lease could not be renewed; trying another node");
                }
                Err(_) => {}
            }
            self.cluster.pass_over(at);
            tokio::time::sleep_until(reign.valid_until.min(Instant::now() + RETRY)).await;
        }
    }

    /// Returns when the leader's key has changed since etcd's revision `seen`, or when that cannot be known any more: a
    /// hint, after which to look.
    pub(crate) async fn changed(&self, seen: i64) {
        let key = self.cluster.key("leader");
        let from = seen.saturating_add(1);
        let at = self.cluster.current_node();
        let Ok(mut client) = self.cluster.client_of(at).await else { return self.cluster.pass_over(at) };
        let options = WatchOptions::new().with_start_revision(from);
        let Ok(mut watch) = client.watch(key, Some(options)).await else { return self.cluster.pass_over(at) };
        while let Ok(Some(response)) = watch.message().await {
            if !response.events().is_empty() || response.canceled() {
                return;
            }
        }
    }
}

/// How long a failed renewal waits before the next.
const RETRY: Duration = Duration::from_millis(20);

/// How a reign ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Somebody ended it, or etcd did.
    Taken,
    /// It could not be renewed in time.
    Unrenewed,
}

/// Renews until the stream or the time runs out (an error), or until the lease is gone.
async fn renew_on_one_stream(cluster: &Cluster, at: usize, reign: &mut Reign) -> Result<(), EtcdError> {
    let fail = |why: String| cluster.unreachable(&why);
    let patience = reign.renew_every();
    let late = |what: &'static str| move |_| fail(format!("no {what} within {patience:?}"));
    let mut sent = Instant::now();
    let mut client =
        timeout_at(reign.patience(sent), cluster.client_of(at)).await.map_err(late("connection"))??;
    // Opening the stream is the first renewal, too.
    let opening = timeout_at(reign.patience(sent), client.lease_keep_alive(reign.lease));
    let (mut keeper, mut answers) = match opening.await.map_err(late("stream"))? {
        Ok(opened) => opened,
        // What the client makes of an answer that says the lease is gone.
        Err(etcd_client::Error::LeaseKeepAliveError(why)) if why.contains("not found") => return Ok(()),
        Err(why) => return Err(fail(why.to_string())),
    };
    loop {
        // An answer that comes after the time was up (this process was stopped, say) is worth nothing.
        if reign.is_over() {
            return Err(fail("the lease has run out".to_owned()));
        }
        reign.valid_until = reign.valid_until.max(sent + reign.ttl);
        tokio::time::sleep_until(sent + patience).await;
        sent = Instant::now();
        keeper.keep_alive().await.map_err(|why| fail(why.to_string()))?;
        let answer = timeout_at(reign.patience(sent), answers.message()).await.map_err(late("renewal"))?;
        match answer.map_err(|why| fail(why.to_string()))? {
            Some(answer) if answer.ttl() > 0 => {}
            Some(_) => return Ok(()),
            None => return Err(fail("it ended the stream".to_owned())),
        }
    }
}

fn leader(kv: &etcd_client::KeyValue) -> Leader {
    Leader {
        url: String::from_utf8_lossy(kv.value()).into_owned(),
        epoch: Epoch(kv.create_revision().unsigned_abs()),
        lease: kv.lease(),
    }
}
