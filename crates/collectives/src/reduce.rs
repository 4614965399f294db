//! How two numbers become one: the loops in which the rings spend their arithmetic.
//!
//! The left operand comes off the wire as bytes that are aligned to nothing. Reading it in arrays of a number's size
//! lets the compiler use unaligned vector loads, so there is no copy to align it first.
//!
//! The loops are compiled twice, for any processor and for those with AVX2, and which one runs is decided when the program
//! runs. Both do the same operations in the same order: not even a multiplication is fused with an addition, for there is
//! none. So processors of both kinds compute the same bits.

#![allow(unsafe_code, reason = "calls what is compiled for a processor that this one was found to be")]

use std::fmt;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How the inputs of all ranks become one result.
///
/// Sums of integers wrap around on overflow; those of floats become infinite. A mean is right where its sum would not fit:
/// `u8` and `i32` are averaged as `i64`, and `f16` as `f32`, which takes as many bytes on the wire. `f16` and `bf16` are
/// otherwise added as `f32` and rounded once per hop, and in shared memory or where there are few once in all. If any input is
/// NaN, so is the result, for [`Min`](ReduceOp::Min) and [`Max`](ReduceOp::Max) too; which NaN, may differ between processors
/// of different makes. The inputs are added in rank order in
/// shared memory and in an all-reduce of few elements (of which a rank sends at most 64 KiB), and else in ring order, which
/// depends on the element's place: the result is bit for bit the same on every rank, but not the same in the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum.
    Sum,
    /// The sum, divided by the number of ranks; integers are cut towards zero.
    Mean,
    /// The smallest.
    Min,
    /// The largest.
    Max,
}

impl ReduceOp {
    /// All of them.
    pub const ALL: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Min, ReduceOp::Max];

    pub(crate) fn code(self) -> u8 {
        match self {
            ReduceOp::Sum => 1,
            ReduceOp::Mean => 2,
            ReduceOp::Min => 3,
            ReduceOp::Max => 4,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<ReduceOp> {
        ReduceOp::ALL.into_iter().find(|op| op.code() == code)
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Mean => "mean",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
        })
    }
}

/// The loops of one type. Public only because [`Element`](crate::Element) rests on it: it is not exported.
pub trait Fold: Pod + Send + Sync {
    /// `output[i] = came[i] op own[i]`, where `came` is the numbers' bytes.
    fn fold(op: ReduceOp, came: &[u8], own: &[Self], output: &mut [Self]);

    /// `output[i] = inputs[0][i] op inputs[1][i] op …`, from left to right. There is at least one input.
    fn combine(op: ReduceOp, inputs: &[&[Self]], output: &mut [Self]);

    /// Divides each number by how many ranks there are: what makes a sum a mean.
    fn divide(numbers: &mut [Self], ranks: u32);
}

/// Does `work`, compiled for the widest vectors that this processor has.
#[inline(always)]
fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: it has just been detected.
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

/// How many bytes of a result are made from all inputs before the next ones: they stay in the first-level cache meanwhile.
const BLOCK_BYTES: usize = 4096;

/// `output[i] = inputs[0][i] op inputs[1][i] op …`.
#[inline(always)]
fn combine_with<T: Copy>(inputs: &[&[T]], output: &mut [T], combine: impl Fn(T, T) -> T) {
    let (first, others) = inputs.split_first().expect("there is something to combine");
    assert!(inputs.iter().all(|input| input.len() == output.len()));
    let Some((second, others)) = others.split_first() else { return output.copy_from_slice(first) };
    let block = BLOCK_BYTES / size_of::<T>();
    for start in (0..output.len()).step_by(block) {
        let end = output.len().min(start + block);
        let output = &mut output[start..end];
        for ((output, a), b) in output.iter_mut().zip(&first[start..end]).zip(&second[start..end]) {
            *output = combine(*a, *b);
        }
        for other in others {
            output.iter_mut().zip(&other[start..end]).for_each(|(a, b)| *a = combine(*a, *b));
        }
    }
}

/// `output[i] = combine(came[i], own[i])`.
#[inline(always)]
fn zip_with<T: Copy, const BYTES: usize>(
    came: &[u8],
    own: &[T],
    output: &mut [T],
    number: impl Fn([u8; BYTES]) -> T,
    combine: impl Fn(T, T) -> T,
) {
    let (came, rest) = came.as_chunks::<BYTES>();
    assert!(rest.is_empty() && came.len() == own.len() && own.len() == output.len());
    for ((output, came), own) in output.iter_mut().zip(came).zip(own) {
        *output = combine(number(*came), *own);
    }
}

macro_rules! fold_floats {
    ($($float:ty),+) => {
        $(impl Fold for $float {
            fn fold(op: ReduceOp, came: &[u8], own: &[Self], output: &mut [Self]) {
                let number = <$float>::from_le_bytes;
                vectorised(|| match op {
                    ReduceOp::Sum | ReduceOp::Mean => zip_with(came, own, output, number, |a, b| a + b),
                    ReduceOp::Min => zip_with(came, own, output, number, min),
                    ReduceOp::Max => zip_with(came, own, output, number, max),
                });
            }

            fn combine(op: ReduceOp, inputs: &[&[Self]], output: &mut [Self]) {
                vectorised(|| match op {
                    ReduceOp::Sum | ReduceOp::Mean => combine_with(inputs, output, |a, b| a + b),
                    ReduceOp::Min => combine_with(inputs, output, min),
                    ReduceOp::Max => combine_with(inputs, output, max),
                });
            }

            fn divide(numbers: &mut [Self], ranks: u32) {
                let ranks = ranks as $float;
                numbers.iter_mut().for_each(|number| *number /= ranks);
            }
        })+
    };
}

macro_rules! fold_integers {
    ($($integer:ty),+) => {
        $(impl Fold for $integer {
            fn fold(op: ReduceOp, came: &[u8], own: &[Self], output: &mut [Self]) {
                let number = <$integer>::from_le_bytes;
                vectorised(|| match op {
                    ReduceOp::Sum | ReduceOp::Mean => zip_with(came, own, output, number, <$integer>::wrapping_add),
                    ReduceOp::Min => zip_with(came, own, output, number, Ord::min),
                    ReduceOp::Max => zip_with(came, own, output, number, Ord::max),
                });
            }

            fn combine(op: ReduceOp, inputs: &[&[Self]], output: &mut [Self]) {
                vectorised(|| match op {
                    ReduceOp::Sum | ReduceOp::Mean => combine_with(inputs, output, <$integer>::wrapping_add),
                    ReduceOp::Min => combine_with(inputs, output, Ord::min),
                    ReduceOp::Max => combine_with(inputs, output, Ord::max),
                });
            }

            fn divide(numbers: &mut [Self], ranks: u32) {
                let ranks = i64::from(ranks);
                for number in numbers {
                    let quotient = i64::from(*number) / ranks;
                    *number = <$integer>::try_from(quotient).expect("it is no farther from zero than before");
                }
            }
        })+
    };
}

/// How many halves are widened at a time: few enough to stay in the first-level cache, in all three widths.
const HALVES: usize = 256;

/// `left[i] = left[i] op right[i]`.
fn fold_wide(op: ReduceOp, left: &mut [f32], right: &[f32]) {
    vectorised(|| {
        let pairs = left.iter_mut().zip(right);
        match op {
            ReduceOp::Sum | ReduceOp::Mean => pairs.for_each(|(a, b)| *a += *b),
            ReduceOp::Min => pairs.for_each(|(a, b)| *a = min(*a, *b)),
            ReduceOp::Max => pairs.for_each(|(a, b)| *a = max(*a, *b)),
        }
    });
}

macro_rules! fold_halves {
    ($($half:ty),+) => {
        $(impl Fold for $half {
            fn fold(op: ReduceOp, came: &[u8], own: &[Self], output: &mut [Self]) {
                assert!(came.len() == size_of::<$half>() * own.len() && own.len() == output.len());
                let mut aligned = [<$half>::ZERO; HALVES];
                let (mut left, mut right) = ([0f32; HALVES], [0f32; HALVES]);
                let blocks = came.chunks(HALVES * size_of::<$half>()).zip(own.chunks(HALVES));
                for ((came, own), output) in blocks.zip(output.chunks_mut(HALVES)) {
                    let (aligned, left) = (&mut aligned[..own.len()], &mut left[..own.len()]);
                    let right = &mut right[..own.len()];
                    bytemuck::cast_slice_mut(aligned).copy_from_slice(came);
                    aligned.convert_to_f32_slice(left);
                    own.convert_to_f32_slice(right);
                    fold_wide(op, left, right);
                    output.convert_from_f32_slice(left);
                }
            }

            fn combine(op: ReduceOp, inputs: &[&[Self]], output: &mut [Self]) {
                let (first, others) = inputs.split_first().expect("there is something to combine");
                assert!(inputs.iter().all(|input| input.len() == output.len()));
                let (mut sum, mut other_wide) = ([0f32; HALVES], [0f32; HALVES]);
                for (at, output) in output.chunks_mut(HALVES).enumerate() {
                    let place = at * HALVES..at * HALVES + output.len();
                    let (sum, other_wide) = (&mut sum[..output.len()], &mut other_wide[..output.len()]);
                    first[place.clone()].convert_to_f32_slice(sum);
                    for other in others {
                        other[place.clone()].convert_to_f32_slice(other_wide);
                        fold_wide(op, sum, other_wide);
                    }
                    output.convert_from_f32_slice(sum);
                }
            }

            fn divide(numbers: &mut [Self], ranks: u32) {
                let ranks = ranks as f32;
                let mut wide = [0f32; HALVES];
                for block in numbers.chunks_mut(HALVES) {
                    let wide = &mut wide[..block.len()];
                    block.convert_to_f32_slice(wide);
                    wide.iter_mut().for_each(|number| *number /= ranks);
                    block.convert_from_f32_slice(wide);
                }
            }
        })+
    };
}

fold_floats!(f32, f64);
fold_integers!(i32, i64, u8);
fold_halves!(f16, bf16);

/// The smaller of two floats, or NaN if either is: `f32::min` would drop the NaN. Written with selects only.
#[expect(
    clippy::eq_op,
    reason = "a number that differs from itself is a NaN; this form works for f32 and f64"
)]
#[inline(always)]
fn min<F: PartialOrd + Copy>(a: F, b: F) -> F {
    if a < b || a != a { a } else { b }
}

/// The larger of two floats, or NaN if either is.
#[expect(
    clippy::eq_op,
    reason = "a number that differs from itself is a NaN; this form works for f32 and f64"
)]
#[inline(always)]
fn max<F: PartialOrd + Copy>(a: F, b: F) -> F {
    if a > b || a != a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folds `came` into `own`, the bytes of `came` being at every alignment once.
    fn fold<T: Fold + PartialEq + fmt::Debug>(op: ReduceOp, came: &[T], own: &[T]) -> Vec<T> {
        let plain: &[u8] = bytemuck::cast_slice(came);
        let mut results = (0..8).map(|shift| {
            let mut shifted = vec![0u8; shift];
            shifted.extend_from_slice(plain);
            let mut output = vec![T::zeroed(); own.len()];
            T::fold(op, &shifted[shift..], own, &mut output);
            output
        });
        let first = results.next().unwrap();
        assert!(
            results
                .all(|other| bytemuck::cast_slice::<T, u8>(&other) == bytemuck::cast_slice::<T, u8>(&first))
        );
        first
    }

    #[test]
    fn integers_wrap_around_and_their_mean_is_cut_towards_zero() {
        assert_eq!(fold(ReduceOp::Sum, &[i32::MAX, -7], &[1, 3]), [i32::MIN, -4]);
        assert_eq!(fold(ReduceOp::Mean, &[200u8], &[100]), [44]);
        let mut numbers = [-7i64, 7, i64::MIN];
        Fold::divide(&mut numbers, 2);
        assert_eq!(numbers, [-3, 3, i64::MIN / 2]);
    }

    #[test]
    fn a_nan_on_either_side_wins_over_every_number() {
        fn check<T: Fold + PartialEq + fmt::Debug>(nan: T, one: T) {
            for op in ReduceOp::ALL {
                let results = fold(op, &[nan, one, nan, one], &[one, nan, nan, one]);
                for (at, result) in results.into_iter().enumerate() {
                    assert_eq!(result.ne(&result), at < 3, "{op}: {result:?} at {at}");
                }
            }
        }
        check(f32::NAN, 1.0);
        check(f64::NAN, 1.0);
        check(f16::NAN, f16::ONE);
        check(bf16::NAN, bf16::ONE);
    }

    #[test]
    fn halves_are_added_as_floats_and_rounded_once() {
        let own: Vec<f16> = (0..600).map(|i| f16::from_f32(i as f32 * 0.37 - 90.0)).collect();
        let came: Vec<f16> = (0..600).map(|i| f16::from_f32(i as f32 * -0.11 + 3.0)).collect();
        let want: Vec<f16> =
            came.iter().zip(&own).map(|(a, b)| f16::from_f32(a.to_f32() + b.to_f32())).collect();
        assert_eq!(fold(ReduceOp::Sum, &came, &own), want);
        assert_eq!(
            fold(ReduceOp::Max, &[bf16::from_f32(-2.0)], &[bf16::from_f32(-3.0)]),
            [bf16::from_f32(-2.0)]
        );
        let mut mean = [bf16::from_f32(3.0); 300];
        Fold::divide(&mut mean, 2);
        assert_eq!(mean, [bf16::from_f32(1.5); 300]);
    }

    #[test]
    fn many_are_combined_from_left_to_right() {
        fn check<T: Fold + PartialEq + fmt::Debug>(number: impl Fn(usize, usize) -> T) {
            for (len, count) in [(0, 2), (1, 1), (5, 3), (3000, 2), (3000, 5)] {
                let inputs: Vec<Vec<T>> =
                    (0..count).map(|i| (0..len).map(|at| number(i, at)).collect()).collect();
                let slices: Vec<&[T]> = inputs.iter().map(Vec::as_slice).collect();
                for op in ReduceOp::ALL {
                    let mut want = inputs[0].clone();
                    for input in &inputs[1..] {
                        let left = want.clone();
                        T::fold(op, bytemuck::cast_slice(&left), input, &mut want);
                    }
                    let mut output = vec![T::zeroed(); len];
                    T::combine(op, &slices, &mut output);
                    assert_eq!(output, want, "{op} of {count} times {len}");
                }
            }
        }
        check(|i, at| 1.0f32 / (1 + i * 7 + at) as f32);
        check(|i, at| 1.0f64 / (1 + i * 7 + at) as f64);
        check(|i, at| (i as i32 * 77 - at as i32) << 20);
        check(|i, at| (i as i64 * 77 - at as i64) << 50);
        check(|i, at| (i * 91 + at) as u8);
        // Few enough bits that no hop rounds.
        check(|i, at| f16::from_f32((i * 8 + at % 64) as f32));
        check(|i, at| bf16::from_f32((i * 4 + at % 16) as f32));
    }

    #[test]
    fn halves_of_many_ranks_are_rounded_once() {
        // 2048 + 1 is 2048 in sixteen bits, and stays so however often one is added.
        let inputs = [f16::from_f32(2048.0), f16::ONE, f16::ONE, f16::ONE, f16::ONE].map(|x| [x; 300]);
        let slices: Vec<&[f16]> = inputs.iter().map(|input| &input[..]).collect();
        let mut output = [f16::ZERO; 300];
        f16::combine(ReduceOp::Sum, &slices, &mut output);
        assert_eq!(output, [f16::from_f32(2052.0); 300]);
    }

    #[test]
    fn every_operation_has_its_own_code() {
        for op in ReduceOp::ALL {
            assert_eq!(ReduceOp::from_code(op.code()), Some(op));
        }
        assert_eq!(ReduceOp::from_code(0), None);
    }
}
