//! The clock by which the processes of one machine write down what they do.

use rustix::time::{ClockId, clock_gettime};

/// Now, in microseconds of the machine's monotonic clock.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The kernel never gives a negative one.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}
