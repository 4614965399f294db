//! The control word: what every rank wants the others to know, carried along with the data.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

/// A set of flags. Each rank's flags are sampled once, when it enters a collective; when the collective is over every
/// rank holds the union of all of them, the same on every rank.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ControlWord(pub u32);

impl ControlWord {
    /// How many bytes a word takes in the stream.
    pub(crate) const BYTES: usize = 4;

    /// No flag.
    pub const NONE: ControlWord = ControlWord(0);
    /// Somebody was asked to stop at the next step boundary.
    pub const BOUNDARY_REQUESTED: ControlWord = ControlWord(1);
    /// Somebody's own work failed, so that what this collective sums is not to be used.
    pub const FAILED: ControlWord = ControlWord(1 << 1);
    /// Somebody was asked to save a checkpoint at the next step boundary.
    pub const SAVE_REQUESTED: ControlWord = ControlWord(1 << 2);
    /// Somebody is still busy with the checkpoint before, so that none is to be begun at the next step boundary.
    pub const SAVE_BUSY: ControlWord = ControlWord(1 << 3);

    /// Whether every flag of `flags` is in this word.
    pub fn contains(self, flags: ControlWord) -> bool {
        self.0 & flags.0 == flags.0
    }
}

impl BitOr for ControlWord {
    type Output = ControlWord;

    fn bitor(self, other: ControlWord) -> ControlWord {
        ControlWord(self.0 | other.0)
    }
}

impl BitOrAssign for ControlWord {
    fn bitor_assign(&mut self, other: ControlWord) {
        self.0 |= other.0;
    }
}

impl fmt::Debug for ControlWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{:#b}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_set() {
        let both = ControlWord::FAILED | ControlWord::SAVE_REQUESTED;
        assert!(
            both.contains(ControlWord::FAILED) && both.contains(both) && both.contains(ControlWord::NONE)
        );
        assert!(!both.contains(ControlWord::BOUNDARY_REQUESTED));
        assert!(!ControlWord::FAILED.contains(both));
    }
}
