//! Sums over the stand-ins: every type and operation, several devices in a process, and what is refused before it is begun.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::thread;

use common::{BOUND, control, driver, nccl};
use half::{bf16, f16};
use reknit_collectives::{AbortHandle, DType, Element, ReduceOp};
use reknit_cuda::{
    Communicator, DeviceBuffer, Gpu, Image, Kernels, Options, ReduceError, Stream, UniqueId, Way, Work, World,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

fn open(devices: &[u32]) -> (Communicator, Vec<Gpu>) {
    let driver = driver();
    let gpus: Vec<Gpu> = devices.iter().map(|index| driver.gpu(*index).unwrap()).collect();
    (Communicator::open(nccl(), &gpus, Options::default()).unwrap(), gpus)
}

fn world(size: usize, ranks: &[u32], id: UniqueId) -> World {
    let ranks = ranks.iter().map(|rank| Rank(*rank)).collect();
    World { generation: Generation(1), size: WorldSize(size as u32), ranks, way: Way::Fresh { id } }
}

/// Runs `work` as so many ranks, each in a thread of its own, in one world.
fn each<R: Send>(size: usize, work: impl Fn(usize, &mut Communicator, &[Gpu]) -> R + Sync) -> Vec<R> {
    let (mut first, gpus) = open(&[0]);
    let id = first.unique_id().unwrap();
    let mut members = vec![(first, gpus)];
    members.extend((1..size).map(|rank| open(&[rank as u32])));
    let results = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(rank, (mut communicator, gpus))| {
                scope.spawn(move || {
                    communicator.form(world(size, &[rank as u32], id), AbortHandle::new()).unwrap();
                    let result = work(rank, &mut communicator, &gpus);
                    communicator.leave().unwrap();
                    result
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(control::report().1, Vec::<String>::new(), "called in the wrong");
    results
}

/// A rank's number: whole and small, so that every order of adding gives the same.
fn input(rank: usize, at: usize) -> i64 {
    ((at * 7 + rank * 3) % 20) as i64
}

fn check<T: Element + PartialEq + std::fmt::Debug>(size: usize, number: impl Fn(i64) -> T + Sync) {
    let is_integer = matches!(T::DTYPE, DType::I32 | DType::I64 | DType::U8);
    // A mean of one or two whole numbers has an exact value in every float; of three it has not.
    let exact_mean = size.is_power_of_two() && !is_integer;
    let ops = ReduceOp::ALL.into_iter().filter(|op| *op != ReduceOp::Mean || exact_mean);
    let cases: Vec<(ReduceOp, usize)> = ops.flat_map(|op| [0, 1, 5, 1000].map(|len| (op, len))).collect();
    each(size, |rank, communicator, gpus| {
        for (op, len) in &cases {
            let host: Vec<T> = (0..*len).map(|at| number(input(rank, at))).collect();
            let mut data = [DeviceBuffer::from_host(&gpus[0], &host, BOUND).unwrap()];
            communicator.all_reduce(&mut data, *op).unwrap();
            let expected: Vec<T> = (0..*len)
                .map(|at| {
                    let numbers = (0..size).map(|rank| input(rank, at));
                    match op {
                        ReduceOp::Sum => number(numbers.sum()),
                        ReduceOp::Min => number(numbers.min().unwrap()),
                        ReduceOp::Max => number(numbers.max().unwrap()),
                        // Quarters of whole numbers, by way of a scale that the types of 16 bits hold exactly.
                        ReduceOp::Mean => mean(numbers.sum(), size, &number),
                    }
                })
                .collect();
            assert!(
                data[0].to_host(BOUND).unwrap() == expected,
                "{op} of {len} {} in {size} ranks",
                T::DTYPE
            );
        }
    });
}

/// `sum / size`, through the bits of a number of the type.
fn mean<T: Element>(sum: i64, size: usize, number: &impl Fn(i64) -> T) -> T {
    let quotient = sum as f64 / size as f64;
    match T::DTYPE {
        DType::F32 => bytes(quotient as f32),
        DType::F64 => bytes(quotient),
        DType::F16 => bytes(f16::from_f64(quotient)),
        DType::Bf16 => bytes(bf16::from_f64(quotient)),
        DType::I32 | DType::I64 | DType::U8 => number(sum / size as i64),
    }
}

/// The same bits as another type of the same size.
fn bytes<T: Element, U: Element>(number: U) -> T {
    assert_eq!(T::DTYPE, U::DTYPE);
    // SAFETY: the two are one type, as their codes say.
    unsafe { std::mem::transmute_copy(&number) }
}

#[test]
fn every_type_and_operation_gives_the_exact_result_on_every_rank() {
    for size in 1..=4 {
        check::<f32>(size, |number| number as f32);
        check::<f64>(size, |number| number as f64);
        check::<f16>(size, |number| f16::from_f64(number as f64));
        check::<bf16>(size, |number| bf16::from_f64(number as f64));
        check::<i32>(size, |number| number as i32);
        check::<i64>(size, |number| number);
        check::<u8>(size, |number| number as u8);
    }
}

#[test]
fn one_process_brings_two_devices_and_another_one() {
    let (mut two, two_gpus) = open(&[0, 1]);
    let (mut one, one_gpus) = open(&[2]);
    let id = two.unique_id().unwrap();
    let reduce = |communicator: &mut Communicator, gpus: &[Gpu], ranks: &[u32]| {
        communicator.form(world(3, ranks, id), AbortHandle::new()).unwrap();
        let buffers = gpus.iter().zip(ranks);
        let mut data: Vec<DeviceBuffer<f32>> = buffers
            .map(|(gpu, rank)| DeviceBuffer::from_host(gpu, &[*rank as f32, 1.0], BOUND).unwrap())
            .collect();
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        for buffer in &data {
            assert_eq!(buffer.to_host(BOUND).unwrap(), [3.0, 3.0]);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| reduce(&mut two, &two_gpus, &[0, 1]));
        scope.spawn(|| reduce(&mut one, &one_gpus, &[2]));
    });
}

#[test]
fn what_cannot_be_reduced_is_refused_and_breaks_nothing() {
    each(2, |_, communicator, gpus| {
        let whole = || DeviceBuffer::from_host(&gpus[0], &[1i32, 2, 3], BOUND).unwrap();
        let refused = communicator.all_reduce(&mut [whole()], ReduceOp::Mean);
        assert_eq!(refused, Err(ReduceError::Unsupported { op: ReduceOp::Mean, dtype: DType::I32 }));
        let refused = communicator.all_reduce(&mut [whole(), whole()], ReduceOp::Sum);
        assert_eq!(refused, Err(ReduceError::Buffers { devices: 1 }));
        let mut data = [whole()];
        communicator.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data[0].to_host(BOUND).unwrap(), [2, 4, 6]);
    });
}

#[test]
fn without_a_world_nothing_is_reduced() {
    let (mut communicator, gpus) = open(&[0]);
    let mut data = [DeviceBuffer::from_host(&gpus[0], &[1.0f32], BOUND).unwrap()];
    assert_eq!(communicator.all_reduce(&mut data, ReduceOp::Sum), Err(ReduceError::NotFormed));
}

#[test]
fn a_reduction_waits_for_the_work_that_it_is_told_to_wait_for() {
    each(2, |rank, communicator, gpus| {
        let kernels = Kernels::load(&gpus[0], &Image::new(b"any".to_vec())).unwrap();
        let compute = Stream::on(&gpus[0]).unwrap();
        // What takes longer than a reduction of one number, before what makes that number.
        let large = DeviceBuffer::from_host(&gpus[0], &vec![1.0f32; 4 << 20], BOUND).unwrap();
        let small = DeviceBuffer::from_host(&gpus[0], &[rank as f32], BOUND).unwrap();
        let data: [DeviceBuffer<f32>; 1] = [DeviceBuffer::from_host(&gpus[0], &[-5.0], BOUND).unwrap()];
        let mut works: Vec<Work> =
            (0..8).map(|_| kernels.pack(&compute, &large, &large, 0, 1.0).unwrap()).collect();
        works.push(kernels.pack(&compute, &small, &data[0], 0, 2.0).unwrap());
        communicator.after(0, works[8].event()).unwrap();
        let mut data = data;
        communicator.all_reduce(&mut data, ReduceOp::Max).unwrap();
        assert_eq!(data[0].to_host(BOUND).unwrap(), [2.0]);
        works.into_iter().for_each(|work| work.wait(BOUND).unwrap());
    });
}

#[test]
fn a_probe_says_in_words_what_is_missing() {
    let said = reknit_cuda::probe().to_string();
    assert!(said.contains("driver: ") && said.contains("NCCL: "), "{said}");
}
