//! Peers that ask for too much: they are cut off or held off, and others are served meanwhile.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{BOUND, Running, ends, eventually, introduction};
use reknit_coordinator::config::Limits;
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use tonic::Code;

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CANCEL: [u8; 4] = 8u32.to_be_bytes();
const ENHANCE_YOUR_CALM: [u8; 4] = 11u32.to_be_bytes();
/// `POST http /`, in HPACK's static table.
const REQUEST: [u8; 3] = [0x83, 0x86, 0x84];

/// Opens and resets as many streams as it can in one go. Returns what the server answered until it hung up.
fn resets_rapidly(server: SocketAddr) -> Vec<u8> {
    let mut said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    said.extend(frame(SETTINGS, 0, 0, &[]));
    for stream in (1..).step_by(2).take(50_000) {
        said.extend(frame(HEADERS, 4, stream, &REQUEST));
        said.extend(frame(RST_STREAM, 0, stream, &CANCEL));
    }
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let answer = std::thread::spawn(move || {
        let mut answer = Vec::new();
        let ended = reader.read_to_end(&mut answer);
        assert!(
            !ended.is_err_and(|why| why.kind() == std::io::ErrorKind::WouldBlock),
            "the connection is kept"
        );
        answer
    });
    // It may be cut off before it has said it all.
    let _ = stream.write_all(&said);
    answer.join().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_peer_that_resets_streams_rapidly_is_cut_off_and_others_are_served_meanwhile() {
    let server = Running::with(Limits::default()).await;
    let mut client = InspectClient::connect(server.url()).await.unwrap();
    let address = server.address;
    let attacks: Vec<_> =
        (0..4).map(|_| tokio::task::spawn_blocking(move || resets_rapidly(address))).collect();
    while !attacks.iter().all(tokio::task::JoinHandle::is_finished) {
        let asked = tokio::time::timeout(BOUND, client.server(v1::ServerRequest {})).await.unwrap();
        assert!(asked.is_ok(), "{asked:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for attack in attacks {
        let answer = attack.await.unwrap();
        // The bytes that were not read may have reset the connection, and this with it.
        if let Some(at) = answer.windows(5).position(|bytes| bytes == [GOAWAY, 0, 0, 0, 0]) {
            assert_eq!(answer[at + 10..at + 14], ENHANCE_YOUR_CALM, "{answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_peer_with_too_many_connections_gets_no_more_until_it_lets_one_go() {
    let limits = Limits { connections_per_peer: 3, connections: 100, ..Limits::default() };
    let server = Running::with(limits).await;
    let mut members = Vec::new();
    for member in 1..=3 {
        let (said, heard) = server.attend(Some(introduction("job", member))).await;
        members.push((said, heard.unwrap()));
    }
    let address = server.address;
    let more = tokio::task::spawn_blocking(move || {
        let more: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        more.iter().all(ends)
    });
    assert!(more.await.unwrap(), "they are kept");
    // Another machine's, as far as the server can tell.
    let other = tokio::net::TcpSocket::new_v4().unwrap();
    other.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = other.connect(server.address).await.unwrap().into_std().unwrap();
    let served = tokio::task::spawn_blocking(move || {
        let mut stream = stream;
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
        let mut first = [0; 9];
        stream.read_exact(&mut first).unwrap();
        first[3]
    });
    assert_eq!(served.await.unwrap(), SETTINGS);
    members.pop();
    eventually("room again", async || {
        let mut client = InspectClient::connect(server.url()).await.ok()?;
        client.server(v1::ServerRequest {}).await.ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_calls_beyond_the_rate_of_a_connection_are_told_so_and_other_connections_have_their_own() {
    let server = Running::with(Limits { calls_per_second: 20, ..Limits::default() }).await;
    let mut greedy = InspectClient::connect(server.url()).await.unwrap();
    let mut modest = InspectClient::connect(server.url()).await.unwrap();
    let why =
        eventually("a call that is one too many", async || greedy.server(v1::ServerRequest {}).await.err())
            .await;
    assert_eq!(why.code(), Code::ResourceExhausted);
    assert!(why.message().contains("more calls a second than it may"), "{why}");
    assert!(modest.server(v1::ServerRequest {}).await.is_ok());
    eventually("it may call again", async || greedy.server(v1::ServerRequest {}).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_member_that_floods_is_read_at_its_rate_and_stays() {
    let limits = Limits { messages_per_second: 100, messages_burst: 10, ..Limits::default() };
    let server = Running::with(limits).await;
    let (said, heard) = server.attend(Some(introduction("job", 1))).await;
    let mut heard = heard.unwrap();
    let mut inspect = InspectClient::connect(server.url()).await.unwrap();
    let began = Instant::now();
    // Not so many that HTTP/2 itself takes offence.
    for _ in 0..100 {
        let renewal = v1::MemberMessage { body: Some(v1::member_message::Body::Renew(v1::Renew::default())) };
        said.send(renewal).await.unwrap();
    }
    let mut seen = 0;
    while seen < 60 {
        let asked = inspect.server(v1::ServerRequest {}).await.unwrap().into_inner();
        seen = asked.received.get("renew").copied().unwrap_or(0);
        // The burst, what the rate has added since, and one that is on its way.
        let most = 11.0 + began.elapsed().as_secs_f64() * 100.0;
        assert!(seen as f64 <= most, "{seen} within {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(heard.message().await.unwrap().is_some(), "it is held off, not cut off");
}
