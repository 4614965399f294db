//! Memory that is used again and again, for elements of any type.

use crate::element::Element;

/// It stays as large as the largest use so far. Made of `u64`s so that it is aligned for every type of element.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Vec<u64>);

impl Scratch {
    /// So many elements, of whatever value.
    pub(crate) fn lend<T: Element>(&mut self, len: usize) -> &mut [T] {
        let needed = (len * size_of::<T>()).div_ceil(size_of::<u64>());
        if self.0.len() < needed {
            // A new one, not a longer one: what is in it is not worth moving, and zeros come free of charge.
            self.0 = vec![0; needed];
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// What was lent, and at least as many elements.
    pub(crate) fn lent<T: Element>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }
}
