//! What the collectives compute, over real sockets, against sums done by hand.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use common::{BOUND, Chance, WAYS, World, each, index, seed};
use half::{bf16, f16};
use reknit_collectives::{ControlWord, Element, Group, GroupOptions, ReduceOp, SharedMemory, part};
use reknit_membership::ids::{Rank, WorldSize};

const LENS: [usize; 9] = [0, 1, 2, 3, 7, 64, 1000, 1023, 40_000];

/// Chunks so small that 40,000 numbers are many of them.
fn small_chunks(shared_memory: SharedMemory) -> GroupOptions {
    GroupOptions { chunk_bytes: 4096, shared_memory, ..GroupOptions::default() }
}

/// Worlds of these sizes, joined in every way.
fn worlds(sizes: impl IntoIterator<Item = usize>) -> impl Iterator<Item = (usize, World)> {
    let both = |size| WAYS.map(|way| (size, World::with(size, small_chunks(way))));
    sizes.into_iter().flat_map(both)
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
    for (size, mut world) in worlds(1..=8) {
        let (_, oks) = each(world.form(), move |group| {
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
        each(World::with(size, small_chunks(SharedMemory::Unasked)).form(), move |group| {
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
    for (size, way) in [2, 3, 5].into_iter().flat_map(|size| WAYS.map(|way| (size, way))) {
        let len = 3_000_001;
        let options = GroupOptions { shared_memory: way, ..GroupOptions::default() };
        let (_, right) = each(World::with(size, options).form(), move |group| {
            let mut data = numbers(index(group), len);
            group.all_reduce(&mut data, ReduceOp::Sum, ControlWord::NONE).unwrap();
            data == sums(size, len)
        });
        assert_eq!(right, vec![true; size]);
    }
}

#[test]
fn the_parts_and_their_gathering_are_the_two_halves_of_an_all_reduce() {
    for (size, mut world) in worlds(1..=8) {
        each(world.form(), move |group| {
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
    for (size, mut world) in worlds(1..=8) {
        each(world.form(), move |group| {
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
    for (size, mut world) in worlds(1..=8) {
        let entered = Arc::new(AtomicUsize::new(0));
        let seen = entered.clone();
        each(world.form(), move |group| {
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
    /// Two numbers that a mean of must not overflow, however many ranks bring them.
    const EXTREMES: [Self; 2];
    /// The multiples of this are in the type, negative ones too if it has any.
    const GRAIN: f64;
    fn from(number: f64) -> Self;
    fn to(self) -> f64;
}

macro_rules! number {
    ($($number:ty: $grain:expr, $extremes:expr, $from:expr, $to:expr;)+) => {
        $(impl Number for $number {
            const EXTREMES: [Self; 2] = $extremes;
            const GRAIN: f64 = $grain;
            fn from(number: f64) -> Self {
                let from: fn(f64) -> Self = $from;
                from(number)
            }
            fn to(self) -> f64 {
                let to: fn(Self) -> f64 = $to;
                to(self)
            }
        })+
    };
}

// The floats of 32 and 64 bits, and bf16 with its exponent of 32 bits, overflow only where no gradient is.
number! {
    f32: 0.25, [1e30, -1e30], |x| x as f32, |x| x.into();
    f64: 0.25, [1e300, -1e300], |x| x, |x| x;
    bf16: 0.25, [bf16::from_bits(0x7000), bf16::from_bits(0xf000)], bf16::from_f64, bf16::to_f64;
    f16: 0.25, [f16::MAX, f16::MIN], f16::from_f64, f16::to_f64;
    i32: 1.0, [i32::MAX, i32::MIN], |x| x as i32, |x| x.into();
    // A sum of these fits an i64, and a float has no more bits.
    i64: 1.0, [1 << 52, -(1 << 52)], |x| x as i64, |x| x as f64;
    u8: 1.0, [u8::MAX, u8::MIN], |x| x as i64 as u8, |x| x.into();
}

/// A rank's number at an index: small, so that sums of eight of them are exact in every type. A `u8` that is sent a
/// negative one takes it as a large one, which makes its sums wrap around.
fn own<T: Number>(rank: usize, at: usize) -> T {
    T::from(((at * 7 + rank * 11) % 17) as f64 * T::GRAIN - 8.0 * T::GRAIN)
}

/// The result as it is by the book.
fn wanted<T: Number>(op: ReduceOp, all: impl Iterator<Item = f64> + Clone, size: usize) -> f64 {
    let sum: f64 = all.clone().sum();
    match op {
        ReduceOp::Sum => T::from(sum).to(),
        // Cut towards zero where there are no fractions.
        ReduceOp::Mean if T::GRAIN == 1.0 => (sum / size as f64).trunc(),
        ReduceOp::Mean => T::from(sum / size as f64).to(),
        ReduceOp::Min => all.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => all.fold(f64::NEG_INFINITY, f64::max),
    }
}

fn check_reductions<T: Number>(group: &mut Group, op: ReduceOp, len: usize) {
    let (rank, size) = (index(group), group.size().0 as usize);
    let context = format!("{op} of {len} {} in a world of {size}", T::DTYPE);
    let input: Vec<T> = (0..len).map(|at| own(rank, at)).collect();
    let want = |at: usize| wanted::<T>(op, (0..size).map(|rank| own::<T>(rank, at).to()), size);
    let want: Vec<f64> = (0..len).map(want).collect();

    let mut output = vec![T::from(3.0); len];
    group.all_reduce_into(&input, &mut output, op, ControlWord::NONE).unwrap();
    assert!(output.iter().map(|x| x.to()).eq(want.iter().copied()), "{context}: {output:?}");
    let mut in_place = input.clone();
    group.all_reduce(&mut in_place, op, ControlWord::NONE).unwrap();
    assert_eq!(in_place, output, "{context}");

    let mut buffer = group.buffer::<T>(len).unwrap();
    assert!(buffer.iter().all(|x| x.to() == 0.0) && buffer.result().is_empty(), "{context}");
    buffer.copy_from_slice(&input);
    group.all_reduce_buffer(&mut buffer, op, ControlWord::NONE).unwrap();
    assert_eq!((buffer.result(), &buffer[..]), (&output[..], &input[..]), "{context}");
    buffer.set_len(len / 2);
    assert!(buffer.result().is_empty() && buffer.room() == len, "{context}");
    group.all_reduce_buffer(&mut buffer, op, ControlWord::NONE).unwrap();
    assert_eq!((buffer.result(), &buffer[..]), (&output[..len / 2], &input[..len / 2]), "{context}");
    buffer.set_len(len);
    assert_eq!(buffer[..], input[..], "{context}");

    let own_part = part(len, group.size(), group.rank());
    let mut scattered = vec![T::from(3.0); own_part.len()];
    group.reduce_scatter(&input, &mut scattered, op, ControlWord::NONE).unwrap();
    assert_eq!(scattered, output[own_part.clone()], "{context}");
    let mut gathered = vec![T::from(3.0); len];
    group.all_gather(&scattered, &mut gathered, ControlWord::NONE).unwrap();
    assert_eq!(gathered, output, "{context}");

    let root = len % size;
    let mut handed = input.clone();
    group.broadcast(&mut handed, Rank(root as u32), ControlWord::NONE).unwrap();
    assert!(handed.iter().enumerate().all(|(at, x)| *x == own(root, at)), "{context}");
    assert_eq!(input, (0..len).map(|at| own(rank, at)).collect::<Vec<T>>(), "C-2: {context}");
}

/// The mean of equal numbers is that number, also where their sum does not fit.
fn check_extreme_means<T: Number>(group: &mut Group) {
    for extreme in T::EXTREMES {
        let mut data = vec![extreme; 70];
        group.all_reduce(&mut data, ReduceOp::Mean, ControlWord::NONE).unwrap();
        let right = data.iter().all(|x| (x.to() - extreme.to()).abs() <= extreme.to().abs() * 1e-6);
        assert!(right, "the mean of {extreme:?} in a world of {:?} is {:?}", group.size(), data[0]);
    }
}

fn check_type<T: Number>(groups: Vec<Group>) -> Vec<Group> {
    let check = |group: &mut Group| {
        for op in ReduceOp::ALL {
            // The last one is too much to go around whole.
            for len in [0, 1, 5, 777, 3000, 70_000 / size_of::<T>()] {
                check_reductions::<T>(group, op, len);
            }
        }
        check_extreme_means::<T>(group);
    };
    each(groups, check).0
}

#[test]
fn every_operation_works_on_every_type_in_every_world() {
    for (_, mut world) in worlds(1..=8) {
        let mut groups = world.form();
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
    for (size, mut world) in worlds(2..=8) {
        for op in ReduceOp::ALL {
            let (_, results) = each(world.form(), move |group| {
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
    for (size, mut world) in worlds([2, 3, 4]) {
        each(world.form(), move |group| {
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

#[test]
fn who_begins_a_collective_wakes_the_others_one_after_the_other() {
    let mut groups = World::with(4, small_chunks(SharedMemory::Unasked)).form();
    for round in 0..3 {
        let (tell, told) = mpsc::channel();
        for (rank, group) in groups.iter_mut().enumerate() {
            let tell = tell.clone();
            group.on_neighbour_ahead(move || tell.send(rank).unwrap());
        }
        thread::scope(|scope| {
            let mut others: BTreeMap<usize, &mut Group> = groups.iter_mut().enumerate().collect();
            let mut begun = Vec::new();
            let mut begin = |rank: usize| {
                let group = others.remove(&rank).expect("each is woken once");
                begun.push(scope.spawn(move || group.barrier(ControlWord::default()).unwrap()));
            };
            begin(2);
            for woken in [3, 0, 1] {
                assert_eq!(told.recv_timeout(BOUND), Ok(woken), "round {round}");
                begin(woken);
            }
            for begun in begun {
                begun.join().unwrap();
            }
        });
    }
    let mut alone = World::with(1, small_chunks(SharedMemory::Unasked)).form();
    alone[0].on_neighbour_ahead(|| panic!("there is no neighbour"));
    alone[0].barrier(ControlWord::default()).unwrap();
}
