//! One pass over a state: its digests, and a copy of the part that this rank will write.

use reknit_membership::Digest;

use crate::digest::{Digester, fold_state};
use crate::layout::{ByteRange, Layout};
use crate::state::State;
use crate::stream::in_place;
use crate::to_usize;
use crate::values::{Values, ValuesError, values_digest};

/// How much is copied before it is digested, in bytes: small enough to be still in the core's own cache.
const COPY_BYTES: usize = 256 << 10;

/// The digests of a state: of each chunk of its tensors (see [`Layout::chunk_bytes`]), and of all of it.
///
/// Equal states have equal fingerprints on every machine; where two differ, the chunks tell where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    chunks: Vec<Digest>,
    state: Digest,
}

impl Fingerprint {
    /// The fingerprint of all that `state` holds.
    ///
    /// # Errors
    /// If its values are over the limits.
    ///
    /// # Panics
    /// If the state is not of this layout.
    pub fn of(state: &dyn State, layout: &Layout) -> Result<Fingerprint, ValuesError> {
        let (fingerprint, _) = scan(state, layout, ByteRange::default(), &mut [])?;
        Ok(fingerprint)
    }

    /// The fingerprint of a state whose chunks have these digests.
    pub(crate) fn from_parts(
        layout: &Layout,
        chunks: Vec<Digest>,
        values: &Values,
    ) -> Result<Fingerprint, ValuesError> {
        let values = values_digest(values)?;
        let state = fold_state(layout.shape_digest(), layout.chunk_bytes(), &chunks, values);
        Ok(Fingerprint { chunks, state })
    }

    /// The digest of each chunk, as they lie.
    pub fn chunks(&self) -> &[Digest] {
        &self.chunks
    }

    /// The digest of the whole state: tensors (names, types, shapes and bytes) and values.
    pub fn state(&self) -> Digest {
        self.state
    }
}

/// The digest of all that `state` holds, as [`Fingerprint::state`].
///
/// # Errors
/// If its values are over the limits.
///
/// # Panics
/// If the state is not of this layout.
pub fn state_digest(state: &dyn State, layout: &Layout) -> Result<Digest, ValuesError> {
    Ok(Fingerprint::of(state, layout)?.state())
}

/// Digests the whole state and copies the bytes `own`, which lie on the grid of chunks, into `copy`, which has just
/// their length. What is copied is digested from the copy, so that a copy gone wrong shows as a state unlike the
/// other ranks'.
pub(crate) fn scan(
    state: &dyn State,
    layout: &Layout,
    own: ByteRange,
    copy: &mut [u8],
) -> Result<(Fingerprint, Values), ValuesError> {
    assert!(own.len() == copy.len() as u64, "the copy has the length of the rank's own part");
    let values = state.values();
    let mut chunks = Vec::with_capacity(to_usize(layout.total_bytes() / layout.chunk_bytes() + 1));
    let mut scratch = Vec::new();
    for chunk in layout.chunks(layout.all()) {
        let mut digester = Digester::new();
        let is_own = !chunk.intersect(own).is_empty();
        for piece in layout.locate(chunk) {
            let len = to_usize(piece.len);
            let place = if is_own { Some(&mut copy[to_usize(piece.at - own.start)..][..len]) } else { None };
            match (in_place(state, layout, &piece), place) {
                (Some(bytes), Some(place)) => {
                    for (from, to) in bytes.chunks(COPY_BYTES).zip(place.chunks_mut(COPY_BYTES)) {
                        to.copy_from_slice(from);
                        digester.update(to);
                    }
                }
                (Some(bytes), None) => digester.update(bytes),
                (None, Some(place)) => {
                    state.read(piece.tensor, piece.offset, place);
                    digester.update(place);
                }
                (None, None) => {
                    scratch.resize(len.max(scratch.len()), 0);
                    state.read(piece.tensor, piece.offset, &mut scratch[..len]);
                    digester.update(&scratch[..len]);
                }
            }
        }
        chunks.push(digester.finish());
    }
    let fingerprint = Fingerprint::from_parts(layout, chunks, &values)?;
    Ok((fingerprint, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::read_range;
    use crate::tensors::NamedTensors;
    use serde_json::json;

    fn state() -> (NamedTensors, Layout) {
        let mut state = NamedTensors::new()
            .with_u8("a", [130], (0..130).collect())
            .with_f32("b", [21], (0..21u8).map(f32::from).collect())
            .with_f64("c", [], vec![0.5]);
        state.set_value("step", 7);
        let layout = Layout::new(state.tensors()).unwrap();
        (state, layout)
    }

    #[test]
    fn k_13_any_changed_bit_or_value_changes_the_digest() {
        let (mut state, layout) = state();
        let before = Fingerprint::of(&state, &layout).unwrap();
        for name in ["a", "b", "c"] {
            for bit in 0..state.raw(name).len() * 8 {
                state.raw_mut(name)[bit / 8] ^= 1 << (bit % 8);
                let after = Fingerprint::of(&state, &layout).unwrap();
                assert_ne!(after.state(), before.state());
                let differ = before.chunks().iter().zip(after.chunks()).filter(|(x, y)| x != y).count();
                assert_eq!(differ, 1, "one bit lies in one chunk");
                state.raw_mut(name)[bit / 8] ^= 1 << (bit % 8);
            }
        }
        assert_eq!(Fingerprint::of(&state, &layout).unwrap(), before);
        state.set_value("step", 8);
        let after = Fingerprint::of(&state, &layout).unwrap();
        assert_eq!(after.chunks(), before.chunks());
        assert_ne!(after.state(), before.state());
        state.set_value("step", json!(7));
        assert_eq!(Fingerprint::of(&state, &layout).unwrap(), before);
    }

    #[test]
    fn k_13_the_digest_stays_what_it_was() {
        // The format promises it: a checkpoint of today is verified by the library of tomorrow.
        let (state, layout) = state();
        assert_eq!(state_digest(&state, &layout).unwrap().to_string(), "4ef57b9ba4262e4aa91b7eed96f70948");
    }

    #[test]
    fn the_copy_is_the_part_and_the_digest_does_not_depend_on_it() {
        let (state, layout) = state();
        let whole = Fingerprint::of(&state, &layout).unwrap();
        for own in [ByteRange::new(0, 64), ByteRange::new(64, 222), ByteRange::new(128, 192), layout.all()] {
            let mut copy = vec![0xee; own.len() as usize];
            let (fingerprint, values) = scan(&state, &layout, own, &mut copy).unwrap();
            assert_eq!((fingerprint, values), (whole.clone(), state.values()));
            let mut expected = Vec::new();
            read_range(&state, &layout, own, |bytes| expected.extend_from_slice(bytes));
            assert_eq!(copy, expected);
        }
    }

    #[test]
    fn an_empty_state_has_a_digest() {
        let state = NamedTensors::new();
        let layout = Layout::new(state.tensors()).unwrap();
        let fingerprint = Fingerprint::of(&state, &layout).unwrap();
        assert_eq!(fingerprint.chunks(), []);
        let empty = NamedTensors::new().with_f32("t", [0], vec![]);
        let other = Layout::new(empty.tensors()).unwrap();
        assert_ne!(state_digest(&empty, &other).unwrap(), fingerprint.state());
    }
}
