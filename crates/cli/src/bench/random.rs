//! Chance that a seed repeats.

/// splitmix64 (Steele, Lea, Flood, 2014).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// A number below `bound`, which is not zero. Slightly uneven for huge bounds, which nothing here has.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// One of these, if there are any.
    pub(super) fn one_of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() {
            return None;
        }
        all.get(self.below(all.len() as u64) as usize).copied()
    }

    /// Bytes that no machine can guess or shrink.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        let mut eights = bytes.chunks_exact_mut(8);
        for eight in &mut eights {
            eight.copy_from_slice(&self.next().to_le_bytes());
        }
        let rest = eights.into_remainder();
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_another_one_differs() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            [random.next(), random.below(10), random.one_of(&[1u64, 2, 3]).unwrap()]
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1)[0], draw(2)[0]);
        assert_eq!(Random::new(1).one_of::<u8>(&[]), None);
        let mut bytes = [0; 11];
        Random::new(3).fill(&mut bytes);
        assert_ne!(bytes[8..], [0; 3]);
    }
}
