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
    /// Nobody listens where it listened.
    Gone,
    /// It has said nothing for as long as it may.
    Silent,
}

/// The pause before the next attempt.
const RETRY: Duration = Duration::from_millis(20);

/// Follows the leader until it is gone, or has been silent since `heard` for as long as `silence`.
pub(crate) async fn follow(endpoint: Endpoint, silence: Duration, heard: &mut Instant) -> Fate {
    // The connection notices within twice this that nobody answers.
    let ask_every = silence / 8;
    let endpoint = endpoint
        .connect_timeout(ask_every)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(ask_every)
        .keep_alive_timeout(ask_every)
        .keep_alive_while_idle(true);
    loop {
        let patience = ask_every.min((*heard + silence).saturating_duration_since(Instant::now())).max(RETRY);
        match endpoint.connect().await {
            Ok(channel) => {
                let mut health = HealthClient::new(channel);
                let watched = health.watch(HealthCheckRequest { service: String::new() });
                if let Ok(Ok(response)) = tokio::time::timeout(patience, watched).await {
                    *heard = Instant::now();
                    let mut said = response.into_inner();
                    // Pings are answered beneath us: as long as the stream is open, somebody is there.
                    while let Ok(Some(_)) = said.message().await {}
                    // A connection that was given up had been silent for a while.
                    *heard = Instant::now().checked_sub(ask_every * 2).unwrap_or(*heard);
                }
            }
            Err(why) if is_refused(&why) => return Fate::Gone,
            Err(_) => {}
        }
        if heard.elapsed() >= silence {
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
