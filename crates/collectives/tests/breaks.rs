//! What happens when ranks die, leave, stall, give up or disagree: everybody returns, and nobody with a wrong sum.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::io::Read;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{BOUND, Chance, Cut, WAYS, World, each, index, relay, seed, together};
use reknit_collectives::{
    AbortHandle, BreakReason, Broken, Call, CallKind, ControlWord, DType, FormError, Group, GroupOptions,
    Place, Purpose, ReduceOp, SharedMemory, dial,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

const NONE: ControlWord = ControlWord::NONE;

/// How long a break may take to get around a ring on a busy machine. It takes well under a millisecond on a quiet one.
const PROMPT: Duration = Duration::from_secs(5);

/// Nothing in these tests stalls for so long, so that nothing ends by a time-out unless a test shortens it.
fn options() -> GroupOptions {
    options_of(SharedMemory::Unasked)
}

fn options_of(shared_memory: SharedMemory) -> GroupOptions {
    GroupOptions { chunk_bytes: 4096, stall: BOUND * 2, shared_memory, ..GroupOptions::default() }
}

/// Worlds of these sizes, joined in every way.
fn worlds(sizes: impl IntoIterator<Item = usize>) -> impl Iterator<Item = (usize, World)> {
    let both = |size| WAYS.map(|way| (size, World::with(size, options_of(way))));
    sizes.into_iter().flat_map(both)
}

/// A rank's numbers: their bits differ from rank to rank, also where their values are equal.
fn input(rank: usize, len: usize) -> Vec<f64> {
    (0..len).map(|at| if at % 3 == 0 && rank == 0 { -0.0 } else { ((at * 5 + rank) % 100) as f64 }).collect()
}

fn sums(size: usize, len: usize) -> Vec<f64> {
    let inputs: Vec<_> = (0..size).map(|rank| input(rank, len)).collect();
    (0..len).map(|at| inputs.iter().map(|input| input[at]).sum()).collect()
}

fn bits(numbers: &[f64]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// One all_reduce in which some link is cut: returns whether it succeeded, and checks all that must hold either way.
fn reduce_in_a_dying_ring(group: &mut Group, len: usize, context: &str) -> Result<Vec<f64>, Broken> {
    let start = Instant::now();
    let mut data = input(index(group), len);
    let result = group.all_reduce(&mut data, ReduceOp::Sum, NONE);
    assert!(start.elapsed() < PROMPT, "C-1: {context}: rank {} took {:?}", group.rank(), start.elapsed());
    let Err(broken) = result else { return Ok(data) };
    assert_eq!(bits(&data), bits(&input(index(group), len)), "C-2: {context}: rank {}", group.rank());
    assert_eq!(group.all_reduce(&mut data, ReduceOp::Sum, NONE), Err(broken.clone()), "C-5: {context}");
    assert!(matches!(broken.reason, BreakReason::NeighbourLost { .. }), "{context}: {broken:?}");
    let next = Rank((group.rank().0 + 1) % group.size().0);
    let prev = Rank((group.rank().0 + group.size().0 - 1) % group.size().0);
    // In shared memory all hear of the same loss.
    let is_neighbour = broken.suspects == [next] || broken.suspects == [prev] || group.shares_memory();
    assert!(is_neighbour && broken.suspects.len() == 1, "{context}: {broken:?}");
    Err(broken)
}

/// Cuts the link from `from` to its next after `bytes` bytes of an all_reduce.
fn check_cut(world: &mut World, size: usize, len: usize, from: usize, bytes: usize, cut: Cut) {
    let context = format!("{len} numbers, {size} ranks, {cut:?} after {bytes} bytes from rank {from}");
    let groups = world.form_via(|rank, next| if rank == from { relay(next, bytes, cut) } else { next });
    let told = context.clone();
    let (_, results) = each(groups, move |group| reduce_in_a_dying_ring(group, len, &told));
    assert!(results[(from + 1) % size].is_err(), "{context}: {results:?}");
    for result in results.into_iter().flatten() {
        assert!(result == sums(size, len), "{context}: a wrong sum");
    }
}

/// How many bytes rank 0 sends in an all_reduce of `len` numbers of eight bytes each.
fn sent_bytes(size: usize, len: usize) -> usize {
    if 8 * len * (size - 1) <= 64 << 10 {
        // It hands on what all others but the next contribute, and a head before each.
        return (size - 1) * (64 + 8 * len);
    }
    let parts: Vec<_> = (0..size).map(|rank| len / size + usize::from(rank < len % size)).collect();
    // Rank 0 sends every part twice, but for its own and the next rank's, which it sends once; and a head before each.
    2 * (size - 1) * 64 + 8 * (2 * len - parts[0] - parts[1])
}

#[test]
fn a_link_cut_after_any_byte_breaks_every_rank_or_leaves_it_a_right_sum() {
    for size in 2..=4 {
        let mut world = World::with(size, options());
        let len = 5;
        for bytes in 0..sent_bytes(size, len) {
            let cut = if bytes % 2 == 0 { Cut::Close } else { Cut::Reset };
            check_cut(&mut world, size, len, 0, bytes, cut);
        }
    }
}

#[test]
fn a_link_cut_at_any_chunk_breaks_every_rank_or_leaves_it_a_right_sum() {
    for (size, len) in [(2, 60_000), (4, 50_000)] {
        let mut world = World::with(size, options());
        for (round, bytes) in (0..sent_bytes(size, len)).step_by(4096 * 2).enumerate() {
            let cut = if round % 2 == 0 { Cut::Close } else { Cut::Reset };
            check_cut(&mut world, size, len, 0, bytes + round % 3, cut);
        }
    }
}

#[test]
fn a_link_cut_after_the_last_byte_breaks_nobody() {
    for (size, len) in [(2, 5), (3, 5), (4, 5), (2, 60_000), (4, 50_000)] {
        let bytes = sent_bytes(size, len);
        let groups = World::with(size, options())
            .form_via(|rank, next| if rank == 0 { relay(next, bytes, Cut::Close) } else { next });
        let (_, results) = each(groups, move |group| {
            let mut data = input(index(group), len);
            group.all_reduce(&mut data, ReduceOp::Sum, NONE).map(|_| data)
        });
        assert!(
            results.iter().all(|result| *result == Ok(sums(size, len))),
            "C-6: {size} ranks, {len} numbers"
        );
    }
}

#[test]
fn a_rank_that_leaves_instead_of_calling_breaks_all_the_others() {
    for (size, mut world) in worlds(2..=6) {
        for leaver in 0..size {
            let works = world.form().into_iter().map(|mut group| {
                move || match index(&group) == leaver {
                    true => drop(group),
                    false => {
                        let context = format!("rank {leaver} of {size} leaves");
                        let result = reduce_in_a_dying_ring(&mut group, 100, &context);
                        assert!(result.is_err(), "{context}");
                    }
                }
            });
            together(works.collect());
        }
    }
}

#[test]
fn a_rank_that_finishes_a_collective_and_leaves_makes_no_other_fail_it() {
    for (size, mut world) in worlds(2..=4) {
        for round in 0..60 {
            let len = [0, 1, 50, 3000][round % 4];
            let works = world.form().into_iter().map(|mut group| {
                move || {
                    let mut data = input(index(&group), len);
                    let result = group.all_reduce(&mut data, ReduceOp::Sum, NONE);
                    drop(group);
                    assert!(
                        result.is_ok() && data == sums(size, len),
                        "C-6: {size} ranks, round {round}: {result:?}"
                    );
                }
            });
            together(works.collect());
        }
    }
}

#[test]
fn an_abort_at_any_instant_ends_every_rank() {
    let seed = seed("an_abort_at_any_instant");
    let mut chance = Chance(seed);
    for (size, mut world) in worlds([1, 2, 4]) {
        for round in 0..60 {
            let groups = world.form();
            let victim = chance.below(size as u64) as usize;
            let abort = groups[victim].abort_handle();
            let wait = Duration::from_nanos(chance.below(800_000));
            let (go, gone) = (Arc::new(Barrier::new(size + 1)), Instant::now());
            let gate = go.clone();
            let aborter = thread::spawn(move || {
                gate.wait();
                // A pause of a random length is what is tested here; nothing depends on how long it really is.
                let until = Instant::now() + wait;
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
                abort.abort(BreakReason::Protocol { what: "the test says so" });
            });
            let (_, reasons) = each(groups, move |group| {
                go.wait();
                let mut data = input(index(group), 3000);
                loop {
                    data.copy_from_slice(&input(index(group), 3000));
                    if let Err(broken) = group.all_reduce(&mut data, ReduceOp::Sum, NONE) {
                        assert_eq!(bits(&data), bits(&input(index(group), 3000)), "C-2");
                        return broken.reason;
                    }
                }
            });
            aborter.join().unwrap();
            let context = format!("C-1: seed {seed}, {size} ranks, round {round}: {reasons:?}");
            assert!(gone.elapsed() < PROMPT, "{context}");
            for (rank, reason) in reasons.iter().enumerate() {
                let theirs = matches!(reason, BreakReason::NeighbourLost { .. });
                let own = *reason == BreakReason::Protocol { what: "the test says so" };
                assert!(if rank == victim { own } else { theirs }, "{context}");
            }
        }
    }
}

#[test]
fn an_abort_while_everybody_computes_is_seen_by_everybody_in_the_next_collective() {
    let mut groups = World::with(3, options()).form();
    let (tell, told) = mpsc::channel();
    groups[1].on_neighbour_lost(move |rank| tell.send(rank).unwrap());
    groups[0].abort_handle().abort(BreakReason::Aborted);
    assert_eq!(told.recv_timeout(PROMPT), Ok(Rank(0)), "the neighbour learns of it while it computes");
    let (_, results) = each(groups, |group| group.barrier(NONE).unwrap_err());
    assert_eq!(results[0].reason, BreakReason::Aborted);
    assert_eq!(results[0].suspects, []);
    assert!(matches!(results[1].reason, BreakReason::NeighbourLost { rank: Rank(0), .. }), "{results:?}");
    assert!(matches!(results[2].reason, BreakReason::NeighbourLost { .. }), "{results:?}");
}

#[test]
fn a_lost_neighbour_is_noticed_once_while_nobody_calls_anything() {
    let mut world = World::with(4, options());
    for _ in 0..20 {
        let mut groups = world.form();
        let (tell, told) = mpsc::channel();
        for group in &mut groups {
            let (tell, rank) = (tell.clone(), group.rank());
            group.on_neighbour_lost(move |lost| tell.send((rank, lost)).unwrap());
        }
        drop(tell);
        let dead = groups.remove(2);
        drop(dead);
        let mut seen: Vec<_> = (0..3).map(|_| told.recv_timeout(PROMPT).unwrap()).collect();
        seen.sort();
        assert_eq!(seen.iter().map(|(rank, _)| rank.0).collect::<Vec<_>>(), [0, 1, 3]);
        // Rank 0 can only see a neighbour pass it on, and on a busy machine that may overtake the death itself on its
        // way to one of the dead rank's neighbours; to both it cannot.
        assert!(seen.iter().all(|(rank, lost)| (rank.0 + lost.0) % 2 == 1), "{seen:?}");
        assert!(seen[1..].iter().any(|(_, lost)| *lost == Rank(2)), "{seen:?}");
        drop(groups);
        assert_eq!(
            told.recv_timeout(PROMPT),
            Err(mpsc::RecvTimeoutError::Disconnected),
            "nobody is told twice"
        );
    }
}

#[test]
fn a_loss_is_told_also_to_who_asks_later_and_to_who_is_in_a_collective() {
    let mut groups = World::with(2, options()).form();
    drop(groups.remove(1));
    let mut alone = groups.remove(0);
    assert!(alone.barrier(NONE).is_err());
    let (tell, told) = mpsc::channel();
    alone.on_neighbour_lost(move |lost| tell.send(lost).unwrap());
    assert_eq!(told.recv_timeout(PROMPT), Ok(Rank(1)));
}

#[test]
fn an_abort_of_ones_own_is_no_lost_neighbour() {
    let mut groups = World::with(2, options()).form();
    let (tell, told) = mpsc::channel::<Rank>();
    groups[0].on_neighbour_lost(move |lost| tell.send(lost).unwrap());
    groups[0].abort_handle().abort(BreakReason::Aborted);
    let (groups, _) = each(groups, |group| group.barrier(NONE).unwrap_err());
    drop(groups);
    assert_eq!(told.recv_timeout(PROMPT), Err(mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn a_callback_may_drop_its_own_group() {
    let mut groups = World::with(2, options()).form();
    let (hand_over, handed) = mpsc::channel::<Group>();
    let (tell, told) = mpsc::channel();
    groups[0].on_neighbour_lost(move |_| {
        drop(handed.recv().unwrap());
        tell.send(()).unwrap();
    });
    drop(groups.remove(1));
    hand_over.send(groups.remove(0)).unwrap();
    assert_eq!(told.recv_timeout(PROMPT), Ok(()));
}

#[test]
fn a_rank_that_never_calls_stalls_the_others_who_say_so() {
    for way in WAYS {
        check_stall(way);
    }
}

fn check_stall(way: SharedMemory) {
    let stall = Duration::from_millis(200);
    let groups = World::with(3, GroupOptions { stall, ..options_of(way) }).form();
    let start = Instant::now();
    let (_, results) = each(groups, move |group| match index(group) {
        // It holds its connections open, but does nothing until the others are through.
        0 => {
            thread::park_timeout(stall * 3);
            group.barrier(NONE).unwrap_err()
        }
        _ => group.barrier(NONE).unwrap_err(),
    });
    assert!(start.elapsed() < PROMPT, "C-1");
    let stalled =
        |broken: &Broken| matches!(broken.reason, BreakReason::Stalled { waited } if waited >= stall);
    assert!(stalled(&results[1]) || stalled(&results[2]), "{results:?}");
    if stalled(&results[1]) {
        assert_eq!(results[1].suspects, [Rank(0)]);
    }
}

#[test]
fn a_next_rank_that_is_gone_is_noticed_though_the_previous_one_is_alive_and_silent() {
    let (listener, next) = (common::listener(), common::listener());
    let secret = common::secret();
    let place = Place {
        generation: Generation(1),
        rank: Rank(1),
        size: WorldSize(3),
        secret: secret.clone(),
        next: next.local_addr(),
    };
    let (door, next_door) =
        (listener.open_ring(&place), next.open_ring(&Place { rank: Rank(2), ..place.clone() }));
    let silent = Purpose::Ring { from: Rank(0), to: Rank(1) };
    let handle = AbortHandle::new();
    let _silent =
        dial(listener.local_addr(), silent, Generation(1), &secret, common::soon(), &handle).unwrap();
    let group = Group::form(&door, &place, &options(), handle.clone()).unwrap();
    let connection = next_door.take_previous(common::soon(), &handle).unwrap();
    // Read on, so that it closes in good order once it has the header and the first word.
    let leave = move || {
        (&connection).read_exact(&mut [0; 36]).unwrap();
        None
    };
    let call = move || {
        let mut group = group;
        Some(group.barrier(NONE).unwrap_err())
    };
    let works: Vec<Box<dyn FnOnce() -> Option<Broken> + Send>> = vec![Box::new(leave), Box::new(call)];
    let start = Instant::now();
    let results = together(works);
    assert!(start.elapsed() < PROMPT, "C-1");
    assert_eq!(results[1].as_ref().unwrap().suspects, [Rank(2)]);
}

#[test]
fn a_stall_is_counted_from_the_last_byte_that_moved() {
    for way in WAYS {
        check_stall_of_eight(way);
    }
}

fn check_stall_of_eight(way: SharedMemory) {
    let stall = Duration::from_millis(400);
    let groups = World::with(2, GroupOptions { stall, ..options_of(way) }).form();
    let (_, results) = each(groups, move |group| {
        let start = Instant::now();
        for _ in 0..8 {
            if index(group) == 0 {
                thread::park_timeout(stall / 4);
            }
            group.barrier(NONE).unwrap();
        }
        start.elapsed()
    });
    assert!(results[1] > stall, "eight short waits are together longer than one may be: {results:?}");
}

#[test]
fn two_ranks_that_call_different_things_both_say_what() {
    for (_, mut world) in worlds([2]) {
        check_two_that_differ(&mut world);
    }
}

fn check_two_that_differ(world: &mut World) {
    for round in 0..20 {
        let groups = world.form();
        let (_, results) = each(groups, move |group| {
            group.barrier(NONE).unwrap();
            match index(group) == round % 2 {
                true => group.barrier(NONE).unwrap_err().reason,
                false => group.all_reduce(&mut [0u8; 4], ReduceOp::Min, NONE).unwrap_err().reason,
            }
        });
        let barrier = Call { sequence: 1, kind: CallKind::Barrier, count: 0 };
        let kind = CallKind::AllReduce { dtype: DType::U8, op: ReduceOp::Min };
        let reduce = Call { sequence: 1, kind, count: 4 };
        assert_eq!(results[round % 2], BreakReason::Mismatch { ours: barrier, theirs: reduce });
        assert_eq!(results[1 - round % 2], BreakReason::Mismatch { ours: reduce, theirs: barrier });
        let text = "this rank called barrier #1, another one called all_reduce #1 (min) of 4 u8";
        assert_eq!(results[round % 2].to_string(), text);
    }
}

#[test]
fn a_rank_that_calls_something_else_breaks_everybody_and_somebody_says_why() {
    for (size, mut world) in worlds(3..=5) {
        for odd in 0..size {
            let (_, results) = each(world.form(), move |group| match index(group) == odd {
                true => group.all_reduce(&mut [0f32; 1001], ReduceOp::Sum, NONE).unwrap_err(),
                false => group.all_reduce(&mut [0f32; 1000], ReduceOp::Sum, NONE).unwrap_err(),
            });
            let says_why = |broken: &Broken| matches!(broken.reason, BreakReason::Mismatch { .. });
            assert!(results.iter().any(says_why), "C-7: {results:?}");
        }
    }
}

#[test]
fn a_wait_too_long_for_the_clock_is_as_good_as_one_for_ever() {
    WAYS.into_iter().for_each(check_endless);
}

fn check_endless(shared_memory: SharedMemory) {
    let (form, stall, spin) = (Duration::MAX, Duration::MAX, Duration::ZERO);
    let options = GroupOptions { form, stall, spin, chunk_bytes: 0, shared_memory };
    let mut groups = World::with(2, options).form();
    let last = groups.remove(1);
    let works: Vec<Box<dyn FnOnce() -> bool + Send>> = vec![
        Box::new(move || groups.remove(0).barrier(NONE).is_err()),
        Box::new(move || {
            drop(last);
            true
        }),
    ];
    assert_eq!(together(works), [true, true]);
}

#[test]
fn what_a_trainer_shares_between_threads_can_be_shared() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<Group>();
    is_send::<AbortHandle>();
    is_sync::<AbortHandle>();
    is_send::<reknit_collectives::Door>();
    is_sync::<reknit_collectives::Door>();
    is_send::<reknit_collectives::Listener>();
    is_sync::<reknit_collectives::Listener>();
    is_send::<FormError>();
    is_sync::<Broken>();
}

#[test]
fn a_world_of_one_knows_only_its_own_abort() {
    let mut group = World::with(1, options()).form().remove(0);
    let mut data = [3f32, 4.0];
    assert_eq!(group.all_reduce(&mut data, ReduceOp::Mean, ControlWord::FAILED), Ok(ControlWord::FAILED));
    assert_eq!(data, [3.0, 4.0]);
    group.abort_handle().abort(BreakReason::Aborted);
    let broken = group.barrier(NONE).unwrap_err();
    assert_eq!(
        (broken.reason, broken.generation, broken.suspects),
        (BreakReason::Aborted, group.generation(), vec![])
    );
}

#[test]
fn a_handle_aborted_before_forming_forms_nothing() {
    let listener = common::listener();
    let place = Place {
        generation: Generation(1),
        rank: Rank(0),
        size: WorldSize(2),
        secret: common::secret(),
        next: listener.local_addr(),
    };
    let door = listener.open_ring(&place);
    let abort = AbortHandle::new();
    abort.abort(BreakReason::Aborted);
    let result = Group::form(&door, &place, &options(), abort);
    assert!(matches!(result, Err(FormError::Aborted { reason: BreakReason::Aborted })));
}

#[test]
fn who_adds_in_place_and_who_does_not_may_meet() {
    for (size, mut world) in worlds(2..=4) {
        for odd in 0..size {
            each(world.form(), move |group| {
                // The second time it needs no new memory, the third time more.
                for len in [30_000, 20_000, 600_000, 1] {
                    let mut data = input(index(group), len);
                    if index(group) == odd {
                        group.all_reduce(&mut data, ReduceOp::Sum, NONE).unwrap();
                    } else {
                        let own = data.clone();
                        group.all_reduce_into(&own, &mut data, ReduceOp::Sum, NONE).unwrap();
                    }
                    assert!(data == sums(size, len), "{len} numbers, {odd} of {size} in place");
                }
            });
        }
    }
}

#[test]
fn ranks_of_which_one_declines_do_not_share_memory() {
    let mut world = World::with(3, options_of(SharedMemory::Offered));
    let groups = world.form_each(|rank, options| {
        options.shared_memory = if rank == 1 { SharedMemory::Declined } else { SharedMemory::Offered };
    });
    each(groups, |group| {
        assert!(!group.shares_memory());
        let mut buffer = group.buffer::<f64>(1000).unwrap();
        buffer.copy_from_slice(&input(index(group), 1000));
        group.all_reduce_buffer(&mut buffer, ReduceOp::Sum, NONE).unwrap();
        assert!(buffer.result() == sums(3, 1000));
    });
}

/// Rule C-12: it is private once its collective has failed.
#[test]
fn a_buffer_outlives_its_group_and_is_added_again_in_the_next() {
    let mut world = World::with(3, options_of(SharedMemory::Offered));
    let (mut groups, mut buffers) = each(world.form(), |group| {
        let mut buffer = group.buffer::<f64>(5000).unwrap();
        buffer.copy_from_slice(&input(index(group), 5000));
        buffer
    });
    drop(groups.remove(0));
    buffers.remove(0);
    let works = groups.into_iter().zip(buffers).map(|(mut group, mut buffer)| {
        move || {
            assert!(group.all_reduce_buffer(&mut buffer, ReduceOp::Sum, NONE).is_err());
            assert_eq!(buffer.result(), [], "what was there is no result any more");
            assert!(bits(&buffer) == bits(&input(index(&group), 5000)), "C-2");
            buffer
        }
    });
    let survivors = std::sync::Mutex::new(together(works.collect()));
    let survivors = Arc::new(survivors);
    let mut world = World::with(2, options_of(SharedMemory::Offered));
    each(world.form(), move |group| {
        let mut buffer = {
            let mut survivors = survivors.lock().unwrap();
            let own = input(index(group) + 1, 5000);
            let at = survivors.iter().position(|buffer| buffer[..] == own[..]).unwrap();
            survivors.remove(at)
        };
        group.all_reduce_buffer(&mut buffer, ReduceOp::Sum, NONE).unwrap();
        let want: Vec<f64> = input(1, 5000).iter().zip(input(2, 5000)).map(|(a, b)| a + b).collect();
        assert!(buffer.result() == want, "exactly the sum of who is left");
    });
}

#[test]
fn who_takes_another_buffer_than_the_others_is_told() {
    let groups = World::with(2, options_of(SharedMemory::Offered)).form();
    let (_, results) = each(groups, |group| {
        let mut buffers = [group.buffer::<u8>(64).unwrap(), group.buffer::<u8>(64).unwrap()];
        group.all_reduce_buffer(&mut buffers[index(group)], ReduceOp::Max, NONE).unwrap_err().reason
    });
    assert!(results.iter().all(|reason| matches!(reason, BreakReason::Mismatch { .. })), "C-7: {results:?}");
    let text = results[0].to_string();
    assert!(text.contains("buffer 0 of 64 u8") && text.contains("buffer 1 of 64 u8"), "{text}");
}

#[test]
fn a_buffer_larger_than_memory_can_be_is_an_error() {
    for way in WAYS {
        for len in [usize::MAX, 1 << 61, 1 << 45] {
            let groups = World::with(2, options_of(way)).form();
            let (_, results) = each(groups, move |group| group.buffer::<f64>(len).map(|buffer| buffer.len()));
            assert!(results.iter().all(Result::is_err), "{way:?}: {results:?}");
        }
    }
}
