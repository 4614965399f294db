//! A network for each process, and a router between them that forgets what it is told to forget.
//!
//! ```text
//!   etcd1  etcd2  etcd3     coord1  coord2  coord3     worker1 … worker4     operator
//!     │      │      │         │       │       │           │         │           │
//!     └──────┴──────┴─────────┴───── router ──┴───────────┴─────────┴───────────┘
//! ```
//! A cut is a routing rule in the router: what comes *from* one address *to* another is dropped there without a word.
//! So it has a direction, takes effect at once also for connections that exist, and neither side is told.
//!
//! Each network is the namespace of one sleeping process, and other processes enter it by that one's id. Nothing has a
//! name in the file system, so nothing is left behind. An ordinary user gets a user namespace of its own around it all.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::process::{self, Process};

/// Somebody with an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// A server of the store, counted from 0.
    Etcd(usize),
    /// A coordinator.
    Coordinator(usize),
    /// A worker.
    Worker(usize),
    /// Who looks and asks.
    Operator,
}

impl Node {
    /// Its place among all, from 1.
    fn number(self) -> u8 {
        let number = match self {
            Node::Etcd(index) => 11 + index,
            Node::Coordinator(index) => 21 + index,
            Node::Worker(index) => 31 + index,
            Node::Operator => 1,
        };
        u8::try_from(number).unwrap()
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Node::Etcd(index) => write!(f, "etcd{}", index + 1),
            Node::Coordinator(index) => write!(f, "coord{}", index + 1),
            Node::Worker(index) => write!(f, "worker{}", index + 1),
            Node::Operator => write!(f, "operator"),
        }
    }
}

/// Where nodes are.
#[derive(Debug)]
pub enum Net {
    /// All on this machine's loopback.
    Loopback,
    /// Each in a network of its own.
    Separate(Networks),
}

/// The networks, and the router between them.
#[derive(Debug)]
pub struct Networks {
    router: Namespace,
    nodes: BTreeMap<Node, Namespace>,
    /// Those whose clock is not the machine's.
    clocks: BTreeMap<Node, Process>,
    dir: tempfile::TempDir,
}

/// A network and a table of mounts that live as long as a process that does nothing.
#[derive(Debug)]
struct Namespace {
    holder: Process,
    is_ours: bool,
}

impl Namespace {
    fn make(prefix: &[String], around: &[&str], dir: &Path, name: &str, is_ours: bool) -> Namespace {
        let mut words = prefix.to_vec();
        words.extend(["unshare", "--net", "--mount"].map(str::to_owned));
        words.extend(around.iter().map(|word| (*word).to_owned()));
        let mut command = process::command(&words, "sleep");
        command.arg("infinity");
        let holder = Process::start(command, dir, name);
        holder.becomes("sleep");
        Namespace { holder, is_ours }
    }

    /// What a command line begins with that runs in here.
    fn prefix(&self) -> Vec<String> {
        let mut words = self.user_prefix();
        if words.is_empty() {
            words = vec!["nsenter".to_owned(), "--target".to_owned(), self.holder.id().to_string()];
        }
        words.extend(["--net", "--mount"].map(str::to_owned));
        words
    }

    /// Enters the user namespace around it only, if there is one.
    fn user_prefix(&self) -> Vec<String> {
        let id = self.holder.id().to_string();
        let words = ["nsenter", "--target", &id, "--user", "--preserve-credentials"];
        if self.is_ours { Vec::new() } else { words.map(str::to_owned).to_vec() }
    }

    /// Runs several commands of `ip`.
    fn ip(&self, lines: &[String]) {
        let mut child = process::command(&self.prefix(), "ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{lines:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn shell(&self, script: &str) {
        let output = process::command(&self.prefix(), "sh").args(["-c", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Whether networks can be made here; why not, if not.
fn can_be_made() -> Result<bool, String> {
    let works = |args: &[&str]| {
        Command::new("unshare").args(args).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let ip = Command::new("ip").arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    if !ip {
        return Err("there is no `ip` (iproute2)".to_owned());
    }
    if works(&["--net", "--mount", "true"]) {
        return Ok(true);
    }
    if works(&["--user", "--map-root-user", "--net", "--mount", "true"]) {
        return Ok(false);
    }
    Err("no network namespace can be made, with the rights of root or in a user namespace".to_owned())
}

impl Net {
    /// A network for each of these nodes.
    ///
    /// # Errors
    /// If that cannot be done here; the text says why.
    pub fn separate(nodes: &[Node]) -> Result<Net, String> {
        let is_ours = can_be_made()?;
        let dir = tempfile::tempdir().unwrap();
        let around: &[&str] = if is_ours { &[] } else { &["--user", "--map-root-user"] };
        let router = Namespace::make(&[], around, dir.path(), "router", is_ours);
        let mut networks = Networks { router, nodes: BTreeMap::new(), clocks: BTreeMap::new(), dir };
        networks.router.shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
        for node in nodes {
            networks.add(*node, is_ours);
        }
        // What comes in by one way and goes out by another is not suspicious here.
        networks.router.shell("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
        Ok(Net::Separate(networks))
    }

    /// A node's address.
    pub fn address(&self, node: Node) -> Ipv4Addr {
        match self {
            Net::Loopback => Ipv4Addr::LOCALHOST,
            Net::Separate(_) => address(node),
        }
    }

    /// A port that is free there: the wanted one, if it has a network of its own.
    pub fn port(&self, wanted: u16) -> u16 {
        match self {
            Net::Loopback => port_that_stays_free(),
            Net::Separate(_) => wanted,
        }
    }

    /// A command that runs a program there.
    pub fn command(&self, node: Node, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self {
            Net::Loopback => process::command(&[], program),
            Net::Separate(networks) => {
                let mut prefix = networks.nodes[&node].prefix();
                let clock = networks.clocks.get(&node);
                prefix
                    .extend(clock.map(|holder| format!("--time=/proc/{}/ns/time_for_children", holder.id())));
                process::command(&prefix, program)
            }
        }
    }

    /// From now on, the monotonic clock of what is started there is so far ahead of the machine's.
    ///
    /// # Errors
    /// If that cannot be done here.
    pub fn set_clock_ahead(&mut self, node: Node, by: Duration) -> Result<(), String> {
        let Net::Separate(networks) = self else { panic!("this needs networks of their own") };
        if !networks.router.is_ours {
            return Err("clocks of their own need the rights of root".to_owned());
        }
        let prefix = ["unshare", "--time", "--monotonic", &by.as_secs().to_string()].map(str::to_owned);
        let mut command = process::command(&prefix, "sleep");
        command.arg("infinity");
        let holder = Process::start(command, networks.dir.path(), &format!("{node}-clock"));
        holder.becomes("sleep");
        networks.clocks.insert(node, holder);
        Ok(())
    }

    /// Runs a shell script there, with the rights of root over its networks and mounts.
    pub fn shell(&self, node: Node, script: &str) {
        self.networks().nodes[&node].shell(script);
    }

    /// The ids of the processes that the networks consist of.
    pub fn holders(&self) -> Vec<u32> {
        let networks = self.networks();
        let namespaces = networks.nodes.values().chain([&networks.router]);
        let holders = namespaces.map(|namespace| &namespace.holder).chain(networks.clocks.values());
        holders.map(Process::id).collect()
    }

    fn networks(&self) -> &Networks {
        match self {
            Net::Loopback => panic!("this needs networks of their own"),
            Net::Separate(networks) => networks,
        }
    }

    /// From now on nothing that one sends reaches the other.
    pub fn cut(&self, from: Node, to: Node) {
        self.networks().router.ip(&[rule("add", from, to)]);
    }

    /// Neither hears of the other any more.
    pub fn cut_both_ways(&self, one: Node, other: Node) {
        self.networks().router.ip(&[rule("add", one, other), rule("add", other, one)]);
    }

    /// Takes all cuts back.
    pub fn heal(&self) {
        // Each deletes one rule, until there is none of this priority.
        self.networks().router.shell(&format!("while ip rule del pref {CUT} 2> /dev/null; do :; done"));
    }
}

/// The priority of the rules that cut: before the main table.
const CUT: u32 = 100;

fn address(node: Node) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, node.number(), 2)
}

fn rule(verb: &str, from: Node, to: Node) -> String {
    format!("rule {verb} pref {CUT} from {} to {} blackhole", address(from), address(to))
}

impl Networks {
    fn add(&mut self, node: Node, is_ours: bool) {
        let namespace =
            Namespace::make(&self.router.user_prefix(), &[], self.dir.path(), &node.to_string(), is_ours);
        let (number, id) = (node.number(), namespace.holder.id());
        self.router.ip(&[
            format!("link add {node} type veth peer name eth0 netns {id}"),
            format!("addr add 10.77.{number}.1/30 dev {node}"),
            format!("link set {node} up"),
        ]);
        namespace.ip(&[
            "link set lo up".to_owned(),
            format!("addr add {}/30 dev eth0", address(node)),
            "link set eth0 up".to_owned(),
            format!("route add default via 10.77.{number}.1"),
        ]);
        self.nodes.insert(node, namespace);
    }
}

/// Ports that the kernel gives nobody who does not name one (`ip_local_port_range` begins above them): one that is free
/// now is not taken by somebody's connection before its server listens, or while its server is dead.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// A port of this machine that this process has not given away yet.
fn port_that_stays_free() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let ports = u32::from(PORTS.end - PORTS.start);
    // Processes begin apart from each other.
    let first = std::process::id().wrapping_mul(97);
    loop {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed);
        assert!(given < ports, "no port is free");
        let port = PORTS.start + u16::try_from(first.wrapping_add(given) % ports).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}
