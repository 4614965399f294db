//! What a peer may ask of a server, over real connections: each limit is kept, and what is beyond it is told so.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use reknit_coordinator::config::{Limits, StoreConfig};
use reknit_coordinator::server::Exposure;
use reknit_coordinator::{Config, Server};
use reknit_membership::event::Join;
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{Digest, Generation, JobId, MemberId, MemberName, Spec};
use reknit_proto::rendezvous::{Introduction, from_introduction};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Longer than anything here takes on a busy machine.
const BOUND: Duration = Duration::from_secs(30);

struct Running {
    address: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Running {
    async fn with(limits: Limits) -> Running {
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config { listen, store: StoreConfig::Memory, limits, ..Config::default() };
        let server = Server::bind(config, Exposure::Loopback).await.unwrap();
        let address = server.address();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Running { address, _stop: stop }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Attends with nothing to say but this, if anything.
    async fn attend(
        &self,
        first: Option<v1::MemberMessage>,
    ) -> (mpsc::Sender<v1::MemberMessage>, Result<Streaming<v1::CoordinatorMessage>, Status>) {
        let mut client = RendezvousClient::connect(self.url()).await.unwrap();
        let (said, outgoing) = mpsc::channel(4);
        if let Some(first) = first {
            said.send(first).await.unwrap();
        }
        let answer = tokio::time::timeout(BOUND, client.attend(ReceiverStream::new(outgoing))).await.unwrap();
        (said, answer.map(tonic::Response::into_inner))
    }
}

fn introduction(job: &str, member: u64) -> v1::MemberMessage {
    let shape =
        Shape { tensors: Digest(1), count: 1, bytes: 4, recipe: Digest(1), sharding: Sharding::Replicated };
    let join = Join {
        name: MemberName::new(&format!("member-{member}")).unwrap(),
        slots: 1,
        address: "127.0.0.1:1".to_owned(),
        spec: Spec { min: 1, max: 8, unit: 1, keep: 1 },
        shape,
        history: None,
        generation: Generation(0),
        running: false,
        available: true,
    };
    from_introduction(&Introduction { job: JobId::new(job).unwrap(), member: MemberId(member), join })
}

/// Whether the other side closes the connection, by itself.
fn ends(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(why) => why.kind() != ErrorKind::WouldBlock,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_stream_that_does_not_say_who_it_is_ends_after_its_limit() {
    let introduction = Duration::from_millis(200);
    let server = Running::with(Limits { introduction, ..Limits::default() }).await;
    let began = Instant::now();
    let (_said, answer) = server.attend(None).await;
    let why = answer.unwrap_err();
    assert_eq!((why.code(), why.message()), (Code::DeadlineExceeded, "a stream must begin with a join"));
    assert!(began.elapsed() >= introduction);
    // And one that says something else first is told what it must say.
    let renewal = v1::MemberMessage { body: Some(v1::member_message::Body::Renew(v1::Renew::default())) };
    let (_said, answer) = server.attend(Some(renewal)).await;
    assert_eq!(answer.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_one_connection_more_than_allowed_is_closed_and_there_is_room_again_when_one_goes() {
    let server = Running::with(Limits { connections: 3, ..Limits::default() }).await;
    let address = server.address;
    // Three members, each on a connection of its own.
    let mut members = Vec::new();
    for member in 1..=3 {
        let (said, heard) = server.attend(Some(introduction("job", member))).await;
        members.push((said, heard.unwrap()));
    }
    let fourth = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may be closed before it has said anything.
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        ends(&stream)
    });
    assert!(fourth.await.unwrap(), "it is kept");
    members.pop();
    let began = Instant::now();
    loop {
        let client = InspectClient::connect(server.url()).await;
        if let Ok(mut client) = client
            && client.server(v1::ServerRequest {}).await.is_ok()
        {
            break;
        }
        assert!(began.elapsed() < BOUND, "there is no room again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_connection_that_never_speaks_is_closed_after_its_limit() {
    let first_bytes = Duration::from_millis(200);
    let server = Running::with(Limits { first_bytes, connections: 2, ..Limits::default() }).await;
    let address = server.address;
    let silent = tokio::task::spawn_blocking(move || {
        let silent = [TcpStream::connect(address).unwrap(), TcpStream::connect(address).unwrap()];
        silent.iter().all(ends)
    });
    assert!(silent.await.unwrap());
    // They have taken all the room there was, and given it back.
    let (_said, heard) = server.attend(Some(introduction("job", 1))).await;
    assert!(heard.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_one_job_more_than_allowed_is_refused_with_the_limit() {
    let server = Running::with(Limits { jobs: 2, ..Limits::default() }).await;
    let (_a, first) = server.attend(Some(introduction("a", 1))).await;
    let (_b, second) = server.attend(Some(introduction("b", 2))).await;
    assert!(first.is_ok() && second.is_ok());
    let (_c, third) = server.attend(Some(introduction("c", 3))).await;
    let why = third.unwrap_err();
    assert_eq!(why.code(), Code::ResourceExhausted);
    assert!(why.message().contains('2'), "{}", why.message());
    // Those that there are take more members.
    let (_again, more) = server.attend(Some(introduction("a", 4))).await;
    assert!(more.is_ok());
}
