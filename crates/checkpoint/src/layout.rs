//! The logical byte space of a state: all its tensors laid end to end.
//!
//! Tensors with larger elements come first (those of one size in the program's order). With no hole between them,
//! every tensor then starts at a multiple of its element size, and every multiple of eight bytes is a boundary between
//! elements, whatever the tensors are. So any cut on a grid of eight cuts no element, and a file that holds a cut keeps
//! its tensors aligned for the tools that map it.

use reknit_membership::Digest;

use crate::digest::Digester;
use crate::dtype::TensorSpec;

/// The most tensors a state may have.
pub const TENSORS_MAX: usize = 65_536;
/// The longest name of a tensor, in bytes.
pub const NAME_BYTES_MAX: usize = 512;
/// The most dimensions of a tensor.
pub const DIMENSIONS_MAX: usize = 32;
/// The largest state, in bytes (4 TiB): each rank holds all of it in memory.
pub const STATE_BYTES_MAX: u64 = 1 << 42;
/// The largest chunk that has a digest of its own, in bytes.
pub const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// The smallest chunk that has a digest of its own, in bytes.
pub const CHUNK_BYTES_MIN: u64 = 64;

/// Bytes from `start` up to but without `end`, usually of the logical byte space of a [`Layout`].
/// Empty if `end` is not after `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

impl ByteRange {
    /// The bytes from `start` up to but without `end`.
    pub fn new(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    /// How many bytes.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The bytes that both ranges have.
    pub fn intersect(self, other: ByteRange) -> ByteRange {
        let start = self.start.max(other.start);
        ByteRange { start, end: self.end.min(other.end).max(start) }
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// A run of bytes within one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's index in [`Layout::specs`].
    pub tensor: usize,
    /// The first byte, counted from the tensor's start.
    pub offset: u64,
    /// How many bytes, at least one.
    pub len: u64,
    /// The first byte's place in the logical byte space.
    pub at: u64,
}

/// Where each tensor of a state lies in its logical byte space. Equal tensors give equal layouts, everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    specs: Vec<TensorSpec>,
    /// By tensor index.
    spans: Vec<ByteRange>,
    /// The tensors that have bytes, as they lie.
    order: Vec<usize>,
    total_bytes: u64,
    shape_digest: Digest,
}

/// Why tensors do not make a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// More tensors than [`TENSORS_MAX`].
    #[error("a state may have {TENSORS_MAX} tensors, this one has {count}")]
    TooManyTensors {
        /// How many.
        count: usize,
    },
    /// A name that cannot be kept.
    #[error("the tensor name {name:?} {why}")]
    BadName {
        /// The name, cut short if it is long.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two tensors of one name.
    #[error("two tensors are called {name:?}")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// More dimensions than [`DIMENSIONS_MAX`].
    #[error("the tensor {name:?} has {count} dimensions, {DIMENSIONS_MAX} are the limit")]
    TooManyDimensions {
        /// The tensor.
        name: String,
        /// How many.
        count: usize,
    },
    /// With this tensor the state is larger than [`STATE_BYTES_MAX`].
    #[error("with the tensor {name:?} the state is larger than {STATE_BYTES_MAX} bytes")]
    TooLarge {
        /// The tensor.
        name: String,
    },
}

impl Layout {
    /// The layout of the tensors `specs`, if they are within the limits.
    pub fn new(specs: Vec<TensorSpec>) -> Result<Layout, LayoutError> {
        let sizes = checked_sizes(&specs)?;
        let mut by_place: Vec<usize> = (0..specs.len()).collect();
        // The sort is stable: within an element size the program's order stays.
        by_place.sort_by_key(|tensor| std::cmp::Reverse(specs[*tensor].dtype.bytes()));
        let mut spans = vec![ByteRange::default(); specs.len()];
        let mut total_bytes = 0u64;
        for tensor in &by_place {
            let end = total_bytes.checked_add(sizes[*tensor]).filter(|end| *end <= STATE_BYTES_MAX);
            let end = end.ok_or_else(|| LayoutError::TooLarge { name: specs[*tensor].name.clone() })?;
            spans[*tensor] = ByteRange::new(total_bytes, end);
            total_bytes = end;
        }
        by_place.retain(|tensor| !spans[*tensor].is_empty());
        let shape_digest = shape_digest(&specs);
        Ok(Layout { specs, spans, order: by_place, total_bytes, shape_digest })
    }

    /// The tensors, in the program's order.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// The bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// All of the logical byte space.
    pub fn all(&self) -> ByteRange {
        ByteRange::new(0, self.total_bytes)
    }

    /// Where the tensor with this index lies.
    pub fn span(&self, tensor: usize) -> Option<ByteRange> {
        self.spans.get(tensor).copied()
    }

    /// Whether `range` lies within the layout, with its ends in order.
    pub fn holds(&self, range: ByteRange) -> bool {
        range.start <= range.end && range.end <= self.total_bytes
    }

    /// The pieces of tensors that `range` consists of, as they lie; none outside the layout.
    pub fn locate(&self, range: ByteRange) -> impl Iterator<Item = Piece> + '_ {
        let first = self.order.partition_point(|tensor| self.spans[*tensor].end <= range.start);
        self.order[first..].iter().map_while(move |tensor| {
            let span = self.spans[*tensor];
            let part = span.intersect(range);
            let piece =
                Piece { tensor: *tensor, offset: part.start - span.start, len: part.len(), at: part.start };
            (!part.is_empty()).then_some(piece)
        })
    }

    /// A digest over the tensors' names, types and shapes: two programs with the same one hold states of one form.
    pub fn shape_digest(&self) -> Digest {
        self.shape_digest
    }

    /// The size in bytes of the chunks that have digests of their own: a power of two that cuts the state into about
    /// a thousand chunks, within [`CHUNK_BYTES_MIN`] and [`CHUNK_BYTES_MAX`]. The last chunk may be shorter.
    ///
    /// Part of the format: a state's digest depends on it.
    pub fn chunk_bytes(&self) -> u64 {
        (self.total_bytes / 1024).next_power_of_two().clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    }

    /// The chunks that `range` touches, as they lie.
    pub fn chunks(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + '_ {
        let size = self.chunk_bytes();
        let range = range.intersect(self.all());
        let numbers = if range.is_empty() { 0..0 } else { range.start / size..range.end.div_ceil(size) };
        numbers.map(move |n| ByteRange::new(n * size, (n * size + size).min(self.total_bytes)))
    }
}

fn checked_sizes(specs: &[TensorSpec]) -> Result<Vec<u64>, LayoutError> {
    if specs.len() > TENSORS_MAX {
        return Err(LayoutError::TooManyTensors { count: specs.len() });
    }
    let mut names = std::collections::BTreeSet::new();
    let mut sizes = Vec::with_capacity(specs.len());
    for spec in specs {
        let TensorSpec { name, shape, .. } = spec;
        if let Some(why) = bad_name(name) {
            return Err(LayoutError::BadName { name: name.chars().take(64).collect(), why });
        }
        if !names.insert(name.as_str()) {
            return Err(LayoutError::DuplicateName { name: name.clone() });
        }
        if shape.len() > DIMENSIONS_MAX {
            return Err(LayoutError::TooManyDimensions { name: name.clone(), count: shape.len() });
        }
        sizes.push(spec.bytes().ok_or_else(|| LayoutError::TooLarge { name: name.clone() })?);
    }
    Ok(sizes)
}

fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > NAME_BYTES_MAX {
        Some("is longer than 512 bytes")
    } else if name.chars().any(char::is_control) {
        Some("holds a control character")
    } else if name == "__metadata__" {
        Some("is what safetensors files call their own notes")
    } else if looks_like_a_piece(name) {
        Some("looks like the name of a piece of a tensor")
    } else {
        None
    }
}

/// Whether `name` ends as [`piece_name`] ends: a tensor of that name could be taken for a piece of another.
fn looks_like_a_piece(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let range = name.strip_suffix(']').and_then(|rest| rest.rsplit_once('[')).map(|(_, range)| range);
    range.and_then(|range| range.split_once("..")).is_some_and(|(start, end)| digits(start) && digits(end))
}

/// What a shard file calls the elements `start..end` (counted row-major) of the tensor `name`.
pub(crate) fn piece_name(name: &str, start: u64, end: u64) -> String {
    format!("{name}[{start}..{end}]")
}

fn shape_digest(specs: &[TensorSpec]) -> Digest {
    let mut digester = Digester::new();
    let number = |digester: &mut Digester, number: usize| digester.update(&(number as u64).to_le_bytes());
    digester.update(b"reknit shape 1\n");
    number(&mut digester, specs.len());
    for spec in specs {
        number(&mut digester, spec.name.len());
        digester.update(spec.name.as_bytes());
        number(&mut digester, spec.dtype.name().len());
        digester.update(spec.dtype.name().as_bytes());
        number(&mut digester, spec.shape.len());
        spec.shape.iter().for_each(|dimension| digester.update(&dimension.to_le_bytes()));
    }
    digester.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> TensorSpec {
        TensorSpec::new(name, dtype, shape)
    }

    #[test]
    fn larger_elements_come_first_and_the_order_stays_otherwise() {
        let layout = Layout::new(vec![
            spec("a", Dtype::U8, &[3]),
            spec("b", Dtype::F32, &[2]),
            spec("c", Dtype::F64, &[]),
            spec("d", Dtype::F32, &[0, 7]),
            spec("e", Dtype::I32, &[1]),
        ])
        .unwrap();
        let spans: Vec<_> = (0..5).map(|tensor| layout.span(tensor).unwrap()).collect();
        let range = ByteRange::new;
        assert_eq!(spans, [range(20, 23), range(8, 16), range(0, 8), range(16, 16), range(16, 20)]);
        assert_eq!(layout.total_bytes(), 23);
        let pieces: Vec<_> = layout.locate(range(5, 21)).collect();
        let piece = |tensor, offset, len, at| Piece { tensor, offset, len, at };
        assert_eq!(pieces, [piece(2, 5, 3, 5), piece(1, 0, 8, 8), piece(4, 0, 4, 16), piece(0, 0, 1, 20)]);
    }

    #[test]
    fn k_6_every_multiple_of_eight_is_between_elements() {
        let mut specs = Vec::new();
        for (i, dtype) in Dtype::ALL.into_iter().rev().enumerate() {
            specs.push(spec(&format!("t{i}"), dtype, &[2 * i as u64 + 1]));
            specs.push(spec(&format!("s{i}"), dtype, &[]));
        }
        let layout = Layout::new(specs).unwrap();
        for at in (0..layout.total_bytes()).step_by(8) {
            let piece = layout.locate(ByteRange::new(at, at + 1)).next().unwrap();
            let element = layout.specs()[piece.tensor].dtype.bytes();
            assert_eq!(piece.offset % element, 0, "the cut at {at} goes through an element");
        }
    }

    #[test]
    fn chunks_cover_a_range_and_lie_on_the_grid() {
        let layout = Layout::new(vec![spec("t", Dtype::U8, &[1000])]).unwrap();
        assert_eq!(layout.chunk_bytes(), 64);
        let chunks = |start, end| layout.chunks(ByteRange::new(start, end)).collect::<Vec<_>>();
        assert_eq!(chunks(0, 64), [ByteRange::new(0, 64)]);
        assert_eq!(chunks(63, 65), [ByteRange::new(0, 64), ByteRange::new(64, 128)]);
        assert_eq!(chunks(990, 2000), [ByteRange::new(960, 1000)]);
        assert_eq!(chunks(10, 10), []);
        assert_eq!(chunks(1000, 1000), []);
        assert_eq!(chunks(0, 1000).len(), 16);
    }

    #[test]
    fn chunks_grow_with_the_state_up_to_a_limit() {
        let chunk = |bytes| Layout::new(vec![spec("t", Dtype::U8, &[bytes])]).unwrap().chunk_bytes();
        assert_eq!([0, 1, 1 << 16, 1 << 20].map(chunk), [64, 64, 64, 1024]);
        assert_eq!([1 << 30, 1 << 33, 1 << 42].map(chunk), [1 << 20, 4 << 20, 4 << 20]);
    }

    #[test]
    fn names_counts_and_sizes_have_limits() {
        let error = |specs: Vec<TensorSpec>| Layout::new(specs).unwrap_err();
        let named = |name: &str| error(vec![spec(name, Dtype::U8, &[])]);
        for name in ["", "a\nb", "__metadata__", "w[0..4]", &"x".repeat(513)] {
            assert!(matches!(named(name), LayoutError::BadName { .. }), "{name:?}");
        }
        for name in ["w[0..4].b", "w[0]", "w[..]", "w[a..b]", "m/µ", &"x".repeat(512)] {
            assert!(Layout::new(vec![spec(name, Dtype::U8, &[])]).is_ok(), "{name:?}");
        }
        let twice = vec![spec("a", Dtype::U8, &[]), spec("a", Dtype::F32, &[])];
        assert_eq!(error(twice), LayoutError::DuplicateName { name: "a".to_owned() });
        let half = 1 << 41;
        let large =
            vec![spec("a", Dtype::U8, &[half]), spec("b", Dtype::U8, &[half]), spec("c", Dtype::U8, &[1])];
        assert_eq!(error(large), LayoutError::TooLarge { name: "c".to_owned() });
        let huge = vec![spec("a", Dtype::U8, &[u64::MAX, u64::MAX])];
        assert_eq!(error(huge), LayoutError::TooLarge { name: "a".to_owned() });
        let deep = vec![spec("a", Dtype::U8, &[1; 33])];
        assert_eq!(error(deep), LayoutError::TooManyDimensions { name: "a".to_owned(), count: 33 });
        let many = vec![spec("a", Dtype::U8, &[]); TENSORS_MAX + 1];
        assert_eq!(error(many), LayoutError::TooManyTensors { count: TENSORS_MAX + 1 });
    }

    #[test]
    fn the_shape_digest_sees_names_types_shapes_and_order() {
        let of = |specs: &[TensorSpec]| Layout::new(specs.to_vec()).unwrap().shape_digest();
        let (a, b) = (spec("a", Dtype::F32, &[2, 3]), spec("b", Dtype::F32, &[1]));
        let base = of(&[a.clone(), b.clone()]);
        assert_eq!(base, of(&[a.clone(), b.clone()]));
        let others = [
            of(&[b.clone(), a.clone()]),
            of(&[spec("a", Dtype::F32, &[3, 2]), b.clone()]),
            of(&[spec("a", Dtype::I32, &[2, 3]), b.clone()]),
            of(&[spec("c", Dtype::F32, &[2, 3]), b]),
            of(&[a]),
        ];
        assert!(others.iter().all(|other| *other != base));
    }
}
