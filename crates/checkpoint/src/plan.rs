//! Who writes, sends and reads which bytes: pure arithmetic.

use crate::layout::{ByteRange, Layout};
use crate::manifest::Manifest;

/// Which bytes of the state each of `n` ranks writes: all of them in order, each byte once, cut where chunks meet, no
/// rank more than one chunk above another. With fewer chunks than ranks some ranks write nothing.
///
/// Empty if `n` is zero.
pub fn shards(layout: &Layout, n: u32) -> Vec<ByteRange> {
    stripes(layout.all(), n as usize, layout.chunk_bytes())
}

/// Which bytes of `range` each of `holders` members sends to somebody who needs all of it: all in order, each byte
/// once, cut at multiples of `grain` bytes, no holder more than one grain above another.
///
/// A grain that is a multiple of eight cuts no element. Empty if there are no holders; a `grain` of zero counts as one.
pub fn stripes(range: ByteRange, holders: usize, grain: u64) -> Vec<ByteRange> {
    let grain = u128::from(grain.max(1));
    let range = ByteRange::new(range.start, range.end.max(range.start));
    let (first, last) = (u128::from(range.start) / grain, u128::from(range.end).div_ceil(grain));
    let cut = |k: usize| {
        // The k-th of `holders` cuts of the grid's cells, pulled into the range at its ends.
        let cell = first + (last - first) * k as u128 / holders as u128;
        let at = (cell * grain).clamp(u128::from(range.start), u128::from(range.end));
        u64::try_from(at).expect("a cut lies within a range of 64-bit offsets")
    };
    (0..holders).map(|k| ByteRange::new(cut(k), cut(k + 1))).collect()
}

/// One run of bytes to read from a shard's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRead {
    /// The shard's index in [`Manifest::shards`].
    pub shard: usize,
    /// Where in its file the bytes start.
    pub file_offset: u64,
    /// How many bytes, at least one.
    pub len: u64,
    /// Where in the state's logical byte space they belong.
    pub at: u64,
}

/// Where in the checkpoint's files the bytes `range` of the state are: in order, each byte once, whoever wrote them.
pub fn reads(manifest: &Manifest, range: ByteRange) -> Vec<FileRead> {
    let shards = manifest.shards().iter().enumerate();
    let read = |(shard, entry): (usize, &crate::manifest::ShardEntry)| {
        let part = entry.range.intersect(range);
        let file_offset = entry.data_at() + part.start.saturating_sub(entry.range.start);
        let read = FileRead { shard, file_offset, len: part.len(), at: part.start };
        (!part.is_empty()).then_some(read)
    };
    shards.filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{Dtype, TensorSpec};

    fn check_stripes(range: ByteRange, n: usize, grain: u64) {
        let stripes = stripes(range, n, grain);
        let context = format!("{range} for {n} by {grain}: {stripes:?}");
        assert_eq!(stripes.len(), n, "{context}");
        assert_eq!((stripes[0].start, stripes[n - 1].end), (range.start, range.end), "{context}");
        for pair in stripes.windows(2) {
            assert_eq!(pair[0].end, pair[1].start, "{context}");
            let cut = pair[0].end;
            assert!(cut % grain == 0 || cut == range.start || cut == range.end, "{context}");
        }
        let (least, most) =
            (stripes.iter().map(|s| s.len()).min().unwrap(), stripes.iter().map(|s| s.len()).max().unwrap());
        // The first and the last cell of the grid may be cut short by the range's own ends.
        let slack = if range.start.is_multiple_of(grain) { 1 } else { 2 };
        assert!(most - least <= grain.saturating_mul(slack) || n == 1, "{context}");
    }

    #[test]
    fn k_6_stripes_cover_a_range_once_and_evenly() {
        for start in 0..20 {
            for end in start..60 {
                for n in 1..=9 {
                    for grain in [1, 2, 8, 16, 64] {
                        check_stripes(ByteRange::new(start, end), n, grain);
                    }
                }
            }
        }
        check_stripes(ByteRange::new(0, u64::MAX), 65_536, 4096);
        check_stripes(ByteRange::new(u64::MAX - 1, u64::MAX), 3, u64::MAX);
    }

    #[test]
    fn no_holders_no_stripes() {
        assert_eq!(stripes(ByteRange::new(0, 10), 0, 8), []);
        assert_eq!(stripes(ByteRange::new(7, 3), 2, 0), [ByteRange::new(7, 7); 2]);
    }

    #[test]
    fn k_6_shards_cut_no_element_and_differ_by_a_chunk_at_most() {
        for bytes in [0u64, 1, 3, 63, 64, 65, 1000, 4097, 100_000] {
            let specs = vec![
                TensorSpec::new("a", Dtype::F64, [bytes / 16]),
                TensorSpec::new("b", Dtype::U8, [bytes % 97]),
            ];
            let layout = Layout::new(specs).unwrap();
            for n in 1..=70u32 {
                let shards = shards(&layout, n);
                assert_eq!(shards.len(), n as usize);
                assert_eq!(shards.iter().map(|s| s.len()).sum::<u64>(), layout.total_bytes());
                let most = shards.iter().map(|s| s.len()).max().unwrap();
                let least = shards.iter().map(|s| s.len()).min().unwrap();
                assert!(most - least <= layout.chunk_bytes());
                for shard in shards.iter().filter(|shard| !shard.is_empty()) {
                    let first = layout.locate(*shard).next().unwrap();
                    assert_eq!(first.offset % layout.specs()[first.tensor].dtype.bytes(), 0);
                }
            }
        }
    }
}
