//! What peers may do wrong: each gets a clear error or a bounded wait, and the others go on.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use reknit_e2e::{Coordinator, Process, eventually};
use reknit_membership::event::Join;
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{
    Digest, Event, Generation, Holding, JobId, MemberId, MemberName, Message, Spec, Step, Timestamp,
};
use reknit_proto::rendezvous::{self, Introduction};
use reknit_proto::v1;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use reknit_trainer::{DataOrder, NamedTensors, Options, TrainError, Trainer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const ORDER: DataOrder = DataOrder { dataset: 100, global_batch: 10, seed: 1 };
const ENDLESS: [&str; 6] = ["--min", "1", "--step-ms", "2", "--steps", "1000000"];

fn state(elements: usize) -> NamedTensors {
    NamedTensors::new().with_f32("weights", [elements as u64], vec![0.0; elements])
}

fn options(coordinator: &Coordinator, job: &str, name: &str) -> Options {
    Options::new(&coordinator.url(), job, ORDER).unwrap().name(name).unwrap().workers(1, 8).unwrap()
}

fn refusal(joined: Result<Trainer, TrainError>) -> String {
    match joined {
        Ok(_) => panic!("it must not be let in"),
        Err(why) => why.to_string(),
    }
}

/// The step of a job as its coordinator has heard of it.
fn step(coordinator: &Coordinator, job: &str) -> u64 {
    coordinator.status(job).unwrap()["step"].as_u64().unwrap()
}

/// The others go on: a job makes steps, in the same generation.
fn goes_on(coordinator: &Coordinator, job: &str, generation: u64) {
    let before = step(coordinator, job);
    eventually("training to go on", || {
        let status = coordinator.status(job)?;
        assert_eq!(status["generation"], generation, "the world did not change");
        let now = status["step"].as_u64().unwrap();
        if now > before + 20 { Ok(()) } else { Err(format!("at step {now}, was at {before}")) }
    });
}

fn training(coordinator: &Coordinator) -> (Process, u64) {
    let worker = coordinator.worker("job", "good", &ENDLESS);
    let generation = coordinator.runs_with("job", 1)["generation"].as_u64().unwrap();
    (worker, generation)
}

#[test]
fn a_worker_with_other_tensors_is_refused_and_told_what_differs() {
    let coordinator = Coordinator::start();
    let (_worker, generation) = training(&coordinator);
    let why = refusal(Trainer::join(options(&coordinator, "job", "other"), &state(7)));
    assert!(why.contains("tensors") && why.contains("same model"), "{why}");
    goes_on(&coordinator, "job", generation);
}

#[test]
fn a_worker_with_another_batch_is_refused() {
    let coordinator = Coordinator::start();
    let first = Trainer::join(options(&coordinator, "job", "a"), &state(3)).unwrap();
    let other = DataOrder { global_batch: 11, ..ORDER };
    let options = Options::new(&coordinator.url(), "job", other).unwrap().name("b").unwrap();
    let why = refusal(Trainer::join(options, &state(3)));
    assert!(why.contains("batch"), "{why}");
    drop(first);
}

#[test]
fn a_job_that_is_over_lets_nobody_in_and_says_why() {
    let coordinator = Coordinator::start();
    let mut worker = coordinator.worker("job", "a", &["--min", "1", "--steps", "5"]);
    assert!(worker.ended().success(), "{}", worker.log());
    let mut late = coordinator.worker("job", "b", &["--min", "1", "--steps", "5"]);
    assert!(!late.ended().success());
    assert!(late.log().contains("completed at step 5"), "{}", late.log());
}

#[test]
fn nobody_to_talk_to_is_an_error_after_the_patience_that_was_asked_for() {
    let options = Options::new("http://127.0.0.1:9", "job", ORDER)
        .unwrap()
        .patience(Duration::from_millis(300), Duration::from_secs(1));
    let why = refusal(Trainer::join(options, &state(1)));
    assert!(why.contains("127.0.0.1:9") && why.contains("reknit serve"), "{why}");
}

fn introduction(job: &str, name: &str, spec: Spec) -> Introduction {
    let shape =
        Shape { tensors: Digest(1), count: 1, bytes: 4, recipe: Digest(1), sharding: Sharding::Replicated };
    let join = Join {
        name: MemberName::new(name).unwrap(),
        slots: 1,
        address: "127.0.0.1:1".to_owned(),
        spec,
        shape,
        history: None,
        generation: Generation(0),
        running: false,
        available: true,
    };
    let member = MemberId(name.bytes().fold(7, |id, byte| id * 31 + u64::from(byte)));
    Introduction { job: JobId::new(job).unwrap(), member, join }
}

type Said = mpsc::Sender<v1::MemberMessage>;
type Heard = tonic::Streaming<v1::CoordinatorMessage>;

/// A member that speaks the bare protocol.
async fn attend(url: String, first: v1::MemberMessage) -> Result<(Said, Heard), tonic::Status> {
    let mut client = RendezvousClient::connect(url).await.unwrap();
    let (said, outgoing) = mpsc::channel(8);
    said.send(first).await.unwrap();
    let heard = client.attend(ReceiverStream::new(outgoing)).await?.into_inner();
    Ok((said, heard))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn another_version_of_the_protocol_is_refused_with_both_versions() {
    let coordinator = Coordinator::start();
    let mut first = rendezvous::from_introduction(&introduction("job", "old", Spec::default()));
    if let Some(v1::member_message::Body::Join(join)) = &mut first.body {
        join.protocol += 1;
    }
    let refused = runtime().block_on(attend(coordinator.url(), first)).map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("version 2") && refused.message().contains("speaks 1"), "{refused:?}");
}

#[test]
fn bounds_that_no_world_can_meet_are_refused_and_make_no_job() {
    let coordinator = Coordinator::start();
    let spec = Spec { min: 4, max: 2, unit: 1, keep: 1 };
    let first = rendezvous::from_introduction(&introduction("job", "a", spec));
    let told = runtime().block_on(async {
        let (_said, mut heard) = attend(coordinator.url(), first).await.unwrap();
        heard.message().await.unwrap().unwrap()
    });
    let told = rendezvous::told(told).unwrap();
    assert!(format!("{told:?}").contains("MinAboveMax"), "{told:?}");
    assert!(coordinator.status("job").is_err());
}

#[test]
fn a_message_over_the_limit_ends_its_stream_and_nobody_elses() {
    let coordinator = Coordinator::start();
    let (_worker, generation) = training(&coordinator);
    let first = rendezvous::from_introduction(&introduction("huge", "a", Spec::default()));
    runtime().block_on(async {
        let (said, mut heard) = attend(coordinator.url(), first).await.unwrap();
        heard.message().await.unwrap();
        let suspects = vec![u32::MAX; 1 << 20];
        let body = v1::member_message::Body::Broken(v1::Broken { generation: 1, suspects });
        said.send(v1::MemberMessage { body: Some(body) }).await.unwrap();
        let last = loop {
            match heard.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it is not told why its stream ends"),
                Err(why) => break why,
            }
        };
        assert_eq!(last.code(), tonic::Code::InvalidArgument, "{last}");
        assert!(last.message().contains("1048576 bytes"), "{last}");
    });
    goes_on(&coordinator, "job", generation);
}

/// What one member of the bare protocol is told before it is refused or told to go.
async fn plays(url: String, name: &str, answers: bool) -> (usize, Message) {
    let introduction = introduction("job", name, Spec { min: 1, max: 4, unit: 1, keep: 1 });
    let member = introduction.member;
    let (said, mut heard) = attend(url, rendezvous::from_introduction(&introduction)).await.unwrap();
    let (mut worlds, mut generation) = (0, Generation(0));
    let mut renew = tokio::time::interval(Duration::from_millis(40));
    loop {
        let event = tokio::select! {
            _ = renew.tick() => Event::Renew { member, generation, step: Step(0) },
            message = heard.message() => {
                match rendezvous::told(message.unwrap().expect("the stream ends with a word")).unwrap().message {
                    Message::World(place) => {
                        worlds += 1;
                        if !answers {
                            continue;
                        }
                        generation = place.generation;
                        Event::Ready { member, generation, holding: Holding::Fresh { digest: Digest(1) } }
                    }
                    last @ (Message::Refused(_) | Message::Go { .. }) => return (worlds, last),
                    _ => continue,
                }
            }
        };
        // It may have been struck off meanwhile.
        let _ = said.send(rendezvous::from_event(&event, Timestamp(0)).unwrap()).await;
    }
}

#[test]
fn a_member_that_never_answers_is_left_out_after_a_bounded_wait_and_the_others_go_on() {
    // Long enough that a busy machine does not make it silent, too.
    let coordinator = Coordinator::start_with_silence("1s");
    let ((told, mute), (also_told, other)) = runtime().block_on(async {
        // It is alive, for it renews its lease; but it does not answer the world that it is told of.
        tokio::join!(plays(coordinator.url(), "mute", false), plays(coordinator.url(), "other", true))
    });
    let Message::Refused(why) = mute else { panic!("{mute:?}") };
    assert!(told == 1 && why.to_string().contains("did not answer"), "after {told} worlds: {why}");
    assert!(matches!(other, Message::Go { .. }), "{other:?}");
    assert_eq!(also_told, 2, "one with the mute member, one without");
}

#[test]
fn garbage_and_half_open_connections_hurt_nobody_on_any_port() {
    let coordinator = Coordinator::start();
    let _workers = ["a", "b"].map(|name| coordinator.worker("job", name, &ENDLESS));
    let generation = coordinator.runs_with("job", 2)["generation"].as_u64().unwrap();
    let status = coordinator.status("job").unwrap();
    let data_plane: SocketAddr = status["members"][0]["address"].as_str().unwrap().parse().unwrap();
    let mut open = Vec::new();
    for port in [coordinator.address(), data_plane] {
        for garbage in [&b""[..], b"G", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n", &[0xff; 4096]] {
            for _ in 0..20 {
                let mut stream = TcpStream::connect(port).unwrap();
                // The other end may hang up before it has read it all.
                let _ = stream.write_all(garbage);
                open.push((port, stream));
            }
        }
        goes_on(&coordinator, "job", generation);
    }
    // Another worker gets in although all those are open: it is let in, wired into the ring, and given the state.
    let _third = coordinator.worker("job", "c", &ENDLESS);
    let generation = coordinator.runs_with("job", 3)["generation"].as_u64().unwrap();
    goes_on(&coordinator, "job", generation);
    for (port, mut stream) in open {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut rest = Vec::new();
        // Closed in order, or reset: either way it ends by itself, and within its limit.
        let ended = stream.read_to_end(&mut rest);
        let timed_out = ended.as_ref().is_err_and(|why| why.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "{port} keeps a connection that says nothing");
    }
}
