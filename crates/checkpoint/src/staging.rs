//! The buffer in which a rank's part waits to be written.
//!
//! It is kept from save to save: memory that the system has just handed out is ten times slower to fill than memory
//! that was used before.

use crate::files::DIRECT_ALIGN;

/// A buffer that grows and never shrinks, and starts on a page.
#[derive(Default)]
pub(crate) struct Staging {
    /// A page longer than asked for, so that there is an aligned start in it.
    bytes: Vec<u8>,
}

impl Staging {
    /// Makes room for `len` bytes and touches every page of it, so that a later [`Staging::image`] costs nothing.
    pub(crate) fn reserve(&mut self, len: usize) {
        if self.bytes.len() < len + DIRECT_ALIGN {
            // The old one goes first: both at once may be more than there is.
            self.bytes = Vec::new();
            // Not zeros: those the system would promise without giving memory.
            self.bytes = vec![0xa5; len + DIRECT_ALIGN];
        }
    }

    /// The first `len` bytes of the buffer, holding what was left there.
    pub(crate) fn image(&mut self, len: usize) -> &mut [u8] {
        self.reserve(len);
        let skip = self.skip();
        &mut self.bytes[skip..][..len]
    }

    /// What [`Staging::image`] gave, to be read.
    pub(crate) fn image_ref(&self, len: usize) -> &[u8] {
        &self.bytes[self.skip()..][..len]
    }

    fn skip(&self) -> usize {
        self.bytes.as_ptr().addr().wrapping_neg() % DIRECT_ALIGN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_aligned_and_stays_in_place() {
        let mut staging = Staging::default();
        staging.image(10_000).fill(7);
        let at = staging.image(10_000).as_ptr().addr();
        assert_eq!(at % DIRECT_ALIGN, 0);
        assert_eq!(staging.image(100).as_ptr().addr(), at);
        assert_eq!(staging.image_ref(10_000), [7; 10_000]);
        assert_eq!(staging.image(20_000).as_ptr().addr() % DIRECT_ALIGN, 0);
    }
}
