//! Talking to a coordinator.

mod verdict;

use std::path::PathBuf;
use std::time::Duration;

use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use reknit_trainer::Credentials;
use reknit_trainer::credentials::Authorization;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::args::Connection;
use crate::failure::{self, Failure};

/// A connection on which each call shows the token, if there is one.
pub(crate) type Authorized = InterceptedService<Channel, Authorization>;

/// How long one attempt may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A coordinator that has vanished shows soon, also to who only listens.
fn endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(PATIENCE)
        .http2_keep_alive_interval(PATIENCE)
        .keep_alive_timeout(PATIENCE)
        .keep_alive_while_idle(true)
}

impl Connection {
    /// Runs `talk` on an event loop of its own, with a connection to the first coordinator that answers.
    pub(crate) fn run<T>(
        &self,
        talk: impl AsyncFnOnce(Authorized) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async { talk(self.connect().await?).await })
    }

    /// What is shown to the coordinator, and what it is checked by: the flags, and REKNIT_TOKEN.
    fn credentials(&self) -> Result<Credentials, Failure> {
        let named = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let token = Credentials::from_env().map_err(failure::credentials)?.token;
        let (ca, cert, key) = (named(&self.ca), named(&self.cert), named(&self.key));
        Ok(Credentials { ca, cert, key, token, token_file: named(&self.token_file) })
    }

    async fn connect(&self) -> Result<Authorized, Failure> {
        let credentials = self.credentials()?;
        let authorization = credentials.authorization().map_err(failure::credentials)?;
        let mut last = anyhow::anyhow!("no address was given");
        for coordinator in self.coordinator.split(',').map(str::trim) {
            let address = credentials.endpoint(coordinator).map_err(failure::credentials)?;
            match verdict::connect(&endpoint(address)).await {
                Ok(channel) => return Ok(InterceptedService::new(channel, authorization)),
                Err(why) => last = why,
            }
        }
        Err(failure::unreachable(&self.coordinator, last))
    }

    /// Asks the inspect service one question.
    pub(crate) fn inspect<T>(
        &self,
        ask: impl AsyncFnOnce(&mut InspectClient<Authorized>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, Failure> {
        self.run(async |channel| {
            let mut client = InspectClient::new(channel);
            self.answer(tokio::time::timeout(PATIENCE, ask(&mut client)).await)
        })
    }

    /// Asks the operate service for one thing.
    pub(crate) fn operate<T>(
        &self,
        ask: impl AsyncFnOnce(&mut OperateClient<Authorized>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, Failure> {
        self.run(async |channel| {
            let mut client = OperateClient::new(channel);
            self.answer(tokio::time::timeout(PATIENCE, ask(&mut client)).await)
        })
    }

    fn answer<T>(
        &self,
        answer: Result<Result<tonic::Response<T>, tonic::Status>, tokio::time::error::Elapsed>,
    ) -> Result<T, Failure> {
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(failure::call(&status, &self.coordinator)),
            Err(_) => {
                Err(failure::unreachable(&self.coordinator, anyhow::anyhow!("no answer within {PATIENCE:?}")))
            }
        }
    }
}
