//! Digests of bytes: 128-bit XXH3, at the speed of memory.
//!
//! The digest of something large is folded from the digests of its parts, so that a part can be checked alone and
//! nothing has to be read twice.

use reknit_membership::Digest;
use twox_hash::xxhash3_128::Hasher;

/// Digests a stream of bytes; how the stream is cut into calls makes no difference.
pub struct Digester(Hasher);

impl Digester {
    /// A digester that has seen nothing yet.
    pub fn new() -> Digester {
        Digester(Hasher::new())
    }

    /// Adds `bytes` to what was seen.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// The digest of all that was seen so far.
    pub fn finish(&self) -> Digest {
        Digest(self.0.finish_128())
    }

    fn number(&mut self, number: u64) {
        self.update(&number.to_le_bytes());
    }

    fn part(&mut self, part: Digest) {
        self.update(&part.0.to_le_bytes());
    }
}

impl Default for Digester {
    fn default() -> Digester {
        Digester::new()
    }
}

impl std::fmt::Debug for Digester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digester({:?})", self.finish())
    }
}

/// The digest of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    Digest(Hasher::oneshot(bytes))
}

/// The digest of a whole state, out of what it is made of. The first bytes name the recipe: another recipe must never
/// give the same digest by chance of layout.
pub(crate) fn fold_state(shape: Digest, chunk_bytes: u64, chunks: &[Digest], values: Digest) -> Digest {
    let mut digester = Digester::new();
    digester.update(b"reknit state 1\n");
    digester.part(shape);
    digester.number(chunk_bytes);
    digester.number(chunks.len() as u64);
    chunks.iter().for_each(|chunk| digester.part(*chunk));
    digester.part(values);
    digester.finish()
}

/// The digest of a whole shard file: its header's, and those of its data's chunks. It covers every byte of the file,
/// so a reader of one chunk can check the header and that chunk without reading the rest.
pub(crate) fn fold_file(header: Digest, chunks: &[Digest]) -> Digest {
    let mut digester = Digester::new();
    digester.update(b"reknit file 1\n");
    digester.part(header);
    digester.number(chunks.len() as u64);
    chunks.iter().for_each(|chunk| digester.part(*chunk));
    digester.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_plain_xxh3_128() {
        // Known answers, from another implementation: nothing, and 200 bytes counted up.
        assert_eq!(digest(b"").to_string(), "99aa06d3014798d86001c324468d497f");
        let counted: Vec<u8> = (0..200).collect();
        assert_eq!(digest(&counted).to_string(), "cb0395310643ba0edd97e9af3609d9f5");
    }

    #[test]
    fn cutting_the_stream_makes_no_difference() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i * 7 % 251) as u8).collect();
        for cut in [0, 1, 3, 239, 240, 241, 255, 256, 1024, 4999, 5000] {
            let mut digester = Digester::new();
            digester.update(&bytes[..cut]);
            digester.update(&bytes[cut..]);
            assert_eq!(digester.finish(), digest(&bytes), "cut at {cut}");
        }
    }

    #[test]
    fn a_fold_tells_its_parts_and_their_order_apart() {
        let (a, b) = (digest(b"a"), digest(b"b"));
        let all = [
            fold_file(a, &[]),
            fold_file(a, &[b]),
            fold_file(b, &[a]),
            fold_file(a, &[b, b]),
            fold_state(a, 64, &[], b),
            fold_state(b, 64, &[], a),
            fold_state(a, 64, &[a], b),
            fold_state(a, 128, &[a], b),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one), "fold {i} is not unique");
        }
    }
}
