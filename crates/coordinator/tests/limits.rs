//! What a peer may ask of a server, over real connections: each limit is kept, and what is beyond it is told so.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{BOUND, Running, ends, introduction};
use reknit_coordinator::config::Limits;
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use tonic::Code;

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
        let asking = async {
            let mut client = InspectClient::connect(server.url()).await.ok()?;
            client.server(v1::ServerRequest {}).await.ok()
        };
        // A call on a connection that is closed just then may never come back: whoever calls waits only so long.
        if let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(1), asking).await {
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
