//! The words of the core as types: what two bare `u64`s could swap, the compiler keeps apart.

use std::fmt;
use std::time::Duration;

/// One training run. TorchElastic calls it `run_id`.
///
/// 1 to 128 characters out of `a-z A-Z 0-9 . _ -`, so that it fits a path, a key and a URL unescaped.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(String);

/// The longest a [`JobId`] or a [`MemberName`] may be, in characters.
pub const NAME_CHARS_MAX: usize = 128;

/// Why a text is not a [`JobId`] or a [`MemberName`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadName {
    /// It has no character.
    Empty,
    /// It has more than [`NAME_CHARS_MAX`] characters.
    TooLong {
        /// How many it has.
        chars: usize,
    },
    /// It holds a character outside `a-z A-Z 0-9 . _ -`.
    BadCharacter {
        /// The first such character.
        found: char,
    },
}

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadName::Empty => write!(f, "a name needs at least one character"),
            BadName::TooLong { chars } => {
                write!(f, "a name may have {NAME_CHARS_MAX} characters, this one has {chars}")
            }
            BadName::BadCharacter { found } => {
                write!(f, "a name may hold a-z A-Z 0-9 . _ - only, this one holds {found:?}")
            }
        }
    }
}

impl std::error::Error for BadName {}

fn checked(text: &str) -> Result<String, BadName> {
    let chars = text.chars().count();
    if chars == 0 {
        return Err(BadName::Empty);
    }
    if chars > NAME_CHARS_MAX {
        return Err(BadName::TooLong { chars });
    }
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.chars().find(|c| !allowed(c)) {
        Some(found) => Err(BadName::BadCharacter { found }),
        None => Ok(text.to_owned()),
    }
}

impl JobId {
    /// The id that `text` spells, if it is one.
    pub fn new(text: &str) -> Result<JobId, BadName> {
        checked(text).map(JobId)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job:{}", self.0)
    }
}

/// What people call a member: stable over a restart of its process, unique among the live members of a job.
///
/// A process that joins under a name that is taken replaces the member that had it: the same place cannot run twice.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberName(String);

impl MemberName {
    /// The name that `text` spells, if it is one.
    pub fn new(text: &str) -> Result<MemberName, BadName> {
        checked(text).map(MemberName)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty), $show:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $show, self.0)
            }
        }
    };
}

number!(
    /// One rank of a world: 0..n-1 without gaps.
    Rank(u32), "r{}"
);
number!(
    /// How many ranks a world has.
    WorldSize(u32), "n{}"
);
number!(
    /// The fencing number of a world: one more per formation, never used twice.
    /// Zero means that no world has been formed yet.
    Generation(u64), "g{}"
);
number!(
    /// How many optimizer steps have been committed. A job starts at zero.
    Step(u64), "s{}"
);
number!(
    /// Which store the job's record lives in: drawn when the record is made, so that a member notices when a
    /// coordinator answers out of a foreign or a fresh store.
    HistoryId(u64), "h{:x}"
);
number!(
    /// The world that computed a state, by its generation. A world whose members all start from one state computes
    /// each step once, so world and step together name exactly one state (rule M-15).
    Lineage(u64), "l{}"
);

impl Generation {
    /// The generation after this one.
    pub fn next(self) -> Generation {
        Generation(self.0 + 1)
    }
}

/// One process that holds a lease, drawn at random when the process starts: a restarted process is a new member.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{:x}", self.0)
    }
}

/// A 128-bit digest of bytes. It guards against accidents (a torn write, a flipped bit, a diverged rank), not
/// against somebody who forges bytes on purpose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{:x}", self.0)
    }
}

/// An instant on the driver's clock, in microseconds since the Unix epoch.
///
/// The driver reads the wall clock once, when it starts, and adds what the monotonic clock says from then on: within
/// one process it never runs back, and a deadline that was saved keeps its meaning over a restart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The instant `wait` after this one; the far future if that does not fit.
    pub fn after(self, wait: Duration) -> Timestamp {
        Timestamp(self.0.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this instant is; zero if it is before it.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}.{:03}ms", self.0 / 1000, self.0 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_and_plain() {
        assert_eq!(JobId::new("digits-1.a_B").map(|j| j.as_str().to_owned()), Ok("digits-1.a_B".to_owned()));
        assert_eq!(JobId::new(""), Err(BadName::Empty));
        assert_eq!(JobId::new("a/b"), Err(BadName::BadCharacter { found: '/' }));
        assert_eq!(MemberName::new(&"x".repeat(129)), Err(BadName::TooLong { chars: 129 }));
    }

    #[test]
    fn time_neither_overflows_nor_runs_back() {
        assert_eq!(Timestamp(u64::MAX).after(Duration::from_secs(1)), Timestamp(u64::MAX));
        assert_eq!(Timestamp(1).since(Timestamp(5)), Duration::ZERO);
    }
}
