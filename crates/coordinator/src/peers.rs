//! How a coordinator reaches the others.

use tonic::transport::{Endpoint, Error};

/// Makes connections to other coordinators.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peers {}

impl Peers {
    /// The way to a coordinator.
    #[expect(clippy::unused_self, reason = "certificates will be in it")]
    pub(crate) fn endpoint(&self, url: &str) -> Result<Endpoint, Error> {
        Endpoint::from_shared(url.to_owned())
    }
}
