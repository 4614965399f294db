//! What the log says of connections that are not served: strangers may come often, and one who floods the endpoint must not flood
//! the log too.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::rate::Allowance;

/// How often something is said of an address, and of how many addresses that is remembered.
const EVERY: Duration = Duration::from_secs(60);
const ADDRESSES_MAX: usize = 1024;
/// How much may be said at once of all addresses together, and then every second: a hundred lines in a minute at most.
const ALL_MAX: u32 = 40;
const ALL_PER_SECOND: u32 = 1;

/// What has been said, and when.
pub(super) struct Complaints {
    said: HashMap<IpAddr, Instant>,
    all: Allowance,
}

impl Complaints {
    /// Nothing has been said.
    pub(super) fn new(now: Instant) -> Complaints {
        Complaints { said: HashMap::new(), all: Allowance::new(ALL_PER_SECOND, ALL_MAX, now) }
    }

    /// A connection is closed before it has said anything.
    pub(super) fn refused(&mut self, peer: IpAddr, why: &str) {
        if self.is_due(peer, Instant::now()) {
            tracing::warn!(%peer, why, "a connection to the endpoint for torchrun is refused");
        }
    }

    /// A connection is closed for what it has said, or has not read.
    pub(super) fn cut_off(&mut self, peer: IpAddr, why: &str) {
        if self.is_due(peer, Instant::now()) {
            tracing::warn!(%peer, why, "a connection of torchrun is cut off");
        }
    }

    fn is_due(&mut self, peer: IpAddr, now: Instant) -> bool {
        let is_recent = |at: &Instant| now.duration_since(*at) < EVERY;
        if self.said.get(&peer).is_some_and(is_recent) || !self.all.try_take(now) {
            return false;
        }
        if self.said.len() >= ADDRESSES_MAX {
            self.said.clear();
        }
        self.said.insert(peer, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e7_one_who_comes_often_is_in_the_log_once_a_minute_and_many_do_not_fill_it() {
        let begin = Instant::now();
        let mut complaints = Complaints::new(begin);
        let peer = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        assert!(complaints.is_due(peer(1), begin));
        assert!((0..1000).all(|_| !complaints.is_due(peer(1), begin)));
        assert!(complaints.is_due(peer(2), begin));
        assert!(complaints.is_due(peer(1), begin + EVERY));
        let said = (0..5000).filter(|n| complaints.is_due(peer(10 + n), begin + EVERY)).count();
        assert_eq!(said, ALL_MAX as usize - 1);
        assert!(complaints.is_due(peer(9000), begin + 2 * EVERY));
    }
}
