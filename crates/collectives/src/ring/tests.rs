//! All ranks of a ring in one thread, over pipes in memory: every order of events comes from a seed, and a pipe can be
//! cut after any byte.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::*;
use crate::call::CallKind;
use crate::element::DType;
use crate::schedule::part;
use crate::transport::Ready;

/// One direction between two neighbours.
#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// How many bytes may still enter it before it is cut.
    cut_after: Option<usize>,
    /// No byte can enter it any more; those in it can still leave.
    closed: bool,
    /// All that has entered it.
    passed: Vec<u8>,
}

/// A source of numbers that a seed replays.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

struct Memory {
    next: Rc<RefCell<Pipe>>,
    prev: Rc<RefCell<Pipe>>,
    chance: Rc<RefCell<Chance>>,
}

impl Transport for Memory {
    fn send(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut pipe = self.next.borrow_mut();
        if pipe.closed {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let offered: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert!(offered > 0, "a send of nothing");
        let limit = 1 + self.chance.borrow_mut().below(offered);
        let room = (pipe.capacity - pipe.bytes.len()).min(limit).min(pipe.cut_after.unwrap_or(usize::MAX));
        let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter()).take(room).copied().collect();
        pipe.bytes.extend(&bytes);
        pipe.passed.extend(bytes);
        if let Some(left) = &mut pipe.cut_after {
            *left -= room;
            pipe.closed = *left == 0;
        }
        Ok(room)
    }

    fn receive(&mut self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut pipe = self.prev.borrow_mut();
        let wanted: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert!(wanted > 0, "a receive of nothing");
        if pipe.bytes.is_empty() {
            return if pipe.closed { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(0) };
        }
        let count = (1 + self.chance.borrow_mut().below(wanted)).min(pipe.bytes.len());
        let mut bytes = pipe.bytes.drain(..count);
        for piece in pieces {
            piece.iter_mut().zip(&mut bytes).for_each(|(to, byte)| *to = byte);
        }
        Ok(count)
    }

    fn wait(&mut self, _: Want, _: Duration) -> io::Result<Ready> {
        unreachable!("the simulation drives the runs itself")
    }
}

/// What goes wrong with a rank, once it has sent so many bytes.
#[derive(Debug, Clone, Copy)]
struct Cut {
    rank: usize,
    bytes: usize,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// The connection to the next rank ends; the rank itself goes on until it notices.
    Link,
    /// The rank dies or gives up: both its connections end. What it has sent arrives.
    Death,
    /// The same, and what is on its way is lost.
    Reset,
}

/// One collective on all ranks. Each rank has its own call, so that they can disagree.
struct Trial<'a, T> {
    calls: Vec<Call>,
    inputs: &'a [Vec<T>],
    outputs: Vec<Vec<T>>,
    cut: Option<Cut>,
    chunk: usize,
    capacity: usize,
    seed: u64,
}

/// What became of it: each rank's word or fault, the outputs, and what each rank sent.
struct Verdict<T> {
    results: Vec<Result<ControlWord, Fault>>,
    outputs: Vec<Vec<T>>,
    sent: Vec<Vec<u8>>,
}

impl<T: Element> Trial<'_, T> {
    fn play(mut self) -> Verdict<T> {
        let n = self.calls.len();
        let chance = Rc::new(RefCell::new(Chance(self.seed)));
        let pipes: Vec<_> = (0..n)
            .map(|rank| {
                let cut_after = self.cut.filter(|cut| cut.rank == rank).map(|cut| cut.bytes);
                let closed = cut_after == Some(0);
                Rc::new(RefCell::new(Pipe { capacity: self.capacity, cut_after, closed, ..Pipe::default() }))
            })
            .collect();
        let before = |rank: usize| (rank + n - 1) % n;
        let mut stagings: Vec<_> = (0..n).map(|_| vec![0; self.chunk]).collect();
        let mut transports: Vec<_> = (0..n)
            .map(|r| Memory {
                next: pipes[r].clone(),
                prev: pipes[before(r)].clone(),
                chance: chance.clone(),
            })
            .collect();
        let mut runs: Vec<_> = self
            .outputs
            .iter_mut()
            .zip(&mut stagings)
            .enumerate()
            .map(|(rank, (output, staging))| {
                let seat = Seat {
                    size: WorldSize(n as u32),
                    rank: Rank(rank as u32),
                    prev: Rank(before(rank) as u32),
                };
                let call = self.calls[rank];
                let input = self.inputs.get(rank).map_or(&[][..], |input| input);
                Run::new(call.kind.pattern(), call, seat, input, output, staging, ControlWord(1 << rank))
            })
            .collect();
        let mut results: Vec<Option<Result<ControlWord, Fault>>> = vec![None; n];
        let mut idle = 0;
        while results.iter().any(Option::is_none) {
            let rank = chance.borrow_mut().below(n);
            if results[rank].is_some() {
                continue;
            }
            if let Some(Cut { how: How::Death | How::Reset, .. }) = self.cut.filter(|cut| cut.rank == rank)
                && pipes[rank].borrow().closed
            {
                results[rank] = Some(Err(Fault::Aborted));
                pipes[before(rank)].borrow_mut().closed = true;
                if self.cut.is_some_and(|cut| cut.how == How::Reset) {
                    pipes[rank].borrow_mut().bytes.clear();
                }
                continue;
            }
            let run = &mut runs[rank];
            (run.room, run.bytes) = (true, true);
            match run.advance(&mut transports[rank]) {
                Ok(_) if run.is_done() => results[rank] = Some(Ok(run.word)),
                Ok(true) => idle = 0,
                Ok(false) => idle += 1,
                Err(fault) => results[rank] = Some(Err(fault)),
            }
            // Whoever is done leaves, and whoever fails gives up: both close both ends at once. The collective of the
            // others must survive the first and notice the second.
            if results[rank].is_some() {
                pipes[rank].borrow_mut().closed = true;
                pipes[before(rank)].borrow_mut().closed = true;
            }
            assert!(idle < 2000 * n, "C-1: nobody moves, seed {}", self.seed);
        }
        drop(runs);
        let sent = pipes.iter().map(|pipe| pipe.borrow().passed.clone()).collect();
        Verdict { results: results.into_iter().flatten().collect(), outputs: self.outputs, sent }
    }
}

fn input(n: usize, len: usize) -> Vec<Vec<i64>> {
    (0..n).map(|rank| (0..len).map(|i| ((i * 31 + 7) << (5 * rank)) as i64).collect()).collect()
}

fn total(inputs: &[Vec<i64>], at: usize) -> i64 {
    inputs.iter().map(|input| input[at]).sum()
}

fn same(n: usize, kind: CallKind, count: usize) -> Vec<Call> {
    vec![Call { sequence: 0, kind, count: count as u64 }; n]
}

const SUM: CallKind = CallKind::AllReduce { dtype: DType::I64, op: ReduceOp::Sum };

fn reduction(n: usize, inputs: &[Vec<i64>], seed: u64) -> Trial<'_, i64> {
    let len = inputs[0].len();
    let outputs = vec![vec![-1; len]; n];
    Trial { calls: same(n, SUM, len), inputs, outputs, cut: None, chunk: 64, capacity: 100, seed }
}

fn everybody(n: usize) -> ControlWord {
    ControlWord((1 << n) - 1)
}

#[test]
fn every_order_of_events_gives_the_same_sums_and_words() {
    for n in 2..=5 {
        for len in [0, 1, 2, 5, 13, 40] {
            for seed in 0..40 {
                let inputs = input(n, len);
                let Verdict { results, outputs, .. } = reduction(n, &inputs, seed).play();
                assert!(
                    results.iter().all(|r| *r == Ok(everybody(n))),
                    "C-4: n {n} len {len} seed {seed}: {results:?}"
                );
                let want: Vec<_> = (0..len).map(|at| total(&inputs, at)).collect();
                assert!(outputs.iter().all(|output| *output == want), "C-3: n {n} len {len} seed {seed}");
            }
        }
    }
}

#[test]
fn chunks_that_end_inside_an_element_a_word_or_a_header_change_nothing() {
    let inputs = input(3, 31);
    let want: Vec<_> = (0..31).map(|at| total(&inputs, at)).collect();
    for chunk in HEADER_BYTES..HEADER_BYTES + 20 {
        for capacity in [1, 3, 33, 1000] {
            let trial = Trial { chunk, capacity, ..reduction(3, &inputs, chunk as u64) };
            let Verdict { results, outputs, .. } = trial.play();
            assert!(results.iter().all(Result::is_ok), "chunk {chunk} capacity {capacity}: {results:?}");
            assert!(outputs.iter().all(|output| *output == want), "chunk {chunk} capacity {capacity}");
        }
    }
}

#[test]
fn the_other_collectives_give_everybody_what_they_promise() {
    for n in 2..=5usize {
        for len in [0, 1, 7, 40] {
            for seed in 0..20 {
                let size = WorldSize(n as u32);
                let own = |rank: usize| part(len, size, Rank(rank as u32));
                let inputs = input(n, len);
                let dtype = DType::I64;
                let context = format!("n {n} len {len} seed {seed}");

                let kind = CallKind::ReduceScatter { dtype, op: ReduceOp::Sum };
                let trial = Trial { calls: same(n, kind, len), ..reduction(n, &inputs, seed) };
                let Verdict { results, outputs, .. } = trial.play();
                assert!(results.iter().all(|r| *r == Ok(everybody(n))), "reduce_scatter {context}");
                for (rank, output) in outputs.iter().enumerate() {
                    assert!(own(rank).all(|at| output[at] == total(&inputs, at)), "reduce_scatter {context}");
                }

                let mut outputs = vec![vec![-1; len]; n];
                (0..n).for_each(|rank| outputs[rank][own(rank)].copy_from_slice(&inputs[rank][own(rank)]));
                let calls = same(n, CallKind::AllGather { dtype }, len);
                let trial = Trial { calls, outputs, inputs: &[], ..reduction(n, &inputs, seed) };
                let Verdict { results, outputs, .. } = trial.play();
                assert!(results.iter().all(|r| *r == Ok(everybody(n))), "all_gather {context}");
                for owner in 0..n {
                    let right = outputs.iter().all(|output| output[own(owner)] == inputs[owner][own(owner)]);
                    assert!(right, "all_gather {context}");
                }

                let root = seed as usize % n;
                let calls = same(n, CallKind::Broadcast { dtype, root: Rank(root as u32) }, len);
                let trial =
                    Trial { calls, outputs: inputs.clone(), inputs: &[], ..reduction(n, &inputs, seed) };
                let Verdict { results, outputs, .. } = trial.play();
                assert!(results.iter().all(|r| *r == Ok(everybody(n))), "broadcast {context}");
                assert!(outputs.iter().all(|output| *output == inputs[root]), "broadcast {context}");
            }
        }
    }
}

/// Everything there is to call, and what a rank must have when it succeeds: of `len` numbers, with these inputs.
fn trials(n: usize, inputs: &[Vec<i64>]) -> Vec<(Trial<'_, i64>, Vec<Vec<i64>>)> {
    let (len, dtype, size) = (inputs[0].len(), DType::I64, WorldSize(n as u32));
    let own = |rank: usize| part(len, size, Rank(rank as u32));
    let sums: Vec<_> = (0..len).map(|at| total(inputs, at)).collect();
    let root = n - 1;
    let mut trials = vec![(reduction(n, inputs, 0), vec![sums.clone(); n])];

    let kind = CallKind::ReduceScatter { dtype, op: ReduceOp::Sum };
    trials.push((Trial { calls: same(n, kind, len), ..reduction(n, inputs, 0) }, vec![sums; n]));

    let mut outputs = vec![vec![-1; len]; n];
    (0..n).for_each(|rank| outputs[rank][own(rank)].copy_from_slice(&inputs[rank][own(rank)]));
    let gathered: Vec<i64> = (0..n).flat_map(|rank| inputs[rank][own(rank)].to_vec()).collect();
    let calls = same(n, CallKind::AllGather { dtype }, len);
    trials.push((Trial { calls, outputs, inputs: &[], ..reduction(n, inputs, 0) }, vec![gathered; n]));

    let calls = same(n, CallKind::Broadcast { dtype, root: Rank(root as u32) }, len);
    let trial = Trial { calls, outputs: inputs.to_vec(), inputs: &[], ..reduction(n, inputs, 0) };
    trials.push((trial, vec![inputs[root].clone(); n]));

    let calls = same(n, CallKind::Barrier, 0);
    let trial = Trial { calls, outputs: vec![vec![]; n], inputs: &[], ..reduction(n, inputs, 0) };
    trials.push((trial, vec![vec![]; n]));
    trials
}

#[test]
fn a_cut_or_a_death_after_any_byte_ends_every_rank_and_who_succeeds_has_the_result() {
    for n in 2..=4 {
        let inputs = input(n, 11);
        let count = trials(n, &inputs).len();
        let fresh = |which: usize| trials(n, &inputs).swap_remove(which);
        for which in 0..count {
            let whole = fresh(which).0.play().sent;
            let points = (0..n).flat_map(|rank| (0..whole[rank].len()).map(move |bytes| (rank, bytes)));
            let hows = [How::Link, How::Death, How::Reset];
            for (rank, bytes, how) in points.flat_map(|(rank, bytes)| hows.map(|how| (rank, bytes, how))) {
                let (trial, want) = fresh(which);
                let (cut, seed) = (Cut { rank, bytes, how }, (bytes * n + rank) as u64);
                let context = format!("C-1: {} of {n}, {cut:?}, seed {seed}", trial.calls[0]);
                let Verdict { results, outputs, .. } = Trial { cut: Some(cut), seed, ..trial }.play();
                assert!(results[(rank + 1) % n].is_err(), "{context}: {results:?}");
                for (at, (result, output)) in results.iter().zip(&outputs).enumerate() {
                    match result {
                        Ok(word) => {
                            // A reduce_scatter promises a rank its own part.
                            let own = match which {
                                1 => part(output.len(), WorldSize(n as u32), Rank(at as u32)),
                                _ => 0..output.len(),
                            };
                            let right = output[own.clone()] == want[at][own];
                            assert!(*word == everybody(n) && right, "{context}: {results:?}");
                        }
                        Err(Fault::NextLost(_) | Fault::PrevLost(_)) => {}
                        Err(Fault::Aborted) if at == rank => {}
                        Err(_) => panic!("{context}: {results:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn whoever_leaves_after_finishing_makes_nobody_fail() {
    // In every trial each rank closes its end as soon as it is done; C-6 is that all get done nevertheless.
    let inputs = input(4, 9);
    for seed in 0..2000 {
        let results = reduction(4, &inputs, seed).play().results;
        assert!(results.iter().all(Result::is_ok), "C-6: seed {seed}: {results:?}");
    }
}

#[test]
fn ranks_that_call_different_things_fail_before_they_add_anything() {
    let other = |kind, sequence, count| Call { sequence, kind, count };
    let calls = [
        other(CallKind::AllReduce { dtype: DType::F64, op: ReduceOp::Sum }, 0, 6),
        other(CallKind::AllReduce { dtype: DType::I64, op: ReduceOp::Max }, 0, 6),
        other(CallKind::ReduceScatter { dtype: DType::I64, op: ReduceOp::Sum }, 0, 6),
        other(SUM, 1, 6),
        other(SUM, 0, 7),
        other(CallKind::Barrier, 0, 6),
    ];
    for (code, call) in calls.into_iter().enumerate() {
        for n in 2..=4 {
            for odd in 0..n {
                for seed in 0..10 {
                    let inputs = input(n, 6);
                    let mut trial = reduction(n, &inputs, seed);
                    trial.calls[odd] = call;
                    let ours = trial.calls[(odd + 1) % n];
                    let Verdict { results, outputs, .. } = trial.play();
                    let context = format!("C-7: call {code}, n {n}, odd {odd}, seed {seed}: {results:?}");
                    assert!(results.iter().all(Result::is_err), "{context}");
                    // Either the one after it sees that it differs, or it sees that the one before it does and ends.
                    let after = Err(Fault::Mismatch { ours, theirs: call });
                    let own = matches!(&results[odd], Err(Fault::Mismatch { ours, .. }) if *ours == call);
                    assert!(results[(odd + 1) % n] == after || own, "{context}");
                    assert_eq!(outputs[(odd + 1) % n], vec![-1; 6], "{context}");
                }
            }
        }
    }
}

#[test]
fn a_stream_that_is_none_is_refused() {
    let inputs = input(2, 6);
    for at in [0, 4, 28] {
        let (mut output, mut staging) = (vec![0i64; 6], vec![0; 64]);
        let seat = Seat { size: WorldSize(2), rank: Rank(0), prev: Rank(1) };
        let call = same(1, SUM, 6)[0];
        let (pattern, word) = (call.kind.pattern(), ControlWord::NONE);
        let mut run = Run::new(pattern, call, seat, &inputs[0], &mut output, &mut staging, word);
        let mut header = call.header(Rank(1));
        header[at] ^= 0x80;
        let prev = Rc::new(RefCell::new(Pipe { bytes: header.into(), ..Pipe::default() }));
        let next = Rc::new(RefCell::new(Pipe { capacity: 1000, ..Pipe::default() }));
        let mut transport = Memory { next, prev, chance: Rc::new(RefCell::new(Chance(1))) };
        let fault = (0..100).find_map(|_| {
            run.bytes = true;
            run.advance(&mut transport).err()
        });
        assert!(matches!(fault, Some(Fault::Protocol(_))), "byte {at}: {fault:?}");
    }
}

/// How bytes can come that no rank sends.
fn damaged(honest: &[u8], chance: &mut Chance) -> Vec<u8> {
    let mut bytes = honest.to_vec();
    let at = chance.below(bytes.len());
    let until = at + chance.below(bytes.len() - at);
    match chance.below(5) {
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes.truncate(at),
        2 => drop(bytes.drain(at..until)),
        3 => bytes.splice(at..at, honest[at..until].iter().copied()).for_each(drop),
        _ => bytes[at..].iter_mut().for_each(|byte| *byte = chance.below(256) as u8),
    }
    bytes
}

#[test]
fn whatever_a_neighbour_sends_a_rank_ends_and_takes_no_byte_that_is_not_its() {
    let seeds = 6000;
    let (mut done, mut refused) = (0, 0);
    for seed in 0..seeds {
        let mut chance = Chance(seed);
        let n = 2 + chance.below(3);
        let inputs = input(n, [0, 1, 6, 40][chance.below(4)]);
        let len = inputs[0].len();
        let kind = match chance.below(5) {
            0 => CallKind::ReduceScatter { dtype: DType::I64, op: ReduceOp::Sum },
            1 => CallKind::AllGather { dtype: DType::I64 },
            2 => CallKind::Broadcast { dtype: DType::I64, root: Rank(chance.below(n) as u32) },
            3 => CallKind::Barrier,
            _ => SUM,
        };
        let trial = Trial { calls: same(n, kind, len), capacity: 10_000, ..reduction(n, &inputs, seed) };
        let (call, honest) = (trial.calls[0], trial.play().sent.pop().unwrap());
        let sent = damaged(&honest, &mut chance);
        let is_header_whole = sent.starts_with(&call.header(Rank(n as u32 - 1)));

        let (mut output, mut staging) = (vec![0; len], vec![0; 64]);
        let seat = Seat { size: WorldSize(n as u32), rank: Rank(0), prev: Rank(n as u32 - 1) };
        let (pattern, word) = (call.kind.pattern(), ControlWord::NONE);
        let mut run = Run::new(pattern, call, seat, &inputs[0], &mut output, &mut staging, word);
        let prev = Pipe { bytes: sent.into(), closed: true, ..Pipe::default() };
        let prev = Rc::new(RefCell::new(prev));
        let next = Rc::new(RefCell::new(Pipe { capacity: 10_000, ..Pipe::default() }));
        let (chance, before) = (Rc::new(RefCell::new(chance)), prev.borrow().bytes.len());
        let mut transport = Memory { next, prev: prev.clone(), chance };
        let mut ended = None;
        for _ in 0..20_000 {
            (run.room, run.bytes) = (true, true);
            ended = run.advance(&mut transport).err().map(Err).or(run.is_done().then_some(Ok(())));
            if ended.is_some() {
                break;
            }
        }
        match ended.unwrap_or_else(|| panic!("C-1: seed {seed}: {call} does not end")) {
            Ok(()) => {
                assert!(is_header_whole, "C-7: seed {seed}: {call} took another's header for its own");
                assert_eq!(before - prev.borrow().bytes.len(), honest.len(), "seed {seed}: {call}");
                done += 1;
            }
            Err(Fault::PrevLost(_) | Fault::Mismatch { .. } | Fault::Protocol(_)) => refused += 1,
            Err(fault) => panic!("seed {seed}: {call}: {fault:?}"),
        }
    }
    assert!(done > seeds / 20 && refused > seeds / 5, "{done} and {refused}: it tries little");
}
