//! C-10: threads and descriptors end with what they belong to. The only test in its process, because it counts them.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::time::Instant;

use common::{WAYS, World, each, index, soon};
use reknit_collectives::{BreakReason, ControlWord, GroupOptions, ReduceOp, SharedMemory};

/// How many threads and descriptors this process has, and how many segments of shared memory it maps.
fn count() -> (usize, usize, usize) {
    let entries = |path| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (entries("/proc/self/task"), entries("/proc/self/fd"), maps.matches("memfd:reknit").count())
}

/// A joined thread may be in the kernel's list for a moment longer.
fn check_count(want: (usize, usize, usize), when: &str) {
    let deadline = soon();
    while count() != want {
        assert!(
            Instant::now() < deadline,
            "C-10: {:?} threads, descriptors and segments {when}, not {want:?}",
            count()
        );
        std::thread::yield_now();
    }
}

/// How many worlds of each kind there are; and of two ranks that share memory, so many.
const ROUNDS: usize = 100;
const ROUNDS_MOST: usize = 10_000;

#[test]
fn worlds_that_form_and_break_leave_nothing_behind() {
    let before = count();
    for (size, shared_memory) in [1, 2, 4].into_iter().flat_map(|size| WAYS.map(|way| (size, way))) {
        let mut world = World::with(size, GroupOptions { shared_memory, ..GroupOptions::default() });
        let listening = count();
        let most = size == 2 && shared_memory == SharedMemory::Offered;
        for round in 0..if most { ROUNDS_MOST } else { ROUNDS } {
            let mut groups = world.form();
            if round % 4 == 1 {
                groups.remove(0);
            }
            each(groups, move |group| {
                assert_eq!(group.shares_memory(), size > 1 && shared_memory == SharedMemory::Offered);
                // Enough for memory of their own for the results.
                let mut data = vec![1f32; 40_000];
                let buffer = group.buffer::<f32>(1000);
                assert!(size == 1 || buffer.is_ok() || round % 4 == 1);
                let first = index(group) == 0;
                match round % 4 {
                    0 => {}
                    2 if first => group.abort_handle().abort(BreakReason::Aborted),
                    3 if first => {
                        let _ = group.barrier(ControlWord::NONE);
                    }
                    _ => group.on_neighbour_lost(|_| {}),
                }
                let result = group.all_reduce(&mut data, ReduceOp::Sum, ControlWord::NONE);
                assert!(size == 1 || result.is_ok() == (round % 4 == 0), "round {round}: {result:?}");
            });
            check_count(listening, "after a world has ended");
        }
        drop(world);
        check_count(before, "after its listeners have ended");
    }
}
