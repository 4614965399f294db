//! What the stand-ins cannot show: the real NCCL, driver, and NVRTC on the GPUs of this machine. `cuda/check-gpu.sh` runs it; where there is
//! no GPU it is passed over with a notice.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]
#![allow(clippy::print_stdout, reason = "what was found, or passed over, is the other half of the result")]

mod common;

use std::time::{Duration, Instant};

use common::BOUND;
use common::process::{Process, check_sum, form_fresh, together};
use half::{bf16, f16};
use reknit_collectives::{AbortHandle, Element, ReduceOp};
use reknit_cuda::{
    Communicator, DeviceBuffer, Driver, Gpu, Kernels, Nccl, Nvrtc, Options, Stream, Target, Way, World,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

/// What the processes of the tests below run.
#[test]
fn rank_process() {
    common::process::be_a_rank();
}

/// The GPUs of this machine; none, with a notice.
fn gpus() -> Vec<Gpu> {
    let driver = match Driver::load() {
        Ok(driver) => driver,
        Err(missing) => {
            println!("passed over, no GPU: {missing}");
            return Vec::new();
        }
    };
    let gpus: Vec<Gpu> = (0..driver.devices().unwrap()).map(|index| driver.gpu(index).unwrap()).collect();
    println!("{driver:?}: {gpus:?}");
    gpus
}

fn world(generation: u64, size: usize, way: Way) -> World {
    let ranks = (0..size as u32).map(Rank).collect();
    World { generation: Generation(generation), size: WorldSize(size as u32), ranks, way }
}

/// All GPUs as the ranks of this one process.
fn open(gpus: &[Gpu]) -> Communicator {
    Communicator::open(Nccl::load().unwrap(), gpus, Options::default()).unwrap()
}

fn check_type<T: Element + PartialEq>(
    communicator: &mut Communicator,
    gpus: &[Gpu],
    number: impl Fn(i64) -> T,
) {
    let host =
        |rank: usize| -> Vec<T> { (0..1000).map(|at| number((at * 7 + rank as i64 * 3) % 20)).collect() };
    let from: Vec<_> = gpus
        .iter()
        .enumerate()
        .map(|(rank, gpu)| DeviceBuffer::from_host(gpu, &host(rank), BOUND).unwrap())
        .collect();
    let mut to: Vec<_> = gpus.iter().map(|gpu| DeviceBuffer::undefined(gpu, 1000).unwrap()).collect();
    communicator.all_reduce_into(&from, &mut to, ReduceOp::Sum).unwrap();
    let sum = |at: i64| number((0..gpus.len() as i64).map(|rank| (at * 7 + rank * 3) % 20).sum());
    let expected: Vec<T> = (0..1000).map(sum).collect();
    for buffer in &to {
        assert!(buffer.to_host(BOUND).unwrap() == expected, "{}", T::DTYPE);
    }
}

fn check_all(communicator: &mut Communicator, gpus: &[Gpu]) {
    check_type(communicator, gpus, |number| number as f32);
    check_type(communicator, gpus, |number| number as f64);
    check_type(communicator, gpus, |number| f16::from_f64(number as f64));
    check_type(communicator, gpus, |number| bf16::from_f64(number as f64));
    check_type(communicator, gpus, |number| number as i32);
    check_type(communicator, gpus, |number| number);
    check_type(communicator, gpus, |number| number as u8);
}

#[test]
fn sums_are_right_and_worlds_are_formed_again_in_one_process() {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    let mut communicator = open(&gpus);
    for generation in 1..=5 {
        let start = Instant::now();
        let id = communicator.unique_id().unwrap();
        communicator.form(world(generation, gpus.len(), Way::Fresh { id }), AbortHandle::new()).unwrap();
        println!("generation {generation}: formed after {:?}", start.elapsed());
        check_all(&mut communicator, &gpus);
        if generation % 2 == 0 {
            let start = Instant::now();
            communicator.break_up(reknit_collectives::BreakReason::Aborted);
            println!("generation {generation}: broken up after {:?}", start.elapsed());
        }
    }
    communicator.leave().unwrap();
}

#[test]
fn a_rank_that_never_comes_is_given_up_by_the_deadline() {
    let gpus = gpus();
    let Some(gpu) = gpus.first() else { return };
    let options = Options { form: Duration::from_secs(3), ..Options::default() };
    let mut communicator = Communicator::open(Nccl::load().unwrap(), &gpus[..1], options).unwrap();
    let id = communicator.unique_id().unwrap();
    let mut lonely = world(1, 1, Way::Fresh { id });
    lonely.size = WorldSize(2);
    let start = Instant::now();
    let error = communicator.form(lonely, AbortHandle::new()).unwrap_err();
    println!("given up after {:?}: {error}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20));
    let id = communicator.unique_id().unwrap();
    communicator.form(world(2, 1, Way::Fresh { id }), AbortHandle::new()).unwrap();
    check_all(&mut communicator, std::slice::from_ref(gpu));
}

#[test]
fn kernels_give_what_the_host_gives() {
    let gpus = gpus();
    let Some(gpu) = gpus.first() else { return };
    let kernels = Kernels::load(gpu, &Nvrtc::load().unwrap().kernels(Target::Ptx(80)).unwrap()).unwrap();
    let stream = Stream::on(gpu).unwrap();
    let bits = |at: u32| f32::from_bits(at.wrapping_mul(0x9e37_79b9));
    let numbers: Vec<f32> = (0..1 << 20).map(bits).collect();
    let from = DeviceBuffer::from_host(gpu, &numbers, BOUND).unwrap();
    let packed: DeviceBuffer<bf16> = DeviceBuffer::undefined(gpu, numbers.len()).unwrap();
    kernels.pack(&stream, &from, &packed, 0, 1.0).unwrap().wait(BOUND).unwrap();
    for (got, of) in packed.to_host(BOUND).unwrap().iter().zip(&numbers) {
        assert!(got.to_bits() == bf16::from_f32(*of).to_bits() || of.is_nan() && got.is_nan(), "{of:e}");
    }
    let packed: DeviceBuffer<f16> = DeviceBuffer::undefined(gpu, numbers.len()).unwrap();
    kernels.pack(&stream, &from, &packed, 0, 1.0).unwrap().wait(BOUND).unwrap();
    for (got, of) in packed.to_host(BOUND).unwrap().iter().zip(&numbers) {
        assert!(got.to_bits() == f16::from_f32(*of).to_bits() || of.is_nan() && got.is_nan(), "{of:e}");
    }
    let back: DeviceBuffer<f32> = DeviceBuffer::undefined(gpu, numbers.len()).unwrap();
    kernels.unpack(&stream, &packed, 0, &back, 1.0).unwrap().wait(BOUND).unwrap();
    for (got, of) in back.to_host(BOUND).unwrap().iter().zip(packed.to_host(BOUND).unwrap()) {
        assert!(got.to_bits() == of.to_f32().to_bits() || of.is_nan() && got.is_nan(), "{of:e}");
    }
    assert!(!kernels.are_finite(&stream, &from, BOUND).unwrap());
    let bytes: Vec<u8> =
        (0..(64u64 << 20) + 4097).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let on_gpu = DeviceBuffer::from_host(gpu, &bytes, BOUND).unwrap();
    let chunk = 4 << 20;
    let start = Instant::now();
    let got = kernels.digests(&stream, &on_gpu, chunk, BOUND).unwrap();
    println!("digests of {} bytes after {:?}", bytes.len(), start.elapsed());
    let expected = bytes.chunks(chunk as usize).map(twox_hash::xxhash3_128::Hasher::oneshot);
    assert!(got.iter().map(|digest| digest.0).eq(expected));
}

/// Survivors of a kill, each with a GPU and a process of its own, go on by shrinking, or afresh if this NCCL cannot; then a newcomer takes
/// the place of the dead.
#[test]
fn survivors_of_a_kill_go_on_and_a_newcomer_joins() {
    let count = gpus().len();
    if count < 3 {
        println!("passed over: it takes three GPUs, here are {count}");
        return;
    }
    let open = |at: usize| {
        let mut process = Process::start();
        process.expect(&format!("open real=1 first={at} stall=20000"), "ok");
        process
    };
    let mut ranks: Vec<Process> = (0..count).map(open).collect();
    form_fresh(&mut ranks, 1);
    check_sum(&mut ranks);
    let mut dying = ranks.pop().unwrap();
    ranks.iter_mut().for_each(|rank| rank.tell("reduce 1000 1"));
    dying.kill();
    let mut handles = true;
    for rank in &mut ranks {
        let mut timed = rank.answers_within(Duration::from_secs(5)).map(|answer| (answer, "by itself"));
        if timed.is_none() {
            // NCCL has seen nothing: it is the coordinator who knows, and aborts.
            println!("a survivor was still waiting after 5 s");
            timed = Some((rank.answer(), "by its deadline"));
        }
        let (answer, how) = timed.unwrap();
        println!("told {how}: {answer}");
        assert!(answer.starts_with("broken"), "{answer}");
        handles &= answer.ends_with("[Handle]");
    }
    let survivors = ranks.len();
    let start = Instant::now();
    if handles {
        let told = ranks.iter_mut().enumerate();
        let told = told.map(|(rank, r)| (r, format!("form 2 {survivors} {rank} shrink 1 {survivors}")));
        for answer in together(told) {
            assert_eq!(answer, "formed");
        }
    } else {
        form_fresh(&mut ranks, 2);
    }
    println!("formed by {} after {:?}", if handles { "shrinking" } else { "a fresh init" }, start.elapsed());
    check_sum(&mut ranks);
    let mut newcomer = open(survivors);
    let start = Instant::now();
    let id = ranks[0].ask("grow-id");
    if id.len() == 256 {
        newcomer.tell(&format!("form 3 {count} {survivors} grow 2 {survivors} {id}"));
        let told = ranks.iter_mut().enumerate();
        let told = told.map(|(rank, r)| (r, format!("form 3 {count} {rank} grow 2 {survivors} {id}")));
        assert!(together(told).iter().all(|answer| answer == "formed"));
        assert_eq!(newcomer.answer(), "formed");
        ranks.push(newcomer);
    } else {
        ranks.push(newcomer);
        form_fresh(&mut ranks, 3);
    }
    println!("a newcomer joined after {:?}", start.elapsed());
    check_sum(&mut ranks);
}
