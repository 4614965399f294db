//! A follower's connection to the leader, by which it learns of the leader's death sooner than etcd does.
//!
//! A process that is killed has its connections closed by the kernel, and its port refuses new ones: that is proof enough
//! to end its lease for it. One that is stopped, or cut off, says nothing: then the follower waits for as long as the lease
//! lasts, and asks etcd whether the leader has renewed it.

use std::io;
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// What has become of the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nobody listens where it has been heard before.
    Gone,
    /// It has said nothing for as long as it may.
    Silent,
}

/// The pause before the next attempt.
const RETRY: Duration = Duration::from_millis(20);

/// What a follower knows of the leader.
#[derive(Debug)]
pub(crate) struct Acquaintance {
    /// Until when it has been heard, or since when it has not been.
    heard: Instant,
    /// Whether it has ever been heard. A port that refuses connections proves nothing otherwise: there may be a wall.
    ever: bool,
}

impl Acquaintance {
    pub(crate) fn new() -> Acquaintance {
        Acquaintance { heard: Instant::now(), ever: false }
    }
}

/// Follows the leader until it is gone, or has been silent for as long as `silence`.
pub(crate) async fn follow(endpoint: Endpoint, silence: Duration, leader: &mut Acquaintance) -> Fate {
    // The connection notices within twice this that nobody answers.
    let ask_every = silence / 8;
    let endpoint = endpoint
        .connect_timeout(ask_every)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(ask_every)
        .keep_alive_timeout(ask_every)
        .keep_alive_while_idle(true);
    loop {
        let left = (leader.heard + silence).saturating_duration_since(Instant::now());
        let patience = ask_every.min(left).max(RETRY);
        match tokio::time::timeout(ask_every * 2, endpoint.connect()).await {
            Ok(Ok(channel)) => {
                let mut health = HealthClient::new(channel);
                let watched = health.watch(HealthCheckRequest { service: String::new() });
                if let Ok(Ok(response)) = tokio::time::timeout(patience, watched).await {
                    *leader = Acquaintance { heard: Instant::now(), ever: true };
                    let mut said = response.into_inner();
                    // Pings are answered beneath us: as long as the stream is open, somebody is there.
                    while let Ok(Some(_)) = said.message().await {}
                    // A connection that was given up had been silent for a while.
                    leader.heard = Instant::now().checked_sub(ask_every * 2).unwrap_or(leader.heard);
                }
            }
            Ok(Err(why)) if leader.ever && is_refused(&why) => return Fate::Gone,
            // There is no connection, or there is none in time (who is stopped accepts one, and shakes no hands).
            Ok(Err(_)) | Err(_) => {}
        }
        if leader.heard.elapsed() >= silence {
            return Fate::Silent;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether the machine is there and says that nobody listens.
fn is_refused(why: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(why), |why| why.source())
        .filter_map(|why| why.downcast_ref::<io::Error>())
        .any(|why| why.kind() == io::ErrorKind::ConnectionRefused)
}
