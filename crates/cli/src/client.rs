//! Talking to a coordinator: to the one that leads, if there are several.

mod verdict;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use reknit_proto::{LEADER_KEY, may_be_sent, v1};
use reknit_trainer::Credentials;
use reknit_trainer::credentials::Authorization;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::args::Connection;
use crate::failure::{self, Failure};

/// A connection on which each call shows the token, if there is one.
pub(crate) type Authorized = InterceptedService<Channel, Authorization>;

/// How long one attempt may take, and how long a change of leader is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// The pause before coordinators of which none leads are asked again.
const RETRY: Duration = Duration::from_millis(100);

impl Connection {
    /// Runs `talk` on an event loop of its own.
    pub(crate) fn run<T>(&self, talk: impl AsyncFnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(talk())
    }

    /// What is shown to the coordinator, and what it is checked by: the flags, and REKNIT_TOKEN.
    pub(crate) fn credentials(&self) -> Result<Credentials, Failure> {
        let named = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let token = Credentials::from_env().map_err(failure::credentials)?.token;
        let (ca, cert, key) = (named(&self.ca), named(&self.cert), named(&self.key));
        Ok(Credentials { ca, cert, key, token, token_file: named(&self.token_file) })
    }

    /// Asks the inspect service one question.
    pub(crate) fn inspect<T>(
        &self,
        ask: impl AsyncFn(InspectClient<Authorized>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.run(async || self.call(async |channel| ask(InspectClient::new(channel)).await).await)
    }

    /// Asks the operate service for one thing.
    pub(crate) fn operate<T>(
        &self,
        ask: impl AsyncFn(OperateClient<Authorized>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.run(async || self.call(async |channel| ask(OperateClient::new(channel)).await).await)
    }

    /// The coordinators that were named.
    fn coordinators(&self) -> impl Iterator<Item = String> {
        self.coordinator.split(',').map(|coordinator| coordinator.trim().to_owned())
    }

    /// Whether more than one was named.
    pub(crate) fn is_several(&self) -> bool {
        self.coordinators().count() > 1
    }

    /// Puts a call to the coordinators until the one that leads answers. What another one knows is taken if that one
    /// cannot be reached.
    pub(crate) async fn call<T>(
        &self,
        ask: impl AsyncFn(Authorized) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let began = Instant::now();
        loop {
            match self.round(&ask).await {
                Round::Answered(answer) => return Ok(answer),
                Round::Failed(failure) => return Err(failure),
                // Somebody will lead in a moment, or else something is wrong that the coordinators know best.
                Round::Leaderless(status) if began.elapsed() >= PATIENCE => {
                    return Err(failure::call(&status, &self.coordinator));
                }
                Round::Leaderless(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// What each of the coordinators says of itself.
    pub(crate) async fn each(&self) -> Vec<(String, Result<v1::ServerStatus, Failure>)> {
        let mut answers = Vec::new();
        for coordinator in self.coordinators() {
            let asking = async {
                let channel = match self.channel(&coordinator).await {
                    Ok(channel) => channel,
                    Err(Unreached::Senseless(failure)) => return Err(failure),
                    Err(Unreached::Connection(why)) => return Err(failure::unreachable(&coordinator, why)),
                };
                let answer = InspectClient::new(channel).server(v1::ServerRequest {}).await;
                answer.map(Response::into_inner).map_err(|status| failure::call(&status, &coordinator))
            };
            let answer = tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| {
                let why = anyhow::anyhow!("no answer within {PATIENCE:?}");
                Err(failure::unreachable(&coordinator, why))
            });
            answers.push((coordinator, answer));
        }
        answers
    }

    /// Asks each coordinator once, and whoever they say leads.
    async fn round<T>(&self, ask: &impl AsyncFn(Authorized) -> Result<Response<T>, Status>) -> Round<T> {
        let mut left: VecDeque<String> = self.coordinators().collect();
        let mut asked = Vec::new();
        // Who was sent to, not named.
        let mut sent_to = None;
        let mut last =
            Round::Failed(failure::unreachable(&self.coordinator, anyhow::anyhow!("no address was given")));
        while let Some(coordinator) = left.pop_front() {
            if asked.contains(&coordinator) {
                continue;
            }
            asked.push(coordinator.clone());
            let channel = match self.channel(&coordinator).await {
                Ok(channel) => channel,
                // A name that makes no sense is the user's; what one is sent to is not.
                Err(Unreached::Senseless(failure)) if sent_to.as_ref() != Some(&coordinator) => {
                    return Round::Failed(failure);
                }
                Err(Unreached::Senseless(failure)) => {
                    last.or(Round::Failed(failure));
                    continue;
                }
                Err(Unreached::Connection(why)) => {
                    last.or(Round::Failed(failure::unreachable(&self.coordinator, why)));
                    continue;
                }
            };
            let answer = match tokio::time::timeout(PATIENCE, ask(channel)).await {
                Ok(answer) => answer,
                Err(_) => {
                    let why = anyhow::anyhow!("no answer within {PATIENCE:?}");
                    last.or(Round::Failed(failure::unreachable(&self.coordinator, why)));
                    continue;
                }
            };
            let leader = leader(answer.as_ref().map_or_else(Status::metadata, Response::metadata));
            let leads = leader.is_none();
            if let Some(leader) = leader.filter(|leader| may_be_sent(&coordinator, leader)) {
                sent_to = Some(leader.clone());
                left.push_front(leader);
            }
            match answer {
                Ok(response) if leads => return Round::Answered(response.into_inner()),
                Ok(response) => last = Round::Answered(response.into_inner()),
                Err(status) if !leads || status.code() == Code::Unavailable => {
                    last.or(Round::Leaderless(status));
                }
                Err(status) => return Round::Failed(failure::call(&status, &coordinator)),
            }
        }
        last
    }

    async fn channel(&self, coordinator: &str) -> Result<Authorized, Unreached> {
        let senseless = |why| Unreached::Senseless(failure::credentials(why));
        let credentials = self.credentials().map_err(Unreached::Senseless)?;
        let authorization = credentials.authorization().map_err(senseless)?;
        // A coordinator that has vanished shows soon, also to who only listens.
        let endpoint = credentials
            .endpoint(coordinator)
            .map_err(senseless)?
            .connect_timeout(PATIENCE)
            .http2_keep_alive_interval(PATIENCE)
            .keep_alive_timeout(PATIENCE)
            .keep_alive_while_idle(true);
        let channel = verdict::connect(&endpoint).await.map_err(Unreached::Connection)?;
        Ok(InterceptedService::new(channel, authorization))
    }
}

/// What came of asking all coordinators.
enum Round<T> {
    Answered(T),
    /// None of them leads at present.
    Leaderless(Status),
    Failed(Failure),
}

impl<T> Round<T> {
    /// Takes `other` for the outcome unless what is known already says more.
    fn or(&mut self, other: Round<T>) {
        let says_more = match self {
            Round::Answered(_) => true,
            Round::Leaderless(_) => matches!(other, Round::Failed(_)),
            Round::Failed(_) => false,
        };
        if !says_more {
            *self = other;
        }
    }
}

/// Why there is no connection.
enum Unreached {
    /// The address, or what is to be shown there, makes no sense.
    Senseless(Failure),
    /// Nobody answers there.
    Connection(anyhow::Error),
}

/// The coordinator that leads, if an answer says that it is another one.
fn leader(metadata: &MetadataMap) -> Option<String> {
    metadata.get(LEADER_KEY).and_then(|leader| leader.to_str().ok()).map(str::to_owned)
}
