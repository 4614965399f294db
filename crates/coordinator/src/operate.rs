//! The service for those who act. A call returns when what it changed is saved.

use std::time::Duration;

use reknit_membership::MemberName;
use reknit_membership::event::{Answer, Operation};
use reknit_proto::v1;
use reknit_proto::v1::operate_server::Operate;
use tonic::{Request, Response, Status};

use crate::access::Identity;
use crate::inspect::{find, unanswered};
use crate::job::Input;
use crate::office::Office;

pub(crate) struct OperateService {
    office: Office,
}

impl OperateService {
    pub(crate) fn new(office: Office) -> OperateService {
        OperateService { office }
    }

    async fn operate(
        &self,
        who: &Identity,
        job: &str,
        operation: Operation,
    ) -> Result<Response<v1::OperateReply>, Status> {
        let handle = find(&self.office.jobs()?, who, job).await?;
        let answer = handle.ask(|answer| Input::Operate { operation, answer }).await.map_err(unanswered)?;
        answered(answer)
    }
}

fn answered(answer: Answer) -> Result<Response<v1::OperateReply>, Status> {
    match answer {
        Answer::Done => Ok(Response::new(v1::OperateReply {})),
        Answer::NoSuchMember { name, known } => {
            let known: Vec<&str> = known.iter().map(MemberName::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Err(Status::not_found(format!("no member is called {name}; the job's members: {known}")))
        }
        Answer::BadSpec(why) => Err(Status::invalid_argument(why.to_string())),
        Answer::JobClosed(closure) => Err(Status::failed_precondition(format!("the job is over: {closure}"))),
        Answer::NotRunning => Err(Status::failed_precondition("the job has no running world")),
    }
}

fn member(name: &str) -> Result<MemberName, Status> {
    MemberName::new(name).map_err(|why| Status::invalid_argument(why.to_string()))
}

#[tonic::async_trait]
impl Operate for OperateService {
    async fn drain(&self, request: Request<v1::MemberRequest>) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        self.operate(&who, &request.job, Operation::Drain { name: member(&request.member)? }).await
    }

    async fn undrain(
        &self,
        request: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        self.operate(&who, &request.job, Operation::Undrain { name: member(&request.member)? }).await
    }

    async fn evict(&self, request: Request<v1::MemberRequest>) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        self.operate(&who, &request.job, Operation::Evict { name: member(&request.member)? }).await
    }

    async fn notice(
        &self,
        request: Request<v1::NoticeRequest>,
    ) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        let deadline = self.office.around.clock.now().after(Duration::from_millis(request.left_ms));
        self.operate(&who, &request.job, Operation::Notice { name: member(&request.member)?, deadline }).await
    }

    async fn resize(
        &self,
        request: Request<v1::ResizeRequest>,
    ) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        self.operate(&who, &request.job, Operation::Resize { min: request.min, max: request.max }).await
    }

    async fn save_now(&self, request: Request<v1::JobRequest>) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        self.operate(&who, &request.into_inner().job, Operation::SaveNow).await
    }

    async fn close(&self, request: Request<v1::JobRequest>) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        self.operate(&who, &request.into_inner().job, Operation::Close).await
    }

    async fn forget(&self, request: Request<v1::JobRequest>) -> Result<Response<v1::OperateReply>, Status> {
        let who = Identity::of(&request);
        let request = request.into_inner();
        let handle = find(&self.office.jobs()?, &who, &request.job).await?;
        let forgotten = handle
            .ask(|answer| Input::Forget { answer })
            .await
            .map_err(|_| Status::unavailable("the record could not be removed; try again"))?;
        if forgotten {
            Ok(Response::new(v1::OperateReply {}))
        } else {
            Err(Status::failed_precondition(
                "the job is not over yet; close it first, and give its workers a few seconds to end",
            ))
        }
    }
}
