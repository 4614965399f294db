//! One client's connection: what it has sent and is not all there, and what it has not read yet.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use reknit_torchelastic::wire::{self, MAGIC, Parsed, Request, WireLimits};
use socket2::{SockRef, TcpKeepalive};

use crate::listen::Seat;

/// Which store a connection is to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The one in which agents meet.
    Rendezvous,
    /// The one of the workers of a run.
    Workers(usize),
}

pub(super) struct Connection {
    pub(super) stream: TcpStream,
    pub(super) side: Side,
    pub(super) peer: IpAddr,
    /// Which of our addresses it has reached.
    pub(super) reached: IpAddr,
    /// Whether it has shown what it speaks.
    pub(super) is_greeted: bool,
    pub(super) pings: bool,
    /// Since when it may be waited for: to greet, or to read.
    pub(super) since: Instant,
    /// What it has sent, if that is not a whole request.
    pub(super) pending: Vec<u8>,
    /// How long `pending` must be before it is worth looking at.
    pub(super) needs: usize,
    /// What it has not read, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    _seat: Seat,
}

/// How much of the socket there may still be to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// This much was there, and that was all.
    All(usize),
    /// This much was there, and there may be more.
    Some(usize),
    /// The client has gone.
    Ended,
}

/// A buffer that has grown larger than this is given back when it is empty.
const BUFFER_KEPT: usize = 64 << 10;

impl Connection {
    pub(super) fn new(
        stream: TcpStream,
        side: Side,
        silence: Duration,
        seat: Seat,
    ) -> io::Result<Connection> {
        let socket = SockRef::from(&stream);
        socket.set_tcp_nodelay(true)?;
        // A host that has vanished says nothing: it is asked, and given up if it does not answer.
        let probes = 3;
        let keepalive =
            TcpKeepalive::new().with_time(silence).with_interval(PROBE_EVERY).with_retries(probes);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(silence + PROBE_EVERY * probes))?;
        let peer = stream.peer_addr()?.ip().to_canonical();
        let reached = stream.local_addr()?.ip().to_canonical();
        Ok(Connection {
            stream,
            side,
            peer,
            reached,
            is_greeted: false,
            pings: false,
            since: Instant::now(),
            pending: Vec::new(),
            needs: 0,
            out: Vec::new(),
            sent: 0,
            _seat: seat,
        })
    }

    /// Reads once.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Received> {
        loop {
            return match self.stream.read(buffer) {
                Ok(0) => Ok(Received::Ended),
                Ok(n) if n < buffer.len() => Ok(Received::All(n)),
                Ok(n) => Ok(Received::Some(n)),
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => Ok(Received::All(0)),
                Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
                Err(why) => Err(why),
            };
        }
    }

    /// Whether it has read everything that it was sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }

    /// Sends what is given, as far as the socket takes it; the rest is kept for later.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.out.is_empty() {
            self.out.extend_from_slice(bytes);
            return Ok(());
        }
        let sent = write_some(&mut self.stream, bytes)?;
        if sent < bytes.len() {
            self.out.extend_from_slice(&bytes[sent..]);
            self.since = Instant::now();
        }
        Ok(())
    }

    /// Sends what was kept.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let sent = write_some(&mut self.stream, &self.out[self.sent..])?;
        self.sent += sent;
        if self.sent == self.out.len() {
            self.sent = 0;
            self.out.clear();
            if self.out.capacity() > BUFFER_KEPT {
                self.out = Vec::new();
            }
        }
        Ok(())
    }

    /// Keeps what is left of what it has sent. `answered`: something of it was.
    pub(super) fn keep(&mut self, rest: Vec<u8>, needs: usize, answered: bool) {
        if answered || (self.pending.is_empty() && self.needs == 0) {
            self.since = Instant::now();
        }
        self.needs = if rest.is_empty() { 0 } else { needs };
        self.pending = rest;
    }

    /// Whether enough is kept to be a request.
    pub(super) fn is_worth_a_look(&self) -> bool {
        !self.pending.is_empty() && self.pending.len() >= self.needs
    }

    /// Bytes that it has not read.
    pub(super) fn unread(&self) -> usize {
        self.out.len() - self.sent
    }
}

fn write_some(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match stream.write(&bytes[sent..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => break,
            Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
    Ok(sent)
}

/// How often a silent host is asked.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// What a connection begins with.
pub(super) enum Greeting {
    /// A client of PyTorch 2.2 or later, and how long its greeting is.
    Torch(usize),
    /// Not all of it is there.
    Needs(usize),
    /// Something else, and what it probably is.
    Stranger(&'static str),
}

/// What the first bytes of a connection show.
pub(super) fn greeting(bytes: &[u8], limits: &WireLimits) -> Greeting {
    match bytes.first() {
        Some(0) | None => {}
        // Before 2.2 a connection began with a request.
        Some(1..=12) => return Greeting::Stranger("a client of PyTorch before 2.2, which is not supported"),
        Some(_) => return Greeting::Stranger("no client of PyTorch's TCPStore"),
    }
    match wire::parse(bytes, limits) {
        Ok(Parsed::Whole(Request::Validate { magic: MAGIC }, length)) => Greeting::Torch(length),
        Ok(Parsed::Needs(bytes)) => Greeting::Needs(bytes),
        // The request with the number 0 of PyTorch before 2.2 is followed by the length of a key.
        _ => Greeting::Stranger("a client of PyTorch before 2.2, which is not supported, or no TCPStore's"),
    }
}

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 4096;

/// Listens; on IPv4 too, if the address is the one that stands for all of IPv6.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}
