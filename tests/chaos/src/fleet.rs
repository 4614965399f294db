//! Three coordinators on an etcd of three, four training workers, and what is asked of all of them in the end.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reknit_e2e::{eventually, programs};
use rustix::process::Signal;
use serde_json::Value;

use crate::etcd::{self, Etcd};
use crate::history::History;
use crate::invariants::Evidence;
use crate::net::{Net, Node};
use crate::probe::{Leadership, Probe};
use crate::process::Process;

/// How many coordinators there are.
pub const COORDINATORS: usize = 3;
/// How many workers.
pub const WORKERS: usize = 4;
/// How long a leader may go on without the store.
pub const LEASE: Duration = Duration::from_secs(2);
/// How long a member may be silent.
pub const SILENCE: Duration = Duration::from_secs(3);

const JOB: &str = "job";

/// One at a time: each has a dozen processes.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// What a fleet is like.
#[derive(Debug, Clone, Default)]
pub struct Make {
    /// Each process in a network of its own, so that networks can be cut.
    pub networks: bool,
    /// The store.
    pub etcd: etcd::Make,
    /// What else a coordinator's environment has.
    pub environment: Vec<(String, String)>,
    /// After how many steps workers make a checkpoint; 20 if it is not said.
    pub checkpoint_every: Option<u64>,
    /// By how much the coordinators' monotonic clocks are ahead of the machine's.
    pub ahead: [Duration; COORDINATORS],
}

/// A coordinator that leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    /// Which one.
    pub index: usize,
    /// Greater than that of every leader before.
    pub epoch: u64,
}

/// All of it, running.
#[derive(Debug)]
pub struct Fleet {
    make: Make,
    // Processes first: what they are in must outlive them.
    workers: Vec<Process>,
    coordinators: Vec<Coordinator>,
    etcd: Etcd,
    probe: RefCell<Probe>,
    net: Net,
    dir: Option<tempfile::TempDir>,
    _turn: MutexGuard<'static, ()>,
}

#[derive(Debug)]
struct Coordinator {
    address: SocketAddr,
    process: Option<Process>,
    /// The ids of all its lives.
    ids: Vec<u32>,
}

/// Says why a test is passed over, unless what it needs was promised to be there.
pub fn pass_over(why: &str) {
    assert!(std::env::var_os("REKNIT_NEED_ETCD").is_none(), "REKNIT_NEED_ETCD is set, but {why}");
    #[expect(clippy::print_stderr, reason = "who reads the tests' output should know")]
    {
        eprintln!("passed over: {why}");
    }
}

/// Networks for all these nodes; nothing, with a notice, if they cannot be made here.
pub fn networks(nodes: &[Node]) -> Option<Net> {
    Net::separate(nodes).map_err(|why| pass_over(&why)).ok()
}

fn nodes() -> Vec<Node> {
    let etcd = (0..etcd::SERVERS).map(Node::Etcd);
    let coordinators = (0..COORDINATORS).map(Node::Coordinator);
    let workers = (0..WORKERS).map(Node::Worker);
    etcd.chain(coordinators).chain(workers).chain([Node::Operator]).collect()
}

impl Fleet {
    /// Starts one whose workers all train in one world; nothing, with a notice, if what it needs is not here.
    pub fn start(make: Make) -> Option<Fleet> {
        // Whoever panicked with it has cleaned up all the same.
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if etcd::program().is_none() {
            pass_over("there is no etcd: none in the path, none named by REKNIT_ETCD");
            return None;
        }
        let mut net = if make.networks { networks(&nodes())? } else { Net::Loopback };
        for (index, ahead) in make.ahead.into_iter().enumerate().filter(|(_, ahead)| !ahead.is_zero()) {
            net.set_clock_ahead(Node::Coordinator(index), ahead).map_err(|why| pass_over(&why)).ok()?;
        }
        let dir = tempfile::Builder::new().prefix("reknit-chaos-").tempdir().unwrap();
        let mut probe = Probe::start(&net, Node::Operator);
        let etcd = Etcd::start(&net, &mut probe, dir.path(), make.etcd);
        let coordinators = (0..COORDINATORS).map(|index| {
            let address = SocketAddr::from((net.address(Node::Coordinator(index)), net.port(7070)));
            Coordinator { address, process: None, ids: Vec::new() }
        });
        let coordinators = coordinators.collect();
        let (workers, probe, dir) = (Vec::new(), RefCell::new(probe), Some(dir));
        let mut fleet = Fleet { make, workers, coordinators, etcd, probe, net, dir, _turn: turn };
        for index in 0..COORDINATORS {
            fleet.restart(index);
        }
        fleet.leader();
        for index in 0..WORKERS {
            fleet.launch(index);
        }
        fleet.all_train();
        Some(fleet)
    }

    fn dir(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    fn record(&self, index: usize) -> PathBuf {
        self.dir().join(format!("coord{}.record", index + 1))
    }

    fn urls(&self) -> Vec<String> {
        self.coordinators.iter().map(|coordinator| format!("http://{}", coordinator.address)).collect()
    }

    /// Starts a coordinator, also one that was killed or has ended.
    pub fn restart(&mut self, index: usize) {
        let Coordinator { address, .. } = self.coordinators[index];
        let node = Node::Coordinator(index);
        let mut command = self.net.command(node, programs().join("reknit"));
        command
            .args(["serve", "--insecure", "--announce", "--listen", &address.to_string()])
            .args(["--advertise", &format!("http://{address}"), "--store", &self.etcd.store(&self.net)])
            .args([
                "--lease",
                &format!("{}s", LEASE.as_secs()),
                "--silence",
                &format!("{}s", SILENCE.as_secs()),
            ])
            .arg("--record")
            .arg(self.record(index))
            .envs(self.make.environment.iter().map(|(name, value)| (name, value)));
        let process = Process::start(command, self.dir(), &node.to_string());
        self.coordinators[index].ids.push(process.id());
        self.coordinators[index].process = Some(process);
    }

    fn launch(&mut self, index: usize) {
        let node = Node::Worker(index);
        let (name, host) = (node.to_string(), self.net.address(node).to_string());
        let checkpoints = self.dir().join("checkpoints");
        let evidence = self.dir().join(format!("{name}.evidence"));
        let mut command = self.net.command(node, programs().join("reknit-digits"));
        command
            .args(["--coordinator", &self.urls().join(","), "--job", JOB, "--name", &name])
            .args(["--min", "1", "--max", "8", "--steps", "100000000", "--step-ms", "20"])
            .args(["--listen", &format!("{host}:0"), "--advertise", &host])
            // Each checkpoint is a save, and something that members are told.
            .args([
                "--checkpoint-every",
                &self.make.checkpoint_every.unwrap_or(20).to_string(),
                "--checkpoints",
            ])
            .arg(checkpoints)
            .arg("--evidence")
            .arg(evidence)
            .env("RAYON_NUM_THREADS", "1");
        self.workers.push(Process::start(command, self.dir(), &name));
    }

    /// The network.
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// The store, with what is needed to ask it things.
    pub fn etcd(&mut self) -> (&mut Etcd, &Net, &mut Probe) {
        (&mut self.etcd, &self.net, self.probe.get_mut())
    }

    /// A coordinator's process.
    pub fn coordinator(&mut self, index: usize) -> &mut Process {
        self.coordinators[index].process.as_mut().unwrap()
    }

    /// What each coordinator says of itself, if it answers.
    pub fn roles(&self) -> Vec<Option<Leadership>> {
        self.probe.borrow_mut().coordinators(&self.urls())
    }

    /// Waits until a coordinator leads.
    pub fn leader(&self) -> Leader {
        self.leader_after(0)
    }

    /// Waits until a coordinator leads that came after the leader of this epoch.
    pub fn leader_after(&self, epoch: u64) -> Leader {
        eventually("a leader", || {
            let roles = self.roles();
            let newest = roles
                .iter()
                .enumerate()
                .filter_map(|(index, says)| {
                    says.as_ref().filter(|says| says.leads()).map(|says| (index, says))
                })
                .filter(|(_, says)| says.epoch > epoch)
                .max_by_key(|(_, says)| says.epoch);
            match newest {
                Some((index, says)) => Ok(Leader { index, epoch: says.epoch }),
                None => Err(format!("{roles:?}; {}", self.last_words())),
            }
        })
    }

    /// Waits until a coordinator says that it does not lead.
    pub fn follows(&self, index: usize) {
        eventually("a coordinator to follow", || {
            let roles = self.roles();
            match &roles[index] {
                Some(says) if !says.leads() => Ok(()),
                _ => Err(format!("{roles:?}; {}", self.last_words())),
            }
        });
    }

    /// What each process has said last.
    fn last_words(&self) -> String {
        let coordinators = self.coordinators.iter().filter_map(|coordinator| coordinator.process.as_ref());
        let last = |process: &Process| {
            format!("{}: {}", process.name(), process.log().lines().last().unwrap_or_default())
        };
        coordinators.chain(&self.workers).map(last).collect::<Vec<_>>().join(" / ")
    }

    /// Runs a command line as an operator would, with all coordinators named.
    ///
    /// # Errors
    /// If it fails; what it said.
    pub fn reknit(&self, args: &[&str]) -> Result<String, String> {
        let output = self
            .net
            .command(Node::Operator, programs().join("reknit"))
            .args(args)
            .args(["--coordinator", &self.urls().join(",")])
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The job's status.
    ///
    /// # Errors
    /// If no coordinator says; what the command said instead.
    pub fn status(&self) -> Result<Value, String> {
        let text = self.reknit(&["status", JOB, "--json"])?;
        serde_json::from_str(&text).map_err(|why| format!("{text}: {why}"))
    }

    /// Waits until the job runs with so many workers, each of which has its stream, and returns its generation.
    pub fn trains_with(&self, workers: usize) -> u64 {
        eventually(&format!("{workers} workers to train"), || {
            let status = self.status()?;
            let members = status["members"].as_array().map(Vec::as_slice).unwrap_or_default();
            let there = members.iter().filter(|member| member["state"] == "in").count();
            let is_so = status["phase"] == "running" && status["ranks"] == workers && there == workers;
            let generation = status["generation"].as_u64().filter(|_| is_so);
            generation.ok_or_else(|| format!("{status}; {}", self.last_words()))
        })
    }

    /// Waits until all workers train in one world, and returns its generation.
    pub fn all_train(&self) -> u64 {
        self.trains_with(WORKERS)
    }

    /// The step of the newest checkpoint that counts.
    pub fn newest_checkpoint(&self) -> u64 {
        eventually("a status", || {
            let status = self.status()?;
            Ok(status["checkpoints"].as_array().and_then(|all| all.last()?["step"].as_u64()).unwrap_or(0))
        })
    }

    /// Waits until a checkpoint newer than `step` counts: then the store takes saves.
    pub fn saves_after(&self, step: u64) -> u64 {
        eventually("a newer checkpoint", || {
            let newest = self.newest_checkpoint();
            if newest > step { Ok(newest) } else { Err(format!("{newest}; {}", self.last_words())) }
        })
    }

    fn evidence(&self) -> Evidence {
        let names: Vec<String> = (0..WORKERS).map(|index| Node::Worker(index).to_string()).collect();
        Evidence::read(self.dir(), &names).unwrap()
    }

    /// How many steps the workers have done: told by themselves, no coordinator is asked.
    pub fn steps(&self) -> u64 {
        self.evidence().steps()
    }

    /// Waits until the workers have done some more steps.
    pub fn trains_on(&self) {
        let from = self.steps();
        eventually("training to go on", || {
            let now = self.steps();
            if now > from + 10 { Ok(()) } else { Err(format!("{now} of {from}; {}", self.last_words())) }
        });
    }

    /// For so long things stay as they are; meanwhile the workers must never stand still for longer than `still_most`.
    pub fn trains_for(&self, time: Duration, still_most: Duration) {
        let until = Instant::now() + time;
        let (mut steps, mut risen) = (self.steps(), Instant::now());
        while Instant::now() < until {
            // Not a wait for anything: how often the evidence is read.
            std::thread::sleep(Duration::from_millis(100));
            let now = self.steps();
            if now > steps {
                (steps, risen) = (now, Instant::now());
            }
            let still = risen.elapsed();
            assert!(still <= still_most, "training stands still for {still:?}; {}", self.last_words());
        }
    }

    /// Ends the fleet, and looks at all that was written down. The workers must all have lived, and no step may have been
    /// done twice.
    pub fn end(self) {
        self.end_with(0);
    }

    /// The same, where so many steps may have been done again: because whoever had done them lost its lease.
    pub fn end_with(mut self, again_most: usize) {
        let ended: Vec<&Process> =
            self.workers.iter_mut().filter_map(|worker| (!worker.runs()).then_some(&*worker)).collect();
        let ended: Vec<String> =
            ended.iter().map(|worker| format!("{}: {}", worker.name(), worker.log())).collect();
        assert!(ended.is_empty(), "workers have ended: {ended:?}");
        for worker in &mut self.workers {
            worker.kill();
        }
        for coordinator in &mut self.coordinators {
            coordinator.process = None;
        }
        let evidence = self.evidence();
        let records: Vec<PathBuf> = (0..COORDINATORS).map(|index| self.record(index)).collect();
        let mut history = History::read(&records).unwrap();
        for (coordinator, ahead) in self.coordinators.iter().zip(self.make.ahead) {
            for id in &coordinator.ids {
                history.move_times(*id, -i64::try_from(ahead.as_micros()).unwrap());
            }
        }
        assert!(history.saves() > 0 && !history.tells.is_empty(), "nothing was written down");
        assert!(evidence.steps() > 0, "nobody trained");
        #[expect(clippy::print_stderr, reason = "how much was looked at")]
        {
            let (steps, operations) = (evidence.steps(), history.operations.len());
            let (saves, unknown, tells) = (history.saves(), history.unknown(), history.tells.len());
            eprintln!(
                "looked at {steps} steps, {operations} operations on the store ({saves} saves, and {unknown} with \
                 an outcome that nobody knows), {tells} things that members were told"
            );
        }
        let complaints = [evidence.complaints(again_most), history.complaints()].concat();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    }

    /// Sends the leader a signal while it leads, and says which it was.
    pub fn signal_leader(&mut self, signal: Signal) -> Leader {
        let leader = self.leader();
        self.coordinator(leader.index).signal(signal);
        leader
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            let path = dir.keep();
            #[expect(clippy::print_stderr, reason = "who looks into a failure needs it")]
            {
                eprintln!("logs, records and evidence are kept in {}", path.display());
            }
        }
    }
}
