//! Giving up from outside.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::broken::BreakReason;
use crate::lock;
use crate::wake::Wake;

/// Ends everything that waits on a group, from any thread: forming it, a collective, a dial.
///
/// It is one-way. What starts after the abort ends at once, so a new world takes a new handle.
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// The same as `sleepers.reason.is_some()`, readable without the lock: a collective asks between any two chunks.
    aborted: AtomicBool,
    sleepers: Mutex<Sleepers>,
}

#[derive(Default)]
struct Sleepers {
    reason: Option<BreakReason>,
    next_ticket: u64,
    waiting: Vec<(u64, Arc<dyn Rouse>)>,
}

/// Something that sleeps and can be woken.
pub(crate) trait Rouse: Send + Sync {
    fn rouse(&self);
}

impl Rouse for Wake {
    fn rouse(&self) {
        self.signal();
    }
}

impl AbortHandle {
    /// A handle that has not been used yet.
    pub fn new() -> AbortHandle {
        AbortHandle::default()
    }

    /// Ends, for `reason`, everything that waits now or later with this handle. The first reason stays.
    pub fn abort(&self, reason: BreakReason) {
        let waiting = {
            let mut sleepers = lock(&self.shared.sleepers);
            sleepers.reason.get_or_insert(reason);
            self.shared.aborted.store(true, Ordering::Release);
            std::mem::take(&mut sleepers.waiting)
        };
        waiting.iter().for_each(|(_, sleeper)| sleeper.rouse());
    }

    /// Whether [`abort`](AbortHandle::abort) has been called.
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::Acquire)
    }

    /// The first reason given, once aborted.
    pub fn reason(&self) -> Option<BreakReason> {
        if self.is_aborted() { lock(&self.shared.sleepers).reason.clone() } else { None }
    }

    /// Has `sleeper` woken when the abort comes, or at once if it came already.
    pub(crate) fn attach(&self, sleeper: Arc<dyn Rouse>) -> Attached {
        let mut sleepers = lock(&self.shared.sleepers);
        let ticket = sleepers.next_ticket;
        sleepers.next_ticket += 1;
        if sleepers.reason.is_some() {
            drop(sleepers);
            sleeper.rouse();
        } else {
            sleepers.waiting.push((ticket, sleeper));
        }
        Attached { handle: self.clone(), ticket }
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.reason()).finish()
    }
}

/// Keeps a sleeper attached to its handle.
pub(crate) struct Attached {
    handle: AbortHandle,
    ticket: u64,
}

impl Drop for Attached {
    fn drop(&mut self) {
        lock(&self.handle.shared.sleepers).waiting.retain(|(ticket, _)| *ticket != self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags};

    use super::*;
    use crate::wake::poll;

    fn is_signalled(wake: &Wake) -> bool {
        let mut fds = [PollFd::new(wake, PollFlags::IN)];
        poll(&mut fds, Some(Duration::ZERO)).unwrap();
        !fds[0].revents().is_empty()
    }

    #[test]
    fn an_abort_wakes_who_sleeps_and_who_lies_down_later() {
        let abort = AbortHandle::new();
        let (before, after) = (Arc::new(Wake::new().unwrap()), Arc::new(Wake::new().unwrap()));
        let _before = abort.attach(before.clone());
        assert!(!is_signalled(&before));
        abort.clone().abort(BreakReason::Aborted);
        let _after = abort.attach(after.clone());
        assert!(is_signalled(&before) && is_signalled(&after));
    }

    #[test]
    fn the_first_reason_stays() {
        let abort = AbortHandle::new();
        assert_eq!(abort.reason(), None);
        abort.abort(BreakReason::Protocol { what: "first" });
        abort.abort(BreakReason::Aborted);
        assert_eq!(abort.reason(), Some(BreakReason::Protocol { what: "first" }));
    }

    #[test]
    fn who_has_left_is_neither_woken_nor_kept() {
        let abort = AbortHandle::new();
        let wake = Arc::new(Wake::new().unwrap());
        drop(abort.attach(wake.clone()));
        assert_eq!(Arc::strong_count(&wake), 1);
        abort.abort(BreakReason::Aborted);
        assert!(!is_signalled(&wake));
    }
}
