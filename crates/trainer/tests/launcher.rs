//! What a launcher promises, with a real coordinator and real rings.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Coordinator, PATIENCE, eventually};
use reknit_proto::v1;
use reknit_trainer::launcher::{Next, World};
use reknit_trainer::{End, Launcher, LauncherOptions, Options, TrainError, Trainer};

/// How long one call may wait; every wait is repeated.
const SLICE: Duration = Duration::from_millis(50);

fn options(coordinator: &Coordinator, name: &str, min: u32, max: u32) -> LauncherOptions {
    let options = LauncherOptions::new(coordinator.url(), "job").unwrap();
    options.name(name).unwrap().members(min, max).unwrap()
}

/// What a program does that starts others.
struct Program {
    launcher: Arc<Launcher>,
}

impl Program {
    fn join(coordinator: &Coordinator, name: &str, min: u32, max: u32) -> Program {
        Program { launcher: Arc::new(Launcher::join(options(coordinator, name, min, max)).unwrap()) }
    }

    fn next(&self) -> Next {
        eventually("a world", || match self.launcher.next_world(SLICE).unwrap() {
            Next::NotYet => None,
            next => Some(next),
        })
    }

    /// The next world of that size in which everybody has what was shared, and that.
    fn world(&self, size: usize) -> (World, Vec<u8>) {
        loop {
            let Next::World(world) = self.next() else { panic!("{:?}", self.launcher.end()) };
            let own = format!("of rank {} in {}", world.rank, world.generation);
            let shared =
                eventually("what is shared", || self.launcher.share(own.as_bytes(), SLICE).transpose());
            match shared {
                Ok(shared) if world.size as usize == size => return (world, shared),
                // On a busy machine the others were too late for this one.
                Ok(_) => self.waits_for_the_end_of(world),
                Err(_) => {}
            }
        }
    }

    fn starts(&self, size: usize) -> Starting {
        let launcher = Arc::clone(&self.launcher);
        Starting { thread: std::thread::spawn(move || Program { launcher }.world(size)) }
    }

    fn waits_for_the_end_of(&self, world: World) {
        assert!(self.launcher.wait_until_over(PATIENCE) && self.launcher.is_over());
        assert!(world.size > 0);
    }
}

struct Starting {
    thread: JoinHandle<(World, Vec<u8>)>,
}

impl Starting {
    fn world(self) -> (World, Vec<u8>) {
        eventually("a world for all", || self.thread.is_finished().then_some(()));
        self.thread.join().unwrap()
    }
}

/// All of them in one world.
fn together(programs: &[&Program]) -> Vec<World> {
    let starting: Vec<_> = programs.iter().map(|program| program.starts(programs.len())).collect();
    let worlds: Vec<_> = starting.into_iter().map(Starting::world).collect();
    let generation = worlds[0].0.generation;
    for (world, shared) in &worlds {
        assert_eq!((world.generation, world.size as usize), (generation, programs.len()));
        assert_eq!(shared, format!("of rank 0 in {generation}").as_bytes(), "L-3");
    }
    worlds.into_iter().map(|(world, _)| world).collect()
}

#[test]
fn l1_l3_a_world_is_given_to_all_and_all_share_what_rank_0_says() {
    let coordinator = Coordinator::start();
    let [a, b, c] = ["a", "b", "c"].map(|name| Program::join(&coordinator, name, 3, 3));
    let first = together(&[&a, &b, &c]);
    let mut ranks: Vec<u32> = first.iter().map(|world| world.rank).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [0, 1, 2]);
    assert!(!a.launcher.is_over() && !b.launcher.is_over() && !c.launcher.is_over());

    // One asks for the next world: nobody has it before all have asked.
    let early = a.starts(3);
    b.waits_for_the_end_of(first[1]);
    c.waits_for_the_end_of(first[2]);
    let other = b.starts(3);
    assert!(!early.thread.is_finished() && !other.thread.is_finished(), "L-1");
    eventually("one that is waited for", || {
        (coordinator.status("job").waiting.unwrap().members.len() == 1).then_some(())
    });
    let last = c.starts(3);
    let second = [early, other, last].map(|starting| starting.world().0);
    for (before, after) in first.iter().zip(second) {
        assert_eq!((after.rank, after.generation), (before.rank, before.generation + 1), "ranks stay");
    }
}

#[test]
fn l2_a_loss_and_a_newcomer_end_the_world_of_busy_programs() {
    let coordinator = Coordinator::start();
    let [a, b, c] = ["a", "b", "c"].map(|name| Program::join(&coordinator, name, 1, 4));
    let first = together(&[&a, &b, &c]);
    // The one that is lost is dropped: its connections end. What only a killed process does is tested with real ones.
    let lost = first.iter().position(|world| world.rank == 0).unwrap();
    let mut programs = vec![a, b, c];
    drop(programs.remove(lost));
    for program in &programs {
        program.waits_for_the_end_of(first[0]);
    }
    let second = together(&[&programs[0], &programs[1]]);
    let d = Program::join(&coordinator, "d", 1, 4);
    let newcomer = d.starts(3);
    for program in &programs {
        program.waits_for_the_end_of(second[0]);
    }
    let others: Vec<_> = programs.iter().map(|program| program.starts(3)).collect();
    let third: Vec<World> = others.into_iter().map(|starting| starting.world().0).collect();
    assert_eq!(newcomer.world().0.rank, 2, "who was there keeps its place");
    assert_eq!(
        third.iter().map(|world| world.rank).collect::<Vec<_>>(),
        second.iter().map(|world| world.rank).collect::<Vec<_>>()
    );
    eventually("the history to know when each world had begun", || {
        (first_steps(&coordinator) == 3 + 2 + 3).then_some(())
    });
}

fn first_steps(coordinator: &Coordinator) -> u64 {
    coordinator.received().iter().filter(|(kind, _)| kind.contains("first_step")).map(|(_, n)| n).sum()
}

#[test]
fn l4_nothing_is_said_while_a_world_runs() {
    let coordinator = Coordinator::start();
    let [a, b] = ["a", "b"].map(|name| Program::join(&coordinator, name, 2, 2));
    together(&[&a, &b]);
    eventually("the last that is said of a beginning", || (first_steps(&coordinator) == 2).then_some(()));
    let said = || {
        let mut received = coordinator.received();
        (received.remove("renew"), received)
    };
    let (_, before) = said();
    let renewals = eventually("renewals", || said().0.filter(|count| *count > 6));
    assert!(renewals > 6);
    assert_eq!(said().1, before, "L-4");
    assert!(!a.launcher.is_over() && !b.launcher.is_over());
}

#[test]
fn a_notice_is_a_planned_leave_and_one_too_many_waits() {
    let coordinator = Coordinator::start();
    let noticed = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&noticed);
    let told = options(&coordinator, "a", 1, 2).on_notice(move |_| seen.store(true, Ordering::Relaxed));
    let a = Program { launcher: Arc::new(Launcher::join(told).unwrap()) };
    let b = Program::join(&coordinator, "b", 1, 2);
    let worlds = together(&[&a, &b]);
    let spare = Program::join(&coordinator, "c", 1, 2);
    assert_eq!(spare.launcher.next_world(SLICE).unwrap(), Next::NotYet);
    eventually("the spare to be known", || coordinator.members("job").contains_key("c").then_some(()));
    assert_eq!(spare.launcher.job_has_a_world(), Some(true));
    assert!(!a.launcher.is_over() && !b.launcher.is_over(), "a spare ends no world");

    coordinator.notice("job", "a", Duration::from_secs(120));
    a.waits_for_the_end_of(worlds[0]);
    b.waits_for_the_end_of(worlds[1]);
    eventually("the callback", || noticed.load(Ordering::Relaxed).then_some(()));
    let others = [b.starts(2), spare.starts(2)];
    assert_eq!(a.next(), Next::End(End::Released));
    for other in others {
        assert_eq!(other.world().0.size, 2);
    }
}

#[test]
fn a_job_is_completed_when_all_have_finished() {
    let coordinator = Coordinator::start();
    let [a, b] = ["a", "b"].map(|name| Program::join(&coordinator, name, 2, 2));
    together(&[&a, &b]);
    let finishing = {
        let launcher = Arc::clone(&a.launcher);
        std::thread::spawn(move || launcher.finish(PATIENCE))
    };
    eventually("the first to have finished", || {
        let waiting = coordinator.status("job").waiting.unwrap();
        (waiting.kind() == v1::waiting::Kind::Finish).then_some(())
    });
    assert!(!finishing.is_finished());
    assert_eq!(b.launcher.finish(PATIENCE), Some(true));
    assert_eq!(finishing.join().unwrap(), Some(true));
    let late = Program::join(&coordinator, "late", 2, 2);
    let refused = eventually("a refusal", || match late.launcher.next_world(SLICE) {
        Ok(Next::NotYet) => None,
        other => Some(other),
    });
    assert!(matches!(refused, Err(TrainError::Refused(_))), "{refused:?}");
}

#[test]
fn who_has_finished_holds_up_nobody_who_goes_on() {
    let coordinator = Coordinator::start();
    let [a, b] = ["a", "b"].map(|name| Program::join(&coordinator, name, 1, 2));
    together(&[&a, &b]);
    assert_eq!(a.launcher.finish(SLICE), None);
    let goes_on = b.starts(1);
    assert_eq!(a.launcher.finish(PATIENCE), Some(false));
    drop(a);
    assert_eq!(goes_on.world().0.size, 1);
    assert!(b.launcher.close_job());
    b.waits_for_the_end_of(World { generation: 0, rank: 0, size: 1 });
    assert!(matches!(b.next(), Next::End(End::Closed(_))));
}

#[test]
fn without_a_coordinator_it_says_so_in_time_and_with_training_programs_it_is_refused() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let towards_nobody = LauncherOptions::new(&format!("http://{nobody}"), "job").unwrap();
    let alone = Launcher::join(towards_nobody.patience(Duration::from_millis(200), PATIENCE)).unwrap();
    let began = Instant::now();
    let failed = eventually("an error", || alone.next_world(SLICE).err());
    assert!(matches!(failed, TrainError::Unreachable { .. }), "{failed}");
    assert!(began.elapsed() >= Duration::from_millis(200));

    let coordinator = Coordinator::start();
    let mut state = reknit_trainer::NamedTensors::new().with_f32("w", [1], vec![0.0]);
    let train = Options::new(coordinator.url(), "job", common::ORDER).unwrap().name("t").unwrap();
    let mut trainer = Trainer::join(train, &state).unwrap();
    assert!(trainer.next_step(&mut state).unwrap().is_some());
    let launcher = Launcher::join(options(&coordinator, "stranger", 1, 2)).unwrap();
    let failed = eventually("the refusal", || launcher.next_world(SLICE).err());
    assert!(matches!(failed, TrainError::Refused(_)), "{failed}");
}
