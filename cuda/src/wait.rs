//! Waiting for what can only be asked about: every wait of this crate goes through here, and has a deadline (rule G-1).

use std::thread;
use std::time::{Duration, Instant};

/// How long it is asked again at once, giving the core away in between.
const SPIN: Duration = Duration::from_micros(100);

/// How long it sleeps between two questions, after that: an eighth of what it has waited for, within these.
const SLEEP_MIN: Duration = Duration::from_micros(20);
const SLEEP_MAX: Duration = Duration::from_millis(1);

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited<R> {
    /// What was waited for came.
    Came(R),
    /// Somebody gave up.
    GivenUp,
    /// The deadline passed.
    Missed,
}

/// Asks `look` until it has an answer, `gives_up` says so, or `patience` is over.
pub(crate) fn wait<R>(
    patience: Duration,
    gives_up: impl Fn() -> bool,
    mut look: impl FnMut() -> Option<R>,
) -> Waited<R> {
    let start = Instant::now();
    loop {
        if let Some(came) = look() {
            return Waited::Came(came);
        }
        if gives_up() {
            return Waited::GivenUp;
        }
        let waited = start.elapsed();
        if waited >= patience {
            return Waited::Missed;
        }
        if waited < SPIN {
            thread::yield_now();
        } else {
            thread::sleep((waited / 8).clamp(SLEEP_MIN, SLEEP_MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g1_a_wait_ends_by_its_deadline_at_the_latest() {
        let start = Instant::now();
        let patience = Duration::from_millis(20);
        assert_eq!(wait::<()>(patience, || false, || None), Waited::Missed);
        assert!(start.elapsed() >= patience && start.elapsed() < Duration::from_secs(5));
        assert_eq!(wait::<()>(Duration::MAX, || true, || None), Waited::GivenUp);
        assert_eq!(wait(Duration::ZERO, || true, || Some(7)), Waited::Came(7), "what has come counts");
    }
}
