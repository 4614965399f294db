//! The clock that all processes of one machine share.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// An instant by the machine's monotonic clock, in nanoseconds: unlike [`std::time::Instant`] it can be told to another
/// process and compared there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Mark(pub(super) u64);

impl Mark {
    pub(super) fn now() -> Mark {
        Mark(crate::clock::monotonic_ns())
    }

    /// The instant so much later.
    pub(super) fn after(self, duration: Duration) -> Mark {
        Mark(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` it is; zero if it is not after it.
    pub(super) fn since(self, earlier: Mark) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A duration in milliseconds, as results show it.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_rise_and_never_give_a_negative_duration() {
        let first = Mark::now();
        let second = Mark::now();
        assert!(first <= second);
        assert_eq!(first.since(Mark(first.0 + 1)), Duration::ZERO);
        assert_eq!(Mark(3_500_000).since(Mark(500_000)), Duration::from_millis(3));
        assert_eq!(Mark(500_000).after(Duration::from_millis(3)), Mark(3_500_000));
        assert_eq!(ms(Duration::from_micros(1_500)), 1.5);
    }
}
