//! The seed from which the ranks of a world find each other.

use std::fmt;

/// NCCL's unique id: 128 bytes that only NCCL understands. A surviving rank makes it, for one generation; the world's
/// message carries it to the others. It is good for one formation, and the process that made it must live until then.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// How many bytes it is.
    pub const BYTES: usize = 128;

    /// The id that consists of these bytes.
    pub const fn new(bytes: [u8; UniqueId::BYTES]) -> UniqueId {
        UniqueId(bytes)
    }

    /// The bytes, to be carried in a world's message.
    pub fn as_bytes(&self) -> &[u8; UniqueId::BYTES] {
        &self.0
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut UniqueId {
        self
    }
}

impl fmt::Debug for UniqueId {
    /// Whoever knows it can join: it belongs in no log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_passed_as_nccl_passes_it() {
        assert_eq!((size_of::<UniqueId>(), align_of::<UniqueId>()), (128, 1));
        assert_eq!(format!("{:?}", UniqueId::new([7; 128])), "UniqueId(..)");
    }
}
