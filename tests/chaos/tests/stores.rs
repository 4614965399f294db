//! What may befall the store: its leader dies, most of it stands still, its disk is full.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::time::Duration;

use reknit_chaos::etcd::{self, SERVERS};
use reknit_chaos::fleet::{Fleet, LEASE, Make, SILENCE};
use reknit_e2e::eventually;
use rustix::process::Signal;

/// How long training may seem to stand still on a busy machine, where it should not at all.
const STILL_MOST: Duration = Duration::from_secs(3);

/// How long the store stands still: longer where there is time for it.
fn outage() -> Duration {
    Duration::from_secs(if std::env::var_os("REKNIT_CHAOS_LONG").is_some() { 30 } else { 8 })
}

#[test]
fn the_stores_leader_dies_and_nobody_who_trains_notices() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let generation = fleet.all_train();
    for _ in 0..2 {
        let (etcd, net, probe) = fleet.etcd();
        let leader = etcd.leader(net, probe);
        etcd.kill(leader);
        assert_ne!(etcd.leader(net, probe), leader);
        fleet.saves_after(fleet.newest_checkpoint());
        fleet.trains_on();
        assert_eq!(fleet.all_train(), generation);
        let (etcd, net, _) = fleet.etcd();
        etcd.restart(net, leader);
    }
    fleet.end();
}

#[test]
fn most_of_the_store_stands_still_and_training_goes_on_all_the_while() {
    let Some(mut fleet) = Fleet::start(Make::default()) else { return };
    let generation = fleet.all_train();
    // By then every coordinator has read what is saved.
    fleet.trains_for(2 * LEASE, STILL_MOST);
    let (etcd, net, probe) = fleet.etcd();
    let leader = etcd.leader(net, probe);
    let stopped = [leader, (leader + 1) % SERVERS];
    stopped.iter().for_each(|index| fleet.etcd().0.signal(*index, Signal::STOP));
    fleet.trains_for(outage(), STILL_MOST);
    // Nobody leads by now; what was saved is shown, and how old it is.
    let shown = fleet.status().unwrap();
    assert!(shown["saved_age_ms"].as_u64().is_some_and(|age| age >= 1000), "{shown}");
    assert_eq!(shown["generation"], generation);
    stopped.iter().for_each(|index| fleet.etcd().0.signal(*index, Signal::CONT));
    fleet.leader();
    assert_eq!(fleet.all_train(), generation);
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.trains_on();
    fleet.end();
}

#[test]
fn a_full_disk_ends_one_server_of_the_store_and_the_others_go_on() {
    // What etcd sets aside from the start, twice 64 MiB for its log, and a little.
    let etcd = etcd::Make { disk_mib: 160, ..etcd::Make::default() };
    let Some(mut fleet) = Fleet::start(Make { networks: true, etcd, ..Make::default() }) else { return };
    let generation = fleet.all_train();
    let (etcd, net, probe) = fleet.etcd();
    let full = etcd.leader(net, probe);
    etcd.fill_disk(net, full);
    let other = (full + 1) % SERVERS;
    eventually("the server without room to give up", || {
        // It may be refused while another leader is chosen.
        let put = etcd.put_garbage(net, probe, other);
        if etcd.runs(full) { Err(format!("it runs; {put:?}")) } else { Ok(()) }
    });
    assert_ne!(etcd.leader(net, probe), full);
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.trains_on();
    assert_eq!(fleet.all_train(), generation);
    fleet.end();
}

#[test]
fn a_store_that_takes_nothing_any_more_holds_up_what_is_saved_but_not_training() {
    let etcd = etcd::Make { quota_bytes: 16 << 20, ..etcd::Make::default() };
    let Some(mut fleet) = Fleet::start(Make { etcd, ..Make::default() }) else { return };
    let generation = fleet.all_train();
    let (etcd, net, probe) = fleet.etcd();
    eventually("the store to be full", || match etcd.put_garbage(net, probe, 0) {
        Err(why) if why.contains("database space exceeded") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    fleet.trains_for(2 * LEASE, STILL_MOST);
    let (etcd, net, probe) = fleet.etcd();
    etcd.make_room(net, probe);
    fleet.leader();
    assert_eq!(fleet.all_train(), generation);
    fleet.saves_after(fleet.newest_checkpoint());
    fleet.trains_on();
    fleet.end();
}

#[test]
fn a_change_of_world_costs_three_transactions_at_most_and_renewed_leases_none() {
    // Each checkpoint would be a transaction of its own.
    let Some(fleet) = Fleet::start(Make { checkpoint_every: Some(1 << 40), ..Make::default() }) else {
        return;
    };
    let leader = fleet.leader();
    let asked = || fleet.roles()[leader.index].as_ref().unwrap().store_transactions;
    let settled = || {
        // The first step of a world is written down as well.
        fleet.trains_for(Duration::from_secs(1), STILL_MOST);
        asked()
    };
    let before = settled();
    // Every worker renews its lease a good many times.
    fleet.trains_for(SILENCE, STILL_MOST);
    assert_eq!(asked(), before);
    let generation = fleet.all_train();
    for most in ["3", "4"] {
        fleet.reknit(&["resize", "job", "--min", "2", "--max", most]).unwrap();
        fleet.trains_with(most.parse().unwrap());
    }
    assert_eq!(fleet.all_train(), generation + 2);
    // What the operator has asked for is a promise, and so a transaction, too.
    assert_eq!(settled(), before + 2 * (3 + 1));
    assert_eq!(fleet.leader(), leader);
    fleet.end();
}
