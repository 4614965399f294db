//! Dialling another member's listener.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use reknit_membership::ids::Generation;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use crate::abort::AbortHandle;
use crate::broken::BreakReason;
use crate::handshake::{ANSWER_BYTES, Answer, Hello, Purpose, RefuseReason, VERDICT_BYTES, Verdict};
use crate::patience::{Patience, Vain, after};
use crate::secret::{Proof, Secret, Side, fresh_nonce};

/// The pause before the first repetition; it doubles with every further one.
const PAUSE_FIRST: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// How long one attempt may take before another one is made: longer than any listener holds a connection, short enough
/// that a connection that a router or a full queue has forgotten costs little.
const ATTEMPT: Duration = Duration::from_secs(15);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Nobody listens there, or the way there is blocked: the member is probably dead.
    #[error("cannot reach {addr}")]
    Unreachable {
        /// Where.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The listener turned us away, again and again if the [reason](RefuseReason::is_retryable) was a passing one.
    #[error("{addr} refused the connection: {reason}")]
    Refused {
        /// Who.
        addr: SocketAddr,
        /// Why.
        reason: RefuseReason,
    },
    /// Whoever listens there does not know the generation's secret, or does not speak the protocol at all.
    #[error("{addr} is not a member of this generation")]
    Impostor {
        /// Who.
        addr: SocketAddr,
    },
    /// The deadline passed without an answer.
    #[error("{addr} did not answer in time")]
    TimedOut {
        /// Who.
        addr: SocketAddr,
    },
    /// The caller gave up.
    #[error("dialling was given up: {reason}")]
    Aborted {
        /// Why.
        reason: BreakReason,
    },
    /// The process is out of descriptors or the like.
    #[error("cannot make a connection")]
    System {
        /// What was refused.
        source: io::Error,
    },
}

/// A connection, in blocking mode, to the member that listens on `addr` and has proved, as we have, that it knows the
/// secret of `generation`.
///
/// A listener that has not opened the generation yet, or is busy, is dialled again until `deadline`. One that cannot
/// be reached is not: members listen before they join, so who does not listen any more is gone.
pub fn dial(
    addr: SocketAddr,
    purpose: Purpose,
    generation: Generation,
    secret: &Secret,
    deadline: Instant,
    abort: &AbortHandle,
) -> Result<TcpStream, DialError> {
    let patience = Patience::new(deadline, abort).map_err(|source| DialError::System { source })?;
    let mut pause = PAUSE_FIRST;
    let mut refused = None;
    loop {
        let until = after(Instant::now(), ATTEMPT);
        let failure = match attempt(addr, purpose, generation, secret, &patience.until(until)) {
            Ok(stream) => return Ok(stream),
            Err(failure) => failure,
        };
        let vain = match failure {
            Failure::Refused(reason) if reason.is_retryable() => {
                refused = Some(reason);
                patience.pause(pause).err()
            }
            // A busy listener closes without a word, and so does one that dies: dialling again tells them apart.
            Failure::CutOff => patience.pause(pause).err(),
            Failure::Refused(reason) => return Err(DialError::Refused { addr, reason }),
            Failure::Impostor => return Err(DialError::Impostor { addr }),
            Failure::Unreachable(source) => return Err(DialError::Unreachable { addr, source }),
            Failure::Vain(Vain::TimedOut) if Instant::now() < deadline => patience.pause(pause).err(),
            Failure::Vain(vain) => Some(vain),
        };
        match (vain, refused) {
            (None, _) => pause = (pause * 2).min(PAUSE_MAX),
            (Some(Vain::TimedOut), Some(reason)) => return Err(DialError::Refused { addr, reason }),
            (Some(Vain::TimedOut), None) => return Err(DialError::TimedOut { addr }),
            (Some(Vain::Aborted(reason)), _) => return Err(DialError::Aborted { reason }),
            (Some(Vain::System(source)), _) => return Err(DialError::System { source }),
        }
    }
}

/// Why one attempt gave no connection.
enum Failure {
    Unreachable(io::Error),
    Refused(RefuseReason),
    Impostor,
    /// The connection ended in the middle of the handshake.
    CutOff,
    Vain(Vain),
}

impl From<Vain> for Failure {
    fn from(vain: Vain) -> Failure {
        Failure::Vain(vain)
    }
}

fn attempt(
    addr: SocketAddr,
    purpose: Purpose,
    generation: Generation,
    secret: &Secret,
    patience: &Patience<'_>,
) -> Result<TcpStream, Failure> {
    let system = |error: io::Error| Failure::Vain(Vain::System(error));
    let hello = Hello { purpose, generation, nonce: fresh_nonce().map_err(system)? }.to_bytes();
    let stream = connect(addr, patience)?;
    stream.set_nodelay(true).map_err(system)?;

    say(&stream, &hello)?;
    let nonce = match Answer::from_bytes(&hear::<ANSWER_BYTES>(&stream, patience)?) {
        Some(Answer::Challenge(nonce)) => nonce,
        Some(Answer::Refused(reason)) => return Err(Failure::Refused(reason)),
        None => return Err(Failure::Impostor),
    };
    let own: Proof = secret.proof(Side::Dialler, &hello, &nonce);
    say(&stream, own.as_bytes())?;
    match Verdict::from_bytes(&hear::<VERDICT_BYTES>(&stream, patience)?) {
        Some(Verdict::Accepted(proof)) if proof == secret.proof(Side::Listener, &hello, &nonce) => {}
        Some(Verdict::Refused(reason)) => return Err(Failure::Refused(reason)),
        Some(Verdict::Accepted(_)) | None => return Err(Failure::Impostor),
    }
    stream.set_nonblocking(false).map_err(system)?;
    Ok(stream)
}

/// Whose fault it is that there is no connection.
fn unconnected(error: Errno) -> Failure {
    match error {
        // This machine has no port, no memory or no permission left: the other one is not to be suspected.
        Errno::ADDRNOTAVAIL
        | Errno::AGAIN
        | Errno::NOBUFS
        | Errno::NOMEM
        | Errno::ACCESS
        | Errno::PERM
        | Errno::AFNOSUPPORT => Failure::Vain(Vain::System(error.into())),
        _ => Failure::Unreachable(error.into()),
    }
}

/// A connection in non-blocking mode.
fn connect(addr: SocketAddr, patience: &Patience<'_>) -> Result<TcpStream, Failure> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None).map_err(|e| Vain::System(e.into()))?;
    match rustix::net::connect(&socket, &addr) {
        Ok(()) => return Ok(socket.into()),
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        Err(error) => return Err(unconnected(error)),
    }
    let stream = TcpStream::from(socket);
    loop {
        patience.wait_for(&stream, PollFlags::OUT)?;
        match sockopt::socket_error(&stream) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => return Err(unconnected(error)),
        }
        // No error and a peer is a connection; no error and no peer is a wait that returned early.
        if stream.peer_addr().is_ok() {
            return Ok(stream);
        }
    }
}

/// Sends a handshake message: it always fits a connection on which so little was said before.
fn say(mut stream: &TcpStream, message: &[u8]) -> Result<(), Failure> {
    match stream.write(message) {
        Ok(written) if written == message.len() => Ok(()),
        Ok(_) | Err(_) => Err(Failure::CutOff),
    }
}

/// Receives a handshake message.
fn hear<const BYTES: usize>(mut stream: &TcpStream, patience: &Patience<'_>) -> Result<[u8; BYTES], Failure> {
    let mut message = [0; BYTES];
    let mut filled = 0;
    while filled < BYTES {
        match stream.read(&mut message[filled..]) {
            Ok(0) => return Err(Failure::CutOff),
            Ok(more) => filled += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                patience.wait_for(stream, PollFlags::IN)?
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(Failure::CutOff),
        }
    }
    Ok(message)
}
