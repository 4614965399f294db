//! The door of one generation: where connections that have proved its secret wait to be taken.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reknit_membership::ids::{Generation, MemberId, Rank, WorldSize};

use crate::abort::{AbortHandle, Rouse};
use crate::broken::BreakReason;
use crate::doors::Doors;
use crate::handshake::{Purpose, RefuseReason};
use crate::lock;
use crate::patience::after;
use crate::schedule::before;
use crate::secret::Secret;

/// Lets connections of one generation in, for as long as it lives.
///
/// Dropping it closes the generation: connections that come later are refused, those that wait are dropped.
#[derive(Debug)]
pub struct Door {
    room: Arc<Room>,
    doors: Arc<Doors>,
}

/// A connection from a member that wants state.
#[derive(Debug)]
pub struct StateConnection {
    /// The connection, in blocking mode.
    pub stream: TcpStream,
    /// Who its dialler says it is. It has proved that it belongs to the generation, not that it is this member.
    pub member: MemberId,
}

/// Why no ring connection came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalError {
    /// The deadline passed.
    #[error("nobody came in time")]
    TimedOut,
    /// The caller gave up.
    #[error("waiting for it was given up: {reason}")]
    Aborted {
        /// Why.
        reason: BreakReason,
    },
    /// The door or its listener was closed.
    #[error("the door is closed")]
    Closed,
}

impl Door {
    pub(crate) fn new(room: Arc<Room>, doors: Arc<Doors>) -> Door {
        Door { room, doors }
    }

    /// Which generation it lets in.
    pub fn generation(&self) -> Generation {
        self.room.generation
    }

    /// Which rank it was opened for, in a world of how many; nothing if it lets only members in that want state.
    pub fn seat(&self) -> Option<(Rank, WorldSize)> {
        self.room.seat
    }

    /// The connection, in blocking mode, of who says it is the rank before this one. It has proved that it belongs to
    /// the generation, not that it is that rank. There is one: who comes after it was taken is refused.
    pub fn take_previous(&self, deadline: Instant, abort: &AbortHandle) -> Result<TcpStream, ArrivalError> {
        // Attached before the lock is taken: an abort that has come already rouses at once, under that lock.
        let _attached = abort.attach(self.room.clone());
        let mut arrivals = lock(&self.room.arrivals);
        loop {
            if let Some(reason) = abort.reason() {
                return Err(ArrivalError::Aborted { reason });
            }
            if arrivals.closed {
                return Err(ArrivalError::Closed);
            }
            if let Some(stream) = arrivals.previous.take() {
                arrivals.has_previous = true;
                return Ok(stream);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ArrivalError::TimedOut);
            }
            arrivals = self.room.wait(arrivals, left);
        }
    }

    /// The next connection that wants state; nothing if none comes within `timeout`, or once the door is closed.
    pub fn next_state(&self, timeout: Duration) -> Option<StateConnection> {
        let deadline = after(Instant::now(), timeout);
        let mut arrivals = lock(&self.room.arrivals);
        loop {
            if arrivals.closed {
                return None;
            }
            if let Some(connection) = arrivals.states.pop_front() {
                return Some(connection);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            arrivals = self.room.wait(arrivals, left);
        }
    }

    /// Closes it before it is dropped, which wakes every thread that waits in it.
    pub fn close(&self) {
        self.doors.close(&self.room);
    }

    /// Whether it was closed, was replaced by another door of its generation, or lost its listener.
    pub fn is_closed(&self) -> bool {
        lock(&self.room.arrivals).closed
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a door and its listener share.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) generation: Generation,
    pub(crate) secret: Secret,
    seat: Option<(Rank, WorldSize)>,
    waiting_max: usize,
    arrivals: Mutex<Arrivals>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Arrivals {
    closed: bool,
    /// The previous rank's connection, until it is taken …
    previous: Option<TcpStream>,
    /// … and whether it was.
    has_previous: bool,
    states: VecDeque<StateConnection>,
}

impl Room {
    pub(crate) fn new(
        generation: Generation,
        secret: Secret,
        seat: Option<(Rank, WorldSize)>,
        waiting_max: usize,
    ) -> Room {
        Room { generation, secret, seat, waiting_max, arrivals: Mutex::default(), changed: Condvar::new() }
    }

    /// Whether a connection for `purpose` could be let in now.
    pub(crate) fn admits(&self, purpose: Purpose) -> Result<(), RefuseReason> {
        let arrivals = lock(&self.arrivals);
        if arrivals.closed {
            return Err(RefuseReason::GenerationOver);
        }
        match purpose {
            Purpose::Ring { from, to } => {
                let is_ours = self.seat.is_some_and(|(rank, size)| to == rank && from == before(rank, size));
                if is_ours && !arrivals.has_previous { Ok(()) } else { Err(RefuseReason::WrongNeighbour) }
            }
            Purpose::State { .. } if arrivals.states.len() >= self.waiting_max => Err(RefuseReason::Busy),
            Purpose::State { .. } => Ok(()),
        }
    }

    /// Lets a connection in. Only the listener's one thread does so, and only after it asked [`Room::admits`].
    pub(crate) fn let_in(&self, purpose: Purpose, stream: TcpStream) {
        let mut arrivals = lock(&self.arrivals);
        if arrivals.closed {
            return;
        }
        match purpose {
            // Whoever dials again has given up on the connection before.
            Purpose::Ring { .. } => arrivals.previous = Some(stream),
            Purpose::State { member } => arrivals.states.push_back(StateConnection { stream, member }),
        }
        self.changed.notify_all();
    }

    pub(crate) fn close(&self) {
        *lock(&self.arrivals) = Arrivals { closed: true, ..Arrivals::default() };
        self.changed.notify_all();
    }

    fn wait<'a>(&self, arrivals: MutexGuard<'a, Arrivals>, left: Duration) -> MutexGuard<'a, Arrivals> {
        self.changed.wait_timeout(arrivals, left).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Rouse for Room {
    fn rouse(&self) {
        // Under the lock, so that nobody is between looking at the abort handle and lying down.
        let _arrivals = lock(&self.arrivals);
        self.changed.notify_all();
    }
}
