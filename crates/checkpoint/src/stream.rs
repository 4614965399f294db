//! Ranges of a state's logical byte space as streams of bytes, without a copy where the state offers one.

use std::convert::Infallible;

use reknit_membership::Digest;

use crate::digest::Digester;
use crate::layout::{ByteRange, Layout, Piece};
use crate::state::State;
use crate::to_usize;

/// How much of a state that is not plain host memory is held in a buffer of ours, in bytes.
const BLOCK_BYTES: u64 = 1 << 20;

/// Gives the bytes `range` of the state to `sink`, in order, in pieces of any size.
///
/// # Panics
/// If `range` is not within the layout (see [`Layout::holds`]) or the state is not of this layout.
pub fn read_range(state: &dyn State, layout: &Layout, range: ByteRange, mut sink: impl FnMut(&[u8])) {
    let Ok(()) = try_read_range(state, layout, range, |bytes| {
        sink(bytes);
        Ok::<(), Infallible>(())
    });
}

/// As [`read_range`], with a sink that can fail; its first error ends the reading.
///
/// # Panics
/// As [`read_range`].
pub fn try_read_range<E>(
    state: &dyn State,
    layout: &Layout,
    range: ByteRange,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    assert!(layout.holds(range), "bytes {range} are not within a state of {} bytes", layout.total_bytes());
    let mut block = Vec::new();
    for piece in layout.locate(range) {
        if let Some(bytes) = in_place(state, layout, &piece) {
            sink(bytes)?;
            continue;
        }
        for (offset, len) in blocks(&piece) {
            block.resize(to_usize(len), 0);
            state.read(piece.tensor, offset, &mut block);
            sink(&block)?;
        }
    }
    Ok(())
}

/// Replaces the bytes `range` of the state with what `source` puts into the buffers it is given, in order.
///
/// # Panics
/// As [`read_range`].
pub fn write_range(
    state: &mut dyn State,
    layout: &Layout,
    range: ByteRange,
    mut source: impl FnMut(&mut [u8]),
) {
    let Ok(()) = try_write_range(state, layout, range, |into| {
        source(into);
        Ok::<(), Infallible>(())
    });
}

/// As [`write_range`], with a source that can fail; its first error ends the writing and leaves the state partly
/// written.
///
/// # Panics
/// As [`read_range`].
pub fn try_write_range<E>(
    state: &mut dyn State,
    layout: &Layout,
    range: ByteRange,
    mut source: impl FnMut(&mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    assert!(layout.holds(range), "bytes {range} are not within a state of {} bytes", layout.total_bytes());
    let mut block = Vec::new();
    for piece in layout.locate(range) {
        if let Some(bytes) = in_place_mut(state, layout, &piece) {
            source(bytes)?;
            continue;
        }
        for (offset, len) in blocks(&piece) {
            block.resize(to_usize(len), 0);
            source(&mut block)?;
            state.write(piece.tensor, offset, &block);
        }
    }
    Ok(())
}

/// Replaces the bytes of the state from `at` on (in its logical byte space) with `bytes`.
///
/// # Panics
/// As [`read_range`].
pub fn write_at(state: &mut dyn State, layout: &Layout, at: u64, mut bytes: &[u8]) {
    let range = ByteRange::new(at, at.saturating_add(bytes.len() as u64));
    assert!(layout.holds(range), "bytes {range} are not within a state of {} bytes", layout.total_bytes());
    for piece in layout.locate(range) {
        let (head, tail) = bytes.split_at(to_usize(piece.len));
        match in_place_mut(state, layout, &piece) {
            Some(place) => place.copy_from_slice(head),
            None => state.write(piece.tensor, piece.offset, head),
        }
        bytes = tail;
    }
}

/// The places of the bytes `ranges` of the state, so that each range can be overwritten by a thread of its own; `None` if
/// the state is not plain host memory. The places of one range follow each other.
///
/// # Panics
/// As [`read_range`], and if the ranges do not follow each other.
pub fn split_mut<'a>(
    state: &'a mut dyn State,
    layout: &Layout,
    ranges: &[ByteRange],
) -> Option<Vec<Vec<&'a mut [u8]>>> {
    let mut left: Vec<&mut [u8]> = state.all_bytes_mut()?;
    left.iter().enumerate().for_each(|(tensor, bytes)| assert_whole(bytes.len(), layout, tensor));
    // Where what is left of each tensor starts.
    let mut starts = vec![0; left.len()];
    let mut place = |Piece { tensor, offset, len, .. }: Piece| {
        let skipped: u64 = offset.checked_sub(starts[tensor]).expect("ranges follow each other");
        let (_, rest) = std::mem::take(&mut left[tensor]).split_at_mut(to_usize(skipped));
        let (place, rest) = rest.split_at_mut(to_usize(len));
        (left[tensor], starts[tensor]) = (rest, offset + len);
        place
    };
    let mut places = |range: &ByteRange| {
        let whole = layout.total_bytes();
        assert!(layout.holds(*range), "bytes {range} are not within a state of {whole} bytes");
        layout.locate(*range).map(&mut place).collect()
    };
    Some(ranges.iter().map(&mut places).collect())
}

/// The digest of the bytes `range` of the state, as [`crate::digest()`] gives it of the same bytes in one piece.
///
/// # Panics
/// As [`read_range`].
pub fn digest_range(state: &dyn State, layout: &Layout, range: ByteRange) -> Digest {
    let mut digester = Digester::new();
    read_range(state, layout, range, |bytes| digester.update(bytes));
    digester.finish()
}

/// The piece's bytes where they lie, if the state's tensor is plain host memory.
pub(crate) fn in_place<'a>(state: &'a dyn State, layout: &Layout, piece: &Piece) -> Option<&'a [u8]> {
    let bytes = state.bytes(piece.tensor)?;
    assert_whole(bytes.len(), layout, piece.tensor);
    Some(&bytes[to_usize(piece.offset)..][..to_usize(piece.len)])
}

fn in_place_mut<'a>(state: &'a mut dyn State, layout: &Layout, piece: &Piece) -> Option<&'a mut [u8]> {
    let bytes = state.bytes_mut(piece.tensor)?;
    assert_whole(bytes.len(), layout, piece.tensor);
    Some(&mut bytes[to_usize(piece.offset)..][..to_usize(piece.len)])
}

/// A state that offers another number of bytes than its own specification is a broken program: what it would write
/// could not be told from damage.
fn assert_whole(len: usize, layout: &Layout, tensor: usize) {
    let spec = &layout.specs()[tensor];
    assert!(Some(len as u64) == spec.bytes(), "the state offers {len} bytes for the tensor {spec:?}");
}

/// The piece in blocks of at most [`BLOCK_BYTES`]: offset in the tensor and length of each.
fn blocks(piece: &Piece) -> impl Iterator<Item = (u64, u64)> {
    let (start, end) = (piece.offset, piece.offset + piece.len);
    (0..piece.len.div_ceil(BLOCK_BYTES)).map(move |n| {
        let offset = start + n * BLOCK_BYTES;
        (offset, BLOCK_BYTES.min(end - offset))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::digest;
    use crate::dtype::{Dtype, TensorSpec};

    /// A state behind calls, as on a device: nothing in place.
    struct Device(Vec<TensorSpec>, Vec<Vec<u8>>);

    impl State for Device {
        fn tensors(&self) -> Vec<TensorSpec> {
            self.0.clone()
        }
        fn read(&self, tensor: usize, offset: u64, into: &mut [u8]) {
            into.copy_from_slice(&self.1[tensor][offset as usize..][..into.len()]);
        }
        fn write(&mut self, tensor: usize, offset: u64, bytes: &[u8]) {
            self.1[tensor][offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// The same state in plain memory.
    struct Host(Device);

    impl State for Host {
        fn tensors(&self) -> Vec<TensorSpec> {
            self.0.tensors()
        }
        fn read(&self, _: usize, _: u64, _: &mut [u8]) {
            panic!("a state in plain memory is not read by copy");
        }
        fn write(&mut self, _: usize, _: u64, _: &[u8]) {
            panic!("a state in plain memory is not written by copy");
        }
        fn bytes(&self, tensor: usize) -> Option<&[u8]> {
            Some(&self.0.1[tensor])
        }
        fn bytes_mut(&mut self, tensor: usize) -> Option<&mut [u8]> {
            Some(&mut self.0.1[tensor])
        }
        fn all_bytes_mut(&mut self) -> Option<Vec<&mut [u8]>> {
            Some(self.0.1.iter_mut().map(Vec::as_mut_slice).collect())
        }
    }

    fn states() -> (Layout, Vec<u8>, [Box<dyn State>; 2]) {
        let specs = vec![
            TensorSpec::new("a", Dtype::U8, [3]),
            TensorSpec::new("b", Dtype::F32, [2]),
            TensorSpec::new("empty", Dtype::F32, [0]),
            TensorSpec::new("c", Dtype::F64, []),
        ];
        let layout = Layout::new(specs.clone()).unwrap();
        let make =
            || Device(specs.clone(), vec![vec![16, 17, 18], (8..16).collect(), vec![], (0..8).collect()]);
        (layout, (0..19).collect(), [Box::new(make()), Box::new(Host(make()))])
    }

    #[test]
    fn any_range_reads_as_a_slice_of_the_whole() {
        let (layout, whole, states) = states();
        for state in &states {
            for start in 0..=19u64 {
                for end in start..=19 {
                    let mut read = Vec::new();
                    let range = ByteRange::new(start, end);
                    read_range(&**state, &layout, range, |bytes| read.extend_from_slice(bytes));
                    assert_eq!(read, &whole[start as usize..end as usize]);
                    assert_eq!(digest_range(&**state, &layout, range), digest(&read));
                }
            }
        }
    }

    #[test]
    fn any_range_can_be_written_and_nothing_else_changes() {
        for pull in [false, true] {
            for start in 0..=19usize {
                for end in start..=19 {
                    let (layout, mut whole, mut states) = states();
                    let new: Vec<u8> = (start..end).map(|i| 100 + i as u8).collect();
                    whole[start..end].copy_from_slice(&new);
                    for state in &mut states {
                        let mut left = &new[..];
                        if pull {
                            write_range(
                                &mut **state,
                                &layout,
                                ByteRange::new(start as u64, end as u64),
                                |into| {
                                    let (head, tail) = left.split_at(into.len());
                                    into.copy_from_slice(head);
                                    left = tail;
                                },
                            );
                        } else {
                            write_at(&mut **state, &layout, start as u64, &new);
                        }
                        assert_eq!(digest_range(&**state, &layout, layout.all()), digest(&whole));
                    }
                }
            }
        }
    }

    #[test]
    fn ranges_that_follow_each_other_are_places_that_do_not_overlap() {
        let (layout, mut whole, [mut device, mut host]) = states();
        for first in 0..=19u64 {
            for second in first..=19 {
                let ranges = [ByteRange::new(0, first), ByteRange::new(second, 19)];
                assert_eq!(split_mut(&mut *device, &layout, &ranges), None, "nothing is in place there");
                let places = split_mut(&mut *host, &layout, &ranges).unwrap();
                for (range, places) in ranges.iter().zip(places) {
                    let mut new =
                        whole[range.start as usize..range.end as usize].iter().map(|byte| byte ^ 0x55);
                    places.into_iter().flatten().for_each(|byte| *byte = new.next().unwrap());
                    assert_eq!(new.next(), None, "each byte of {range} has a place");
                    whole[range.start as usize..range.end as usize].iter_mut().for_each(|byte| *byte ^= 0x55);
                }
                assert_eq!(digest_range(&*host, &layout, layout.all()), digest(&whole));
            }
        }
    }

    #[test]
    #[should_panic(expected = "ranges follow each other")]
    fn places_that_would_overlap_are_refused() {
        let (layout, _, [_, mut host]) = states();
        split_mut(&mut *host, &layout, &[ByteRange::new(0, 5), ByteRange::new(4, 19)]);
    }

    #[test]
    fn a_failing_sink_ends_the_reading() {
        let (layout, _, states) = states();
        let mut calls = 0;
        let result = try_read_range(&*states[0], &layout, layout.all(), |_| {
            calls += 1;
            Err("full")
        });
        assert_eq!((result, calls), (Err("full"), 1));
    }

    #[test]
    #[should_panic(expected = "bytes 4..20 are not within a state of 19 bytes")]
    fn a_range_beyond_the_state_is_refused() {
        let (layout, _, states) = states();
        read_range(&*states[0], &layout, ByteRange::new(4, 20), |_| {});
    }

    #[test]
    fn a_large_piece_is_read_in_blocks() {
        let piece = Piece { tensor: 0, offset: 5, len: 2 * BLOCK_BYTES + 1, at: 77 };
        let blocks: Vec<_> = blocks(&piece).collect();
        assert_eq!(blocks, [(5, BLOCK_BYTES), (5 + BLOCK_BYTES, BLOCK_BYTES), (5 + 2 * BLOCK_BYTES, 1)]);
    }
}
