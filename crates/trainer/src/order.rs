//! Which samples a step uses: the data order of a job and each rank's share of a step.
//!
//! Step k uses the positions `k*B .. (k+1)*B` of an endless sequence: pass after pass over the data set, each in an order
//! of its own. The order of a pass is a keyed permutation that is computed for one position at a time, so nothing has to
//! be stored or replayed: the step number is the whole data cursor. A rank's share of a step is a part of its positions,
//! so whatever the world does, each position belongs to exactly one rank of exactly one committed step.

use std::ops::Range;

/// What a job's data order follows from. All workers of a job must agree on it; the coordinator checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DataOrder {
    /// Samples in the data set; at least one.
    pub dataset: u64,
    /// Samples in one step over all ranks, whatever the world's size; at least one.
    pub global_batch: u64,
    /// Makes the order another one.
    pub seed: u64,
}

impl DataOrder {
    /// The positions that step `step` (counted from zero) uses, over all ranks.
    pub fn positions(&self, step: u64) -> Range<u64> {
        let start = step.saturating_mul(self.global_batch);
        start..start.saturating_add(self.global_batch)
    }

    /// The sample at `position`, as an index into the data set.
    pub fn sample(&self, position: u64) -> u64 {
        let dataset = self.dataset.max(1);
        let pass = position / dataset;
        permuted(position % dataset, dataset, mix(self.seed ^ mix(pass)))
    }
}

/// The part of `total` that rank `rank` of `size` has: parts follow each other in rank order, and no two differ by more
/// than one.
pub fn share(total: u64, size: u32, rank: u32) -> Range<u64> {
    let bound = |rank: u32| (u128::from(total) * u128::from(rank) / u128::from(size.max(1))) as u64;
    bound(rank)..bound(rank + 1)
}

/// Where `index` of `0..n` goes: a Feistel network over the next even power of two, walked until it lands below `n`
/// (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: cycle walking). It shuffles; it is no secret.
fn permuted(index: u64, n: u64, key: u64) -> u64 {
    let bits = 64 - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut at = index;
    loop {
        let (mut left, mut right) = (at >> half, at & mask);
        for round in 0..4u64 {
            let next = left ^ (mix(key ^ (round << 60) ^ right) & mask);
            left = right;
            right = next;
        }
        at = (left << half) | right;
        if at < n {
            return at;
        }
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood, 2014): every output bit depends on every input bit.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_uses_every_sample_once_in_an_order_of_its_own() {
        for dataset in (1..70).chain([127, 128, 129, 1000, 1797]) {
            let order = DataOrder { dataset, global_batch: 7, seed: 3 };
            let pass = |p: u64| (p * dataset..(p + 1) * dataset).map(|i| order.sample(i)).collect::<Vec<_>>();
            for p in 0..3 {
                let mut sorted = pass(p);
                sorted.sort_unstable();
                assert_eq!(sorted, (0..dataset).collect::<Vec<_>>(), "pass {p} of {dataset}");
            }
            if dataset > 20 {
                assert_ne!(pass(0), pass(1));
                assert_ne!(pass(0), (0..dataset).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn steps_tile_the_positions_and_shares_tile_a_step_whatever_the_world() {
        let order = DataOrder { dataset: 100, global_batch: 13, seed: 0 };
        for size in 1..20 {
            let mut next = 0;
            for step in 0..5 {
                let positions = order.positions(step);
                for rank in 0..size {
                    let share = share(13, size, rank);
                    assert_eq!(positions.start + share.start, next);
                    next = positions.start + share.end;
                }
                assert_eq!(next, positions.end);
            }
        }
    }

    #[test]
    fn another_seed_is_another_order() {
        let order = |seed| {
            let order = DataOrder { dataset: 50, global_batch: 1, seed };
            (0..50).map(|i| order.sample(i)).collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }
}
