//! How a collective in shared memory goes through its elements: window by window.

use std::ops::Range;

use reknit_membership::ids::{Rank, WorldSize};

use crate::schedule::part;

/// The elements of a collective, window by window. There is one window even if there are no elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub(crate) len: usize,
    pub(crate) each: usize,
}

impl Windows {
    /// How many there are.
    pub(crate) fn len(self) -> usize {
        self.len.div_ceil(self.each).max(1)
    }

    /// Where one of them is.
    pub(crate) fn at(self, window: usize) -> Range<usize> {
        window * self.each..self.len.min((window + 1) * self.each)
    }
}

/// A stretch of a rank's part, at most `each` long.
pub(crate) fn stretch(len: usize, ranks: usize, rank: usize, from: usize, each: usize) -> Range<usize> {
    let Range { start, end } = part(len, WorldSize(ranks as u32), Rank(rank as u32));
    (start + from).min(end)..(start + from + each).min(end)
}
