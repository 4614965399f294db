//! What a launcher asks a coordinator beside its stream.

use std::collections::VecDeque;
use std::time::Duration;

use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::Launcher;
use crate::credentials::Authorization;

type Authorized = InterceptedService<Channel, Authorization>;

/// How long one question to a coordinator may take.
const ASK: Duration = Duration::from_secs(2);

impl Launcher {
    /// Whether the job has a world at present, as a coordinator says: who waits for one all the same is one too many for
    /// it. `None` if no coordinator says anything.
    pub fn job_has_a_world(&self) -> Option<bool> {
        let job = self.options.job.to_string();
        let status = self.ask(async |channel| {
            let request = v1::StatusRequest { job: job.clone(), members_max: 1 };
            InspectClient::new(channel).status(request).await
        })?;
        Some(match status.phase() {
            v1::Phase::Establishing | v1::Phase::Restoring | v1::Phase::Running => true,
            v1::Phase::Unspecified | v1::Phase::Forming | v1::Phase::Closed => false,
        })
    }

    /// Ends the job for all its members. Returns whether a coordinator has taken that; it follows soon after then.
    pub fn close_job(&self) -> bool {
        let job = self.options.job.to_string();
        let closed = self.ask(async |channel| {
            OperateClient::new(channel).close(v1::JobRequest { job: job.clone() }).await
        });
        closed.is_some()
    }

    /// Puts a question to the coordinators, and to whom they say leads, until one answers it.
    fn ask<T>(&self, question: impl AsyncFn(Authorized) -> Result<Response<T>, Status>) -> Option<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let mut left: VecDeque<String> = self.options.coordinators.iter().cloned().collect();
        let mut followed = 0;
        while let Some(coordinator) = left.pop_front() {
            let asking = async {
                let channel = self.options.credentials.endpoint(&coordinator).ok()?.connect().await.ok()?;
                let authorization = self.options.credentials.authorization().ok()?;
                Some(question(InterceptedService::new(channel, authorization)).await)
            };
            match runtime.block_on(async { tokio::time::timeout(ASK, asking).await }) {
                Ok(Some(Ok(answer))) => return Some(answer.into_inner()),
                Ok(Some(Err(status))) => {
                    let leader = status.metadata().get(reknit_proto::LEADER_KEY);
                    let leader = leader.and_then(|leader| leader.to_str().ok()).filter(|it| !it.is_empty());
                    if let Some(leader) = leader
                        && followed < self.options.coordinators.len()
                        && reknit_proto::may_be_sent(&coordinator, leader)
                    {
                        followed += 1;
                        left.push_front(leader.to_owned());
                    }
                }
                Ok(None) | Err(_) => {}
            }
        }
        None
    }
}
