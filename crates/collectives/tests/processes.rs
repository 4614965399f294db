//! Ranks that are processes of their own and share memory, and really die: killed or stopped at any instant, several at
//! once. The survivors return, whole, and go on in a smaller world; nothing is left of the dead.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]
#![allow(clippy::print_stdout, reason = "a rank tells its test what it does by lines")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{BOUND, Chance, listener, secret, seed};
use reknit_collectives::{
    AbortHandle, BreakReason, Broken, ControlWord, Group, GroupOptions, Place, ReduceOp,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};
use rustix::process::{Pid, Signal, kill_process};

/// What a process is told by its environment if it is to be a rank.
const IS_RANK: &str = "REKNIT_TEST_RANK";
/// What a rank's lines begin with.
const MARK: &str = "> ";

/// What a rank does again and again until the group breaks.
const KINDS: [&str; 5] = ["in-place", "into", "buffer", "scatter", "broadcast"];

fn input(rank: u32, round: usize, at: usize) -> f32 {
    ((at * 7 + rank as usize * 3 + round) % 11) as f32
}

/// A rank: does what it is told line by line. No test of its own: without the variable it does nothing.
#[test]
fn a_rank_of_the_other_tests() {
    if std::env::var_os(IS_RANK).is_none() {
        return;
    }
    let listener = listener();
    println!("\n{MARK}{}", listener.local_addr());
    let mut group: Option<Group> = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["form", generation, rank, size, next, stall_ms] => {
                let place = Place {
                    generation: Generation(generation.parse().unwrap()),
                    rank: Rank(rank.parse().unwrap()),
                    size: WorldSize(size.parse().unwrap()),
                    secret: secret(),
                    next: next.parse().unwrap(),
                };
                // The old one first, so that what is counted is the new one's.
                drop(group.take());
                let door = listener.open_ring(&place);
                let stall = Duration::from_millis(stall_ms.parse().unwrap());
                let options = GroupOptions { stall, chunk_bytes: 8192, ..GroupOptions::default() };
                let formed = Group::form(&door, &place, &options, AbortHandle::new()).unwrap();
                println!("{MARK}formed {}", formed.shares_memory());
                group = Some(formed);
            }
            ["run", kind, len] => {
                let broken = run(group.as_mut().unwrap(), kind, len.parse().unwrap());
                let suspects: Vec<String> = broken.suspects.iter().map(|rank| rank.0.to_string()).collect();
                let stalled = matches!(broken.reason, BreakReason::Stalled { .. });
                println!("{MARK}broken {} {stalled}", suspects.join(","));
            }
            _ => panic!("{line}"),
        }
    }
}

/// Does so until it fails. Every result is right, and the inputs of the one that fails are whole.
fn run(group: &mut Group, kind: &str, len: usize) -> Broken {
    let (rank, size) = (group.rank().0, group.size().0);
    let mut buffer = if kind == "buffer" {
        match group.buffer::<f32>(len) {
            Ok(buffer) => Some(buffer),
            Err(broken) => return broken,
        }
    } else {
        None
    };
    for round in 0.. {
        let own: Vec<f32> = (0..len).map(|at| input(rank, round, at)).collect();
        let sum = |at: usize| (0..size).map(|rank| input(rank, round, at)).sum::<f32>();
        let (none, op) = (ControlWord::NONE, ReduceOp::Sum);
        let result = match (kind, &mut buffer) {
            ("in-place", _) => {
                let mut data = own.clone();
                let result = group.all_reduce(&mut data, op, none);
                let want = |at| if result.is_ok() { sum(at) } else { own[at] };
                assert!(data.iter().enumerate().all(|(at, x)| *x == want(at)), "C-2: {result:?}");
                result
            }
            ("into", _) => {
                let mut output = vec![0.0; len];
                let result = group.all_reduce_into(&own, &mut output, op, none);
                assert!(result.is_err() || output.iter().enumerate().all(|(at, x)| *x == sum(at)));
                result
            }
            ("buffer", Some(buffer)) => {
                buffer.copy_from_slice(&own);
                let result = group.all_reduce_buffer(buffer, op, none);
                assert!(buffer[..] == own[..], "C-2");
                let right = buffer.result().iter().enumerate().all(|(at, x)| *x == sum(at));
                assert!(right && buffer.result().is_empty() == result.is_err());
                result
            }
            ("scatter", _) => {
                let part = reknit_collectives::part(len, group.size(), group.rank());
                let mut output = vec![0.0; part.len()];
                let result = group.reduce_scatter(&own, &mut output, op, none);
                let right = output.iter().zip(part).all(|(x, at)| *x == sum(at));
                assert!(result.is_err() || right);
                result
            }
            _ => {
                let root = round as u32 % size;
                let mut data = own.clone();
                let result = group.broadcast(&mut data, Rank(root), none);
                let right = data.iter().enumerate().all(|(at, x)| *x == input(root, round, at));
                assert!(result.is_err() || right);
                result
            }
        };
        if let Err(broken) = result {
            return broken;
        }
    }
    unreachable!("the rounds do not end")
}

/// A process that is a rank.
struct Process {
    child: Child,
    to: ChildStdin,
    from: mpsc::Receiver<String>,
    addr: SocketAddr,
}

impl Process {
    fn start() -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_rank_of_the_other_tests", "--nocapture"]).env(IS_RANK, "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (to, lines) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
        let (tell, from) = mpsc::channel();
        thread::spawn(move || {
            let lines = lines.map_while(Result::ok);
            lines.filter_map(|line| Some(line.strip_prefix(MARK)?.to_owned())).try_for_each(|l| tell.send(l))
        });
        let addr = from.recv_timeout(BOUND).unwrap().parse().unwrap();
        Process { child, to, from, addr }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    fn hear(&self) -> String {
        self.from.recv_timeout(BOUND).expect("a rank hangs or has failed")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn form(processes: &mut [Process], generation: u64, stall: Duration) {
    let (size, stall) = (processes.len(), stall.as_millis());
    let nexts: Vec<SocketAddr> = (0..size).map(|rank| processes[(rank + 1) % size].addr).collect();
    for (rank, process) in processes.iter_mut().enumerate() {
        process.tell(&format!("form {generation} {rank} {size} {} {stall}", nexts[rank]));
    }
    for process in processes {
        assert_eq!(process.hear(), format!("formed {}", size > 1), "all are on one host");
    }
}

/// A pause of a random length is what is tested; nothing depends on how long it really is.
fn pause(chance: &mut Chance) {
    let until = Instant::now() + Duration::from_micros(chance.below(20_000));
    while Instant::now() < until {
        thread::yield_now();
    }
}

#[test]
fn ranks_that_are_killed_at_any_instant_break_the_others_who_go_on_without_them() {
    let seed = seed("ranks_that_are_killed_at_any_instant");
    let mut chance = Chance(seed);
    for (round, kind) in KINDS.iter().cycle().take(3 * KINDS.len()).enumerate() {
        let mut processes: Vec<Process> = (0..6).map(|_| Process::start()).collect();
        let mut generation = 0;
        while processes.len() > 1 {
            generation += 1;
            form(&mut processes, generation, BOUND);
            let len = [1, 700, 5000, 100_000][chance.below(4) as usize];
            processes.iter_mut().for_each(|process| process.tell(&format!("run {kind} {len}")));
            pause(&mut chance);
            // Any number of them, neighbours or not, but for one.
            let victims = 1 + chance.below(processes.len() as u64 - 1) as usize;
            let mut dead = Vec::new();
            for _ in 0..victims {
                let process = processes.swap_remove(chance.below(processes.len() as u64) as usize);
                process.signal(Signal::KILL);
                dead.push(process);
            }
            for process in &processes {
                let said = process.hear();
                let fine = said.starts_with("broken ") && said.ends_with(" false");
                assert!(fine, "C-1: seed {seed}, round {round}, {kind} of {len}: {said}");
            }
            // A line of the dead would be a result of a world that no longer is.
            drop(dead);
        }
    }
}

#[test]
fn a_rank_that_is_stopped_stalls_the_others_who_name_it_and_harms_nobody_when_it_goes_on() {
    let seed = seed("a_rank_that_is_stopped");
    let mut chance = Chance(seed);
    for kind in KINDS {
        let mut processes: Vec<Process> = (0..3).map(|_| Process::start()).collect();
        form(&mut processes, 1, Duration::from_millis(300));
        processes.iter_mut().for_each(|process| process.tell(&format!("run {kind} 50000")));
        pause(&mut chance);
        let stopped = chance.below(3) as usize;
        processes[stopped].signal(Signal::STOP);
        let others: Vec<String> =
            (0..3).filter(|rank| *rank != stopped).map(|rank| processes[rank].hear()).collect();
        // Who is first names it; the other may hear of it from that one.
        let names = |said: &String| *said == format!("broken {stopped} true");
        assert!(others.iter().any(names), "seed {seed}, {kind}, {stopped} is stopped: {others:?}");
        processes[stopped].signal(Signal::CONT);
        assert!(processes[stopped].hear().starts_with("broken "));
        // The same three once more.
        form(&mut processes, 2, BOUND);
    }
}

/// Rules C-10 and C-12: the kernel has the memory of killed ranks back.
#[test]
fn nothing_is_left_of_killed_ranks() {
    let mut processes: Vec<Process> = (0..3).map(|_| Process::start()).collect();
    form(&mut processes, 1, BOUND);
    let segments = |process: &Process| {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.child.id())).unwrap();
        maps.matches("memfd:reknit").count()
    };
    processes.iter_mut().for_each(|process| process.tell("run in-place 1000000"));
    let mut last = processes.remove(0);
    processes.iter().for_each(|process| process.signal(Signal::KILL));
    assert!(last.hear().starts_with("broken "));
    drop(processes);
    assert!(segments(&last) > 0, "it still has the group");
    last.tell(&format!("form 2 0 1 {} 1000", last.addr));
    assert_eq!(last.hear(), "formed false");
    assert_eq!(segments(&last), 0);
}
