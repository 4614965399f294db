//! The store itself, as the faults need it: it has a leader, and another one when that is killed.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use reknit_chaos::etcd::{self, Etcd, SERVERS};
use reknit_chaos::fleet::pass_over;
use reknit_chaos::net::{Net, Node};
use reknit_chaos::probe::Probe;

#[test]
fn three_servers_have_a_leader_and_another_one_when_it_is_killed() {
    if etcd::program().is_none() {
        return pass_over("there is no etcd");
    }
    let dir = tempfile::tempdir().unwrap();
    let net = Net::Loopback;
    let mut probe = Probe::start(&net, Node::Operator);
    let make = etcd::Make { heartbeat_ms: 50, election_ms: 500, ..etcd::Make::default() };
    let mut etcd = Etcd::start(&net, &mut probe, dir.path(), make);
    let first = etcd.leader(&net, &mut probe);
    etcd.kill(first);
    let second = etcd.leader(&net, &mut probe);
    assert_ne!(first, second);
    assert!(!etcd.runs(first) && etcd.runs(second));
    etcd.restart(&net, first);
    let third = (second + 1) % SERVERS;
    etcd.put_garbage(&net, &mut probe, third).unwrap();
}
