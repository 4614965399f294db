//! Moving state between members' memories, and loading it from checkpoints: what a plan asks for.
//!
//! A transfer is one connection that has proved the generation's secret (see `reknit_collectives::dial`):
//!
//! ```text
//!   receiver ──► request: which state, which bytes of it, whether the values too
//!   holder   ──► verdict, values, bytes …, digest of all of these as they left the holder's memory
//! ```
//! The receiver digests what it gets while it streams in, and reports both digests: the core compares them at the barrier.

mod fetch;
mod serve;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use reknit_collectives::AbortHandle;
use reknit_membership::holding::Resume;
use reknit_membership::{Lineage, Step};

pub(crate) use fetch::{Fetching, RestoreError, fetch};
pub(crate) use serve::serve;

/// How long a transfer may go without a byte.
const STALL: Duration = Duration::from_secs(30);
/// How often a transfer that waits looks whether its world is over.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How many bytes are read before they are digested: few enough to be still in the core's own cache.
const BLOCK_BYTES: usize = 256 << 10;

/// What a receiver asks a holder for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TransferRequest {
    /// The state. A step-0 state that no world has run yet is asked for by the lineage it is to get.
    resume: Resume,
    /// The first byte.
    start: u64,
    /// The byte after the last.
    end: u64,
    /// Whether the structured values are wanted too.
    values: bool,
}

const REQUEST_BYTES: usize = 33;

impl TransferRequest {
    fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        for (place, number) in
            bytes.chunks_exact_mut(8).zip([self.resume.lineage.0, self.resume.step.0, self.start, self.end])
        {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[REQUEST_BYTES - 1] = u8::from(self.values);
        bytes
    }

    fn decode(bytes: &[u8; REQUEST_BYTES]) -> TransferRequest {
        let number = |i: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[i * 8..(i + 1) * 8]);
            u64::from_le_bytes(eight)
        };
        TransferRequest {
            resume: Resume { lineage: Lineage(number(0)), step: Step(number(1)) },
            start: number(2),
            end: number(3),
            values: bytes[REQUEST_BYTES - 1] != 0,
        }
    }
}

/// The holder's verdict on a request: then the transfer follows …
const VERDICT_YES: u8 = 1;
/// … or the connection ends.
const VERDICT_NO: u8 = 0;

/// A connection whose reads and writes end when its world does, or when nothing moves.
struct Transfer<'a> {
    stream: TcpStream,
    abort: &'a AbortHandle,
}

impl<'a> Transfer<'a> {
    fn new(stream: TcpStream, abort: &'a AbortHandle) -> io::Result<Transfer<'a>> {
        stream.set_read_timeout(Some(LOOK_EVERY))?;
        stream.set_write_timeout(Some(LOOK_EVERY))?;
        stream.set_nodelay(true)?;
        Ok(Transfer { stream, abort })
    }

    /// Repeats `act` until it moves something, the world is over, or nothing has moved for too long.
    fn patiently(&mut self, mut act: impl FnMut(&mut TcpStream) -> io::Result<usize>) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            if self.abort.is_aborted() {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the world is over"));
            }
            match act(&mut self.stream) {
                Err(why)
                    if matches!(
                        why.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) => {}
                moved => return moved,
            }
            if began.elapsed() > STALL {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no byte moved for too long"));
            }
        }
    }
}

impl Read for Transfer<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.patiently(|stream| stream.read(into))
    }
}

impl Write for Transfer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.patiently(|stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        let resume = Resume { lineage: Lineage(3), step: Step(u64::MAX) };
        let request = TransferRequest { resume, start: 1, end: 1 << 40, values: true };
        assert_eq!(TransferRequest::decode(&request.encode()), request);
    }
}
