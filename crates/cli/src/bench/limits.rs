//! What this machine itself allows: loopback TCP, memory, disk. Measured in the same run as what is compared with it.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::clock::Mark;
use super::company::{Company, PlayerId, Role, say, setup};

/// How long the other end of a connection may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// In what pieces a stream is sent and received.
const PIECE_BYTES: usize = 256 << 10;

/// What the other end does.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum PeerSetup {
    /// Connects and gives back what it is given.
    Echo { at: SocketAddr },
    /// Connects and sends so many bytes out of a memory as large, each time it is given a byte.
    Source { at: SocketAddr, bytes: usize },
}

/// A peer says nothing but that it is there.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Here;

pub(super) fn play_peer() -> Result<()> {
    let setup = setup()?;
    match setup {
        PeerSetup::Echo { at } => {
            let mut stream = connect(at)?;
            say(&Here)?;
            let mut message = [0; 64];
            loop {
                match stream.read(&mut message)? {
                    0 => return Ok(()),
                    n => stream.write_all(&message[..n])?,
                }
            }
        }
        PeerSetup::Source { at, bytes } => {
            let mut stream = connect(at)?;
            let mut memory = vec![0; bytes];
            super::random::Random::new(1).fill(&mut memory);
            say(&Here)?;
            let mut go = [0];
            while stream.read(&mut go)? == 1 {
                for piece in memory.chunks(PIECE_BYTES) {
                    stream.write_all(piece)?;
                }
            }
            Ok(())
        }
    }
}

fn connect(at: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(at)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The other end of a connection, in a process of its own.
struct Peer {
    company: Company<Here>,
    id: PlayerId,
    stream: TcpStream,
}

impl Peer {
    fn start(logs: &Path, setup: impl FnOnce(SocketAddr) -> PeerSetup) -> Result<Peer> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let mut company = Company::new(Role::Peer, logs);
        let id = company.start(&setup(listener.local_addr()?))?;
        company.hear(PATIENCE)?;
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Peer { company, id, stream })
    }
}

/// How long it takes until a process that is killed is seen to be gone, by the end of its connection.
pub(super) fn exit_seen(logs: &Path) -> Result<Duration> {
    let mut peer = Peer::start(logs, |at| PeerSetup::Echo { at })?;
    let killed = Mark::now();
    peer.company.kill(peer.id)?;
    match peer.stream.read(&mut [0]) {
        Ok(0) => {}
        Err(why) if why.kind() == ErrorKind::ConnectionReset => {}
        Ok(_) => anyhow::bail!("a killed process has answered"),
        Err(why) => return Err(why.into()),
    }
    Ok(Mark::now().since(killed))
}

/// How long 64 bytes take to another process and back, each time.
pub(super) fn round_trips(logs: &Path, count: usize) -> Result<Vec<Duration>> {
    let mut peer = Peer::start(logs, |at| PeerSetup::Echo { at })?;
    let mut message = [7; 64];
    let mut round_trip = || {
        let began = Instant::now();
        peer.stream.write_all(&message)?;
        peer.stream.read_exact(&mut message)?;
        Ok(began.elapsed())
    };
    (0..count).map(|_| round_trip()).collect()
}

/// How long `ranks` ranks that all know each other's address take to connect to a ring: each dials the next and accepts
/// the one before.
pub(super) fn ring_connect(ranks: usize) -> Result<Duration> {
    let listeners: Vec<TcpListener> =
        (0..ranks).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>()?;
    let addresses: Vec<SocketAddr> =
        listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    let start = Barrier::new(ranks);
    let join = |rank: usize| {
        let (listener, next) = (&listeners[rank], addresses[(rank + 1) % ranks]);
        start.wait();
        let began = Mark::now();
        let next = connect(next)?;
        let (prev, _) = listener.accept()?;
        prev.set_nodelay(true)?;
        // Both stay open until all ranks have theirs.
        Ok::<_, anyhow::Error>((began, Mark::now(), next, prev))
    };
    let joined: Vec<_> = std::thread::scope(|scope| {
        let join = &join;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || join(rank))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let (mut first, mut last) = (None, None);
    for rank in joined {
        let (began, ended, _, _) = rank.map_err(|_| anyhow!("a rank of the ring panicked"))??;
        first = Some(first.map_or(began, |first: Mark| first.min(began)));
        last = last.max(Some(ended));
    }
    let (first, last) = first.zip(last).context("a ring without ranks")?;
    Ok(last.since(first))
}

/// One stream over loopback from another process's memory.
pub(super) struct Stream {
    peer: Peer,
    memory: Vec<u8>,
}

impl Stream {
    /// A stream between two memories of `bytes` each, neither of which fits a cache if it is large.
    pub(super) fn start(logs: &Path, bytes: usize) -> Result<Stream> {
        let peer = Peer::start(logs, |at| PeerSetup::Source { at, bytes })?;
        // Written to, so that it is really there.
        Ok(Stream { peer, memory: vec![1; bytes] })
    }

    /// How many bytes a second it moves.
    pub(super) fn rate(&mut self) -> Result<f64> {
        let began = Instant::now();
        self.peer.stream.write_all(&[1])?;
        for piece in self.memory.chunks_mut(PIECE_BYTES) {
            self.peer.stream.read_exact(piece)?;
        }
        Ok(self.memory.len() as f64 / began.elapsed().as_secs_f64())
    }
}

/// How many bytes a second one core copies, between memories of `bytes` each.
pub(super) fn copy_rate(from: &[u8], to: &mut [u8]) -> f64 {
    let began = Instant::now();
    to.copy_from_slice(from);
    std::hint::black_box(&to);
    to.len() as f64 / began.elapsed().as_secs_f64()
}

/// How many bytes a second the disk under `dir` takes for good: a file is written in large pieces, past the page cache
/// where that is possible, and synced.
pub(super) fn write_rate(dir: &Path, bytes: &[u8]) -> Result<f64> {
    use rustix::fs::{Mode, OFlags};
    let path = dir.join("limit");
    let open = |direct| {
        rustix::fs::open(
            &path,
            OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | direct,
            Mode::from_raw_mode(0o600),
        )
    };
    let file = open(OFlags::DIRECT).or_else(|_| open(OFlags::empty()));
    let mut file = File::from(file.with_context(|| format!("cannot write {}", path.display()))?);
    let aligned = aligned(bytes);
    let began = Instant::now();
    for piece in aligned.chunks(WRITE_BYTES) {
        file.write_all(piece)?;
    }
    file.sync_all()?;
    let took = began.elapsed();
    drop(file);
    std::fs::remove_file(&path)?;
    ensure!(!aligned.is_empty(), "nothing was written");
    Ok(aligned.len() as f64 / took.as_secs_f64())
}

/// In what pieces the disk is written.
const WRITE_BYTES: usize = 8 << 20;

/// As much of `bytes` as direct writes can take: from one page's start to another's.
fn aligned(bytes: &[u8]) -> &[u8] {
    const PAGE: usize = 4096;
    let skip = bytes.as_ptr().align_offset(PAGE).min(bytes.len());
    let rest = &bytes[skip..];
    &rest[..rest.len() / PAGE * PAGE]
}

/// How many bytes a second are read from a file, filling `into`.
pub(super) fn read_rate(path: &Path, into: &mut [u8]) -> Result<f64> {
    let began = Instant::now();
    File::open(path).with_context(|| format!("cannot read {}", path.display()))?.read_exact(into)?;
    Ok(into.len() as f64 / began.elapsed().as_secs_f64())
}
