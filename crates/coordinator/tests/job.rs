//! The task that owns one job, over a store that fails when it is told to. Time is virtual.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reknit_coordinator::config::Limits;
use reknit_coordinator::job::{
    ConnectionId, Input, JobHandle, Known, Outbound, Surroundings, Unanswered, job_task,
};
use reknit_coordinator::secret::JobSecret;
use reknit_coordinator::store::{Memory, Pending, Revision, Saved, Store, StoreError};
use reknit_membership::event::{Event, Join, Message};
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{
    Digest, Generation, HistoryId, JobId, JobRecord, MemberId, MemberName, Spec, Step, Timing,
};
use reknit_proto::{record, rendezvous, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// A store in memory that takes no saves while it is closed.
#[derive(Default)]
struct Fickle {
    memory: Memory,
    closed: AtomicBool,
}

impl Fickle {
    fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Ordering::Relaxed);
    }
}

impl Store for Fickle {
    fn describe(&self) -> String {
        "a fickle store".to_owned()
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        self.memory.jobs()
    }

    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>> {
        self.memory.load(job)
    }

    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        if self.closed.load(Ordering::Relaxed) {
            let why = StoreError::Unavailable("it was told to be".into());
            return Box::pin(std::future::ready(Err(why)));
        }
        self.memory.save(job, expected, value)
    }

    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()> {
        self.memory.remove(job, expected)
    }
}

type Heard = mpsc::Receiver<Box<v1::CoordinatorMessage>>;

fn job() -> JobId {
    JobId::new("job").unwrap()
}

/// A job's task over `store`, from its beginning.
fn start(store: &Arc<Fickle>) -> JobHandle {
    let spec = Spec { min: 1, max: 4, unit: 1, keep: 1 };
    let known = Known {
        record: JobRecord::new(job(), HistoryId(7), spec),
        secret: JobSecret::from_bytes([9; 32]),
        revision: Revision::default(),
    };
    let around =
        Surroundings::alone(Arc::clone(store) as Arc<dyn Store>, Timing::default(), Limits::default());
    let (handle, task) = job_task(known, around);
    tokio::spawn(task);
    handle
}

/// A member's stream begins; up to `room` messages wait for it to be read. It renews its lease.
async fn attach(handle: &JobHandle, name: &str, connection: u64, room: usize) -> Heard {
    let heard = attach_with(handle, name, connection, room, 1).await;
    tokio::spawn(renew(handle.clone(), member(name), ConnectionId(connection)));
    heard
}

/// One that never says anything more.
async fn attach_silently(handle: &JobHandle, name: &str, connection: u64) -> Heard {
    attach_with(handle, name, connection, 64, 1).await
}

async fn attach_with(handle: &JobHandle, name: &str, connection: u64, room: usize, slots: u32) -> Heard {
    let (sender, heard) = mpsc::channel(room);
    let shape =
        Shape { tensors: Digest(1), count: 1, bytes: 4, recipe: Digest(1), sharding: Sharding::Replicated };
    let join = Join {
        name: MemberName::new(name).unwrap(),
        slots,
        address: "127.0.0.1:1".to_owned(),
        spec: Spec { min: 1, max: 4, unit: 1, keep: 1 },
        shape,
        history: None,
        generation: Generation(0),
        running: false,
        available: true,
    };
    let outbound = Outbound { connection: ConnectionId(connection), sender };
    handle.send(Input::Attach { member: member(name), join, outbound }).await.unwrap();
    heard
}

/// Renews a member's lease for as long as its job is served.
async fn renew(handle: JobHandle, member: MemberId, connection: ConnectionId) {
    let mut times = tokio::time::interval(Duration::from_millis(500));
    loop {
        times.tick().await;
        let event = Event::Renew { member, generation: Generation(0), step: Step(0) };
        if handle.send(Input::Said { connection, event }).await.is_err() {
            return;
        }
    }
}

fn member(name: &str) -> MemberId {
    MemberId(u64::from(name.as_bytes()[0]))
}

/// The next thing that is said to a member; nothing if its stream ends.
async fn next(heard: &mut Heard) -> Option<Message> {
    let wire =
        timeout(Duration::from_secs(60), heard.recv()).await.expect("something is said within a minute");
    wire.map(|wire| rendezvous::told(*wire).unwrap().message)
}

/// Reads until a world is told.
async fn world(heard: &mut Heard) -> Generation {
    loop {
        if let Message::World(place) = next(heard).await.expect("the stream goes on until a world is told") {
            return place.generation;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn d2_nobody_is_told_of_a_world_that_cannot_be_saved_until_it_can() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    store.set_closed(true);
    let mut heard = attach(&handle, "a", 1, 16).await;
    assert!(matches!(next(&mut heard).await, Some(Message::Attached { .. })));
    let told = timeout(Duration::from_secs(30), heard.recv()).await;
    assert!(told.is_err(), "told of what is not saved: {told:?}");
    assert!(store.load(&job()).await.unwrap().is_none());

    store.set_closed(false);
    let generation = world(&mut heard).await;
    let saved = store.load(&job()).await.unwrap().expect("saved before it was told");
    assert_eq!(record::decode(&saved.value).unwrap().0.generation, generation);
}

#[tokio::test(start_paused = true)]
async fn d3_a_record_that_somebody_else_changed_is_read_anew_and_members_attach_again() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    let mut heard = attach(&handle, "a", 1, 16).await;
    let generation = world(&mut heard).await;

    // Somebody else takes the job up and gets ahead.
    let saved = store.load(&job()).await.unwrap().unwrap();
    let (mut theirs, secret) = record::decode(&saved.value).unwrap();
    theirs.generation = Generation(generation.0 + 10);
    store.save(&job(), saved.revision, record::encode(&theirs, &secret)).await.unwrap();

    // The next change cannot be saved on top of the old record: what was believed is void, and every stream ends.
    let leaves = Event::Leave { member: member("a") };
    handle.send(Input::Said { connection: ConnectionId(1), event: leaves }).await.unwrap();
    while let Some(message) = next(&mut heard).await {
        let of_the_lost_change = matches!(message, Message::Refused(_));
        assert!(!of_the_lost_change, "told of a change that was not saved: {message:?}");
    }
    let (status, _) = handle.ask(|answer| Input::Status { members_max: 10, answer }).await.unwrap();
    assert_eq!(status.generation, theirs.generation, "what is in the store counts");
    let mut again = attach(&handle, "b", 2, 16).await;
    assert!(world(&mut again).await > theirs.generation);
}

#[tokio::test(start_paused = true)]
async fn d4_a_member_that_does_not_read_is_cut_off_and_the_others_are_told() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    // There is room for one message, and it never reads any.
    let mut deaf = attach(&handle, "a", 1, 1).await;
    let mut heard = attach(&handle, "b", 2, 64).await;
    let first = world(&mut heard).await;
    assert!(matches!(next(&mut deaf).await, Some(Message::Attached { .. })), "what there was room for");
    assert_eq!(next(&mut deaf).await, None, "its stream has ended, and nothing more was kept for it");
    let second = world(&mut heard).await;
    assert!(second > first, "the others go on without it");
}

#[tokio::test(start_paused = true)]
async fn an_older_stream_of_a_member_ends_when_a_newer_one_begins_and_says_nothing_any_more() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    let mut old = attach(&handle, "a", 1, 16).await;
    let mut new = attach(&handle, "a", 2, 16).await;
    while next(&mut old).await.is_some() {}
    let leaves = || Event::Leave { member: member("a") };
    handle.send(Input::Said { connection: ConnectionId(1), event: leaves() }).await.unwrap();
    handle.send(Input::Detached { member: member("a"), connection: ConnectionId(1) }).await.unwrap();
    let generation = world(&mut new).await;
    assert_eq!(generation, Generation(1), "what the older one said and its end changed nothing");
}

#[tokio::test(start_paused = true)]
async fn d2_whoever_asks_while_a_record_cannot_be_saved_is_told_so_and_not_kept_waiting() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    store.set_closed(true);
    let mut heard = attach(&handle, "a", 1, 16).await;
    assert!(matches!(next(&mut heard).await, Some(Message::Attached { .. })));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asked = handle.ask(|answer| Input::Status { members_max: 10, answer }).await;
    assert_eq!(asked.map(|_| ()), Err(Unanswered::Busy));
    store.set_closed(false);
    world(&mut heard).await;
    let (status, members) = handle.ask(|answer| Input::Status { members_max: 10, answer }).await.unwrap();
    assert_eq!((status.members.len(), members), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_stall_of_the_store_lengthens_leases_by_as_much_and_no_more() {
    let store = Arc::new(Fickle::default());
    let handle = start(&store);
    let mut heard = attach(&handle, "a", 1, 64).await;
    world(&mut heard).await;
    // A member that hangs: its stream is there, and nothing comes.
    let _silent = attach_silently(&handle, "b", 2).await;
    store.set_closed(true);
    let mut third = attach(&handle, "c", 3, 64).await;
    while !matches!(next(&mut third).await, Some(Message::Attached { .. })) {}
    let leaves = Event::Leave { member: member("a") };
    handle.send(Input::Said { connection: ConnectionId(1), event: leaves }).await.unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    store.set_closed(false);
    let began = Instant::now();
    let gone = async {
        loop {
            let asked = handle.ask(|answer| Input::Status { members_max: 10, answer }).await;
            if asked.is_ok_and(|(status, _)| status.members.iter().all(|other| other.name.as_str() != "b")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(3600), gone).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "b is struck off after {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_job_that_never_was_anything_is_forgotten_when_nobody_is_left() {
    let leave = |handle: JobHandle| async move {
        let leaves = Event::Leave { member: member("a") };
        handle.send(Input::Said { connection: ConnectionId(1), event: leaves }).await.unwrap();
    };
    let detach = |handle: JobHandle| async move {
        let gone = Input::Detached { member: member("a"), connection: ConnectionId(1) };
        handle.send(gone).await.unwrap();
    };
    // It says goodbye; its stream ends; or it never was let in at all.
    for how in 0..3 {
        let store = Arc::new(Fickle::default());
        let handle = start(&store);
        let slots = if how == 2 { 0 } else { 1 };
        let heard = attach_with(&handle, "a", 1, 16, slots).await;
        match how {
            0 => leave(handle.clone()).await,
            1 => detach(handle.clone()).await,
            _ => {}
        }
        let gone = async {
            while !handle.is_gone() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(2), gone).await.unwrap_or_else(|_| panic!("way {how}"));
        drop(heard);
        assert!(store.load(&job()).await.unwrap().is_none());
    }
}
