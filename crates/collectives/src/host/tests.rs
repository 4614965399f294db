//! A rank that dies after any of its counts: whoever else gets its result has the right one, and whoever does not has what it
//! gave as it was. (`tests/processes.rs` kills processes, at random instants.)

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;
use crate::call::CallKind;
use crate::element::DType;

/// Ranks of one host, as if each were a process.
fn hosts(ranks: usize) -> Vec<Host> {
    // Few elements are several windows.
    let layout = Layout::new(ranks, 4096);
    let nonce = [7; 16];
    let first = prepare(layout, nonce).unwrap();
    let place = first.whereabouts().unwrap();
    let others: Vec<_> = (1..ranks).map(|_| enter(layout, place, nonce).unwrap()).collect();
    let host = |(own, segment)| Host::new(segment, layout, own, Duration::ZERO, Duration::from_secs(60));
    std::iter::once(first).chain(others).enumerate().map(host).collect()
}

type Work = fn(&mut Host, &dyn Fn() -> Option<Stop>) -> Result<(), HostFault>;

/// Has all ranks do it, of which `dying` is gone once it has counted so often. The others are told as watchers tell them.
/// Returns what became of each, and how often the dying one has counted.
fn play(ranks: usize, dying: usize, counts: u64, work: Work) -> (Vec<Result<(), HostFault>>, u64) {
    let hosts = hosts(ranks);
    let all: Vec<Progress> = hosts.iter().map(|host| host.progress().clone()).collect();
    let is_dead = AtomicBool::new(false);
    thread::scope(|scope| {
        let (all, is_dead) = (&all, &is_dead);
        let run = |(rank, mut host): (usize, Host)| {
            scope.spawn(move || {
                let own = &all[rank];
                let dies = || (own.counted() >= counts).then_some(Stop::Aborted);
                let hears = || is_dead.load(Ordering::Relaxed).then_some(Stop::Lost);
                let result = if rank == dying { work(&mut host, &dies) } else { work(&mut host, &hears) };
                if rank == dying {
                    is_dead.store(true, Ordering::Relaxed);
                    all.iter().for_each(Progress::ring);
                } else if result.is_err() {
                    own.give_up(Rank(dying as u32));
                }
                result
            })
        };
        let threads: Vec<_> = hosts.into_iter().enumerate().map(run).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        (results, all[dying].counted())
    })
}

const DTYPE: DType = DType::I64;
const LEN: usize = 2000;

fn input(rank: usize) -> Vec<i64> {
    (0..LEN).map(|at| (at * 31 + rank * 7919) as i64).collect()
}

fn sums(ranks: usize) -> Vec<i64> {
    (0..LEN).map(|at| (0..ranks).map(|rank| input(rank)[at]).sum()).collect()
}

fn call(sequence: u64, kind: CallKind) -> Call {
    Call { sequence, kind, count: LEN as u64 }
}

fn in_place(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    let (ranks, own) = (host.layout.ranks, host.own);
    let mut data = input(own);
    let call = call(0, CallKind::AllReduce { dtype: DTYPE, op: ReduceOp::Sum });
    let result = host.all_reduce(call, ReduceOp::Sum, Operands::InPlace(&mut data), ControlWord::NONE, stop);
    let want = if result.is_ok() { sums(ranks) } else { input(own) };
    assert!(data == want, "C-2: rank {own} of {ranks}: {result:?}");
    result.map(|_| ())
}

fn apart(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    let (ranks, own) = (host.layout.ranks, host.own);
    let (input, mut output) = (input(own), vec![0; LEN]);
    let call = call(0, CallKind::AllReduce { dtype: DTYPE, op: ReduceOp::Sum });
    let operands = Operands::Apart { input: &input, output: &mut output };
    host.all_reduce(call, ReduceOp::Sum, operands, ControlWord::NONE, stop)?;
    assert!(output == sums(ranks), "C-3: rank {own} of {ranks}");
    Ok(())
}

fn scattered(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    let (ranks, own) = (host.layout.ranks, host.own);
    let (input, mut output) = (input(own), vec![0; LEN]);
    let call = call(0, CallKind::ReduceScatter { dtype: DTYPE, op: ReduceOp::Sum });
    host.reduce_scatter(call, ReduceOp::Sum, &input, &mut output, ControlWord::NONE, stop)?;
    let place = part(LEN, WorldSize(ranks as u32), Rank(own as u32));
    assert!(output[place.clone()] == sums(ranks)[place], "C-3: rank {own} of {ranks}");
    Ok(())
}

fn gathered(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    let (ranks, own) = (host.layout.ranks, host.own);
    let place = |rank: usize| part(LEN, WorldSize(ranks as u32), Rank(rank as u32));
    let mut data = vec![0; LEN];
    data[place(own)].copy_from_slice(&input(own)[place(own)]);
    host.gather(call(0, CallKind::AllGather { dtype: DTYPE }), place, &mut data, ControlWord::NONE, stop)?;
    assert!((0..ranks).all(|rank| data[place(rank)] == input(rank)[place(rank)]), "rank {own} of {ranks}");
    Ok(())
}

/// Makes a buffer, and sums in it.
fn in_buffers(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    let (ranks, own) = (host.layout.ranks, host.own);
    let made = call(0, CallKind::Buffer { dtype: DTYPE });
    let (mut buffer, _) = host.buffer::<i64>(made, LEN, ControlWord::NONE, stop)?;
    buffer.copy_from_slice(&input(own));
    let reduced = call(1, CallKind::AllReduceBuffer { dtype: DTYPE, op: ReduceOp::Sum, buffer: 0 });
    let result = host.all_reduce_buffer(reduced, ReduceOp::Sum, &mut buffer, ControlWord::NONE, stop);
    assert!(buffer[..] == input(own), "C-2: rank {own} of {ranks}: {result:?}");
    result?;
    buffer.set_has_result(true);
    assert!(buffer.result() == sums(ranks), "C-3: rank {own} of {ranks}");
    Ok(())
}

/// A collective, and two more that follow it.
fn three(host: &mut Host, stop: &dyn Fn() -> Option<Stop>) -> Result<(), HostFault> {
    for sequence in 0..3 {
        host.barrier(call(sequence, CallKind::Barrier), ControlWord::NONE, stop)?;
    }
    Ok(())
}

#[test]
fn a_rank_that_dies_after_any_count_leaves_right_results_or_what_was_there() {
    let works: [(&str, Work); 6] = [
        ("in place", in_place),
        ("apart", apart),
        ("scattered", scattered),
        ("gathered", gathered),
        ("in buffers", in_buffers),
        ("barriers", three),
    ];
    for (name, work) in works {
        for ranks in [2, 3, 5] {
            for dying in 0..ranks {
                let (undisturbed, total) = play(ranks, dying, u64::MAX, work);
                assert!(undisturbed.iter().all(Result::is_ok) && total > 0, "{name}: {undisturbed:?}");
                for counts in 0..=total {
                    let (results, counted) = play(ranks, dying, counts, work);
                    let context = format!("{name}: rank {dying} of {ranks} dies after {counts}: {results:?}");
                    assert_eq!(counted, counts, "{context}");
                    if counts < total {
                        // Nobody can have what is to come from it.
                        assert!(results.iter().all(Result::is_err), "C-4: {context}");
                    } else if results[dying].is_ok() {
                        // It had done all, and seen that the others had.
                        assert!(results.iter().all(Result::is_ok), "C-6: {context}");
                    }
                    let was_told = |result: &Result<(), HostFault>| {
                        let told = HostFault::Stuck(Stuck::GivenUp(Rank(dying as u32)));
                        let stopped = matches!(result, Err(HostFault::Stuck(Stuck::Stopped(_))));
                        result.is_ok() || stopped || *result == Err(told)
                    };
                    assert!(results.iter().all(was_told), "{context}");
                }
            }
        }
    }
}
