//! Whether a connection that is there is one.
//!
//! In TLS 1.3 a coordinator judges this side's certificate after this side has begun to speak. Its verdict may arrive
//! before the first call is made, which then hears only that there is no connection any more; the second try hears why.

use reknit_trainer::credentials::TlsTrouble;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// How often the verdict may be missed.
const TRIES: usize = 5;

/// A connection on which the coordinator answers, or why there is none.
pub(super) async fn connect(endpoint: &Endpoint) -> Result<Channel, anyhow::Error> {
    if endpoint.uri().scheme_str() != Some("https") {
        return Ok(endpoint.connect().await?);
    }
    let mut tries = 0;
    loop {
        tries += 1;
        // Who is stopped accepts a connection and shakes no hands.
        let channel = tokio::time::timeout(super::PATIENCE, endpoint.connect()).await??;
        let mut health = HealthClient::new(channel.clone());
        let asked = health.check(HealthCheckRequest::default());
        match tokio::time::timeout(super::PATIENCE, asked).await {
            // What it answers is its own affair; a status that has a source comes from the way to it.
            Ok(Ok(_)) => return Ok(channel),
            Ok(Err(status)) if std::error::Error::source(&status).is_none() => return Ok(channel),
            Ok(Err(status)) if TlsTrouble::of(&status).is_some() || tries == TRIES => {
                return Err(status.into());
            }
            Ok(Err(_)) => {}
            Err(late) => return Err(late.into()),
        }
    }
}
