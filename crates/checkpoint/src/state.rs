//! What a training program keeps, as this library sees it.

use crate::dtype::TensorSpec;
use crate::values::Values;

/// What a training program keeps and the library saves, moves and restores: named tensors and a few small values.
///
/// Every rank holds all of it (it is *replicated*), equal bit for bit at the same step. What differs from rank to rank
/// does not belong here: derive it from the rank and from something that all share, as a seed.
///
/// Bytes are little-endian and row-major. Offsets and lengths are in bytes and stay within the tensor.
/// [`crate::NamedTensors`] implements this for programs that have no tensors of their own.
pub trait State {
    /// The tensors, in an order and with shapes that stay the same while the job lives.
    fn tensors(&self) -> Vec<TensorSpec>;

    /// Copies bytes of the tensor with this index in [`State::tensors`], from `offset` on, filling `into`.
    fn read(&self, tensor: usize, offset: u64, into: &mut [u8]);

    /// Replaces bytes of the tensor with this index, from `offset` on.
    fn write(&mut self, tensor: usize, offset: u64, bytes: &[u8]);

    /// All bytes of the tensor in place, when they lie in plain host memory: saves a copy over [`State::read`].
    fn bytes(&self, _tensor: usize) -> Option<&[u8]> {
        None
    }

    /// All bytes of the tensor in place, to be overwritten: saves a copy over [`State::write`].
    fn bytes_mut(&mut self, _tensor: usize) -> Option<&mut [u8]> {
        None
    }

    /// All tensors in place at once, in the order of [`State::tensors`], when every one of them lies in plain host memory:
    /// lets several threads overwrite different parts of the state at the same time.
    fn all_bytes_mut(&mut self) -> Option<Vec<&mut [u8]>> {
        None
    }

    /// The small structured values: step, seeds, schedule, data cursor.
    fn values(&self) -> Values {
        Values::new()
    }

    /// Replaces the small structured values.
    fn set_values(&mut self, _values: Values) {}
}
