//! Which NCCL it is, what that one can do, and which ones are not to be used.

use std::fmt;

/// A release of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub patch: u32,
}

/// What not every release can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    /// Communicators that return at once and are polled. Nothing works without: a call that blocks has no deadline.
    NonBlocking,
    /// `ncclCommShrink`: survivors go on without a new bootstrap.
    Shrink,
    /// `ncclCommRevoke`: ends what runs and keeps the handle.
    Revoke,
    /// `ncclCommGrow`: newcomers join a communicator that stands.
    Grow,
    /// `ncclCommDestroy` that waits for nobody. From 2.31.2 on it meets the ranks of its machine without a time limit, so
    /// a planned leave ends with an abort there.
    Destroy,
}

impl Feature {
    /// All of them.
    pub const ALL: [Feature; 5] =
        [Feature::NonBlocking, Feature::Shrink, Feature::Revoke, Feature::Grow, Feature::Destroy];

    /// The first release that has it, and the first one that has it no more.
    fn releases(self) -> (Version, Option<Version>) {
        match self {
            Feature::NonBlocking => (Version::new(2, 14, 3), None),
            Feature::Shrink => (Version::new(2, 27, 3), None),
            Feature::Revoke => (Version::new(2, 28, 7), None),
            Feature::Grow => (Version::new(2, 29, 2), None),
            Feature::Destroy => (Version::new(2, 4, 2), Some(Version::new(2, 31, 2))),
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Feature::NonBlocking => "non-blocking communicators",
            Feature::Shrink => "ncclCommShrink",
            Feature::Revoke => "ncclCommRevoke",
            Feature::Grow => "ncclCommGrow",
            Feature::Destroy => "ncclCommDestroy without a barrier",
        })
    }
}

/// Releases in which what this crate lives by is known not to work.
const KNOWN_BAD: [(Version, &str); 3] = [
    (Version::new(2, 17, 1), "ncclCommAbort hangs in it (pytorch#119215); take 2.18 or newer"),
    (Version::new(2, 25, 1), "ncclCommAbort hangs in it (pytorch#149153); take 2.26.2 or newer"),
    (Version::new(2, 29, 2), "it hangs by a regression (pytorch#174338); take 2.29.3 or newer"),
];

impl Version {
    /// The release of these three numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version { major, minor, patch }
    }

    /// What `ncclGetVersion` says, as a release. Before 2.9 the numbers were packed by hundreds.
    pub fn from_code(code: i32) -> Option<Version> {
        let code = u32::try_from(code).ok()?;
        match code {
            0..1000 => None,
            1000..10000 => Some(Version::new(code / 1000, code / 100 % 10, code % 100)),
            _ => Some(Version::new(code / 10000, code / 100 % 100, code % 100)),
        }
    }

    /// The number that `ncclGetVersion` gives for it.
    pub fn code(self) -> i32 {
        let by = if (self.major, self.minor) <= (2, 8) { 1000 } else { 10000 };
        i32::try_from(self.major * by + self.minor * 100 + self.patch).unwrap_or(i32::MAX)
    }

    /// Whether this release can do it.
    pub fn has(self, feature: Feature) -> bool {
        let (since, until) = feature.releases();
        since <= self && until.is_none_or(|until| self < until)
    }

    /// Why this release is not to be used, if so.
    pub fn refused(self) -> Option<&'static str> {
        if !self.has(Feature::NonBlocking) {
            return Some(
                "it has no non-blocking communicators, so nothing could be given up; take 2.14.3 or newer",
            );
        }
        KNOWN_BAD.iter().find(|(version, _)| *version == self).map(|(_, why)| *why)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_as_nccl_writes_it() {
        for (code, version) in
            [(23007, (2, 30, 7)), (21403, (2, 14, 3)), (2804, (2, 8, 4)), (20903, (2, 9, 3))]
        {
            let version = Version::new(version.0, version.1, version.2);
            assert_eq!(Version::from_code(code), Some(version));
            assert_eq!(version.code(), code);
        }
        assert_eq!(Version::from_code(-1), None);
        assert_eq!(Version::from_code(7), None);
    }

    #[test]
    fn every_feature_begins_with_its_release() {
        let without = |version: Version| -> Vec<Feature> {
            Feature::ALL.into_iter().filter(|feature| !version.has(*feature)).collect()
        };
        assert_eq!(without(Version::new(2, 27, 2)), [Feature::Shrink, Feature::Revoke, Feature::Grow]);
        assert_eq!(without(Version::new(2, 27, 3)), [Feature::Revoke, Feature::Grow]);
        assert_eq!(without(Version::new(2, 28, 7)), [Feature::Grow]);
        assert_eq!(without(Version::new(2, 29, 3)), []);
        assert_eq!(without(Version::new(2, 31, 2)), [Feature::Destroy]);
    }

    #[test]
    fn a_release_that_hangs_is_refused_with_the_reason() {
        assert!(Version::new(2, 10, 3).refused().unwrap().contains("2.14.3"));
        assert!(Version::new(2, 25, 1).refused().unwrap().contains("149153"));
        assert_eq!(Version::new(2, 30, 7).refused(), None);
    }
}
