//! An endpoint for stock `torchrun`: PyTorch's TCPStore protocol on a port of its own.
//!
//! ```text
//!   torchrun --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT --rdzv-conf=is_host=0 …
//!        │ one connection per agent                         │ the workers it starts
//!        ▼                                                  ▼
//!   the rendezvous' port ──────► one thread ◄────── a port per run: the store where its workers meet
//!                                   │
//!                          reknit_torchelastic (pure)
//! ```
//!
//! One thread serves all of it, without a lock: a request takes microseconds, and most are one system call to read and one to
//! write. Nothing is saved. A client of this protocol never connects again: when the coordinator goes, so do the agents that are
//! connected to it directly, whatever it knows of them.
//!
//! The protocol knows neither tokens nor encryption. The endpoint is off by default, and an address that others can reach needs a list
//! of the networks that may connect.

mod complaints;
mod connection;
mod serving;
mod view;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use ipnet::IpNet;
use reknit_torchelastic::kv::KvLimits;
use reknit_torchelastic::rendezvous::RunLimits;
use reknit_torchelastic::run::Repairs;
use reknit_torchelastic::wire::WireLimits;

use crate::clock::Clock;
pub(crate) use view::Runs;

/// How the endpoint is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchElastic {
    /// Where agents connect. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Who may connect; on loopback everybody if the list is empty.
    pub allow: Vec<IpNet>,
    /// What is done about the faults of stock torchrun.
    pub repairs: Repairs,
    /// As which host the workers' stores are told to workers; without it, as the address that their agent has reached us by.
    pub advertise: Option<String>,
    /// At which ports the workers' stores listen, one per run; without it, at any.
    pub worker_ports: Option<RangeInclusive<u16>>,
    /// What a client may do.
    pub limits: ClientLimits,
}

/// Limits on what clients of the endpoint control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientLimits {
    /// Open connections of agents and workers, all together. One more is closed at once.
    pub connections: usize,
    /// Open connections of one address.
    pub connections_per_peer: usize,
    /// How long a connection may take to show what it speaks.
    pub first_bytes: Duration,
    /// How long a client may take to read what it has asked for.
    pub reading: Duration,
    /// Bytes of requests that are not all there yet, of all connections together.
    pub pending_bytes: usize,
    /// One request.
    pub wire: WireLimits,
    /// One store.
    pub kv: KvLimits,
    /// Bytes that all stores hold together: that of agents, and each run's of workers.
    pub stored_bytes: usize,
    /// Runs.
    pub runs: RunLimits,
}

impl Default for ClientLimits {
    fn default() -> ClientLimits {
        ClientLimits {
            connections: 16_384,
            connections_per_peer: 12_288,
            first_bytes: Duration::from_secs(5),
            reading: Duration::from_secs(60),
            pending_bytes: 256 << 20,
            wire: WireLimits::default(),
            kv: KvLimits::default(),
            stored_bytes: 1 << 30,
            runs: RunLimits::default(),
        }
    }
}

impl TorchElastic {
    /// The default settings at this address.
    pub fn at(listen: SocketAddr) -> TorchElastic {
        TorchElastic {
            listen,
            allow: Vec::new(),
            repairs: Repairs::default(),
            advertise: None,
            worker_ports: None,
            limits: ClientLimits::default(),
        }
    }

    /// Whether a client of this address may connect.
    fn allows(&self, peer: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|network| network.contains(&peer))
    }
}

/// What the thread is told.
enum Command {
    /// Whether this coordinator leads: if not, nobody is served, and nothing is kept.
    Leads(bool),
    /// The end.
    Stop,
}

/// The endpoint, listening; its thread begins to serve when it is told that this coordinator leads.
pub(crate) struct TorchServer {
    address: SocketAddr,
    runs: Arc<Runs>,
    commands: mpsc::Sender<Command>,
    waker: Arc<mio::Waker>,
    thread: Option<JoinHandle<()>>,
}

impl TorchServer {
    /// Listens, and starts the thread. Connections of hosts that are silent for longer than `silence` end.
    pub(crate) fn start(
        settings: TorchElastic,
        silence: Duration,
        clock: Clock,
    ) -> std::io::Result<TorchServer> {
        let runs = Arc::new(Runs::default());
        let (commands, inbox) = mpsc::channel();
        let serving = serving::Serving::new(settings, silence, clock, Arc::clone(&runs), inbox)?;
        let (address, waker) = (serving.address(), serving.waker());
        let thread = std::thread::Builder::new().name("reknit-torch".to_owned()).spawn(|| serving.run())?;
        Ok(TorchServer { address, runs, commands, waker, thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The runs as they are at present.
    pub(crate) fn runs(&self) -> Arc<Runs> {
        Arc::clone(&self.runs)
    }

    /// Says whether this coordinator leads.
    pub(crate) fn leads(&self, leads: bool) {
        self.tell(Command::Leads(leads));
    }

    fn tell(&self, command: Command) {
        // A thread that has ended needs to be told nothing.
        if self.commands.send(command).is_ok() {
            let _ = self.waker.wake();
        }
    }
}

impl Drop for TorchServer {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of its own has been printed.
            let _ = thread.join();
        }
    }
}
