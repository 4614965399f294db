//! What can be set, typed once. Defaults work on a laptop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reknit_membership::Timing;
use reknit_membership::spec::BadTiming;

use crate::etcd::{EtcdAddress, EtcdCredentials};
use crate::store::recorded::MonotonicUs;
use crate::torchelastic::TorchElastic;

/// Where records live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// In memory: gone with the process. For tests.
    Memory,
    /// In a file in this directory, which is created if it is not there.
    Embedded {
        /// The directory.
        dir: PathBuf,
    },
    /// In an etcd that several coordinators share: one of them leads.
    Etcd {
        /// Where it is.
        address: EtcdAddress,
        /// How it is shown who we are.
        credentials: EtcdCredentials,
        /// Under which URL the other coordinators and the members reach this one.
        advertise: String,
        /// How long a leader that is silent leads on. Whole seconds; etcd has a minimum, 2 s by default.
        lease: Duration,
    },
}

/// What connections are encrypted with. The files are PEM; they are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// This coordinator's certificate, and whatever lies between it and its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authority whose certificates clients must show; without it they need none.
    pub client_ca: Option<PathBuf>,
    /// The authority by which the certificates of other coordinators are checked; without it, `client_ca`.
    pub ca: Option<PathBuf>,
}

/// All that a server can be told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where records live.
    pub store: StoreConfig,
    /// How long a silent member may live. Every other time follows from it.
    pub silence: Duration,
    /// What a peer may ask for.
    pub limits: Limits,
    /// Where saves and tells are written down for a check afterwards, if they are, and by which clock.
    pub record: Option<(PathBuf, MonotonicUs)>,
    /// What connections are encrypted with, if they are.
    pub tls: Option<TlsFiles>,
    /// The file that lists whose tokens are let in; without it nobody needs one. It is read again when it changes.
    pub tokens: Option<PathBuf>,
    /// The endpoint for stock torchrun, if there is one.
    pub torchelastic: Option<TorchElastic>,
}

/// Limits on everything that a peer controls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections. One more is closed at once. By default fewer than `members`, as few processes are given
    /// descriptors for more: a job of that size needs both.
    pub connections: usize,
    /// Open connections of one peer, by its address. By default a job of ten thousand members fits on one machine.
    pub connections_per_peer: usize,
    /// How long a connection may take for its TLS handshake, if there is one, and to show that it speaks HTTP/2.
    pub first_bytes: Duration,
    /// How long a stream may take to introduce itself.
    pub introduction: Duration,
    /// The largest message a peer may send, in bytes.
    pub message_bytes: usize,
    /// Messages that may wait for one member or watcher.
    pub outbound: usize,
    /// Events that may wait for one job; senders beyond it wait.
    pub inbound: usize,
    /// Jobs that are not over at once.
    pub jobs: usize,
    /// Members of one job.
    pub members: u32,
    /// Members that one status or roster page lists.
    pub listed: usize,
    /// Streams on one connection.
    pub streams_per_connection: u32,
    /// Calls on one connection in a second, on average and at once. A member makes one, an operator a few.
    pub calls_per_second: u32,
    /// Messages of one member in a second, on average. What it sends beyond that is read later.
    pub messages_per_second: u32,
    /// Messages of one member that are read at once, if it has sent few before.
    pub messages_burst: u32,
    /// Streams that a peer has opened and reset again before they were looked at; one more ends its connection.
    pub resets_pending: usize,
    /// Streams of one connection that this side had to reset; one more ends the connection.
    pub resets_local: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 16_384,
            connections_per_peer: 12_288,
            first_bytes: Duration::from_secs(5),
            introduction: Duration::from_secs(5),
            message_bytes: 1 << 20,
            outbound: 64,
            inbound: 1024,
            jobs: 1_000,
            members: 20_000,
            listed: 1_000,
            streams_per_connection: 64,
            calls_per_second: 1_000,
            messages_per_second: 200,
            messages_burst: 1_000,
            resets_pending: 20,
            resets_local: 256,
        }
    }
}

impl Config {
    /// The times by which every job waits.
    ///
    /// # Errors
    /// [`BadTiming`] if `silence` is out of range.
    pub fn timing(&self) -> Result<Timing, BadTiming> {
        Timing::derive(self.silence)
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            store: StoreConfig::Embedded { dir: PathBuf::from("reknit-data") },
            silence: Duration::from_secs(3),
            limits: Limits::default(),
            record: None,
            tls: None,
            tokens: None,
            torchelastic: None,
        }
    }
}
