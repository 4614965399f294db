//! The clock that all processes of one machine share.

use rustix::time::{ClockId, clock_gettime};

/// The machine's monotonic clock, in nanoseconds. Unlike [`std::time::Instant`] it can be told to another process and
/// compared there.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The kernel never gives a negative one.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The same, in microseconds.
pub(crate) fn monotonic_us() -> u64 {
    monotonic_ns() / 1000
}
