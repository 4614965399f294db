//! What happened at least once. A fault that never strikes and a path that is never taken prove nothing, so the tests
//! demand that each of [`EXPECTED`] has been seen over their seeds.

use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Default, Clone)]
pub struct Coverage {
    /// How often, by what.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Coverage {
    /// It happened.
    pub fn hit(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Adds what another run has seen.
    pub fn add(&mut self, other: &Coverage) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }

    /// What of [`EXPECTED`] has not been seen.
    pub fn missing(&self) -> Vec<&'static str> {
        EXPECTED.iter().copied().filter(|what| !self.counts.contains_key(what)).collect()
    }
}

/// What a few hundred seeds must have seen.
pub const EXPECTED: &[&str] = &[];
