//! A step's gradients in buckets, over the stand-ins: weighted means, in the order in which they become ready, and once more
//! in the next world after a break.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::sync::{Arc, Barrier};
use std::thread;

use common::{BOUND, control, driver, nccl};
use half::bf16;
use reknit_collectives::{AbortHandle, BreakReason, ReduceOp};
use reknit_cuda::{
    BucketError, Buckets, Communicator, DeviceBuffer, Gpu, Image, Kernels, Options, Packed, ReduceError,
    Stream, UniqueId, Way, World,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

const LENS: [usize; 5] = [300, 5, 1000, 1, 64];
const SIZE: usize = 2;
/// Parts of a whole, as shares of a batch are.
const WEIGHTS: [f64; SIZE] = [0.25, 0.75];

struct Member {
    communicator: Communicator,
    gpu: Gpu,
    kernels: Arc<Kernels>,
    rank: usize,
}

impl Member {
    fn open(rank: usize) -> Member {
        let gpu = driver().gpu(rank as u32).unwrap();
        let kernels = Arc::new(Kernels::load(&gpu, &Image::new(b"any".to_vec())).unwrap());
        let communicator =
            Communicator::open(nccl(), std::slice::from_ref(&gpu), Options::default()).unwrap();
        Member { communicator, gpu, kernels, rank }
    }

    fn form(&mut self, generation: u64, id: UniqueId) {
        let world = World {
            generation: Generation(generation),
            size: WorldSize(SIZE as u32),
            ranks: vec![Rank(self.rank as u32)],
            way: Way::Fresh { id },
        };
        self.communicator.form(world, AbortHandle::new()).unwrap();
    }

    /// This rank's gradients: whole numbers, so that their weighted sums are exact.
    fn gradients(&self) -> Vec<DeviceBuffer<f32>> {
        let on = |(tensor, len): (usize, &usize)| {
            let host: Vec<f32> = (0..*len).map(|at| gradient(self.rank, tensor, at)).collect();
            DeviceBuffer::from_host(&self.gpu, &host, BOUND).unwrap()
        };
        LENS.iter().enumerate().map(on).collect()
    }

    fn make_ready<T: Packed>(
        &mut self,
        buckets: &mut Buckets<T>,
        gradients: &[DeviceBuffer<f32>],
        order: &[usize],
    ) -> Result<(), BucketError> {
        let compute = Stream::on(&self.gpu).unwrap();
        for tensor in order {
            let computed = compute.record().unwrap();
            let weight = WEIGHTS[self.rank];
            buckets.ready(&mut self.communicator, *tensor, &[&gradients[*tensor]], weight, &[&computed])?;
        }
        Ok(())
    }
}

fn gradient(rank: usize, tensor: usize, at: usize) -> f32 {
    ((at * 3 + tensor * 5 + rank * 4) % 16) as f32 * 4.0
}

fn check_means(gradients: &[DeviceBuffer<f32>]) {
    for (tensor, buffer) in gradients.iter().enumerate() {
        let mean = |at| (0..SIZE).map(|rank| gradient(rank, tensor, at) * WEIGHTS[rank] as f32).sum::<f32>();
        let expected: Vec<f32> = (0..LENS[tensor]).map(mean).collect();
        assert_eq!(buffer.to_host(BOUND).unwrap(), expected, "tensor {tensor}");
    }
}

/// Runs `work` as each rank of a world, in a thread of its own.
fn each(work: impl Fn(Member, &dyn Fn(&mut Member) -> UniqueId) + Sync) {
    let (barrier, id) = (Barrier::new(SIZE), std::sync::Mutex::new(None));
    thread::scope(|scope| {
        for rank in 0..SIZE {
            let (work, barrier, id) = (&work, &barrier, &id);
            scope.spawn(move || {
                let share = |member: &mut Member| {
                    if member.rank == 0 {
                        *id.lock().unwrap() = Some(member.communicator.unique_id().unwrap());
                    }
                    barrier.wait();
                    let shared = id.lock().unwrap().unwrap();
                    barrier.wait();
                    shared
                };
                work(Member::open(rank), &share);
            });
        }
    });
    assert_eq!(control::report().1, Vec::<String>::new(), "called in the wrong");
}

fn check<T: Packed>(bytes: usize, buckets_expected: usize) {
    each(|mut member, id| {
        let id = id(&mut member);
        member.form(1, id);
        let devices = [(member.gpu.clone(), member.kernels.clone())];
        let mut buckets: Buckets<T> = Buckets::new(&devices, &LENS, bytes).unwrap();
        assert_eq!(buckets.len(), buckets_expected);
        // Each rank in an order of its own; and once more, for a step leaves nothing behind.
        for order in [[0, 1, 2, 3, 4], if member.rank == 0 { [4, 3, 2, 1, 0] } else { [1, 0, 4, 2, 3] }] {
            let gradients = member.gradients();
            member.make_ready(&mut buckets, &gradients, &order).unwrap();
            let all: Vec<&DeviceBuffer<f32>> = gradients.iter().collect();
            assert!(buckets.finish(&mut member.communicator, &[all], BOUND).unwrap(), "all are finite");
            check_means(&gradients);
        }
        member.communicator.leave().unwrap();
    });
}

#[test]
fn means_are_exact_whatever_the_order_in_which_tensors_become_ready() {
    check::<f32>(1 << 20, 1);
    check::<f32>(1300 * 4, 2);
    check::<bf16>(1, 5);
}

#[test]
fn a_gradient_that_is_not_finite_is_told_by_every_rank() {
    each(|mut member, id| {
        let id = id(&mut member);
        member.form(1, id);
        let devices = [(member.gpu.clone(), member.kernels.clone())];
        let mut buckets: Buckets<f32> = Buckets::new(&devices, &[3], 1 << 20).unwrap();
        let numbers = if member.rank == 1 { [1.0, f32::INFINITY, 2.0] } else { [1.0; 3] };
        let gradient = DeviceBuffer::from_host(&member.gpu, &numbers, BOUND).unwrap();
        let computed = Stream::on(&member.gpu).unwrap().record().unwrap();
        buckets.ready(&mut member.communicator, 0, &[&gradient], 0.5, &[&computed]).unwrap();
        assert!(!buckets.finish(&mut member.communicator, &[vec![&gradient]], BOUND).unwrap());
    });
}

#[test]
fn a_step_that_broke_is_reduced_again_from_the_same_gradients() {
    each(|mut member, share| {
        let id = share(&mut member);
        member.form(1, id);
        let devices = [(member.gpu.clone(), member.kernels.clone())];
        let mut buckets: Buckets<f32> = Buckets::new(&devices, &LENS, 1300 * 4).unwrap();
        let gradients = member.gradients();
        let all: Vec<&DeviceBuffer<f32>> = gradients.iter().collect();
        // One rank makes half of its tensors ready, and gives up; the other waits for it.
        if member.rank == 0 {
            member.make_ready(&mut buckets, &gradients, &[0, 1, 2]).unwrap();
            let early = buckets.finish(&mut member.communicator, std::slice::from_ref(&all), BOUND);
            assert_eq!(early, Err(BucketError::NotReady { tensor: 3 }));
            member.communicator.break_up(BreakReason::Aborted);
        } else {
            let ready = member.make_ready(&mut buckets, &gradients, &[0, 1, 2, 3, 4]);
            let finished = ready
                .and_then(|()| buckets.finish(&mut member.communicator, std::slice::from_ref(&all), BOUND));
            assert!(matches!(finished, Err(BucketError::Reduce(ReduceError::Broken(_)))), "{finished:?}");
        }
        let id = share(&mut member);
        member.form(2, id);
        buckets.begin_again(BOUND).unwrap();
        member.make_ready(&mut buckets, &gradients, &[0, 1, 2, 3, 4]).unwrap();
        assert!(buckets.finish(&mut member.communicator, &[all], BOUND).unwrap());
        check_means(&gradients);
    });
}

#[test]
fn what_was_started_is_finished_in_order_or_given_up_for_the_next_world() {
    each(|mut member, share| {
        let id = share(&mut member);
        member.form(1, id);
        let on = |number: f32| DeviceBuffer::from_host(&member.gpu, &[number], BOUND).unwrap();
        let (first, second) = (on(1.0), on(10.0));
        member.communicator.start_all_reduce(&[&first], ReduceOp::Sum).unwrap();
        member.communicator.start_all_reduce(&[&second], ReduceOp::Max).unwrap();
        member.communicator.finish().unwrap();
        assert_eq!(first.to_host(BOUND).unwrap(), [2.0]);
        assert_eq!(second.to_host(BOUND).unwrap(), [10.0]);
        // Only one rank begins this one, and neither finishes it.
        if member.rank == 0 {
            member.communicator.start_all_reduce(&[&first], ReduceOp::Sum).unwrap();
        }
        let id = share(&mut member);
        member.form(2, id);
        member.communicator.start_all_reduce(&[&second], ReduceOp::Sum).unwrap();
        member.communicator.finish().unwrap();
        assert_eq!(second.to_host(BOUND).unwrap(), [20.0]);
    });
}
