//! What a job asks for, and the times that follow from the one number a user may set.

use std::fmt;
use std::time::Duration;

use crate::ids::Digest;

/// How large a job's worlds may be. Counted in ranks, not in members: a member brings `slots` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spec {
    /// No world is formed with fewer ranks.
    pub min: u32,
    /// No world is formed with more ranks; members beyond it wait as spares.
    pub max: u32,
    /// A world's ranks are a multiple of this.
    pub unit: u32,
    /// How many committed checkpoints are kept.
    pub keep: u32,
}

/// The most ranks a job may ask for.
pub const RANKS_MAX: u32 = 65_536;

/// The most checkpoints a job may keep.
pub const KEEP_MAX: u32 = 100;

/// Why a [`Spec`] cannot be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BadSpec {
    /// `min`, `max`, `unit` or `keep` is zero.
    Zero,
    /// `min` is above `max`.
    MinAboveMax {
        /// What was asked for as the least.
        min: u32,
        /// What was asked for as the most.
        max: u32,
    },
    /// No multiple of `unit` lies within `min..=max`.
    NoMultiple {
        /// What was asked for as the step.
        unit: u32,
    },
    /// `max` is above [`RANKS_MAX`] or `keep` above [`KEEP_MAX`].
    TooMany,
}

impl fmt::Display for BadSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadSpec::Zero => write!(f, "min, max, unit and keep must each be at least 1"),
            BadSpec::MinAboveMax { min, max } => write!(f, "min {min} is above max {max}"),
            BadSpec::NoMultiple { unit } => write!(f, "no multiple of unit {unit} lies between min and max"),
            BadSpec::TooMany => write!(f, "max may be at most {RANKS_MAX} and keep at most {KEEP_MAX}"),
        }
    }
}

impl std::error::Error for BadSpec {}

impl Spec {
    /// The spec itself, if a world can meet it.
    pub fn checked(self) -> Result<Spec, BadSpec> {
        if self.min == 0 || self.max == 0 || self.unit == 0 || self.keep == 0 {
            return Err(BadSpec::Zero);
        }
        if self.min > self.max {
            return Err(BadSpec::MinAboveMax { min: self.min, max: self.max });
        }
        if self.max > RANKS_MAX || self.keep > KEEP_MAX {
            return Err(BadSpec::TooMany);
        }
        if self.max / self.unit * self.unit < self.min {
            return Err(BadSpec::NoMultiple { unit: self.unit });
        }
        Ok(self)
    }
}

impl Default for Spec {
    fn default() -> Spec {
        Spec { min: 1, max: RANKS_MAX, unit: 1, keep: 3 }
    }
}

/// How a job's state is spread over its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharding {
    /// Every rank holds all of it.
    Replicated,
    /// The state is cut into `count` shards; rank r of n needs the shards from `r*count/n` up to `(r+1)*count/n`.
    Sharded {
        /// How many shards there are, whatever the world; 1 to [`SHARDS_MAX`].
        count: u32,
    },
}

/// The most shards a state may be cut into.
pub const SHARDS_MAX: u32 = 65_536;

/// What all members of a job must have in common, so that sums and copies between them mean something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Digest over the names, types and shapes of the state's tensors.
    pub tensors: Digest,
    /// How many tensors, to tell a user what differs.
    pub count: u32,
    /// Their size in bytes, for the same reason.
    pub bytes: u64,
    /// Digest over what else must agree: batch, length of the data set, seed.
    pub recipe: Digest,
    /// How the state is spread.
    pub sharding: Sharding,
}

/// Every wait of the core. All follow from `silence`, the one number a user may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timing {
    /// How long a silent member may live.
    pub silence: Duration,
    /// How long a member that others accuse, but whose stream is up, may take to speak for itself or to hang up.
    pub settle: Duration,
    /// How long a member may be without a stream while everybody waits for it.
    pub reattach: Duration,
    /// How long after a start of the coordinator no lease runs out.
    pub takeover: Duration,
    /// How long a first formation waits for one more member after `min` is met, counted anew with each joiner.
    pub last_call: Duration,
    /// A planned change is asked for when none has been added for this long …
    pub merge_quiet: Duration,
    /// … or this long after the first.
    pub merge_max: Duration,
    /// How long a member may take to answer a world.
    pub establish: Duration,
    /// How long a member may take to bring its state to the resume step.
    pub restore: Duration,
    /// How long a member that renews its lease may keep the others waiting because its program computes.
    pub busy: Duration,
    /// When nothing could be restored: how long until it is tried again.
    pub retry: Duration,
}

/// Why a set of [`Timing`] makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BadTiming {
    /// `silence` is below [`SILENCE_MIN`] or above [`SILENCE_MAX`].
    SilenceOutOfRange,
    /// The order detect < establish < restore < busy does not hold.
    OutOfOrder,
}

/// The shortest [`Timing::silence`]: below it a busy machine looks dead.
pub const SILENCE_MIN: Duration = Duration::from_millis(200);

/// The longest [`Timing::silence`].
pub const SILENCE_MAX: Duration = Duration::from_secs(600);

/// How many renewals a second a job sends at most, however many members it has: above it members renew less often and
/// their leases last longer.
pub const RENEWALS_PER_SECOND_MAX: u32 = 4_000;

impl fmt::Display for BadTiming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadTiming::SilenceOutOfRange => {
                write!(f, "a silent member may live between {SILENCE_MIN:?} and {SILENCE_MAX:?}")
            }
            BadTiming::OutOfOrder => {
                write!(f, "the waits must rise in this order: silence, establish, restore, busy")
            }
        }
    }
}

impl std::error::Error for BadTiming {}

impl Timing {
    /// The times that follow from how long a silent member may live.
    pub fn derive(silence: Duration) -> Result<Timing, BadTiming> {
        if !(SILENCE_MIN..=SILENCE_MAX).contains(&silence) {
            return Err(BadTiming::SilenceOutOfRange);
        }
        Timing {
            silence,
            settle: Duration::from_millis(20),
            reattach: silence.min(Duration::from_millis(300)),
            takeover: silence.max(Duration::from_secs(3)),
            last_call: Duration::from_millis(500),
            merge_quiet: Duration::from_millis(250),
            merge_max: Duration::from_secs(2),
            establish: (silence * 4).max(Duration::from_secs(10)),
            restore: (silence * 40).max(Duration::from_secs(600)),
            busy: (silence * 60).max(Duration::from_secs(1800)),
            retry: Duration::from_secs(30),
        }
        .checked()
    }

    /// The times themselves, if they rise in the order in which they must run out.
    pub fn checked(self) -> Result<Timing, BadTiming> {
        let rising =
            self.silence < self.establish && self.establish < self.restore && self.restore < self.busy;
        if rising { Ok(self) } else { Err(BadTiming::OutOfOrder) }
    }

    /// How often each of `members` members renews its lease.
    pub fn renew_every(&self, members: usize) -> Duration {
        let by_load = Duration::from_micros(members as u64 * 1_000_000 / u64::from(RENEWALS_PER_SECOND_MAX));
        (self.silence / 5).max(by_load)
    }

    /// How long a lease of one of `members` members lasts: at least `silence`, and always three renewals.
    pub fn lease(&self, members: usize) -> Duration {
        self.silence.max(self.renew_every(members) * 3)
    }
}

impl Default for Timing {
    /// The times for a silence of three seconds.
    fn default() -> Timing {
        Timing::derive(Duration::from_secs(3)).expect("three seconds are within the range")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_that_no_world_can_meet_is_refused() {
        let spec = |min, max, unit| Spec { min, max, unit, keep: 1 }.checked().map(|_| ());
        assert_eq!(spec(2, 4, 1), Ok(()));
        assert_eq!(spec(4, 2, 1), Err(BadSpec::MinAboveMax { min: 4, max: 2 }));
        assert_eq!(spec(0, 2, 1), Err(BadSpec::Zero));
        assert_eq!(spec(5, 7, 4), Err(BadSpec::NoMultiple { unit: 4 }));
        assert_eq!(spec(5, 8, 4), Ok(()));
        assert_eq!(spec(1, RANKS_MAX + 1, 1), Err(BadSpec::TooMany));
    }

    #[test]
    fn times_rise_in_order_whatever_the_silence() {
        for silence_ms in [200, 1_000, 3_000, 30_000, 600_000] {
            Timing::derive(Duration::from_millis(silence_ms)).expect("derived times are in order");
        }
        assert_eq!(Timing::derive(Duration::from_millis(199)), Err(BadTiming::SilenceOutOfRange));
        assert_eq!(Timing::derive(Duration::from_secs(601)), Err(BadTiming::SilenceOutOfRange));
    }

    #[test]
    fn ten_thousand_members_renew_no_more_often_than_the_limit() {
        let timing = Timing::default();
        assert_eq!(timing.renew_every(4), Duration::from_millis(600));
        assert_eq!(timing.renew_every(10_000), Duration::from_millis(2_500));
        assert_eq!(timing.lease(10_000), Duration::from_millis(7_500));
    }
}
