//! Rule P-1: what is encoded decodes to the same value. Rule P-2: bytes from outside never panic.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::time::Duration;

use common::{ME, NOW, changes, commit, events, introduction, messages, name, records};
use prost::Message as _;
use reknit_membership::event::{Event, Message};
use reknit_membership::reason::{Closure, Drain, SaveTrouble, Waiting};
use reknit_membership::spec::Spec;
use reknit_membership::status::{MemberStatus, PhaseName, Status};
use reknit_membership::{Generation, HistoryId, JobId, MemberId, Rank, Step, Timestamp, WorldSize};
use reknit_proto::rendezvous::{self, Told};
use reknit_proto::{BadMessage, PROTOCOL, inspect, record, v1};

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

#[test]
fn changes_of_the_world_arrive_as_they_were() {
    for change in changes() {
        assert_eq!(inspect::change(inspect::from_change(&change)), Ok(change));
    }
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
        available: true,
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
            save_trouble: Some(SaveTrouble { step: Step(9), member: name("w") }),
        };
        assert_eq!(inspect::status(inspect::from_status(&status, 2)), Ok(status));
    }
}

/// Every way to cut `bytes` short, or to flip a bit of them.
fn garbled(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let flipped = |bit: usize| {
        let mut garbled = bytes.to_vec();
        garbled[bit / 8] ^= 1 << (bit % 8);
        garbled
    };
    (0..bytes.len()).map(|cut| bytes[..cut].to_vec()).chain((0..bytes.len() * 8).map(flipped))
}

#[test]
fn p2_whatever_a_member_says_is_an_event_or_an_error() {
    let now = Timestamp(1 << 50);
    let introduction = rendezvous::from_introduction(&introduction());
    let said = events().into_iter().filter_map(|event| rendezvous::from_event(&event, now));
    for wire in said.chain([introduction]) {
        for bytes in garbled(&wire.encode_to_vec()) {
            let Ok(wire) = v1::MemberMessage::decode(bytes.as_slice()) else { continue };
            let _ = rendezvous::event(ME, wire.clone(), now);
            let _ = rendezvous::introduction(wire);
        }
    }
}

#[test]
fn p2_whatever_a_coordinator_says_is_a_message_or_an_error() {
    for message in messages() {
        for bytes in garbled(&rendezvous::to_member(&message, |_| [7; 32]).encode_to_vec()) {
            if let Ok(wire) = v1::CoordinatorMessage::decode(bytes.as_slice()) {
                let _ = rendezvous::told(wire);
            }
        }
    }
}
