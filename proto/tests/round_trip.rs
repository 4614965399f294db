//! Rule P-1: what is encoded decodes to the same value. Rule P-2: bytes from outside never panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use prost::Message as _;
use reknit_membership::event::{Event, Join, Message};
use reknit_membership::holding::{Fetch, Holding, Load, Moved, Plan, Resume, ShardReport, Shards, Source};
use reknit_membership::reason::{Cause, Closure, Departure, Drain, Refusal, Waiting};
use reknit_membership::record::{Commit, JobRecord, Stage, WorldChange};
use reknit_membership::spec::{BadSpec, Shape, Sharding, Spec};
use reknit_membership::status::{MemberStatus, PhaseName, Status};
use reknit_membership::world::{Peer, Place, Seat, World};
use reknit_membership::{
    Digest, Generation, HistoryId, JobId, Lineage, MemberId, MemberName, Rank, Step, Timestamp, WorldSize,
};
use reknit_proto::rendezvous::{self, Introduction, Told};
use reknit_proto::{BadMessage, PROTOCOL, inspect, record, v1};

const ME: MemberId = MemberId(0xfeed_0000_0000_0001);

fn name(text: &str) -> MemberName {
    MemberName::new(text).unwrap()
}

fn resume() -> Resume {
    Resume { lineage: Lineage(3), step: Step(u64::MAX) }
}

fn shape(sharding: Sharding) -> Shape {
    Shape { tensors: Digest(u128::MAX - 1), count: 12, bytes: 1 << 40, recipe: Digest(7), sharding }
}

fn commit() -> Commit {
    Commit {
        step: Step(100),
        generation: Generation(4),
        shards: 3,
        manifest: Digest(1 << 100),
        at: Timestamp(9),
    }
}

fn peer(rank: u32) -> Peer {
    Peer { member: MemberId(u64::from(rank) + 10), rank: Rank(rank), address: format!("10.0.0.{rank}:1") }
}

fn report(n: u128) -> ShardReport {
    ShardReport { bytes: 55, file: Digest(n), state: Digest(n + 1) }
}

fn departures() -> Vec<Departure> {
    vec![
        Departure::Died,
        Departure::Silent,
        Departure::Gone,
        Departure::Unready,
        Departure::Unrestored,
        Departure::Stuck,
        Departure::Unreachable,
        Departure::Replaced { by: ME },
        Departure::Left,
        Departure::Drained,
        Departure::Evicted,
        Departure::Diverged,
        Departure::StateLost,
    ]
}

fn holdings() -> Vec<Holding> {
    vec![
        Holding::Nothing,
        Holding::Fresh { digest: Digest(5) },
        Holding::State { resume: resume(), shards: Shards::Whole },
        Holding::State { resume: resume(), shards: Shards::Only(BTreeSet::from([0, 7, 65_535])) },
        Holding::State { resume: resume(), shards: Shards::Only(BTreeSet::new()) },
    ]
}

fn events() -> Vec<Event> {
    let (member, generation, step) = (ME, Generation(u64::MAX), Step(12));
    let mut events = vec![
        Event::Renew { member, generation, step },
        Event::Leave { member },
        Event::Restored {
            member,
            generation,
            attempt: 2,
            resume: resume(),
            moved: vec![Moved { from: MemberId(4), bytes: 1 << 33, sent: Digest(1), got: Digest(2) }],
        },
        Event::RestoreFailed { member, generation, attempt: 1, culprit: Some(MemberId(0)) },
        Event::RestoreFailed { member, generation, attempt: 1, culprit: None },
        Event::Broken { member, generation, suspects: vec![Rank(0), Rank(9)] },
        Event::FirstStep { member, generation, step },
        Event::Finished { member, generation, step },
        Event::ShardWritten { member, generation, step, report: report(3) },
        Event::SaveFailed { member, generation, step },
        Event::ManifestWritten { member, generation, step, manifest: Digest(8) },
        Event::Notice { member, deadline: NOW.after(Duration::from_secs(120)) },
    ];
    for holding in holdings() {
        events.push(Event::Ready { member, generation, holding: holding.clone() });
        events.push(Event::Boundary { member, generation, holding });
    }
    events
}

const NOW: Timestamp = Timestamp(1_000_000_000);

#[test]
fn what_a_member_says_arrives_as_it_was_said() {
    for event in events() {
        let wire = rendezvous::from_event(&event, NOW).unwrap();
        let bytes = wire.encode_to_vec();
        let back = rendezvous::event(ME, v1::MemberMessage::decode(bytes.as_slice()).unwrap(), NOW);
        assert_eq!(back, Ok(event));
    }
    assert_eq!(rendezvous::from_event(&Event::Tick, NOW), None);
}

fn introduction() -> Introduction {
    let join = Join {
        name: name("w-1.a_B"),
        slots: 8,
        address: "host:1".to_owned(),
        spec: Spec { min: 2, max: 8, unit: 2, keep: 3 },
        shape: shape(Sharding::Sharded { count: 9 }),
        history: Some(HistoryId(0)),
        generation: Generation(6),
        running: true,
    };
    Introduction { job: JobId::new("job").unwrap(), member: ME, join }
}

#[test]
fn an_introduction_arrives_as_it_was_said_and_another_protocol_is_refused() {
    let said = introduction();
    let wire = rendezvous::from_introduction(&said);
    assert_eq!(rendezvous::introduction(wire.clone()), Ok(said));

    let Some(v1::member_message::Body::Join(mut join)) = wire.body else { panic!("a join") };
    join.protocol = PROTOCOL + 1;
    let other = v1::MemberMessage { body: Some(v1::member_message::Body::Join(join)) };
    let refused = rendezvous::introduction(other).unwrap_err().to_string();
    assert!(refused.contains("protocol version 2") && refused.contains("same release"), "{refused}");
    assert!(rendezvous::introduction(v1::MemberMessage { body: None }).is_err());
}

fn refusals() -> Vec<Refusal> {
    let mut refusals = vec![
        Refusal::JobClosed(Closure::Completed { step: Step(3) }),
        Refusal::JobClosed(Closure::Closed),
        Refusal::BadSpec(BadSpec::Zero),
        Refusal::BadSpec(BadSpec::MinAboveMax { min: 4, max: 2 }),
        Refusal::BadSpec(BadSpec::NoMultiple { unit: 5 }),
        Refusal::BadSpec(BadSpec::TooMany),
        Refusal::BadSlots { slots: 0 },
        Refusal::OtherShape {
            ours: shape(Sharding::Replicated),
            theirs: shape(Sharding::Sharded { count: 2 }),
        },
        Refusal::OtherRecipe,
        Refusal::OtherHistory { ours: HistoryId(1), theirs: HistoryId(u64::MAX) },
        Refusal::TooManyMembers { limit: 20_000 },
    ];
    refusals.extend(departures().into_iter().map(Refusal::Departed));
    refusals
}

fn messages() -> Vec<Message> {
    let generation = Generation(5);
    let place = Place {
        generation,
        rank: Rank(2),
        slots: 2,
        size: WorldSize(8),
        seat: 1,
        seats: 4,
        prev: peer(0),
        next: peer(4),
        roster: u64::MAX,
        renew_every: Duration::from_micros(600_001),
    };
    let plan = Plan {
        generation,
        attempt: 3,
        resume: resume(),
        fetch: vec![Fetch { shards: vec![1, 2], from: vec![peer(1), Peer::outside(ME, "h:2".to_owned())] }],
        load: Some(Load { commit: commit(), shards: Vec::new() }),
    };
    let mut messages = vec![
        Message::Attached { history: HistoryId(77), renew_every: Duration::from_millis(600) },
        Message::World(place),
        Message::Plan(plan.clone()),
        Message::Plan(Plan { fetch: Vec::new(), load: None, ..plan }),
        Message::Go { generation, resume: resume() },
        Message::Break { generation },
        Message::Boundary { generation },
        Message::Draining { left: Some(Duration::from_secs(120)) },
        Message::Draining { left: None },
        Message::Serve { generation },
        Message::SaveNow { generation },
        Message::Publish { generation, step: Step(4), shards: vec![report(1), report(2)] },
        Message::Committed { kept: vec![commit(), commit()] },
        Message::Released,
        Message::Closed(Closure::Completed { step: Step(9) }),
    ];
    messages.extend(refusals().into_iter().map(Message::Refused));
    messages
}

#[test]
fn what_a_coordinator_says_arrives_as_it_was_said() {
    for message in messages() {
        let wire = rendezvous::to_member(&message, |generation| [generation.0 as u8; 32]);
        let bytes = wire.encode_to_vec();
        let back = rendezvous::told(v1::CoordinatorMessage::decode(bytes.as_slice()).unwrap());
        let carries = matches!(message, Message::World(_) | Message::Serve { .. });
        let secret = carries.then_some([5; 32]);
        assert_eq!(back, Ok(Told { message, secret }));
    }
}

fn causes() -> Vec<Cause> {
    let mut causes = vec![
        Cause::Formed,
        Cause::Joined { name: name("a") },
        Cause::Notice { name: name("b") },
        Cause::Drain { name: name("c") },
        Cause::Resized,
        Cause::LinkBroken,
        Cause::Diverged,
        Cause::Unrestored,
        Cause::StoreRolledBack,
    ];
    causes.extend(departures().into_iter().map(|how| Cause::Lost { name: name("d"), how }));
    causes
}

fn changes() -> Vec<WorldChange> {
    let sources =
        [Source::Memory, Source::Checkpoint { step: Step(3) }, Source::AbandonedMemory, Source::Initial];
    let full = sources.map(|source| WorldChange {
        generation: Generation(2),
        causes: causes(),
        before: 4,
        after: 3,
        learned: Timestamp(1),
        stopped: Timestamp(2),
        agreed: Some(Timestamp(3)),
        rebuilt: Some(Timestamp(4)),
        restored: Some(Timestamp(5)),
        first_step: Some(Timestamp(6)),
        resume: Some(resume()),
        source: Some(source),
        steps_lost: 2,
    });
    let empty = WorldChange {
        agreed: None,
        rebuilt: None,
        restored: None,
        first_step: None,
        resume: None,
        source: None,
        ..full[0].clone()
    };
    full.into_iter().chain([empty]).collect()
}

#[test]
fn changes_of_the_world_arrive_as_they_were() {
    for change in changes() {
        assert_eq!(inspect::change(inspect::from_change(&change)), Ok(change));
    }
}

fn records() -> Vec<JobRecord> {
    let empty = JobRecord::new(JobId::new("j").unwrap(), HistoryId(9), Spec::default());
    let seats = vec![
        Seat { member: MemberId(1), name: name("a"), rank: Rank(0), slots: 2, address: "h:1".to_owned() },
        Seat { member: MemberId(2), name: name("b"), rank: Rank(2), slots: 1, address: "h:2".to_owned() },
    ];
    let stages = [
        Stage::Forming,
        Stage::Published,
        Stage::Running,
        Stage::Closed(Closure::Closed),
        Stage::Closed(Closure::Completed { step: Step(4) }),
    ];
    let full = stages.map(|stage| JobRecord {
        shape: Some(shape(Sharding::Replicated)),
        generation: Generation(8),
        world: Some(World { generation: Generation(7), seats: seats.clone() }),
        stage,
        resume: resume(),
        source: Some(Source::Memory),
        closing: true,
        commits: vec![commit()],
        drains: BTreeMap::from([
            (MemberId(1), Drain { deadline: Some(Timestamp(0)), by_notice: true }),
            (MemberId(2), Drain { deadline: None, by_notice: false }),
        ]),
        departed: VecDeque::from_iter(departures().into_iter().map(|how| (ME, how))),
        changes: VecDeque::from(changes()),
        ..empty.clone()
    });
    [empty].into_iter().chain(full).collect()
}

#[test]
fn a_record_is_read_as_it_was_saved() {
    for saved in records() {
        let bytes = record::encode(&saved, &[3; 32]);
        assert_eq!(record::decode(&bytes), Ok((saved, [3; 32])));
    }
}

#[test]
fn a_record_of_a_newer_server_is_refused_with_a_reason() {
    let bytes = record::encode(&records()[0], &[3; 32]);
    let mut wire = v1::JobRecord::decode(bytes.as_slice()).unwrap();
    wire.format = record::FORMAT + 1;
    let refused = record::decode(&wire.encode_to_vec());
    assert!(matches!(&refused, Err(BadMessage::Wrong { field: "format", .. })), "{refused:?}");
}

#[test]
fn a_record_cut_short_or_garbled_is_an_error_or_another_record_but_never_a_panic() {
    let bytes = record::encode(&records()[1], &[3; 32]);
    for cut in 0..bytes.len() {
        let _ = record::decode(&bytes[..cut]);
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut garbled = bytes.clone();
            garbled[at] ^= 1 << bit;
            let _ = record::decode(&garbled);
        }
    }
}

#[test]
fn a_status_arrives_as_it_was() {
    let waiting = [
        Waiting::Nothing,
        Waiting::BelowMin { have: 1, need: 2 },
        Waiting::UnitRemainder { have: 3, unit: 2 },
        Waiting::LastCall { left: Duration::from_millis(3) },
        Waiting::Reattaching { missing: vec![ME] },
        Waiting::Settling { suspects: vec![ME, MemberId(2)] },
        Waiting::Unrestorable { left: Duration::from_secs(30) },
        Waiting::Ready { missing: Vec::new() },
        Waiting::Restored { missing: vec![ME] },
        Waiting::Merge { left: Duration::ZERO },
        Waiting::Boundary { missing: vec![ME] },
        Waiting::Finish { missing: vec![ME] },
    ];
    let phases = [
        PhaseName::Forming,
        PhaseName::Establishing,
        PhaseName::Restoring,
        PhaseName::Running,
        PhaseName::Closed(Closure::Closed),
    ];
    let member = MemberStatus {
        member: ME,
        name: name("w"),
        rank: Some(Rank(0)),
        slots: 1,
        address: "h:1".to_owned(),
        attached: true,
        lease_left: Duration::from_micros(7),
        drain: Some(Drain { deadline: None, by_notice: false }),
        step: Step(5),
    };
    let spare = MemberStatus { rank: None, drain: None, ..member.clone() };
    for (index, waiting) in waiting.into_iter().enumerate() {
        let status = Status {
            job: JobId::new("j").unwrap(),
            history: HistoryId(4),
            spec: Spec::default(),
            phase: phases[index % phases.len()],
            waiting,
            generation: Generation(1),
            size: WorldSize(2),
            step: Step(3),
            members: vec![member.clone(), spare.clone()],
            commits: vec![commit()],
        };
        assert_eq!(inspect::status(inspect::from_status(&status, 2)), Ok(status));
    }
}
