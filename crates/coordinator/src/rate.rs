//! How often a peer may ask for something.

use std::time::{Duration, Instant};

/// An allowance that fills up with time: so many a second, and at most a burst of them at once.
#[derive(Debug)]
pub(crate) struct Allowance {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

impl Allowance {
    /// A full one.
    pub(crate) fn new(per_second: u32, burst: u32, now: Instant) -> Allowance {
        let burst = f64::from(burst.max(1));
        Allowance { per_second: f64::from(per_second.max(1)), burst, left: burst, at: now }
    }

    /// Takes one if there is one.
    pub(crate) fn try_take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let there_is = self.left >= 1.0;
        if there_is {
            self.left -= 1.0;
        }
        there_is
    }

    /// Takes one, and says how long to wait until there would have been one.
    pub(crate) fn take(&mut self, now: Instant) -> Duration {
        self.fill(now);
        self.left -= 1.0;
        Duration::from_secs_f64((-self.left).max(0.0) / self.per_second)
    }

    fn fill(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.left = (self.left + more).min(self.burst);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_what_is_beyond_it_comes_at_the_rate() {
        let now = Instant::now();
        let mut allowance = Allowance::new(10, 3, now);
        let waits: Vec<u128> = (0..5).map(|_| allowance.take(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        let later = now + Duration::from_millis(300);
        assert_eq!([allowance.try_take(later), allowance.try_take(later)], [true, false]);
        let much_later = now + Duration::from_secs(3600);
        let taken = (0..10).filter(|_| allowance.try_take(much_later)).count();
        assert_eq!(taken, 3, "what was not used does not pile up");
    }
}
