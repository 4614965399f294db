//! Waiting for a socket, but not for ever.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::abort::{AbortHandle, Attached};
use crate::broken::BreakReason;
use crate::wake::{Wake, poll};

/// The instant `wait` after `start`; some years after it if `wait` is longer than the clock can count.
pub(crate) fn after(start: Instant, wait: Duration) -> Instant {
    const YEARS: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
    start.checked_add(wait).unwrap_or_else(|| start + YEARS)
}

/// Why a wait was in vain.
#[derive(Debug)]
pub(crate) enum Vain {
    TimedOut,
    Aborted(BreakReason),
    System(io::Error),
}

impl From<io::Error> for Vain {
    fn from(error: io::Error) -> Vain {
        Vain::System(error)
    }
}

/// Waits for sockets until a deadline or an abort.
pub(crate) struct Patience<'a> {
    deadline: Instant,
    abort: &'a AbortHandle,
    wake: Arc<Wake>,
    _attached: Option<Attached>,
}

impl Patience<'_> {
    pub(crate) fn new(deadline: Instant, abort: &AbortHandle) -> io::Result<Patience<'_>> {
        let wake = Arc::new(Wake::new()?);
        let attached = abort.attach(wake.clone());
        Ok(Patience { deadline, abort, wake, _attached: Some(attached) })
    }

    /// The same with an earlier deadline, for a part of what is waited for.
    pub(crate) fn until(&self, deadline: Instant) -> Patience<'_> {
        let deadline = deadline.min(self.deadline);
        Patience { deadline, abort: self.abort, wake: self.wake.clone(), _attached: None }
    }

    /// Returns when `fd` is ready for any of `events`, or has failed; possibly before.
    pub(crate) fn wait_for(&self, fd: impl AsFd, events: PollFlags) -> Result<(), Vain> {
        let left = self.left()?;
        poll(&mut [PollFd::new(&fd, events), PollFd::new(&self.wake, PollFlags::IN)], Some(left))?;
        Ok(())
    }

    /// Returns when `pause` is over, or what is left of the time.
    pub(crate) fn pause(&self, pause: Duration) -> Result<(), Vain> {
        let until = Instant::now() + pause.min(self.left()?);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.left()?;
            poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(left))?;
        }
    }

    fn left(&self) -> Result<Duration, Vain> {
        if let Some(reason) = self.abort.reason() {
            return Err(Vain::Aborted(reason));
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(Vain::TimedOut) } else { Ok(left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_at_its_deadline() {
        let abort = AbortHandle::new();
        let patience = Patience::new(Instant::now() + Duration::from_millis(5), &abort).unwrap();
        let idle = Wake::new().unwrap();
        let vain = loop {
            if let Err(vain) = patience.wait_for(&idle, PollFlags::IN) {
                break vain;
            }
        };
        assert!(matches!(vain, Vain::TimedOut), "{vain:?}");
    }
}
