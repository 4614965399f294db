//! Networks that are cut between a leader and whom it needs, silently, one way and both.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::time::Duration;

use reknit_chaos::etcd::SERVERS;
use reknit_chaos::fleet::{COORDINATORS, Fleet, LEASE, Leader, Make, SILENCE, WORKERS};
use reknit_chaos::net::{Net, Node};

/// How long training may seem to stand still on a busy machine, where it should not at all.
const STILL_MOST: Duration = Duration::from_secs(3);

fn start() -> Option<Fleet> {
    Fleet::start(Make { networks: true, ..Make::default() })
}

/// Which way nothing gets through.
#[derive(Debug, Clone, Copy)]
enum Way {
    From,
    To,
    Both,
}

const WAYS: [Way; 3] = [Way::Both, Way::From, Way::To];

fn cut(net: &Net, way: Way, one: Node, others: impl IntoIterator<Item = Node>) {
    for other in others {
        match way {
            Way::From => net.cut(one, other),
            Way::To => net.cut(other, one),
            Way::Both => net.cut_both_ways(one, other),
        }
    }
}

fn etcd() -> impl Iterator<Item = Node> {
    (0..SERVERS).map(Node::Etcd)
}

fn workers() -> impl Iterator<Item = Node> {
    (0..WORKERS).map(Node::Worker)
}

fn coordinators_but(one: usize) -> impl Iterator<Item = Node> {
    (0..COORDINATORS).filter(move |index| *index != one).map(Node::Coordinator)
}

#[test]
fn a_leader_that_cannot_reach_the_store_makes_way_for_another_whichever_way_is_cut() {
    let Some(fleet) = start() else { return };
    let generation = fleet.all_train();
    for way in WAYS {
        let leader = fleet.leader();
        cut(fleet.net(), way, Node::Coordinator(leader.index), etcd());
        let next = fleet.leader_after(leader.epoch);
        fleet.trains_on();
        assert_eq!(fleet.all_train(), generation, "{way:?}");
        fleet.follows(leader.index);
        fleet.saves_after(fleet.newest_checkpoint());
        fleet.net().heal();
        fleet.saves_after(fleet.newest_checkpoint());
        assert_eq!((fleet.leader(), fleet.all_train()), (next, generation), "{way:?}");
    }
    fleet.end();
}

#[test]
fn a_leader_that_the_others_cannot_reach_goes_on_or_makes_way_but_never_both() {
    let Some(fleet) = start() else { return };
    let generation = fleet.all_train();
    for way in WAYS {
        let leader = fleet.leader();
        cut(fleet.net(), way, Node::Coordinator(leader.index), coordinators_but(leader.index));
        fleet.trains_for(2 * LEASE, STILL_MOST);
        assert_eq!(fleet.all_train(), generation, "{way:?}");
        fleet.saves_after(fleet.newest_checkpoint());
        fleet.net().heal();
        assert_eq!(fleet.all_train(), generation, "{way:?}");
    }
    fleet.end();
}

#[test]
fn a_leader_that_is_cut_off_from_everybody_is_replaced_and_tells_nobody_anything() {
    let Some(fleet) = start() else { return };
    let (generation, leader) = (fleet.all_train(), fleet.leader());
    let (one, others) = (Node::Coordinator(leader.index), coordinators_but(leader.index));
    cut(fleet.net(), Way::Both, one, etcd().chain(workers()).chain(others));
    let next: Leader = fleet.leader_after(leader.epoch);
    fleet.trains_for(2 * LEASE, STILL_MOST);
    assert_eq!(fleet.all_train(), generation);
    fleet.net().heal();
    fleet.follows(leader.index);
    fleet.saves_after(fleet.newest_checkpoint());
    assert_eq!((fleet.leader(), fleet.all_train()), (next, generation));
    fleet.end();
}

#[test]
fn a_leader_that_no_worker_reaches_makes_way_for_one_that_they_reach_whichever_way_is_cut() {
    let Some(fleet) = start() else { return };
    let generation = fleet.all_train();
    for way in WAYS {
        let leader = fleet.leader();
        cut(fleet.net(), way, Node::Coordinator(leader.index), workers());
        let next = fleet.leader_after(leader.epoch);
        assert_ne!(next.index, leader.index, "{way:?}");
        fleet.trains_for(SILENCE + LEASE, STILL_MOST);
        assert_eq!(fleet.all_train(), generation, "{way:?}");
        fleet.net().heal();
        fleet.saves_after(fleet.newest_checkpoint());
        assert_eq!((fleet.leader(), fleet.all_train()), (next, generation), "{way:?}");
    }
    fleet.end();
}

#[test]
fn workers_that_reach_no_coordinator_at_all_train_on_and_are_all_back_when_they_can() {
    let Some(fleet) = start() else { return };
    for index in 0..COORDINATORS {
        cut(fleet.net(), Way::Both, Node::Coordinator(index), workers());
    }
    fleet.trains_for(3 * (SILENCE + LEASE), STILL_MOST);
    fleet.net().heal();
    fleet.all_train();
    fleet.trains_on();
    fleet.saves_after(fleet.newest_checkpoint());
    // To whoever leads they are all dead, and who comes back first may be a step behind who comes back last.
    fleet.end_with(1);
}

#[test]
fn one_worker_that_the_leader_cannot_hear_is_left_behind_and_comes_back() {
    let Some(fleet) = start() else { return };
    let (before, leader) = (fleet.all_train(), fleet.leader());
    fleet.net().cut(Node::Worker(1), Node::Coordinator(leader.index));
    let without = fleet.trains_with(WORKERS - 1);
    assert!(without > before);
    fleet.trains_on();
    fleet.net().heal();
    assert!(fleet.all_train() > without);
    fleet.trains_on();
    // It may have been the only one that had finished the last step.
    fleet.end_with(1);
}
