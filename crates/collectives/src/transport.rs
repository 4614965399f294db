//! The seam between what a collective does and how bytes move.

use std::io::{self, IoSlice, IoSliceMut};
use std::time::Duration;

/// How bytes get to the next rank and come from the previous one: over TCP, or in a test's memory.
///
/// Nothing here blocks but [`wait`](Transport::wait).
pub(crate) trait Transport {
    /// Sends some of the bytes of `pieces`, in order, to the next rank and says how many; zero if there is no room.
    fn send(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Receives some bytes from the previous rank into `pieces`, in order, and says how many; zero if none are here.
    /// A previous rank that has closed its end, and whose bytes are all read, is an `UnexpectedEof`.
    fn receive(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// Waits until something of `want` is possible, an abort comes or `timeout` is over, and says what is possible.
    /// It may return with nothing before.
    fn wait(&mut self, want: Want, timeout: Duration) -> io::Result<Ready>;
}

/// What a collective is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    /// There are bytes that could go out if there were room.
    pub(crate) room: bool,
    /// Bytes will still go out, now or when others have come in: so the next rank must not be gone.
    pub(crate) next: bool,
    /// Bytes are to come in.
    pub(crate) bytes: bool,
}

/// What is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ready {
    /// There is room to send, or sending would fail.
    pub(crate) room: bool,
    /// The next rank has closed its end, or is gone.
    pub(crate) next_gone: bool,
    /// There are bytes to receive, or receiving would fail.
    pub(crate) bytes: bool,
}
