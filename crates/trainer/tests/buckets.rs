//! Gradients that are added up while others are still being computed.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Coordinator, ORDER, eventually};
use reknit_trainer::{Buckets, NamedTensors, Options, Step, Trainer};

const STEPS: u64 = 12;

fn options(coordinator: &Coordinator, name: &str, workers: u32) -> Options {
    let options = Options::new(coordinator.url(), "job", ORDER).unwrap().name(name).unwrap();
    options.workers(workers, workers).unwrap().steps(STEPS)
}

fn state() -> NamedTensors {
    NamedTensors::new().with_f32("w", [1], vec![0.0])
}

/// How long each layer's gradient is: in some steps none, in others more than a bucket has.
fn layers(step: u64) -> Vec<usize> {
    (0..5).map(|layer| (step as usize * 7 + layer * 13) % 40 * (layer + 1)).collect()
}

/// A layer's mean gradient over some samples.
fn gradient(samples: &[u64], layer: usize, len: usize) -> Vec<f32> {
    let mean = samples.iter().map(|sample| *sample as f32).sum::<f32>() / samples.len() as f32;
    (0..len).map(|at| mean * 0.37 + (layer * 1000 + at) as f32).collect()
}

/// Runs so many workers to the end of their job, and returns what `work` made of every step.
fn train<R: Send>(workers: u32, work: impl Fn(&mut Step<'_>) -> Option<R> + Sync) -> Vec<Vec<R>> {
    let coordinator = Coordinator::start();
    std::thread::scope(|scope| {
        let (work, coordinator) = (&work, &coordinator);
        let run = |rank: u32| {
            let options = options(coordinator, &format!("w{rank}"), workers);
            scope.spawn(move || {
                let mut state = state();
                let mut trainer = Trainer::join(options, &state).unwrap();
                let mut all = Vec::new();
                while let Some(mut step) = trainer.next_step(&mut state).unwrap() {
                    if let Some(seen) = work(&mut step) {
                        all.push(seen);
                        step.commit(&state);
                    }
                }
                all
            })
        };
        let threads: Vec<_> = (0..workers).map(run).collect();
        let outcome = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(outcome).collect()
    })
}

#[test]
fn t3_buckets_of_any_size_give_the_mean_and_the_same_bits_on_every_worker() {
    for (workers, bucket_bytes) in [(1, 64), (2, 4), (3, 64), (5, 1 << 20)] {
        let all = train(workers, |step| {
            let samples: Vec<u64> = step.samples().collect();
            let lens = layers(step.index());
            let give = |buckets: &mut Buckets<'_, f32>| {
                lens.iter()
                    .enumerate()
                    .for_each(|(layer, len)| buckets.give(&gradient(&samples, layer, *len)));
                lens.len()
            };
            let (count, mut means) = step.all_reduce_while(bucket_bytes, give).unwrap();
            assert_eq!(count, 5);
            let mut layers: Vec<Vec<f32>> = lens.iter().map(|len| vec![f32::NAN; *len]).collect();
            // In other pieces than they were given in.
            let (first, others) = layers.split_first_mut().unwrap();
            first.chunks_mut(3).for_each(|some| means.take(some));
            others.iter_mut().for_each(|mean| means.take(mean));
            drop(means);
            Some((step.index(), layers))
        });
        for (index, layers) in &all[0] {
            let samples: Vec<u64> = ORDER.positions(*index).map(|position| ORDER.sample(position)).collect();
            for (layer, mean) in layers.iter().enumerate() {
                for (mean, exact) in mean.iter().zip(gradient(&samples, layer, mean.len())) {
                    assert!((mean - exact).abs() <= exact.abs() * 1e-5, "{mean} instead of {exact}");
                }
            }
        }
        assert_eq!(all[0].len() as u64, STEPS);
        assert!(all.iter().all(|one| *one == all[0]), "{workers} workers, buckets of {bucket_bytes} bytes");
    }
}

#[test]
fn adding_up_begins_before_all_is_computed() {
    train(2, |step| {
        let compute = |buckets: &mut Buckets<'_, f32>| {
            for layer in 0..4 {
                buckets.give(&[1.0; 16]);
                eventually("the buckets that are full", || (buckets.done() == layer + 1).then_some(()));
            }
        };
        step.all_reduce_while(64, compute)
            .map(|((), mut means)| {
                let mut all = [0.0; 64];
                means.take(&mut all);
                assert_eq!(all, [1.0; 64]);
            })
            .ok()
    });
}

#[test]
fn a_panic_while_computing_holds_nobody_up_and_costs_a_world() {
    let panicked = AtomicBool::new(false);
    let all = train(2, |step| {
        let panics = step.index() == 3 && step.rank() == 1 && !panicked.swap(true, Ordering::Relaxed);
        let compute = |buckets: &mut Buckets<'_, f32>| {
            // Some are with the thread by then.
            buckets.give(&[1.0; 40]);
            assert!(!panics, "on purpose");
            buckets.give(&[1.0; 24]);
        };
        let reduce = || step.all_reduce_while(64, compute).map(|((), mut means)| means.take(&mut [0.0; 64]));
        let reduced = std::panic::catch_unwind(AssertUnwindSafe(reduce));
        assert_eq!(reduced.is_err(), panics);
        matches!(reduced, Ok(Ok(()))).then(|| (step.index(), step.generation()))
    });
    assert!(panicked.load(Ordering::Relaxed));
    for steps in all {
        let done: Vec<u64> = steps.iter().map(|(index, _)| *index).collect();
        assert_eq!(done, (0..STEPS).collect::<Vec<_>>());
        assert!(steps.iter().all(|(index, generation)| (*generation > 1) == (*index >= 3)), "{steps:?}");
    }
}

#[test]
#[should_panic(expected = "0 means are left")]
fn more_means_than_were_given_are_not_there() {
    train(1, |step| {
        // In later steps there are buckets left over from this one.
        let count = if step.index() == 0 { 100 } else { 1 };
        let give = |buckets: &mut Buckets<'_, f32>| buckets.give(&vec![1.0; count]);
        let ((), mut means) = step.all_reduce_while(64, give).unwrap();
        means.take(&mut vec![0.0; count]);
        if count == 1 {
            means.take(&mut [0.0]);
        }
        drop(means);
        Some(())
    });
}

#[test]
fn t1_a_worker_that_fails_while_it_computes_has_all_do_the_step_again() {
    let failed = std::sync::Mutex::new(BTreeSet::new());
    let all = train(3, |step| {
        let (rank, index) = (step.rank(), step.index());
        let fails = u64::from(rank) == index % 3 && failed.lock().unwrap().insert(index);
        let compute = |buckets: &mut Buckets<'_, f32>| {
            buckets.give(&[3.0; 40]);
            buckets.give(&[if fails { f32::NAN } else { 3.0 }; 24]);
            if fails {
                buckets.fail();
            }
        };
        // Exactly four buckets: what is said after the last one was full is heard.
        let reduced = step.all_reduce_while(64, compute).map(|((), mut means)| {
            let mut all = [0.0; 64];
            means.take(&mut all);
            all
        });
        assert!(!(fails && reduced.is_ok()));
        reduced.ok().map(|all| (step.generation(), all))
    });
    assert_eq!(failed.lock().unwrap().len() as u64, STEPS);
    for (generation, means) in all.into_iter().flatten() {
        assert_eq!((generation, means.map(|mean| (mean - 3.0).abs() < 1e-5)), (1, [true; 64]));
    }
}
