//! A step whose world breaks is finished by whoever is left, and nobody computes what somebody still has.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::collections::BTreeSet;
use std::sync::Barrier;

use common::{Coordinator, ORDER};
use reknit_trainer::{Buckets, NamedTensors, Options, Trainer};

/// One worker's try at a step.
#[derive(Debug)]
struct Try {
    index: u64,
    world_size: u32,
    computed: Vec<u64>,
    covered: BTreeSet<u64>,
    /// What came of it, if it was not interrupted.
    mean: Option<[f64; 2]>,
}

/// What the mean over a step is, computed by nobody but this.
fn expected(step: u64) -> [f64; 2] {
    let samples = || ORDER.positions(step).map(|position| ORDER.sample(position) as f64);
    let count = ORDER.global_batch as f64;
    [samples().sum::<f64>() / count, samples().map(|x| x * x).sum::<f64>() / count]
}

/// The mean over what a worker computes.
fn mean(samples: &[u64]) -> [f64; 2] {
    let count = samples.len() as f64;
    let sum = |of: fn(f64) -> f64| samples.iter().map(|sample| of(*sample as f64)).sum::<f64>();
    // No number at all where there are none: it is not to count.
    [sum(|x| x) / count, sum(|x| x * x) / count]
}

fn options(coordinator: &Coordinator, name: &str) -> Options {
    let options = Options::new(coordinator.url(), "job", ORDER).unwrap().name(name).unwrap();
    options.workers(1, 3).unwrap().retry_in_place(true)
}

fn state() -> NamedTensors {
    NamedTensors::new().with_f64("w", [1], vec![0.0])
}

/// Trains until the world of three has broken as often as there are gates, each time in the middle of a step that all have
/// begun, for the world's last rank falls there; and then one step more.
fn train(options: Options, gates: &[Barrier], in_buckets: bool) -> Vec<Try> {
    let mut state = state();
    let mut trainer = Trainer::join(options, &state).unwrap();
    let (mut tries, mut interrupted) = (Vec::new(), 0);
    while let Some(mut step) = trainer.next_step(&mut state).unwrap() {
        let computed: Vec<u64> = step.samples().collect();
        let (index, world_size, covered) =
            (step.index(), step.world_size(), step.covered_samples().collect());
        tries.push(Try { index, world_size, computed, covered, mean: None });
        let last = tries.last_mut().unwrap();
        if let Some(gate) = gates.get(interrupted).filter(|_| world_size as usize == 3 - interrupted) {
            gate.wait();
            if step.rank() + 1 == world_size {
                return tries;
            }
        }
        let [mut first, mut second] = mean(&last.computed).map(|mean| [mean]);
        let reduced = if in_buckets {
            let give =
                |buckets: &mut Buckets<'_, f64>| [first, second].iter().for_each(|mean| buckets.give(mean));
            // A bucket for each.
            step.all_reduce_while(8, give).map(|((), mut means)| {
                means.take(&mut first);
                means.take(&mut second);
            })
        } else {
            step.all_reduce_means(&mut [&mut first, &mut second])
        };
        assert_eq!(step.covered_samples().collect::<BTreeSet<u64>>(), last.covered, "it is what it was");
        if reduced.is_err() {
            interrupted += 1;
            continue;
        }
        last.mean = Some([first[0], second[0]]);
        state.f64_mut("w")[0] += first[0];
        step.commit(&state);
        if interrupted == gates.len() && tries.len() >= 2 && tries[tries.len() - 2].mean.is_some() {
            break;
        }
    }
    tries
}

#[test]
fn t9_survivors_compute_only_what_nobody_has_any_more_and_the_mean_is_exact() {
    check(false);
}

#[test]
fn t9_so_it_is_where_gradients_are_given_bucket_by_bucket() {
    check(true);
}

fn check(in_buckets: bool) {
    let coordinator = Coordinator::start();
    let gates = [Barrier::new(3), Barrier::new(2)];
    let tries: Vec<Vec<Try>> = std::thread::scope(|scope| {
        let work = |name| {
            let (options, gates) = (options(&coordinator, name), &gates);
            scope.spawn(move || train(options, gates, in_buckets))
        };
        let threads = ["a", "b", "c"].map(work);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let broken = tries.iter().flatten().filter(|one| one.world_size == 3).map(|one| one.index).max().unwrap();
    let of = |size: u32| -> Vec<&Try> {
        tries.iter().flatten().filter(|one| one.index == broken && one.world_size == size).collect()
    };
    // Of twelve samples each of three has four. One is lost, and its four are computed by two; then one of these is lost,
    // with the six that it had.
    for (size, computed, covered) in [(3, 4, 4), (2, 2, 6), (1, 6, 12)] {
        let tries = of(size);
        assert_eq!(tries.len(), size as usize);
        for one in &tries {
            assert_eq!((one.computed.len(), one.covered.len()), (computed, covered), "{one:?}");
        }
        let all: BTreeSet<u64> = tries.iter().flat_map(|one| one.covered.iter().copied()).collect();
        assert_eq!(all.len(), 12, "a world of {size} covers the step");
    }
    let done: Vec<(u64, [f64; 2])> =
        tries.iter().flatten().filter_map(|one| Some((one.index, one.mean?))).collect();
    assert!(done.iter().any(|(index, _)| *index == broken) && done.iter().any(|(index, _)| *index > broken));
    for (index, mean) in done {
        for (mean, exact) in mean.into_iter().zip(expected(index)) {
            assert!((mean - exact).abs() <= exact * 1e-12, "step {index}: {mean} instead of {exact}");
        }
    }
}

#[test]
fn gradients_that_are_others_when_a_step_comes_again_are_an_error() {
    let coordinator = Coordinator::start();
    let gate = Barrier::new(2);
    let begin =
        |name: &str| Trainer::join(options(&coordinator, name).workers(1, 2).unwrap(), &state()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut state, mut trainer) = (state(), begin("goes"));
            while let Some(step) = trainer.next_step(&mut state).unwrap() {
                if step.world_size() == 2 {
                    gate.wait();
                    return;
                }
                step.commit(&state);
            }
        });
        let (mut state, mut trainer, mut was_interrupted) = (state(), begin("stays"), false);
        let why = loop {
            let mut step = match trainer.next_step(&mut state) {
                Ok(step) => step.unwrap(),
                Err(why) => break why,
            };
            if step.world_size() == 2 {
                gate.wait();
            } else if !was_interrupted {
                step.commit(&state);
                continue;
            }
            let count = if was_interrupted { 3 } else { 2 };
            let give = |buckets: &mut Buckets<'_, f64>| buckets.give(&vec![1.0; count]);
            assert!(step.all_reduce_while(8, give).is_err(), "the others would take it for what it is not");
            was_interrupted = true;
        };
        assert!(why.to_string().contains("another type or number"), "{why}");
        assert!(trainer.next_step(&mut state).is_err(), "and stays one");
    });
}

#[test]
fn a_second_call_in_one_step_is_an_error_that_says_so() {
    let coordinator = Coordinator::start();
    let mut state = state();
    let mut trainer = Trainer::join(options(&coordinator, "a"), &state).unwrap();
    let mut step = trainer.next_step(&mut state).unwrap().unwrap();
    step.all_reduce_mean(&mut [1.0]).unwrap();
    assert!(step.all_reduce_mean(&mut [1.0]).is_err());
    drop(step);
    let Err(why) = trainer.next_step(&mut state).map(|_| ()) else { panic!("it goes on") };
    assert!(why.to_string().contains("one call"), "{why}");
}

#[test]
fn workers_that_do_not_all_retry_in_place_are_no_job() {
    let coordinator = Coordinator::start();
    let state = state();
    let first = Trainer::join(options(&coordinator, "a"), &state).unwrap();
    let Err(why) = Trainer::join(options(&coordinator, "b").retry_in_place(false), &state).map(|_| ()) else {
        panic!("it was let in")
    };
    assert!(!why.to_string().is_empty());
    drop(first);
}
