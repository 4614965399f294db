//! The two TCP connections of a ring: to the next rank, from the previous one.
//!
//! Each carries bytes in one direction only. Nothing ever arrives on the connection to the next rank, so a process that
//! dies has nothing unread there: its kernel delivers what was sent and then closes in good order, it does not reset
//! the connection and throw the last bytes away. This is what C-6 rests on.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use reknit_membership::ids::Rank;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};

use crate::transport::{Ready, Transport, Want};
use crate::wake::{Wake, poll};

/// What says that a connection has ended, besides reading or writing it.
pub(crate) const ENDED: PollFlags = PollFlags::RDHUP.union(PollFlags::HUP).union(PollFlags::ERR);

#[derive(Debug)]
pub(crate) struct Neighbours {
    pub(crate) next: TcpStream,
    pub(crate) next_rank: Rank,
    pub(crate) prev: TcpStream,
    pub(crate) prev_rank: Rank,
}

impl Neighbours {
    /// Makes both connections ready for the ring. A peer that vanishes without a word, as a machine that loses power
    /// does, is noticed by the kernel within about `stall`.
    pub(crate) fn prepare(&self, stall: Duration) -> io::Result<()> {
        // The kernel takes it as a signed number.
        let stall_ms = i32::try_from(stall.as_millis()).unwrap_or(i32::MAX).unsigned_abs();
        let probe = (stall / 4).clamp(Duration::from_secs(1), Duration::from_secs(3600));
        for stream in [&self.next, &self.prev] {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            // Not less than a stall: the kernel counts a receive window that stays shut as unacknowledged, and a
            // neighbour that computes for long leaves it shut.
            sockopt::set_tcp_user_timeout(stream, stall_ms)?;
            sockopt::set_socket_keepalive(stream, true)?;
            sockopt::set_tcp_keepidle(stream, probe)?;
            sockopt::set_tcp_keepintvl(stream, probe)?;
        }
        Ok(())
    }

    /// Ends both connections, for whoever waits on them here and for both neighbours. Bytes that were sent before
    /// still arrive.
    pub(crate) fn shut_down(&self) {
        // It fails if they have ended already.
        let _ = self.next.shutdown(Shutdown::Both);
        let _ = self.prev.shutdown(Shutdown::Both);
    }
}

/// The ring over TCP.
#[derive(Debug)]
pub(crate) struct TcpTransport {
    pub(crate) neighbours: Arc<Neighbours>,
    /// Readable once the group is aborted.
    pub(crate) aborted: Arc<Wake>,
}

impl Transport for TcpTransport {
    fn send(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut no_control = SendAncillaryBuffer::default();
        none_if_blocked(sendmsg(&self.neighbours.next, pieces, &mut no_control, SendFlags::NOSIGNAL))
    }

    fn receive(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match rustix::io::readv(&self.neighbours.prev, pieces) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            result => none_if_blocked(result),
        }
    }

    fn wait(&mut self, want: Want, timeout: Duration) -> io::Result<Ready> {
        let Neighbours { next, prev, .. } = &*self.neighbours;
        // What is not wanted is left out, not just without events: a connection that has ended is always ready.
        let nothing = || PollFd::new(&self.aborted, PollFlags::empty());
        let room = if want.room { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds = [
            PollFd::new(&self.aborted, PollFlags::IN),
            if want.next { PollFd::new(next, room | PollFlags::RDHUP) } else { nothing() },
            if want.bytes { PollFd::new(prev, PollFlags::IN) } else { nothing() },
        ];
        poll(&mut fds, Some(timeout))?;
        let [_, next, prev] = fds.map(|fd| fd.revents());
        Ok(Ready {
            room: next.contains(PollFlags::OUT),
            next_gone: next.intersects(ENDED),
            bytes: !prev.is_empty(),
        })
    }
}

fn none_if_blocked(result: Result<usize, Errno>) -> io::Result<usize> {
    match result {
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        result => Ok(result?),
    }
}
