//! Values of everything that is ever encoded.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use reknit_membership::event::{Event, Join, Message};
use reknit_membership::holding::{Fetch, Holding, Load, Moved, Plan, Resume, ShardReport, Shards, Source};
use reknit_membership::reason::{Cause, Closure, Departure, Drain, Refusal};
use reknit_membership::record::{Commit, JobRecord, Stage, WorldChange};
use reknit_membership::spec::{BadSpec, Shape, Sharding, Spec};
use reknit_membership::world::{Peer, Place, Seat, World};
use reknit_membership::{
    Digest, Generation, HistoryId, JobId, Lineage, MemberId, MemberName, Rank, Step, Timestamp, WorldSize,
};
use reknit_proto::rendezvous::Introduction;

pub(crate) const ME: MemberId = MemberId(0xfeed_0000_0000_0001);

pub(crate) fn name(text: &str) -> MemberName {
    MemberName::new(text).unwrap()
}

pub(crate) fn resume() -> Resume {
    Resume { lineage: Lineage(3), step: Step(u64::MAX) }
}

pub(crate) fn shape(sharding: Sharding) -> Shape {
    Shape { tensors: Digest(u128::MAX - 1), count: 12, bytes: 1 << 40, recipe: Digest(7), sharding }
}

pub(crate) fn commit() -> Commit {
    Commit {
        step: Step(100),
        generation: Generation(4),
        shards: 3,
        manifest: Digest(1 << 100),
        at: Timestamp(9),
    }
}

pub(crate) fn peer(rank: u32) -> Peer {
    Peer { member: MemberId(u64::from(rank) + 10), rank: Rank(rank), address: format!("10.0.0.{rank}:1") }
}

pub(crate) fn report(n: u128) -> ShardReport {
    ShardReport { bytes: 55, file: Digest(n), state: Digest(n + 1) }
}

pub(crate) fn departures() -> Vec<Departure> {
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

pub(crate) fn holdings() -> Vec<Holding> {
    vec![
        Holding::Nothing,
        Holding::Fresh { digest: Digest(5) },
        Holding::State { resume: resume(), shards: Shards::Whole },
        Holding::State { resume: resume(), shards: Shards::Only(BTreeSet::from([0, 7, 65_535])) },
        Holding::State { resume: resume(), shards: Shards::Only(BTreeSet::new()) },
    ]
}

pub(crate) fn events() -> Vec<Event> {
    let (member, generation, step) = (ME, Generation(u64::MAX), Step(12));
    let mut events = vec![
        Event::Renew { member, generation, step },
        Event::Available { member },
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

pub(crate) const NOW: Timestamp = Timestamp(1_000_000_000);

pub(crate) fn introduction() -> Introduction {
    let join = Join {
        name: name("w-1.a_B"),
        slots: 8,
        address: "host:1".to_owned(),
        spec: Spec { min: 2, max: 8, unit: 2, keep: 3 },
        shape: shape(Sharding::Sharded { count: 9 }),
        history: Some(HistoryId(0)),
        generation: Generation(6),
        running: true,
        available: true,
    };
    Introduction { job: JobId::new("job").unwrap(), member: ME, join }
}

pub(crate) fn refusals() -> Vec<Refusal> {
    let mut refusals = vec![
        Refusal::JobClosed(Closure::Completed { step: Step(3) }),
        Refusal::JobClosed(Closure::Closed),
        Refusal::JobClosed(Closure::ByMembers),
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

pub(crate) fn messages() -> Vec<Message> {
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
        Message::SaveGivenUp { generation, step: Step(4) },
        Message::SaveNow { generation },
        Message::Publish { generation, step: Step(4), shards: vec![report(1), report(2)] },
        Message::Committed { kept: vec![commit(), commit()] },
        Message::Released,
        Message::Closed(Closure::Completed { step: Step(9) }),
    ];
    messages.extend(refusals().into_iter().map(Message::Refused));
    messages
}

pub(crate) fn causes() -> Vec<Cause> {
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

pub(crate) fn changes() -> Vec<WorldChange> {
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

pub(crate) fn records() -> Vec<JobRecord> {
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
