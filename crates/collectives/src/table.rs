//! A small all-reduce on the ring: everybody's numbers go around whole, and each rank adds them up for itself, in rank order.
//!
//! To reduce every part and then to gather them takes `2 (n - 1)` steps, each of which waits for the one before. This takes
//! `n - 1`, and moves `n / 2` times the bytes for it: so it is for what is so small that steps count, and not bytes.

use reknit_membership::ids::WorldSize;

use crate::element::Element;
use crate::inputs::Inputs;
use crate::reduce::ReduceOp;
use crate::ring::Seat;
use crate::scratch::Scratch;

/// How many bytes a rank sends at most in an all-reduce that is done so. All ranks must have the same: it is part of the
/// protocol.
const SENT_BYTES_MAX: usize = 64 << 10;

/// Whether an all-reduce of so many bytes is done so.
pub(crate) fn fits(bytes: usize, size: WorldSize) -> bool {
    bytes.checked_mul(size.0 as usize - 1).is_some_and(|sent| sent <= SENT_BYTES_MAX)
}

/// What each rank contributes, rank by rank.
#[derive(Debug, Default)]
pub(crate) struct Table {
    room: Scratch,
}

impl Table {
    /// A table with this rank's numbers in their place, and whatever was there before in the others'.
    pub(crate) fn lay<T: Element>(&mut self, seat: Seat, input: &[T]) -> &mut [T] {
        let table = self.room.lend(input.len() * seat.size.0 as usize);
        table[seat.rank.0 as usize * input.len()..][..input.len()].copy_from_slice(input);
        table
    }

    /// Combines what all have contributed.
    pub(crate) fn combine<T: Element>(&self, op: ReduceOp, size: WorldSize, result: &mut [T]) {
        let table: &[T] = self.room.lent();
        let of = |rank| &table[rank * result.len()..][..result.len()];
        Inputs::new(0..size.0 as usize, of).combine(op, result);
    }
}

#[cfg(test)]
mod tests {
    use reknit_membership::ids::Rank;

    use super::*;

    #[test]
    fn what_is_sent_decides_and_not_what_there_is() {
        assert!(fits(SENT_BYTES_MAX, WorldSize(2)) && !fits(SENT_BYTES_MAX + 1, WorldSize(2)));
        assert!(fits(SENT_BYTES_MAX / 3, WorldSize(4)) && !fits(SENT_BYTES_MAX / 3 + 1, WorldSize(4)));
        assert!(fits(0, WorldSize(1000)) && !fits(usize::MAX, WorldSize(3)));
    }

    #[test]
    fn each_rank_adds_in_rank_order_whatever_lay_there_before() {
        let inputs = [[1e30_f32, 1.0], [-1e30, 2.0], [1.0, 3.0]];
        let mut results = Vec::new();
        for own in 0..3 {
            let mut table = Table::default();
            let seat = Seat { size: WorldSize(3), rank: Rank(own), prev: Rank((own + 2) % 3) };
            table.lay(seat, &[9_u8; 40]);
            let laid = table.lay(seat, &inputs[own as usize]);
            for (rank, input) in inputs.iter().enumerate().filter(|(rank, _)| *rank != own as usize) {
                laid[2 * rank..][..2].copy_from_slice(input);
            }
            let mut result = [0.0_f32; 2];
            table.combine(ReduceOp::Mean, WorldSize(3), &mut result);
            results.push(result);
        }
        // In another order the first is nothing.
        assert_eq!(results, [[1.0 / 3.0, 2.0]; 3]);
    }
}
