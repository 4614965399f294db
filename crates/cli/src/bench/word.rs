//! What the control word costs: the same all-reduce, with the word in its stream and without, by turns, in the same ring.
//!
//! Each part of the run gives one ratio of medians; what counts is the middle one, and how they differ says how far it
//! can be trusted.

use anyhow::{Context, Result};
use serde::Serialize;

use super::rank::Compared;
use super::stats::{Spread, median};

/// Into how many parts a comparison is cut, to see how it varies.
const PARTS: usize = 20;

/// An all-reduce with the control word and without.
#[derive(Debug, Serialize)]
pub(super) struct WordFigures {
    pub(super) ranks: u32,
    pub(super) bytes: u64,
    pairs: usize,
    pub(super) with_us: Spread,
    pub(super) without_us: Spread,
    /// The cost in percent in each part of the run.
    pub(super) cost_percent: Spread,
}

impl WordFigures {
    pub(super) fn of(ranks: u32, bytes: u64, compared: &Compared) -> Result<WordFigures> {
        let missing = "no rank has compared anything";
        let Compared { with, without } = compared;
        let part = with.len().div_ceil(PARTS).max(1);
        let costs = with
            .chunks(part)
            .zip(without.chunks(part))
            .filter_map(|(with, without)| cost_percent(with, without));
        let us = |times: &[u64]| Spread::of(times.iter().map(|ns| *ns as f64 / 1e3)).context(missing);
        Ok(WordFigures {
            ranks,
            bytes,
            pairs: with.len(),
            with_us: us(with)?,
            without_us: us(without)?,
            cost_percent: Spread::of(costs).context(missing)?,
        })
    }
}

/// How much longer the calls of the first kind take than those of the second, in percent; each kind by its median,
/// which a few calls that were interrupted do not move.
fn cost_percent(with: &[u64], without: &[u64]) -> Option<f64> {
    let middle = |times: &[u64]| median(times.iter().map(|ns| *ns as f64));
    Some((middle(with)? / middle(without)? - 1.0) * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_cost_is_a_ratio_of_medians() {
        let with = vec![1010; 100];
        let mut without = vec![1000; 100];
        without[3] = 1_000_000;
        let word = WordFigures::of(4, 1 << 20, &Compared { with, without }).unwrap();
        assert!((word.cost_percent.p50 - 1.0).abs() < 1e-9);
        assert_eq!((word.cost_percent.n, word.pairs), (PARTS, 100));
        assert_eq!(cost_percent(&[], &[1]), None);
    }
}
