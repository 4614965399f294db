//! What all ranks contribute to the same elements, and how it becomes their result; and the elements that lie in memory that
//! processes share.

#![allow(unsafe_code, reason = "reads and writes memory that other processes map")]

use std::ops::Range;

use crate::element::Element;
use crate::reduce::ReduceOp;
use crate::segment::Segment;

/// What all ranks contribute to the same elements.
pub(crate) struct Inputs<'a, T> {
    few: [&'a [T]; Inputs::<u8>::FEW],
    many: Vec<&'a [T]>,
    count: usize,
}

impl<T> Inputs<'_, T> {
    /// No memory is asked for up to so many.
    const FEW: usize = 16;
}

impl<'a, T: Element> Inputs<'a, T> {
    pub(crate) fn new(ranks: Range<usize>, of: impl Fn(usize) -> &'a [T]) -> Inputs<'a, T> {
        let count = ranks.len();
        let mut few = [&[][..]; Inputs::<u8>::FEW];
        if count > few.len() {
            return Inputs { few, many: ranks.map(of).collect(), count };
        }
        few.iter_mut().zip(ranks).for_each(|(input, rank)| *input = of(rank));
        Inputs { few, many: Vec::new(), count }
    }

    fn all(&self) -> &[&'a [T]] {
        if self.many.is_empty() { &self.few[..self.count] } else { &self.many }
    }

    /// Combines them in rank order.
    pub(crate) fn combine(&self, op: ReduceOp, result: &mut [T]) {
        if op != ReduceOp::Mean {
            return T::combine(op, self.all(), result);
        }
        // Block by block, so that what is divided is still in the first-level cache.
        const BLOCK_BYTES: usize = 4096;
        let block = BLOCK_BYTES / size_of::<T>();
        for start in (0..result.len()).step_by(block) {
            let place = start..result.len().min(start + block);
            let inputs = Inputs::new(0..self.count, |rank| &self.all()[rank][place.clone()]);
            T::combine(op, inputs.all(), &mut result[place.clone()]);
            T::divide(&mut result[place], self.count as u32);
        }
    }
}

/// So many elements in a segment.
///
/// # Safety
/// Nobody writes to them for as long as they are borrowed. `offset` is aligned for them.
pub(crate) unsafe fn elements<T: Element>(segment: &Segment, offset: usize, len: usize) -> &[T] {
    let bytes = len.checked_mul(size_of::<T>()).expect("there is no such memory");
    let at = segment.at(offset, bytes).cast::<T>();
    debug_assert!(at.is_aligned());
    // SAFETY: it is mapped for as long as the segment is borrowed, any bytes are an element, and the rest is the caller's.
    unsafe { std::slice::from_raw_parts(at.as_ptr(), len) }
}

/// So many elements in a segment, to be written.
///
/// # Safety
/// Nobody else reads or writes them for as long as they are borrowed. `offset` is aligned for them.
#[expect(clippy::mut_from_ref, reason = "what is shared between processes has no one owner")]
pub(crate) unsafe fn elements_mut<T: Element>(segment: &Segment, offset: usize, len: usize) -> &mut [T] {
    let bytes = len.checked_mul(size_of::<T>()).expect("there is no such memory");
    let at = segment.at(offset, bytes).cast::<T>();
    debug_assert!(at.is_aligned());
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), len) }
}
