//! What loopback streams alone allow: a ring of processes, each of which sends to the next and receives from the one
//! before at the same time, as many bytes as an all-reduce of that size would move. Nobody sums anything or waits for
//! what it has to send.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::super::company::{Company, PlayerId, Role, orders, say};

/// How long a mover may take for any one order, and be without a byte.
const PATIENCE: Duration = Duration::from_secs(60);
/// In what pieces a stream is sent and received.
const PIECE_BYTES: usize = 128 << 10;
/// How often who can move nothing tries again, giving its core away in between, before it sleeps.
const TRIES: u32 = 20;
/// How many rounds are moved before they are timed.
const WARM_UP: usize = 2;

/// What a mover is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Order {
    Listen,
    Connect {
        next: SocketAddr,
    },
    /// Send `bytes` out of a memory of `span` while receiving as many into it, so many times.
    Move {
        bytes: usize,
        span: usize,
        times: usize,
    },
}

/// What it says. The time is that of one round on average, in nanoseconds: a single one may be over in a moment, because
/// the kernel holds what was sent rounds before.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Says {
    Listening(SocketAddr),
    Connected,
    Moved { mean: f64 },
}

pub(in super::super) fn play() -> Result<()> {
    let (mut listener, mut streams) = (None, None);
    for order in orders() {
        match order? {
            Order::Listen => {
                let listener = listener.insert(TcpListener::bind(("127.0.0.1", 0))?);
                say(&Says::Listening(listener.local_addr()?))?;
            }
            Order::Connect { next } => {
                let listener = listener.as_ref().context("a mover must listen first")?;
                let next = TcpStream::connect(next)?;
                let (prev, _) = listener.accept()?;
                for stream in [&next, &prev] {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                }
                streams = Some((next, prev));
                say(&Says::Connected)?;
            }
            Order::Move { bytes, span, times } => {
                let (next, prev) = streams.as_mut().context("a mover without streams")?;
                ensure!(span > 0, "a memory without bytes");
                // Written to, so that it is really there.
                let mut memory = vec![1; span];
                for _ in 0..WARM_UP {
                    exchange(next, prev, &mut memory, bytes)?;
                }
                let began = Instant::now();
                for _ in 0..times {
                    exchange(next, prev, &mut memory, bytes)?;
                }
                say(&Says::Moved { mean: began.elapsed().as_nanos() as f64 / times.max(1) as f64 })?;
            }
        }
    }
    Ok(())
}

/// Sends and receives so many bytes, both as fast as they go.
fn exchange(next: &mut TcpStream, prev: &mut TcpStream, memory: &mut [u8], bytes: usize) -> Result<()> {
    let span = memory.len();
    // As far as the memory and the piece reach.
    let piece = |done: usize| {
        let at = done % span;
        at..(at + PIECE_BYTES.min(bytes - done)).min(span)
    };
    let (mut sent, mut received, mut tries) = (0, 0, 0);
    while sent < bytes || received < bytes {
        let before = sent + received;
        if sent < bytes {
            sent += moved(next.write(&memory[piece(sent)]))?;
        }
        if received < bytes {
            received += moved(prev.read(&mut memory[piece(received)]))?;
        }
        if sent + received > before {
            tries = 0;
        } else if tries < TRIES {
            tries += 1;
            std::thread::yield_now();
        } else {
            let mut fds = Vec::with_capacity(2);
            if sent < bytes {
                fds.push(PollFd::new(&*next, PollFlags::OUT));
            }
            if received < bytes {
                fds.push(PollFd::new(&*prev, PollFlags::IN));
            }
            let ready = poll(&mut fds, Some(&Timespec::try_from(PATIENCE)?))?;
            ensure!(ready > 0, "nothing moved for {PATIENCE:?}");
        }
    }
    Ok(())
}

/// How many bytes there were, if any could move.
fn moved(result: std::io::Result<usize>) -> Result<usize> {
    match result {
        Ok(0) => bail!("another mover has ended"),
        Ok(n) => Ok(n),
        Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(why) => Err(why.into()),
    }
}

/// A ring of movers, each a process of its own.
pub(super) struct Streams {
    company: Company<Says>,
    movers: Vec<PlayerId>,
}

impl Streams {
    pub(super) fn start(logs: &Path, world: u32) -> Result<Streams> {
        let mut company: Company<Says> = Company::new(Role::Mover, logs);
        let (mut movers, mut addresses) = (Vec::new(), Vec::new());
        for _ in 0..world {
            movers.push(company.start(&Order::Listen)?);
            match company.hear(PATIENCE)?.1 {
                Says::Listening(address) => addresses.push(address),
                other => bail!("a mover was to listen and says {other:?}"),
            }
        }
        for (mover, next) in movers.iter().zip(addresses.iter().cycle().skip(1)) {
            company.tell(*mover, &Order::Connect { next: *next })?;
        }
        for _ in &movers {
            ensure!(matches!(company.hear(PATIENCE)?.1, Says::Connected), "a mover is not connected");
        }
        Ok(Streams { company, movers })
    }

    /// How long the slowest mover takes for `bytes` both ways, in nanoseconds.
    pub(super) fn time(&mut self, bytes: usize, span: usize, times: usize) -> Result<f64> {
        for mover in &self.movers {
            self.company.tell(*mover, &Order::Move { bytes, span, times })?;
        }
        let mut slowest = f64::MIN_POSITIVE;
        for _ in &self.movers {
            match self.company.hear(PATIENCE)?.1 {
                Says::Moved { mean } => slowest = slowest.max(mean),
                other => bail!("a mover was to move bytes and says {other:?}"),
            }
        }
        Ok(slowest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_move_all_bytes_through_a_memory_that_is_smaller() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut next = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut prev, _) = listener.accept().unwrap();
        for stream in [&next, &prev] {
            stream.set_nonblocking(true).unwrap();
        }
        let mut memory: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        let before = memory.clone();
        // To itself: what is sent comes back to the place that it was sent from.
        exchange(&mut next, &mut prev, &mut memory, 1_000_000).unwrap();
        assert!(memory == before, "what is received is what was sent");
        drop(prev);
        assert!(exchange(&mut next.try_clone().unwrap(), &mut next, &mut memory, 1).is_err());
    }
}
