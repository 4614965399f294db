//! The store itself, as the faults need it: another leader when one is killed, a disk that is full, a quota that is.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use reknit_chaos::etcd::{Etcd, Make, SERVERS, program};
use reknit_chaos::fleet::{networks, pass_over};
use reknit_chaos::net::{Net, Node};
use reknit_chaos::probe::Probe;
use reknit_e2e::eventually;

struct Store {
    // It ends before what it is in does.
    etcd: Etcd,
    probe: Probe,
    net: Net,
    _dir: tempfile::TempDir,
}

fn start(net: Net, make: Make) -> Option<Store> {
    if program().is_none() {
        pass_over("there is no etcd");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut probe = Probe::start(&net, Node::Operator);
    let etcd = Etcd::start(&net, &mut probe, dir.path(), make);
    Some(Store { etcd, probe, net, _dir: dir })
}

#[test]
fn three_servers_have_a_leader_and_another_one_when_it_is_killed() {
    let make = Make { heartbeat_ms: 50, election_ms: 500, ..Make::default() };
    let Some(Store { mut etcd, mut probe, net, _dir }) = start(Net::Loopback, make) else { return };
    let first = etcd.leader(&net, &mut probe);
    etcd.kill(first);
    let second = etcd.leader(&net, &mut probe);
    assert_ne!(first, second);
    assert!(!etcd.runs(first) && etcd.runs(second));
    etcd.restart(&net, first);
    eventually("a server that is back to take part", || etcd.put_garbage(&net, &mut probe, first));
}

#[test]
fn a_server_whose_disk_is_full_ends_and_the_others_go_on() {
    let nodes = [Node::Etcd(0), Node::Etcd(1), Node::Etcd(2), Node::Operator];
    let Some(net) = networks(&nodes) else { return };
    let make = Make { disk_mib: 160, ..Make::default() };
    let Some(Store { mut etcd, mut probe, net, _dir }) = start(net, make) else { return };
    let full = etcd.leader(&net, &mut probe);
    etcd.fill_disk(&net, full);
    let other = (full + 1) % SERVERS;
    eventually("the server without room to give up", || {
        let put = etcd.put_garbage(&net, &mut probe, other);
        if etcd.runs(full) { Err(format!("it runs; {put:?}")) } else { Ok(()) }
    });
    assert_ne!(etcd.leader(&net, &mut probe), full);
    eventually("the others to go on", || etcd.put_garbage(&net, &mut probe, other));
}

#[test]
fn a_full_store_takes_nothing_until_there_is_room_again() {
    let make = Make { quota_bytes: 16 << 20, ..Make::default() };
    let Some(Store { etcd, mut probe, net, _dir }) = start(Net::Loopback, make) else { return };
    eventually("the store to be full", || match etcd.put_garbage(&net, &mut probe, 0) {
        Err(why) if why.contains("database space exceeded") => Ok(()),
        other => Err(format!("{other:?}")),
    });
    etcd.make_room(&net, &mut probe);
    eventually("room", || etcd.put_garbage(&net, &mut probe, 1));
}
