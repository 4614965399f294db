//! What the collectives compute, over real sockets, against sums done by hand.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Chance, World, each, index, seed};
use half::{bf16, f16};
use reknit_collectives::{ControlWord, Element, Group, GroupOptions, ReduceOp, part};
use reknit_membership::ids::{Rank, WorldSize};

const LENS: [usize; 9] = [0, 1, 2, 3, 7, 64, 1000, 1023, 40_000];

/// Chunks so small that 40,000 numbers are many of them.
fn small_chunks() -> GroupOptions {
    GroupOptions { chunk_bytes: 4096, ..GroupOptions::default() }
}

/// A rank's number at an index. Small whole numbers: their sum is exact in any order and type.
fn number(rank: usize, at: usize) -> f64 {
    ((at * 7 + rank * 3) % 5) as f64
}

fn numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| number(rank, at) as f32).collect()
}

fn sums(size: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| (0..size).map(|rank| number(rank, at)).sum::<f64>() as f32).collect()
}

fn own_flag(group: &Group) -> ControlWord {
    ControlWord(1 << group.rank().0)
}

fn all_flags(size: usize) -> ControlWord {
    ControlWord((1 << size) - 1)
}

#[test]
fn an_all_reduce_gives_every_rank_the_sum_and_the_union_of_the_words() {
    for size in 1..=8 {
        let (_, oks) = each(World::with(size, small_chunks()).form(), move |group| {
            for len in LENS {
                let mut data = numbers(index(group), len);
                let word = group.all_reduce(&mut data, ReduceOp::Sum, own_flag(group)).unwrap();
                assert_eq!(word, all_flags(size), "C-4: {len} numbers in a world of {size}");
                assert!(data == sums(size, len), "{len} numbers in a world of {size}");

                let input = numbers(index(group), len);
                let mut output = vec![f32::NAN; len];
                group.all_reduce_into(&input, &mut output, ReduceOp::Sum, ControlWord::NONE).unwrap();
                assert!(output == data && input == numbers(index(group), len), "{len} in a world of {size}");
            }
        });
        assert_eq!(oks.len(), size);
    }
}

#[test]
fn a_sum_without_the_word_is_the_same_sum() {
    for size in [2, 3, 4] {
        each(World::with(size, small_chunks()).form(), move |group| {
            for (round, len) in LENS.into_iter().filter(|len| *len >= size).enumerate() {
                group.carry_word(round % 2 == 1);
                let mut data = numbers(index(group), len);
                let word = group.all_reduce(&mut data, ReduceOp::Sum, own_flag(group)).unwrap();
                assert!(data == sums(size, len), "{len} numbers in a world of {size}");
                let expected = if round % 2 == 1 { all_flags(size) } else { own_flag(group) };
                assert_eq!(word, expected, "{len} numbers in a world of {size}");
            }
        });
    }
}

#[test]
fn many_times_the_chunks_and_the_kernels_buffers_get_around() {
    for size in [2, 3, 5] {
        let len = 3_000_001;
        let (_, right) = each(World::new(size).form(), move |group| {
            let mut data = numbers(index(group), len);
            group.all_reduce(&mut data, ReduceOp::Sum, ControlWord::NONE).unwrap();
            data == sums(size, len)
        });
        assert_eq!(right, vec![true; size]);
    }
}

#[test]
fn the_parts_and_their_gathering_are_the_two_halves_of_an_all_reduce() {
    for size in 1..=8 {
        each(World::with(size, small_chunks()).form(), move |group| {
            for len in LENS {
                let own = part(len, WorldSize(size as u32), group.rank());
                let input = numbers(index(group), len);
                let mut reduced = vec![f32::NAN; own.len()];
                let word =
                    group.reduce_scatter(&input, &mut reduced, ReduceOp::Sum, own_flag(group)).unwrap();
                assert_eq!(word, all_flags(size));
                assert!(reduced == sums(size, len)[own], "reduce_scatter of {len} in a world of {size}");
                assert!(input == numbers(index(group), len));

                let mut gathered = vec![f32::NAN; len];
                let word = group.all_gather(&reduced, &mut gathered, own_flag(group)).unwrap();
                assert_eq!(word, all_flags(size));
                assert!(gathered == sums(size, len), "all_gather of {len} in a world of {size}");
            }
        });
    }
}

#[test]
fn a_broadcast_gives_every_rank_the_roots_numbers() {
    for size in 1..=8 {
        each(World::with(size, small_chunks()).form(), move |group| {
            for len in LENS {
                for root in 0..size {
                    let mut data = numbers(index(group), len);
                    let word = group.broadcast(&mut data, Rank(root as u32), own_flag(group)).unwrap();
                    assert_eq!(word, all_flags(size));
                    assert!(data == numbers(root, len), "broadcast of {len} from {root} of {size}");
                }
            }
        });
    }
}

#[test]
fn nobody_leaves_a_barrier_before_everybody_has_entered_it() {
    for size in 1..=8 {
        let entered = Arc::new(AtomicUsize::new(0));
        let seen = entered.clone();
        each(World::new(size).form(), move |group| {
            for round in 1..=200 {
                seen.fetch_add(1, Ordering::SeqCst);
                let word = group.barrier(own_flag(group)).unwrap();
                assert_eq!(word, all_flags(size));
                assert!(
                    seen.load(Ordering::SeqCst) >= round * size,
                    "C-4: round {round} in a world of {size}"
                );
            }
        });
        assert_eq!(entered.load(Ordering::SeqCst), 200 * size);
    }
}

/// One type's numbers, from and to `f64`.
trait Number: Element + PartialEq + std::fmt::Debug {
    fn from(number: f64) -> Self;
    fn to(self) -> f64;
}

macro_rules! number {
    ($($number:ty),+) => {
        $(impl Number for $number {
            fn from(number: f64) -> Self { number as $number }
            fn to(self) -> f64 { self as f64 }
        })+
    };
    (half $($number:ty),+) => {
        $(impl Number for $number {
            fn from(number: f64) -> Self { <$number>::from_f64(number) }
            fn to(self) -> f64 { self.to_f64() }
        })+
    };
}

number!(f32, f64, i32, i64, u8);
number!(half f16, bf16);

fn check_type<T: Number>(groups: Vec<Group>) -> Vec<Group> {
    let size = groups.len();
    let whole = T::from(0.5) == T::from(0.0);
    let (groups, _) = each(groups, move |group| {
        for op in ReduceOp::ALL {
            for len in [0, 1, 5, 777, 3000] {
                let input: Vec<T> = (0..len).map(|at| T::from(number(index(group), at))).collect();
                let mut output = vec![T::from(99.0); len];
                group.all_reduce_into(&input, &mut output, op, ControlWord::NONE).unwrap();
                for (at, result) in output.into_iter().enumerate() {
                    let all = (0..size).map(|rank| number(rank, at));
                    let want = match op {
                        ReduceOp::Sum => all.sum(),
                        ReduceOp::Mean if whole => (all.sum::<f64>() / size as f64).trunc(),
                        ReduceOp::Mean => T::from(all.sum::<f64>() / size as f64).to(),
                        ReduceOp::Min => all.fold(f64::INFINITY, f64::min),
                        ReduceOp::Max => all.fold(f64::NEG_INFINITY, f64::max),
                    };
                    assert_eq!(
                        result.to(),
                        want,
                        "{op} of {} at {at} of {len} in a world of {size}",
                        T::DTYPE
                    );
                }
            }
        }
    });
    groups
}

#[test]
fn every_operation_works_on_every_type() {
    for size in [1, 2, 3, 6] {
        let mut groups = World::with(size, small_chunks()).form();
        groups = check_type::<f32>(groups);
        groups = check_type::<f64>(groups);
        groups = check_type::<f16>(groups);
        groups = check_type::<bf16>(groups);
        groups = check_type::<i32>(groups);
        groups = check_type::<i64>(groups);
        check_type::<u8>(groups);
    }
}

/// Numbers whose sum depends on the order: any bits but those of a NaN.
fn wild(seed: u64, rank: usize, len: usize) -> Vec<f32> {
    let mut chance = Chance(seed ^ (rank as u64) << 32);
    (0..len).map(|_| f32::from_bits(chance.next() as u32)).map(|x| if x.is_nan() { 1.5 } else { x }).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
fn every_rank_gets_the_same_bits_where_the_order_of_adding_matters() {
    let seed = seed("every_rank_gets_the_same_bits");
    for size in 2..=8 {
        for op in ReduceOp::ALL {
            let (_, results) = each(World::new(size).form(), move |group| {
                let mut data = wild(seed, index(group), 10_007);
                group.all_reduce(&mut data, op, ControlWord::NONE).unwrap();
                bits(&data)
            });
            assert!(
                results.windows(2).all(|pair| pair[0] == pair[1]),
                "C-3: {op} in a world of {size}, seed {seed}"
            );
        }
    }
}

#[test]
fn collectives_of_all_kinds_follow_each_other_without_a_pause() {
    let seed = seed("collectives_of_all_kinds");
    for size in [2, 3, 4] {
        each(World::with(size, small_chunks()).form(), move |group| {
            // All ranks draw the same numbers.
            let mut chance = Chance(seed);
            for _ in 0..300 {
                let len = chance.below(3000) as usize;
                match chance.below(4) {
                    0 => {
                        let mut data = numbers(index(group), len);
                        group.all_reduce(&mut data, ReduceOp::Sum, ControlWord::NONE).unwrap();
                        assert!(data == sums(size, len));
                    }
                    1 => {
                        let mut data = vec![index(group) as i64; len];
                        group.all_reduce(&mut data, ReduceOp::Max, ControlWord::NONE).unwrap();
                        assert!(data == vec![size as i64 - 1; len]);
                    }
                    2 => {
                        let root = chance.below(size as u64) as u32;
                        let mut data = vec![group.rank().0 as u8; len];
                        group.broadcast(&mut data, Rank(root), ControlWord::NONE).unwrap();
                        assert!(data == vec![root as u8; len]);
                    }
                    _ => {
                        let flags = ControlWord(chance.next() as u32);
                        let own = if index(group) == 0 { flags } else { ControlWord::NONE };
                        assert_eq!(group.barrier(own).unwrap(), flags);
                    }
                }
            }
        });
    }
}
