//! The clock that the core's timestamps are read from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reknit_membership::Timestamp;
use tokio::time::Instant;

/// Reads the wall clock once and adds what the monotonic clock says: it never runs back, whatever is done to the wall
/// clock, and its timestamps mean the same before and after a restart.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    wall: Timestamp,
    started: Instant,
}

impl Clock {
    /// A clock that shows the wall clock's time now.
    pub fn start() -> Clock {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Clock::at(Timestamp::default().after(wall))
    }

    /// A clock that shows `wall` now.
    pub fn at(wall: Timestamp) -> Clock {
        Clock { wall, started: Instant::now() }
    }

    /// The time now.
    pub fn now(&self) -> Timestamp {
        self.wall.after(self.started.elapsed())
    }

    /// When it will show `at`; now if it has already.
    pub fn instant(&self, at: Timestamp) -> Instant {
        Instant::now() + at.since(self.now())
    }

    /// How long it has run.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}
