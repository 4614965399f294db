//! Joining a world's ring: from a place in it to two connections.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use reknit_membership::ids::{Generation, Rank, WorldSize};
use rustix::event::PollFd;

use crate::abort::AbortHandle;
use crate::broken::{BreakReason, Broken};
use crate::dial::{DialError, dial};
use crate::door::{ArrivalError, Door};
use crate::handshake::Purpose;
use crate::meeting::SharedMemory;
use crate::neighbours::{ENDED, Neighbours};
use crate::patience::after;
use crate::schedule::{before, following};
use crate::secret::Secret;
use crate::wake::poll;

/// How often who waits for the previous rank looks whether the next one is still there.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A rank's place in the ring of one world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Of which world.
    pub generation: Generation,
    /// This rank.
    pub rank: Rank,
    /// How many ranks there are.
    pub size: WorldSize,
    /// What only the members of this generation know.
    pub secret: Secret,
    /// Where the next rank listens; the rank after the last is rank 0. Not used in a world of one.
    pub next: SocketAddr,
}

/// How long a group waits, and in what pieces it moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOptions {
    /// How long forming the ring may take.
    pub form: Duration,
    /// How long a collective may go without a single byte moved. It includes the time by which one rank enters it
    /// later than another, so it must be longer than the slowest rank may lag behind.
    pub stall: Duration,
    /// How long a rank that waits inside a collective keeps trying, giving its core away between any two tries, before
    /// it goes to sleep. Longer makes small collectives faster, and a rank that waits for a slow one costs no more.
    pub spin: Duration,
    /// How many bytes are moved at a time; at least 4 KiB and at most 16 MiB, whatever it says.
    pub chunk_bytes: usize,
    /// Whether ranks of one host are to share memory.
    pub shared_memory: SharedMemory,
}

impl Default for GroupOptions {
    fn default() -> GroupOptions {
        GroupOptions {
            form: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            spin: Duration::from_micros(50),
            chunk_bytes: 128 << 10,
            shared_memory: SharedMemory::default(),
        }
    }
}

/// Why the ring was not formed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormError {
    /// There is no such place.
    #[error("there is no rank {rank} in a world of {size}")]
    BadPlace {
        /// The rank.
        rank: Rank,
        /// The size.
        size: WorldSize,
    },
    /// The door is one of another generation than the place.
    #[error("the place is one of generation {place}, the door is one of generation {door}")]
    WrongDoor {
        /// The place's generation.
        place: Generation,
        /// The door's generation.
        door: Generation,
    },
    /// The door was not opened for this place.
    #[error("the door was not opened for rank {rank} in a world of {size}")]
    NoSeat {
        /// The rank.
        rank: Rank,
        /// The size.
        size: WorldSize,
    },
    /// There is no connection to the next rank.
    #[error("no connection to the next rank, {rank}")]
    Next {
        /// The next rank.
        rank: Rank,
        /// Why.
        source: DialError,
    },
    /// The previous rank did not connect.
    #[error("no connection from the previous rank, {rank}")]
    Previous {
        /// The previous rank.
        rank: Rank,
        /// Why.
        source: ArrivalError,
    },
    /// The caller gave up.
    #[error("forming the ring was given up: {reason}")]
    Aborted {
        /// Why.
        reason: BreakReason,
    },
    /// The ring stood, and broke before all ranks had said which host they are on.
    #[error("the ring broke before its ranks knew each other's hosts")]
    Meeting {
        /// Why.
        source: Broken,
    },
    /// The process is out of descriptors or threads.
    #[error("cannot set the ring up")]
    System {
        /// What was refused.
        source: io::Error,
    },
}

impl FormError {
    /// The neighbour that may have caused it.
    pub fn suspect(&self) -> Option<Rank> {
        match self {
            FormError::Next { rank, .. } | FormError::Previous { rank, .. } => Some(*rank),
            FormError::Meeting { source } => source.suspects.first().copied(),
            FormError::BadPlace { .. }
            | FormError::WrongDoor { .. }
            | FormError::NoSeat { .. }
            | FormError::Aborted { .. }
            | FormError::System { .. } => None,
        }
    }
}

/// The connections of a place, or none in a world of one.
///
/// Nobody waits for anybody in turn: the listener's thread greets the previous rank while this one dials the next.
pub(crate) fn connect(
    door: &Door,
    place: &Place,
    options: &GroupOptions,
    abort: &AbortHandle,
) -> Result<Option<Neighbours>, FormError> {
    let Place { generation, rank, size, ref secret, next: addr } = *place;
    if rank.0 >= size.0 {
        return Err(FormError::BadPlace { rank, size });
    }
    if door.generation() != generation {
        return Err(FormError::WrongDoor { place: generation, door: door.generation() });
    }
    if door.seat() != Some((rank, size)) {
        return Err(FormError::NoSeat { rank, size });
    }
    if let Some(reason) = abort.reason() {
        return Err(FormError::Aborted { reason });
    }
    if size.0 == 1 {
        return Ok(None);
    }
    let deadline = after(Instant::now(), options.form);
    let (next_rank, prev_rank) = (following(rank, size), before(rank, size));
    let purpose = Purpose::Ring { from: rank, to: next_rank };
    let failed = |source| match source {
        DialError::Aborted { reason } => FormError::Aborted { reason },
        DialError::System { source } => FormError::System { source },
        source => FormError::Next { rank: next_rank, source },
    };
    let next = dial(addr, purpose, generation, secret, deadline, abort).map_err(failed)?;
    let prev = loop {
        let look_at = after(Instant::now(), LOOK_EVERY).min(deadline);
        match door.take_previous(look_at, abort) {
            Ok(stream) => break stream,
            Err(ArrivalError::Aborted { reason }) => return Err(FormError::Aborted { reason }),
            Err(ArrivalError::TimedOut) if look_at < deadline => {}
            Err(source) => return Err(FormError::Previous { rank: prev_rank, source }),
        }
        // Nobody leaves a ring in good order before it has stood.
        if has_ended(&next).map_err(|source| FormError::System { source })? {
            let source = io::ErrorKind::UnexpectedEof.into();
            return Err(failed(DialError::Unreachable { addr, source }));
        }
    };
    let neighbours = Neighbours { next, next_rank, prev, prev_rank };
    neighbours.prepare(options.stall).map_err(|source| FormError::System { source })?;
    Ok(Some(neighbours))
}

/// Whether the other side has ended this connection.
fn has_ended(stream: &TcpStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, ENDED)];
    poll(&mut fds, Some(Duration::ZERO))?;
    Ok(!fds[0].revents().is_empty())
}
