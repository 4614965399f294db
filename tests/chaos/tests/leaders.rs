//! Coordinators that die, stand still, or have other clocks: another one leads, and nobody who trains notices.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::path::Path;
use std::time::Duration;

use reknit_chaos::fleet::{COORDINATORS, Fleet, LEASE, Make};
use rustix::process::Signal;

/// How long training may seem to stand still on a busy machine, where it should not at all.
const STILL_MOST: Duration = Duration::from_secs(3);

fn kills() -> u32 {
    std::env::var("REKNIT_CHAOS_KILLS").map_or(5, |number| number.parse().unwrap())
}

#[test]
fn the_leading_coordinator_is_killed_again_and_again_and_no_generation_is_spent() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let generation = fleet.all_train();
    let mut leader = fleet.leader();
    for _ in 0..kills() {
        fleet.coordinator(leader.index).kill();
        let next = fleet.leader_after(leader.epoch);
        assert_ne!(next.index, leader.index, "it is dead");
        fleet.trains_on();
        assert_eq!(fleet.all_train(), generation);
        fleet.restart(leader.index);
        fleet.follows(leader.index);
        fleet.saves_after(fleet.newest_checkpoint());
        leader = next;
    }
    fleet.end();
}

#[test]
fn a_leader_that_is_told_to_stop_hands_over_at_once() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let generation = fleet.all_train();
    let leader = fleet.signal_leader(Signal::TERM);
    let asked = std::time::Instant::now();
    let next = fleet.leader_after(leader.epoch);
    assert!(asked.elapsed() < LEASE, "nobody waits for a lease: {:?}", asked.elapsed());
    assert!(fleet.coordinator(leader.index).ended().success(), "{}", fleet.coordinator(leader.index).log());
    assert_eq!(fleet.all_train(), generation);
    fleet.saves_after(fleet.newest_checkpoint());
    assert_eq!(fleet.leader(), next);
    fleet.end();
}

#[test]
fn a_leader_that_stood_still_beyond_its_lease_writes_nothing_when_it_goes_on() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let generation = fleet.all_train();
    let leader = fleet.signal_leader(Signal::STOP);
    let next = fleet.leader_after(leader.epoch);
    fleet.trains_for(3 * LEASE, STILL_MOST);
    assert_eq!(fleet.all_train(), generation);
    fleet.coordinator(leader.index).signal(Signal::CONT);
    // What it would write now, it would write at once.
    fleet.follows(leader.index);
    fleet.saves_after(fleet.newest_checkpoint());
    assert_eq!((fleet.leader(), fleet.all_train()), (next, generation));
    fleet.end();
}

#[test]
fn a_follower_that_stands_still_or_dies_is_not_missed() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let (generation, leader) = (fleet.all_train(), fleet.leader());
    let followers = [1, 2].map(|next| (leader.index + next) % COORDINATORS);
    fleet.coordinator(followers[0]).signal(Signal::STOP);
    fleet.coordinator(followers[1]).kill();
    fleet.trains_for(2 * LEASE, STILL_MOST);
    assert_eq!((fleet.leader(), fleet.all_train()), (leader, generation));
    // The one that is left was not needed for anything either.
    fleet.coordinator(leader.index).kill();
    fleet.trains_on();
    fleet.coordinator(followers[0]).signal(Signal::CONT);
    let next = fleet.leader_after(leader.epoch);
    assert_eq!((next.index, fleet.all_train()), (followers[0], generation));
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.end();
}

#[test]
fn clocks_that_differ_by_days_do_not_matter() {
    let day = Duration::from_secs(86_400);
    let make = Make { networks: true, ahead: [Duration::ZERO, day, 30 * day], ..Make::default() };
    let Some(mut fleet) = Fleet::start(make) else { return };
    let generation = fleet.all_train();
    let mut leader = fleet.leader();
    // Each leads after one whose clock is far from its own.
    for _ in 0..COORDINATORS {
        fleet.coordinator(leader.index).kill();
        let next = fleet.leader_after(leader.epoch);
        assert_eq!(fleet.all_train(), generation);
        fleet.restart(leader.index);
        leader = next;
    }
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.end();
}

#[test]
fn a_wall_clock_that_jumps_changes_nothing() {
    let library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
    if !Path::new(library).exists() {
        // No promise is broken: nobody said that this is installed.
        return println!("passed over: there is no libfaketime");
    }
    let dir = tempfile::tempdir().unwrap();
    let offset = dir.path().join("offset");
    let jump_to = |by: &str| {
        // Whoever reads it must not find half of it.
        let new = dir.path().join("new");
        std::fs::write(&new, by).unwrap();
        std::fs::rename(new, &offset).unwrap();
    };
    jump_to("+0");
    let variables = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", offset.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let Some(mut fleet) = Fleet::start(Make { environment, ..Make::default() }) else { return };
    let (generation, leader) = (fleet.all_train(), fleet.leader());
    for by in ["+1h", "-1d", "+0"] {
        jump_to(by);
        fleet.trains_for(LEASE, STILL_MOST);
        assert_eq!((fleet.leader(), fleet.all_train()), (leader, generation), "{by}");
        fleet.saves_after(fleet.newest_checkpoint());
    }
    jump_to("-1d");
    fleet.coordinator(leader.index).kill();
    let next = fleet.leader_after(leader.epoch);
    assert!(next.epoch > leader.epoch && fleet.all_train() == generation);
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.end();
}
