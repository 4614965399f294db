//! A real etcd of three servers, any of which can be killed, stopped, started again, or left without room.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use reknit_e2e::eventually;
use rustix::process::Signal;
use serde_json::Value;

use crate::net::{Net, Node};
use crate::probe::Probe;
use crate::process::Process;

/// How many servers there are.
pub const SERVERS: usize = 3;

/// How etcd is run.
#[derive(Debug, Clone, Copy)]
pub struct Make {
    /// `--heartbeat-interval`, in milliseconds.
    pub heartbeat_ms: u32,
    /// `--election-timeout`, in milliseconds.
    pub election_ms: u32,
    /// `--quota-backend-bytes`; zero for etcd's own.
    pub quota_bytes: u64,
    /// Each server's data in a file system of its own with so many MiB, in memory; zero for the disk. Needs networks of
    /// their own.
    pub disk_mib: u32,
}

impl Default for Make {
    /// As etcd is run by who does not say otherwise.
    fn default() -> Make {
        Make { heartbeat_ms: 100, election_ms: 1000, quota_bytes: 0, disk_mib: 0 }
    }
}

/// The program, if it is installed.
pub fn program() -> Option<PathBuf> {
    let program = std::env::var_os("REKNIT_ETCD").map_or_else(|| PathBuf::from("etcd"), PathBuf::from);
    let runs = Command::new(&program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    runs.is_ok_and(|status| status.success()).then_some(program)
}

/// The servers.
#[derive(Debug)]
pub struct Etcd {
    make: Make,
    program: PathBuf,
    dir: PathBuf,
    servers: Vec<Server>,
}

#[derive(Debug)]
struct Server {
    node: Node,
    client_port: u16,
    peer_port: u16,
    process: Option<Process>,
}

/// What one server says of itself and its leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Member {
    id: u64,
    leader: u64,
}

impl Etcd {
    /// Starts all servers, and waits until they have a leader.
    pub fn start(net: &Net, probe: &mut Probe, dir: &Path, make: Make) -> Etcd {
        let program = program().unwrap();
        let servers = (0..SERVERS)
            .map(|index| Server {
                node: Node::Etcd(index),
                client_port: net.port(2379),
                peer_port: net.port(2380),
                process: None,
            })
            .collect();
        let mut etcd = Etcd { make, program, dir: dir.to_owned(), servers };
        for index in 0..SERVERS {
            let data = etcd.data(index);
            std::fs::create_dir(&data).unwrap();
            if make.disk_mib > 0 {
                let mount = format!("mount -t tmpfs -o size={}m tmpfs '{}'", make.disk_mib, data.display());
                net.shell(Node::Etcd(index), &mount);
            }
            etcd.launch(net, index);
        }
        etcd.leader(net, probe);
        etcd
    }

    fn data(&self, index: usize) -> PathBuf {
        self.dir.join(format!("etcd{}.data", index + 1))
    }

    fn launch(&mut self, net: &Net, index: usize) {
        let peer = |server: &Server| format!("http://{}:{}", net.address(server.node), server.peer_port);
        let cluster: Vec<String> =
            self.servers.iter().map(|server| format!("{}={}", server.node, peer(server))).collect();
        let server = &self.servers[index];
        let (name, client) = (server.node.to_string(), format!("http://{}", self.address(net, index)));
        let mut command = net.command(server.node, &self.program);
        command
            .args(["--name", &name, "--logger", "zap", "--data-dir"])
            .arg(self.data(index).join("member"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(server), "--initial-advertise-peer-urls", &peer(server)])
            .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"])
            .args(["--heartbeat-interval", &self.make.heartbeat_ms.to_string()])
            .args(["--election-timeout", &self.make.election_ms.to_string()]);
        if self.make.quota_bytes > 0 {
            command.args(["--quota-backend-bytes", &self.make.quota_bytes.to_string()]);
        }
        self.servers[index].process = Some(Process::start(command, &self.dir, &name));
    }

    /// Where a server answers clients, `HOST:PORT`.
    pub fn address(&self, net: &Net, index: usize) -> String {
        format!("{}:{}", net.address(self.servers[index].node), self.servers[index].client_port)
    }

    /// The store as a coordinator is told of it.
    pub fn store(&self, net: &Net) -> String {
        let servers: Vec<String> = (0..SERVERS).map(|index| self.address(net, index)).collect();
        format!("etcd://{}/reknit", servers.join(","))
    }

    fn member(&self, net: &Net, probe: &mut Probe, index: usize) -> Result<Member, String> {
        let reply = probe.post(&self.address(net, index), "/v3/maintenance/status", "{}")?;
        let reply: Value = serde_json::from_str(&reply).map_err(|why| format!("{reply}: {why}"))?;
        let number = |value: &Value| value.as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
        Ok(Member { id: number(&reply["header"]["member_id"]), leader: number(&reply["leader"]) })
    }

    /// Waits until a server leads by what all say that answer, and returns which.
    pub fn leader(&self, net: &Net, probe: &mut Probe) -> usize {
        eventually("etcd to have a leader", || {
            let says: Vec<Result<Member, String>> =
                (0..SERVERS).map(|index| self.member(net, probe, index)).collect();
            let heard = || says.iter().filter_map(|said| said.as_ref().ok());
            let leads =
                |said: &Result<Member, String>| said.as_ref().is_ok_and(|member| member.leader == member.id);
            let leader = says.iter().position(leads).filter(|index| {
                let id = says[*index].as_ref().map(|member| member.id);
                heard().all(|member| Ok(&member.leader) == id.as_ref()) && heard().count() > SERVERS / 2
            });
            leader.ok_or_else(|| format!("{says:?}; {}", self.log()))
        })
    }

    /// SIGKILL.
    pub fn kill(&mut self, index: usize) {
        self.servers[index].process.take().unwrap().kill();
    }

    /// Starts a server again that was killed.
    pub fn restart(&mut self, net: &Net, index: usize) {
        self.launch(net, index);
    }

    /// Sends a server a signal.
    pub fn signal(&self, index: usize, signal: Signal) {
        self.servers[index].process.as_ref().unwrap().signal(signal);
    }

    /// Whether a server still runs.
    pub fn runs(&mut self, index: usize) -> bool {
        self.servers[index].process.as_mut().is_some_and(Process::runs)
    }

    /// Fills a server's disk to the last byte; see [`Make::disk_mib`].
    pub fn fill_disk(&self, net: &Net, index: usize) {
        let data = self.data(index);
        // It ends with an error, when there is no room any more.
        net.shell(self.servers[index].node, &format!("cat /dev/zero > '{}/filler' || :", data.display()));
    }

    /// Puts three quarters of a mebibyte under a key of nobody's.
    ///
    /// # Errors
    /// If the server does not take it.
    pub fn put_garbage(&self, net: &Net, probe: &mut Probe, index: usize) -> Result<(), String> {
        // In base 64, as it has to be: some garbage.
        let body = format!("{{\"key\":\"Z2FyYmFnZQ==\",\"value\":\"{}\"}}", "QUFB".repeat(1 << 18));
        probe.post(&self.address(net, index), "/v3/kv/put", &body).map(drop)
    }

    /// Makes room: forgets all but the newest of everything, gives the space back, and takes the alarm back.
    pub fn make_room(&self, net: &Net, probe: &mut Probe) {
        let address = |index| self.address(net, index);
        let retried = |probe: &mut Probe, index, path: &str, body: &str| {
            eventually(path, || probe.post(&address(index), path, body))
        };
        retried(probe, 0, "/v3/kv/deleterange", "{\"key\":\"Z2FyYmFnZQ==\"}");
        let status = retried(probe, 0, "/v3/maintenance/status", "{}");
        let status: Value = serde_json::from_str(&status).unwrap();
        let revision = status["header"]["revision"].as_str().unwrap();
        retried(probe, 0, "/v3/kv/compaction", &format!("{{\"revision\":\"{revision}\",\"physical\":true}}"));
        for index in 0..SERVERS {
            retried(probe, index, "/v3/maintenance/defragment", "{}");
        }
        // Each server has raised its own.
        eventually("no alarm", || {
            let alarms = probe.post(&address(0), "/v3/maintenance/alarm", "{\"action\":\"GET\"}")?;
            let alarms: Value = serde_json::from_str(&alarms).map_err(|why| why.to_string())?;
            let raised = alarms["alarms"].as_array().map(Vec::as_slice).unwrap_or_default();
            for alarm in raised {
                let of = format!("\"memberID\":{},\"alarm\":\"NOSPACE\"", alarm["memberID"]);
                let body = format!("{{\"action\":\"DEACTIVATE\",{of}}}");
                probe.post(&address(0), "/v3/maintenance/alarm", &body)?;
            }
            if raised.is_empty() { Ok(()) } else { Err(alarms.to_string()) }
        });
    }

    fn log(&self) -> String {
        let last = |server: &Server| {
            let log = server.process.as_ref().map(Process::log).unwrap_or_default();
            log.lines().last().unwrap_or_default().to_owned()
        };
        self.servers.iter().map(last).collect::<Vec<_>>().join(" / ")
    }
}
