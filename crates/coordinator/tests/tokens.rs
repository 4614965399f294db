//! Who may touch what, over real connections: each call of each service, with the tokens of two jobs.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::path::{Path, PathBuf};

use common::{Running, eventually, introduction};
use reknit_coordinator::{Config, tokens};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use reknit_proto::{Token, token::BadToken};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

fn token(name: &str) -> Token {
    Token::new(&format!("a-token-for-tests-{name}")).unwrap()
}

fn line(jobs: &str, name: &str) -> String {
    format!("{jobs} {}\n", tokens::hash(&token(name)).to_hex())
}

fn listed(dir: &Path, lines: &[String]) -> PathBuf {
    let path = dir.join("tokens");
    std::fs::write(&path, lines.concat()).unwrap();
    path
}

async fn server(path: PathBuf) -> Running {
    Running::start(Config { tokens: Some(path), ..Config::default() }).await
}

/// Somebody with a token, or with none.
struct Caller {
    channel: Channel,
    token: Option<Token>,
}

impl Caller {
    async fn new(server: &Running, token: Option<Token>) -> Caller {
        let channel = Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
        Caller { channel, token }
    }

    fn ask<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            token.attach(request.metadata_mut());
        }
        request
    }

    async fn jobs(&self) -> Result<Vec<String>, Status> {
        let reply = InspectClient::new(self.channel.clone()).jobs(self.ask(v1::JobsRequest {})).await?;
        Ok(reply.into_inner().jobs.into_iter().map(|job| job.job).collect())
    }

    async fn attend(&self, job: &str, member: u64) -> Result<Attending, Status> {
        let (said, outgoing) = mpsc::channel(4);
        said.send(introduction(job, member)).await.unwrap();
        let mut client = RendezvousClient::new(self.channel.clone());
        let heard = client.attend(self.ask(ReceiverStream::new(outgoing))).await?.into_inner();
        Ok(Attending { _said: said, heard })
    }

    /// What each call about a job comes to.
    async fn everything_about(&self, job: &str) -> Vec<Result<(), Status>> {
        let job = job.to_owned();
        let named = || v1::JobRequest { job: job.clone() };
        let member = || v1::MemberRequest { job: job.clone(), member: "member-1".to_owned() };
        let status = || v1::StatusRequest { job: job.clone(), members_max: 0 };
        let notice = v1::NoticeRequest { job: job.clone(), member: "member-1".to_owned(), left_ms: 1 };
        let mut inspect = InspectClient::new(self.channel.clone());
        let mut operate = OperateClient::new(self.channel.clone());
        let mut rendezvous = RendezvousClient::new(self.channel.clone());
        let roster = v1::RosterRequest { job: job.clone(), ..v1::RosterRequest::default() };
        vec![
            self.attend(&job, 99).await.map(drop),
            rendezvous.roster(self.ask(roster)).await.map(drop),
            inspect.status(self.ask(status())).await.map(drop),
            inspect.watch(self.ask(status())).await.map(drop),
            inspect.history(self.ask(v1::HistoryRequest { job: job.clone() })).await.map(drop),
            operate.drain(self.ask(member())).await.map(drop),
            operate.undrain(self.ask(member())).await.map(drop),
            operate.evict(self.ask(member())).await.map(drop),
            operate.notice(self.ask(notice)).await.map(drop),
            operate.resize(self.ask(v1::ResizeRequest { job: job.clone(), min: 1, max: 2 })).await.map(drop),
            operate.save_now(self.ask(named())).await.map(drop),
            operate.close(self.ask(named())).await.map(drop),
            operate.forget(self.ask(named())).await.map(drop),
        ]
    }
}

struct Attending {
    _said: mpsc::Sender<v1::MemberMessage>,
    heard: tonic::Streaming<v1::CoordinatorMessage>,
}

#[tokio::test(flavor = "multi_thread")]
async fn d8_jobs_of_different_tokens_can_neither_see_nor_touch_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let lines = [line("a", "a"), line("b", "b"), line("@operator", "operator")];
    let server = server(listed(dir.path(), &lines)).await;
    let [a, b, operator] = ["a", "b", "operator"].map(|name| Caller::new(&server, Some(token(name))));
    let (a, b, operator) = (a.await, b.await, operator.await);
    let mut in_a = a.attend("a", 1).await.unwrap();
    let in_b = b.attend("b", 2).await.unwrap();
    in_a.heard.message().await.unwrap().unwrap();

    for missing in ["no-such-job", "b"] {
        for (call, came_to) in a.everything_about(missing).await.into_iter().enumerate() {
            let why = came_to.expect_err("it must not be let through");
            let text =
                format!("this token is not for the job {missing}; use that job's own, or an operator's");
            assert_eq!((why.code(), why.message()), (Code::PermissionDenied, &*text), "call {call}");
        }
    }
    assert_eq!(a.jobs().await.unwrap(), ["a"]);
    assert_eq!(b.jobs().await.unwrap(), ["b"]);
    assert_eq!(operator.jobs().await.unwrap(), ["a", "b"]);

    let mut asked = Vec::new();
    for caller in [&a, &operator] {
        let mut inspect = InspectClient::new(caller.channel.clone());
        asked.push(inspect.server(caller.ask(v1::ServerRequest {})).await.unwrap().into_inner());
    }
    assert_eq!((asked[0].jobs, asked[1].jobs), (1, 2));
    assert_eq!((asked[0].members, asked[1].members), (1, 2));
    assert!(asked[0].received.is_empty() && asked[0].saves == 0 && asked[0].store.is_empty());
    assert!(asked[1].received["join"] >= 2 && asked[1].store == "memory", "{:?}", asked[1]);

    // A job's own token may act on it; nothing that was tried above has touched the other.
    drop(in_b);
    let own = a.everything_about("a").await;
    let refused = |came_to: &Result<(), Status>| {
        came_to
            .as_ref()
            .is_err_and(|why| matches!(why.code(), Code::PermissionDenied | Code::Unauthenticated))
    };
    assert!(!own.iter().any(refused), "{own:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn d8_no_token_and_an_unknown_one_are_told_what_to_do_and_health_needs_none() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(listed(dir.path(), &[line("a", "a")])).await;
    for (shown, says) in [(None, "asks for a token"), (Some(token("unknown")), "does not know the token")] {
        let caller = Caller::new(&server, shown).await;
        for came_to in caller.everything_about("a").await {
            let why = came_to.expect_err("it must not be let through");
            assert_eq!(why.code(), Code::Unauthenticated);
            assert!(why.message().contains(says) && why.message().contains("--token-file"), "{why}");
        }
        assert_eq!(caller.jobs().await.unwrap_err().code(), Code::Unauthenticated);
    }
    let channel = Channel::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let asked = tonic_health::pb::HealthCheckRequest { service: String::new() };
    assert!(health.check(asked).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn d10_tokens_are_rotated_while_the_server_runs_and_a_list_that_makes_no_sense_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = listed(dir.path(), &[line("a", "old")]);
    let server = server(path).await;
    let (old, new) = (Caller::new(&server, Some(token("old"))), Caller::new(&server, Some(token("new"))));
    let (old, new) = (old.await, new.await);
    let mut attending = old.attend("a", 1).await.unwrap();
    assert!(new.jobs().await.is_err());

    listed(dir.path(), &[line("a", "old"), line("a", "new")]);
    eventually("the new token to be known", async || new.jobs().await.ok()).await;
    assert!(old.jobs().await.is_ok(), "both are known meanwhile");

    listed(dir.path(), &[line("a", "new")]);
    eventually("the old token to be forgotten", async || old.jobs().await.err()).await;
    assert!(attending.heard.message().await.unwrap().is_some(), "a stream that is open goes on");

    listed(dir.path(), &["a of-no-use\n".to_owned()]);
    std::fs::remove_file(dir.path().join("tokens")).unwrap();
    // Longer than it takes to look at the file twice.
    for _ in 0..50 {
        assert!(new.jobs().await.is_ok() && old.jobs().await.is_err());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[test]
fn d9_an_error_of_a_token_says_nothing_of_it() {
    let why = Token::new("secret words with spaces").unwrap_err();
    assert_eq!(why, BadToken::Character);
    assert!(!format!("{why} {why:?}").contains("secret"));
}
