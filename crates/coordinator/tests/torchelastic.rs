//! The endpoint for stock torchrun, over real sockets: whatever a client does, the others are served. What it does with real agents
//! is in `tests/torchelastic`.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use common::{BOUND, Running, ends, eventually};
use reknit_coordinator::config::{Config, StoreConfig};
use reknit_coordinator::server::{Exposure, ServeError, Server};
use reknit_coordinator::torchelastic::{ClientLimits, TorchElastic};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_torchelastic::kv::KvLimits;
use reknit_torchelastic::wire::{MAGIC, Request, put_text};

const STATE: &[u8] = b"/torch.rendezvous.a-run";
/// What an agent of 2.15 begins with: nobody is in it.
const EMPTY: &str = include_str!("../../torchelastic/tests/states/2.15.0.txt");

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

async fn start(limits: ClientLimits) -> Running {
    let settings = TorchElastic { limits, ..TorchElastic::at(loopback()) };
    Running::start(Config { torchelastic: Some(settings), ..Config::default() }).await
}

/// A client that speaks the protocol.
struct Client(TcpStream);

impl Client {
    fn new(server: &Running) -> Client {
        let mut client = Client::mute(server);
        client.say(Request::Validate { magic: MAGIC });
        client
    }

    /// One that says nothing of itself.
    fn mute(server: &Running) -> Client {
        let stream = TcpStream::connect(server.torchelastic.unwrap()).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client(stream)
    }

    fn say(&mut self, request: Request<'_>) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        self.0.write_all(&bytes).unwrap();
    }

    fn text(&mut self) -> Vec<u8> {
        let mut length = [0; 8];
        self.0.read_exact(&mut length).unwrap();
        let mut text = vec![0; u64::from_le_bytes(length) as usize];
        self.0.read_exact(&mut text).unwrap();
        text
    }

    fn set(&mut self, key: &str, value: &[u8]) {
        self.say(Request::Set { key: key.as_bytes(), value });
    }

    fn get(&mut self, key: &str) -> Vec<u8> {
        self.say(Request::Get { key: key.as_bytes() });
        self.text()
    }

    /// Whether it is served.
    fn is_served(&mut self) -> bool {
        self.set("/probe", b"value");
        self.get("/probe") == b"value"
    }

    fn ends(self) -> bool {
        ends(&self.0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_strangers_garbage_and_those_who_say_nothing_are_cut_off() {
    let first_bytes = Duration::from_millis(300);
    let server = start(ClientLimits { first_bytes, ..ClientLimits::default() }).await;
    let mut other = Client::new(&server);
    let greeting = [&[0][..], &MAGIC.to_le_bytes()].concat();
    let before_2_2 = [&[0][..], &4_u64.to_le_bytes(), b"init"].concat();
    for said in [b"GET / HTTP/1.1\r\n".to_vec(), before_2_2, vec![3], [&greeting[..], &[99]].concat()] {
        let mut stranger = Client::mute(&server);
        stranger.0.write_all(&said).unwrap();
        assert!(stranger.ends(), "{said:?}");
    }
    let (began, silent) = (Instant::now(), Client::mute(&server));
    let mut half = Client::mute(&server);
    half.0.write_all(&greeting[..3]).unwrap();
    assert!(silent.ends() && half.ends());
    assert!(began.elapsed() >= first_bytes);
    assert!(other.is_served());
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_one_who_does_not_read_is_cut_off_and_holds_up_nobody() {
    let limits = ClientLimits { reading: Duration::from_millis(300), ..ClientLimits::default() };
    let server = start(limits).await;
    let (mut slow, mut other) = (Client::new(&server), Client::new(&server));
    slow.set("/large", &vec![1; 4 << 20]);
    for _ in 0..20 {
        slow.say(Request::Get { key: b"/large" });
    }
    assert!(other.is_served(), "while it does not read");
    // It may say what it likes until its connection is gone.
    let mut ping = Vec::new();
    Request::Ping { nonce: 1 }.encode(&mut ping);
    eventually("the end of its connection", async || slow.0.write_all(&ping).is_err().then_some(())).await;
    assert!(other.is_served());
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_whoever_leaves_the_most_half_sent_or_unread_is_cut_off_and_nobody_else() {
    let server = start(ClientLimits { pending_bytes: 12 << 20, ..ClientLimits::default() }).await;
    let mut request = Vec::new();
    Request::Set { key: b"/k", value: &vec![1; 7 << 20] }.encode(&mut request);
    let (part, rest) = request.split_at(6 << 20);
    let (mut most, mut less) = (Client::new(&server), Client::new(&server));
    most.0.write_all(&request[..part.len() + 100]).unwrap();
    // It is there when what it has said before is answered.
    less.set("/large", &vec![1; 4 << 20]);
    assert_eq!(less.get("/large").len(), 4 << 20);
    eventually("the half of it to arrive", async || {
        let mut probe = Client::new(&server);
        let _ = less.0.write_all(part);
        probe.is_served().then_some(())
    })
    .await;
    assert!(most.ends());
    less.0.write_all(rest).unwrap();
    assert!(less.is_served());
    // The same for what is not read.
    let mut slow = Client::new(&server);
    for _ in 0..10 {
        slow.say(Request::Get { key: b"/large" });
    }
    let keys = [&b"/large"[..]; 8];
    let mut bytes = vec![10];
    bytes.extend_from_slice(&(keys.len() as u64).to_le_bytes());
    keys.iter().for_each(|key| put_text(&mut bytes, key));
    let mut slower = Client::new(&server);
    slower.0.write_all(&bytes).unwrap();
    let mut ping = Vec::new();
    Request::Ping { nonce: 1 }.encode(&mut ping);
    eventually("the end of it", async || slower.0.write_all(&ping).is_err().then_some(())).await;
    assert!(less.is_served());
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_half_a_request_is_not_waited_for_for_ever() {
    let server = start(ClientLimits { reading: Duration::from_millis(300), ..ClientLimits::default() }).await;
    let mut idle = Client::new(&server);
    let mut half = Client::new(&server);
    half.0.write_all(&[1, 9]).unwrap();
    assert!(half.ends());
    assert!(idle.is_served(), "whoever has nothing to say is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_a_flood_of_requests_is_answered_in_turn() {
    let server = start(ClientLimits::default()).await;
    let mut flood = Client::new(&server);
    let mut requests = Vec::new();
    for _ in 0..100_000 {
        Request::Set { key: b"/k", value: b"value" }.encode(&mut requests);
    }
    let writing = std::thread::spawn(move || {
        for _ in 0..20 {
            flood.0.write_all(&requests).unwrap();
        }
        assert_eq!(flood.get("/k"), b"value");
    });
    let mut other = Client::new(&server);
    while !writing.is_finished() {
        assert!(other.is_served());
    }
    writing.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn e4_a_request_in_pieces_is_carried_out_once_it_is_whole() {
    let server = start(ClientLimits::default()).await;
    let (mut client, mut other) = (Client::new(&server), Client::new(&server));
    let value = vec![7; 3 << 20];
    let mut bytes = Vec::new();
    Request::Set { key: b"/k", value: &value }.encode(&mut bytes);
    Request::Get { key: b"/k" }.encode(&mut bytes);
    let (all, last) = bytes.split_at(bytes.len() - 1);
    for piece in all.chunks(100_000) {
        client.0.write_all(piece).unwrap();
        assert!(other.is_served());
    }
    client.0.write_all(last).unwrap();
    assert_eq!(client.text(), value);
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_connections_half_sent_requests_and_what_is_stored_have_limits() {
    let kv = KvLimits { bytes: 1000, ..KvLimits::default() };
    let some = ClientLimits { connections: 4, pending_bytes: 100_000, ..ClientLimits::default() };
    let limits = ClientLimits { kv, stored_bytes: 900, ..some };
    let server = start(limits).await;
    let mut other = Client::new(&server);
    assert!(other.is_served());
    // More than the store may hold.
    let mut greedy = Client::new(&server);
    greedy.set("/k", &[0; 2000]);
    assert!(greedy.ends());
    // More than all may hold together.
    let mut greedy = Client::new(&server);
    greedy.set("/k", &[0; 850]);
    assert!(greedy.ends());
    // More than may be half sent.
    let mut half = Client::new(&server);
    let mut bytes = Vec::new();
    Request::Set { key: b"/k", value: &vec![0; 200_000] }.encode(&mut bytes);
    bytes.truncate(150_000);
    half.0.write_all(&bytes).unwrap();
    assert!(half.ends());
    // More than may be open.
    let mut open: Vec<Client> = (0..3).map(|_| Client::new(&server)).collect();
    assert!(open.iter_mut().all(Client::is_served));
    assert!(Client::mute(&server).ends());
    drop(open);
    eventually("room for one more", async || Client::mute_or_served(&server)).await;
    assert!(other.is_served());
}

impl Client {
    /// Something if there is room for one more.
    fn mute_or_served(server: &Running) -> Option<()> {
        let mut client = Client::mute(server);
        let mut bytes = Vec::new();
        Request::Validate { magic: MAGIC }.encode(&mut bytes);
        Request::Ping { nonce: 1 }.encode(&mut bytes);
        client.0.write_all(&bytes).ok()?;
        let mut nonce = [0; 4];
        client.0.read_exact(&mut nonce).ok()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e2_what_would_run_code_on_agents_is_refused_and_its_connection_cut_off() {
    let server = start(ClientLimits::default()).await;
    // pickle.dumps of what os.system is called with.
    let evil = b"gASVHQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAJpZJSFlFKULg==";
    for request in [
        Request::CompareSet { key: STATE, expected: b"", desired: evil },
        Request::Set { key: STATE, value: evil },
        Request::Append { key: STATE, value: evil },
    ] {
        let mut attacker = Client::new(&server);
        attacker.say(request);
        assert!(attacker.ends());
    }
    assert_eq!(Client::new(&server).get("/torch.rendezvous.a-run"), b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_shown_like_a_job_and_is_over_when_its_last_agent_is_gone() {
    let server = start(ClientLimits::default()).await;
    let mut agent = Client::new(&server);
    let empty = EMPTY.trim().split_once('\n').unwrap().1.as_bytes();
    agent.say(Request::CompareSet { key: STATE, expected: b"", desired: empty });
    assert_eq!(agent.text(), empty);
    let mut inspect = InspectClient::connect(server.url()).await.unwrap();
    let jobs = inspect.jobs(v1::JobsRequest {}).await.unwrap().into_inner().jobs;
    assert_eq!(jobs.iter().map(|job| job.job.as_str()).collect::<Vec<_>>(), ["a-run"]);
    let request = || v1::StatusRequest { job: "a-run".to_owned(), members_max: 0 };
    let status = inspect.status(request()).await.unwrap().into_inner();
    assert_eq!((status.phase(), status.generation, status.members.len()), (v1::Phase::Forming, 0, 0));
    let history = v1::HistoryRequest { job: "a-run".to_owned() };
    assert_eq!(inspect.history(history).await.unwrap().into_inner().changes.len(), 1);
    let mut watching = inspect.watch(request()).await.unwrap().into_inner();
    assert_eq!(watching.message().await.unwrap().unwrap().phase(), v1::Phase::Forming);
    drop(agent);
    loop {
        let seen = tokio::time::timeout(BOUND, watching.message()).await.unwrap().unwrap().unwrap();
        if seen.phase() == v1::Phase::Closed {
            break;
        }
    }
    // And its id is free.
    let mut next = Client::new(&server);
    assert_eq!(next.get("/torch.rendezvous.a-run"), b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_others_can_reach_says_who_may_connect() {
    let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let config = |settings| Config {
        listen: loopback(),
        store: StoreConfig::Memory,
        torchelastic: Some(settings),
        ..Config::default()
    };
    let open = Server::bind(config(TorchElastic::at(anywhere)), Exposure::Loopback).await;
    assert!(matches!(open, Err(ServeError::OpenToAll { .. })));
    assert!(Server::bind(config(TorchElastic::at(anywhere)), Exposure::Insecure).await.is_ok());
    let allow =
        |network: &str| TorchElastic { allow: vec![network.parse().unwrap()], ..TorchElastic::at(anywhere) };
    let server = Running::start(config(allow("127.0.0.0/8"))).await;
    assert!(Client::new(&server).is_served());
    let server = Running::start(config(allow("10.0.0.0/8"))).await;
    assert!(Client::mute(&server).ends(), "its address is not in that network");
    let taken = TorchElastic::at(server.torchelastic.unwrap());
    let taken = Server::bind(config(taken), Exposure::Insecure).await;
    assert!(matches!(taken, Err(ServeError::ListenForTorchrun { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_wait_for_one_key_and_all_are_woken() {
    let server = start(ClientLimits::default()).await;
    let mut bytes = vec![6];
    bytes.extend_from_slice(&1_u64.to_le_bytes());
    put_text(&mut bytes, b"/late");
    let mut waiting: Vec<Client> = (0..200).map(|_| Client::new(&server)).collect();
    for client in &mut waiting {
        client.0.write_all(&bytes).unwrap();
    }
    // Whoever is answered now has been heard; its wait came first.
    for client in waiting.iter_mut().step_by(2) {
        client.say(Request::Ping { nonce: 7 });
        let mut nonce = [0; 4];
        client.0.read_exact(&mut nonce).unwrap();
        assert_eq!(nonce, 7_u32.to_le_bytes());
    }
    Client::new(&server).set("/late", b"");
    for client in &mut waiting {
        let mut byte = [9];
        client.0.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_list_has_set_before_it_was_cut_off_wakes_who_waits_for_it() {
    let kv = KvLimits { bytes: 1000, ..KvLimits::default() };
    let server = start(ClientLimits { kv, ..ClientLimits::default() }).await;
    let list = |operation: u8, texts: &[&[u8]], length: u64| {
        let mut bytes = vec![operation];
        bytes.extend_from_slice(&length.to_le_bytes());
        texts.iter().for_each(|text| put_text(&mut bytes, text));
        bytes
    };
    let mut waiting = Client::new(&server);
    waiting.0.write_all(&list(6, &[b"/first"], 1)).unwrap();
    waiting.say(Request::Ping { nonce: 7 });
    let mut nonce = [0; 4];
    waiting.0.read_exact(&mut nonce).unwrap();
    let mut greedy = Client::new(&server);
    greedy.0.write_all(&list(11, &[b"/first", b"", b"/second", &[0; 2000]], 2)).unwrap();
    assert!(greedy.ends());
    // Nobody else's request was needed for that.
    let mut byte = [9];
    waiting.0.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);
}
