//! What the library promises a program, with real coordinators, rings and transfers.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Coordinator, Job, ORDER, Outcome, expected};
use reknit_trainer::{DataOrder, End, NamedTensors, Notice, Options, ReduceOp, Trainer};

/// Rules T-1 and T-2 at the end of a job: everybody who stayed has the same state, it is the one that the data order
/// says, and each step that counts was shared out whole.
fn check(job: &Job, outcomes: &[Outcome]) {
    let steps = outcomes[0].steps;
    for outcome in outcomes {
        assert_eq!(outcome.steps, steps, "all leave after the same step");
        assert_eq!(outcome.sums, expected(steps), "the state is that of exactly {steps} steps");
    }
    let used = job.used();
    for step in 0..steps {
        let (_, shares) = used.range((step, 0)..(step + 1, 0)).next_back().expect("every step was committed");
        // A worker that fell after it had committed is in here too; one that fell before is not.
        let samples: BTreeSet<u64> = ORDER.positions(step).collect();
        let count: usize = shares.values().map(Vec::len).sum();
        assert!(count <= samples.len(), "step {step} used {count} samples of {}", samples.len());
    }
}

#[test]
fn t1_t2_workers_come_and_go_and_every_step_counts_once() {
    let job = Job::new(0);
    let (a, b, c) = (job.worker("a", None), job.worker("b", Some(60)), job.worker("c", None));
    job.steps(40);
    // One falls in the middle of a step that the others have begun. They may be in the next world before that is seen here.
    let fallen = b.outcome();
    assert!(fallen.steps <= 60);
    job.new_world(job.generation_before(fallen.steps));
    // One comes; it has nothing.
    let before = job.generation();
    let d = job.worker("d", None);
    job.new_world(before);
    // One is told that its machine will be taken.
    let before = job.generation();
    a.handle.notice(Duration::from_secs(120));
    let left = a.outcome();
    assert_eq!(left.end, Some(End::Released));
    assert_eq!(left.sums, expected(left.steps), "whoever leaves as planned has lost nothing either");
    job.new_world(before);
    job.ends();
    check(&job, &[c.outcome(), d.outcome()]);
}

#[test]
fn t3_the_mean_over_unequal_shares_is_exact_and_the_same_bits_on_every_worker() {
    let coordinator = Coordinator::start();
    let means: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let work = |name: &'static str| {
            let url = coordinator.url();
            move || {
                // Five ranks share 12 samples: two or three each.
                let options = Options::new(url, "job", ORDER).unwrap().name(name).unwrap();
                let options = options.workers(5, 5).unwrap().steps(20);
                let mut state = NamedTensors::new().with_f32("mean", [1], vec![0.0]);
                let mut trainer = Trainer::join(options, &state).unwrap();
                let mut means = Vec::new();
                while let Some(mut step) = trainer.next_step(&mut state).unwrap() {
                    let samples: Vec<u64> = step.samples().collect();
                    let sum: f32 = samples.iter().map(|sample| *sample as f32 * 0.37).sum();
                    let own = sum / samples.len() as f32;
                    // Many gradients, of other sizes in every step and in another type, in one collective.
                    let lens = [3, 0, 1 + step.index() as usize % 7 * 5000];
                    let mut many = lens.map(|len| vec![f64::from(own); len]);
                    let mut many: Vec<&mut [f64]> = many.iter_mut().map(|mean| &mut mean[..]).collect();
                    let mut mean = [own];
                    if step.all_reduce_means(&mut many).is_ok() && step.all_reduce_mean(&mut mean).is_ok() {
                        let all: Vec<f64> = many.iter().flat_map(|mean| mean.iter().copied()).collect();
                        assert!(all.iter().all(|x| x.to_bits() == all[0].to_bits()));
                        assert!((all[0] as f32 - mean[0]).abs() <= mean[0].abs() * 1e-6);
                        means.push(mean[0]);
                        step.commit(&state);
                    }
                }
                means
            }
        };
        let threads: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| scope.spawn(work(name))).into();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (step, mean) in means[0].iter().enumerate() {
        assert!(means.iter().all(|other| other[step].to_bits() == mean.to_bits()), "step {step}");
        let samples = ORDER.positions(step as u64).map(|position| ORDER.sample(position) as f64 * 0.37);
        let exact = samples.sum::<f64>() / ORDER.global_batch as f64;
        let error = (f64::from(*mean) - exact).abs() / exact;
        assert!(error < 4.0 * f64::from(f32::EPSILON), "step {step}: {mean} instead of {exact}");
    }
    assert_eq!(means[0].len(), 20);
}

#[test]
fn t4_nobody_there_is_an_error_after_the_patience_that_was_asked_for() {
    let options = Options::new("http://127.0.0.1:9", "job", ORDER).unwrap();
    let options = options.patience(Duration::from_millis(200), Duration::from_millis(200));
    let began = std::time::Instant::now();
    let joined = Trainer::join(options, &NamedTensors::new().with_f32("w", [1], vec![0.0]));
    assert!(joined.is_err_and(|why| why.to_string().contains("127.0.0.1:9")));
    assert!(began.elapsed() < common::PATIENCE);
}

#[test]
fn t4_a_coordinator_that_stays_away_ends_the_waiting_but_not_the_training() {
    let coordinator = Coordinator::start();
    let options = Options::new(coordinator.url(), "job", ORDER).unwrap().workers(1, 1).unwrap();
    let options = options.patience(Duration::from_secs(20), Duration::from_millis(300));
    let mut state = NamedTensors::new().with_f32("w", [1], vec![0.0]);
    let mut trainer = Trainer::join(options, &state).unwrap();
    for _ in 0..3 {
        trainer.next_step(&mut state).unwrap().unwrap().commit(&state);
    }
    drop(coordinator);
    // While there is something to do, nobody needs it.
    for _ in 0..100 {
        trainer.next_step(&mut state).unwrap().unwrap().commit(&state);
    }
    assert_eq!(trainer.steps_done(), 103);
}

#[test]
fn t5_a_transfer_whose_source_goes_away_is_done_again_whole_from_the_others() {
    // Enough to be under way for a while.
    let job = Job::new(200 << 20);
    let (a, b) = (job.worker("a", None), job.worker("b", None));
    job.steps(20);
    let before = job.generation();
    let c = job.worker("c", None);
    // One of the two sources leaves as soon as the newcomer is let in: before, during or after its transfer.
    a.handle.notice(Duration::from_secs(1));
    let left = a.outcome();
    assert!(left.ballast_is_sound);
    job.new_world(before);
    job.ends();
    let outcomes = [b.outcome(), c.outcome()];
    assert!(outcomes.iter().all(|outcome| outcome.ballast_is_sound), "no byte is wrong or missing");
    check(&job, &outcomes);
}

#[test]
fn t3_a_gradient_that_was_not_reduced_is_what_it_was() {
    let coordinator = Coordinator::start();
    let options = |name: &str| {
        // Weights of 4/7 and 3/7: they cannot be taken back without a trace.
        let order = DataOrder { global_batch: 7, ..ORDER };
        let options = Options::new(coordinator.url(), "job", order).unwrap().name(name).unwrap();
        options.workers(2, 3).unwrap()
    };
    let gradient = [0.1f32, f32::MIN_POSITIVE, -3.7, f32::MAX];
    let mut state = NamedTensors::new().with_f32("w", [1], vec![0.0]);
    // Both are in the step before one goes: whom the world's end finds outside waits for another world of two, for ever.
    let (in_step, both_in_step) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let options = &options;
        let gone = scope.spawn(move || {
            let mut state = NamedTensors::new().with_f32("w", [1], vec![0.0]);
            let mut trainer = Trainer::join(options("gone"), &state).unwrap();
            assert!(trainer.next_step(&mut state).unwrap().is_some());
            both_in_step.recv().unwrap();
        });
        let mut trainer = Trainer::join(options("stays"), &state).unwrap();
        let mut step = trainer.next_step(&mut state).unwrap().unwrap();
        in_step.send(()).unwrap();
        let mut mean = gradient;
        assert!(step.all_reduce_mean(&mut mean).is_err(), "there is nobody to reduce it with");
        assert_eq!(mean.map(f32::to_bits), gradient.map(f32::to_bits));
        gone.join().unwrap();
    });
}

#[test]
fn t1_a_step_that_one_worker_cannot_do_is_done_again_by_all_in_the_same_world() {
    let coordinator = Coordinator::start();
    let sums = std::thread::scope(|scope| {
        let work = |name: &'static str| {
            let url = coordinator.url();
            move || {
                let options = Options::new(url, "job", ORDER).unwrap().name(name).unwrap();
                let mut state = NamedTensors::new().with_f64("sum", [1], vec![0.0]);
                let mut trainer = Trainer::join(options.workers(2, 2).unwrap().steps(20), &state).unwrap();
                let (mut interrupted, mut generations) = (0, BTreeSet::new());
                while let Some(mut step) = trainer.next_step(&mut state).unwrap() {
                    generations.insert(step.generation());
                    let mut sum = [step.samples().map(|sample| sample as f64).sum::<f64>()];
                    if name == "b" && step.index() % 5 == 3 && interrupted <= step.index() / 5 {
                        // Its samples are not to be had at the first try.
                        sum = [f64::NAN];
                        step.fail();
                    }
                    if step.all_reduce(&mut sum, ReduceOp::Sum).is_err() {
                        interrupted += 1;
                        continue;
                    }
                    state.f64_mut("sum")[0] += sum[0];
                    step.commit(&state);
                }
                (state.f64("sum")[0], interrupted, generations.len())
            }
        };
        let threads: Vec<_> = ["a", "b"].map(|name| scope.spawn(work(name))).into();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let all: u64 =
        (0..20).flat_map(|step| ORDER.positions(step)).map(|position| ORDER.sample(position)).sum();
    assert_eq!(sums, [(all as f64, 4, 1), (all as f64, 4, 1)]);
}

#[test]
fn t4_the_port_is_free_when_a_program_is_done_with_it() {
    let coordinator = Coordinator::start();
    let state = NamedTensors::new().with_f32("w", [1], vec![0.0]);
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut handles = Vec::new();
    for _ in 0..3 {
        let options = Options::new(coordinator.url(), "job", ORDER).unwrap().listen(listen, None);
        let mut trainer = Trainer::join(options, &state).unwrap();
        assert!(trainer.next_step(&mut state.clone()).unwrap().is_some());
        // Whoever still has a handle does not keep the port.
        handles.push(trainer.handle());
    }
}

#[test]
fn t8_who_has_joined_and_not_asked_for_a_step_holds_nobody_up() {
    let job = Job::new(0);
    let (a, b) = (job.worker("a", None), job.worker("b", None));
    job.steps(20);
    // It reads its data, say, for as long as it likes.
    let options = Options::new(job.coordinator.url(), "job", ORDER).unwrap().workers(1, 8).unwrap();
    let mut state = NamedTensors::new().with_f64("sums", [2], vec![0.0; 2]);
    let mut slow = Trainer::join(options.name("slow").unwrap(), &state).unwrap();
    let before = job.generation();
    let c = job.worker("c", None);
    job.new_world(before);
    let members = job.coordinator.members("job");
    assert!(["a", "b", "c"].iter().all(|name| members[*name].rank.is_some()));
    assert!(members["slow"].attached && !members["slow"].available && members["slow"].rank.is_none());
    // When it asks, it gets a place, and what the others have.
    let before = job.generation();
    let step = slow.next_step(&mut state).unwrap().unwrap();
    assert!(step.index() >= 20 && step.world_size() == 4 && step.generation() > before);
    drop(slow);
    job.ends();
    check(&job, &[a.outcome(), b.outcome(), c.outcome()]);
}

#[test]
fn a_newcomer_gets_its_state_from_members_that_are_to_leave() {
    let job = Job::new(1 << 20);
    let a = job.worker("a", None);
    job.steps(20);
    let before = job.generation();
    // The only one that has the state is to leave, and one that has nothing has come: the state must change hands.
    let b = job.worker("b", None);
    a.handle.notice(Duration::from_secs(120));
    let left = a.outcome();
    assert_eq!(left.end, Some(End::Released));
    job.new_world(before);
    job.ends();
    let last = b.outcome();
    assert!(last.steps > left.steps && last.ballast_is_sound);
    check(&job, &[last]);
}

#[test]
fn a_program_is_told_once_that_it_is_to_leave_whoever_heard_of_it() {
    let job = Job::new(0);
    let (heard, notices) = std::sync::mpsc::channel();
    let told = move |notice: Notice| heard.send(notice.left).unwrap();
    let (a, b) = (job.worker_with("a", None, |options| options.on_notice(told)), job.worker("b", None));
    job.steps(10);
    // An operator tells the coordinator, and that tells the program; then the machine's own watcher does.
    job.coordinator.notice("job", "a", Duration::from_secs(90));
    let left = notices.recv_timeout(common::PATIENCE).unwrap().unwrap();
    assert!(left <= Duration::from_secs(90), "{left:?}");
    a.handle.notice(Duration::from_secs(80));
    assert_eq!(a.outcome().end, Some(End::Released));
    assert!(notices.try_recv().is_err(), "once");
    job.ends();
    check(&job, &[b.outcome()]);
}

#[test]
fn t6_nothing_is_sent_to_the_coordinator_per_step() {
    let job = Job::new(0);
    let workers = [job.worker("a", None), job.worker("b", None)];
    job.steps(50);
    common::eventually("both to have reported their first step", || {
        (job.coordinator.received()["first_step"] >= 2).then_some(())
    });
    let before = job.coordinator.received();
    job.steps(500);
    let after = job.coordinator.received();
    for (kind, count) in &after {
        assert!(kind == "renew" || before.get(kind) == Some(count), "{kind}: {before:?} became {after:?}");
    }
    job.ends();
    check(&job, &workers.map(common::Worker::outcome));
}
