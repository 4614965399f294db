//! Whole lives over the stand-ins, by ranks that are processes: killed, stopped, hung, misled, and formed anew.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::time::Duration;

use common::process::{Process, calls, check_sum, form_fresh, ranks, together};

/// How long a break may take to be noticed and cleared up, on a busy machine. On a quiet one it takes milliseconds.
const PROMPT: Duration = Duration::from_secs(10);

/// What the processes of the other tests run.
#[test]
fn rank_process() {
    common::process::be_a_rank();
}

fn only(calls: &[String], names: &[&str]) -> Vec<String> {
    calls.iter().filter(|call| names.contains(&call.as_str())).cloned().collect()
}

/// Kills the last of three while the others reduce, and takes their answers.
fn kill_the_last(ranks: &mut Vec<Process>) -> Vec<String> {
    let mut dying = ranks.pop().unwrap();
    for (rank, survivor) in ranks.iter_mut().enumerate() {
        survivor.tell(&format!("reduce 1000 {}", rank + 1));
    }
    dying.kill();
    let timed: Vec<_> = ranks.iter_mut().map(Process::timed_answer).collect();
    assert!(timed.iter().all(|(_, took)| *took < PROMPT), "G-1: {timed:?}");
    timed.into_iter().map(|(answer, _)| answer).collect()
}

#[test]
fn g6_survivors_of_a_kill_go_on_by_shrinking() {
    let mut ranks = ranks(3, "");
    form_fresh(&mut ranks, 1);
    check_sum(&mut ranks);
    for answer in kill_the_last(&mut ranks) {
        assert!(answer.contains("remote error") && answer.ends_with("[Handle]"), "{answer}");
    }
    let shrink = |rank: usize| format!("form 2 2 {rank} shrink 1 2");
    let told = ranks.iter_mut().enumerate().map(|(rank, process)| (process, shrink(rank)));
    assert_eq!(together(told), ["formed", "formed"]);
    check_sum(&mut ranks);
    let names =
        ["ncclCommInitRankConfig", "ncclCommRevoke", "ncclCommShrink", "ncclCommAbort", "ncclCommDestroy"];
    for calls in calls(&mut ranks) {
        let made = only(&calls, &names);
        assert_eq!(made, ["ncclCommInitRankConfig", "ncclCommRevoke", "ncclCommShrink", "ncclCommAbort"]);
    }
    // And once more, out of what was shrunk.
    ranks[1].kill();
    assert!(ranks[0].ask("reduce 10 1").starts_with("broken"));
}

#[test]
fn without_revoke_and_shrink_survivors_form_a_world_afresh() {
    let mut ranks: Vec<Process> = (0..3).map(|_| Process::start()).collect();
    for rank in &mut ranks {
        rank.expect("faults version=22602", "ok");
        rank.expect("open", "ok");
    }
    form_fresh(&mut ranks, 1);
    for answer in kill_the_last(&mut ranks) {
        assert!(answer.ends_with("[Nothing]"), "{answer}");
    }
    let refused = ranks[0].ask("form 2 2 0 shrink 1 2");
    assert_eq!(refused, "refused: NCCL 2.26.2 has no ncclCommShrink");
    form_fresh(&mut ranks, 3);
    check_sum(&mut ranks);
    for calls in calls(&mut ranks) {
        let made = only(&calls, &["ncclCommRevoke", "ncclCommShrink", "ncclCommAbort", "ncclCommDestroy"]);
        assert_eq!(made, ["ncclCommAbort"]);
    }
}

#[test]
fn a_newcomer_is_appended_to_a_world_that_stands() {
    let mut ranks = ranks(3, "");
    let mut newcomer = ranks.pop().unwrap();
    form_fresh(&mut ranks, 1);
    let id = ranks[0].ask("grow-id");
    assert_eq!(
        ranks[1].ask("grow-id").len(),
        "ncclCommGetUniqueId: invalid argument".len() + 34,
        "only rank 0"
    );
    newcomer.tell(&format!("form 2 3 2 grow 1 2 {id}"));
    let told = ranks.iter_mut().enumerate().map(|(rank, r)| (r, format!("form 2 3 {rank} grow 1 2 {id}")));
    assert_eq!(together(told), ["formed", "formed"]);
    assert_eq!(newcomer.answer(), "formed");
    ranks.push(newcomer);
    check_sum(&mut ranks);
    let all = calls(&mut ranks);
    let names = ["ncclCommInitRankConfig", "ncclCommGrow", "ncclCommAbort", "ncclCommDestroy"];
    assert_eq!(only(&all[0], &names), ["ncclCommInitRankConfig", "ncclCommGrow", "ncclCommAbort"], "G-6");
    assert_eq!(only(&all[2], &names), ["ncclCommGrow"]);
}

#[test]
fn a_newcomer_after_a_break_comes_in_by_a_fresh_world() {
    let mut ranks = ranks(3, "");
    form_fresh(&mut ranks, 1);
    kill_the_last(&mut ranks);
    let id = "00".repeat(128);
    let refused = ranks[0].ask(&format!("form 2 4 0 grow 1 3 {id}"));
    assert_eq!(refused, "refused: the communicator of generation 1 was revoked, so it cannot grow");
    let mut newcomer = Process::start();
    newcomer.expect("open", "ok");
    ranks.push(newcomer);
    form_fresh(&mut ranks, 3);
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn a_stopped_peer_says_nothing_and_an_abort_ends_the_wait() {
    let mut ranks = ranks(3, "");
    form_fresh(&mut ranks, 1);
    let stopped = ranks.pop().unwrap();
    stopped.signal("STOP");
    ranks[0].expect("abort-in 500", "ok");
    for rank in &mut ranks {
        rank.tell("reduce 1000 1");
    }
    assert_eq!(ranks[1].answers_within(Duration::from_millis(200)), None, "nobody knows of it");
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "broken: it was given up: it was aborted [Handle]");
    assert!(took < PROMPT, "G-1: {took:?}");
    assert!(ranks[1].answer().starts_with("broken"));
    form_fresh(&mut ranks, 2);
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn an_abort_from_another_thread_ends_a_reduction() {
    let mut ranks = ranks(2, "");
    form_fresh(&mut ranks, 1);
    ranks[0].expect("abort-in 100", "ok");
    ranks[0].tell("reduce 1000 1");
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "broken: it was given up: it was aborted [Handle]");
    assert!(took < PROMPT, "{took:?}");
    assert_eq!(ranks[0].ask("reduce 1000 1"), answer, "a broken world stays broken");
    // The other one is told by the end of the connection, and both go on.
    assert!(ranks[1].ask("reduce 1000 1").starts_with("broken: "));
    form_fresh(&mut ranks, 2);
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn g1_a_reduction_that_does_not_end_is_late_by_its_deadline() {
    let mut ranks = ranks(2, "stall=300");
    form_fresh(&mut ranks, 1);
    ranks[0].tell("reduce 1000 1");
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "broken: it has not ended for 300ms [Handle]");
    assert!(took < PROMPT, "{took:?}");
}

#[test]
fn g5_a_world_that_is_not_formed_in_time_twice_is_the_end() {
    let mut ranks = ranks(1, "form=200");
    let id = ranks[0].ask("id");
    // The other rank never comes.
    ranks[0].tell(&format!("form 1 2 0 fresh {id}"));
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "failed: it has not ended for 200ms [Nothing]");
    assert!(took < PROMPT, "G-1: {took:?}");
    let id = ranks[0].ask("id");
    let answer = ranks[0].ask(&format!("form 2 2 0 fresh {id}"));
    assert_eq!(answer, "failed: it has not ended for 200ms [Exit(MissedTwice)]");
    assert_eq!(ranks[0].ask("exit"), "Some(MissedTwice)");
    let answer = ranks[0].ask(&format!("form 3 2 0 fresh {id}"));
    assert_eq!(answer, "refused: this process cannot form worlds any more: a second deadline was missed");
    assert_eq!(ranks[0].ask("id"), "a second deadline was missed");
}

#[test]
fn an_init_that_hangs_is_given_up_and_the_next_one_succeeds() {
    let mut ranks = ranks(2, "form=300");
    ranks[0].expect("faults init=hang", "ok");
    let id = ranks[0].ask("id");
    let told = ranks.iter_mut().enumerate().map(|(rank, r)| (r, format!("form 1 2 {rank} fresh {id}")));
    for answer in together(told) {
        assert_eq!(answer, "failed: it has not ended for 300ms [Nothing]");
    }
    ranks[0].expect("faults", "ok");
    let mut ranks = ranks;
    // On a busy machine two processes may take longer than so little.
    ranks.iter_mut().for_each(|rank| rank.expect("open", "ok"));
    form_fresh(&mut ranks, 2);
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn an_init_that_fails_says_so_and_leaves_nothing() {
    let mut ranks = ranks(1, "");
    ranks[0].expect("faults init=error", "ok");
    let id = ranks[0].ask("id");
    let answer = ranks[0].ask(&format!("form 1 1 0 fresh {id}"));
    assert!(answer.starts_with("failed: forming the communicator: system error"), "{answer}");
    ranks[0].expect("faults", "ok");
    form_fresh(&mut ranks, 2);
    check_sum(&mut ranks);
}

#[test]
fn g5_an_abort_that_hangs_is_the_end() {
    let mut ranks = ranks(2, "abort=300 stall=200");
    ranks[0].expect("faults version=22602", "ok");
    ranks[0].expect("open abort=300 stall=200", "ok");
    form_fresh(&mut ranks, 1);
    ranks[0].expect("faults abort=hang", "ok");
    ranks[0].tell("reduce 1000 1");
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "broken: it has not ended for 200ms [Exit(AbortHangs)]");
    assert!(took < PROMPT, "G-1: {took:?}");
    // Closing does not hang either.
    ranks[0].expect("close", "ok");
}

#[test]
fn g1_a_call_that_does_not_return_is_the_end_and_hangs_nobody() {
    let mut ranks = ranks(1, "stall=200");
    form_fresh(&mut ranks, 1);
    ranks[0].expect("faults call=hang", "ok");
    ranks[0].tell("reduce 1000 1");
    let (answer, took) = ranks[0].timed_answer();
    assert!(answer.ends_with("has not returned for 200ms [Exit(CallHangs)]"), "{answer}");
    assert!(took < PROMPT, "{took:?}");
    ranks[0].expect("close", "ok");
}

#[test]
fn a_revoke_that_hangs_or_fails_is_followed_by_an_abort() {
    for (fault, settings) in [("hang", "revoke=200"), ("error", "")] {
        let mut ranks = ranks(2, settings);
        form_fresh(&mut ranks, 1);
        ranks[0].expect(&format!("faults revoke={fault}"), "ok");
        ranks[0].expect("abort-in 0", "ok");
        let answer = ranks[0].ask("reduce 1000 1");
        assert!(answer.ends_with("[Nothing]"), "{fault}: {answer}");
        ranks[0].expect("faults", "ok");
        assert!(ranks[1].ask("reduce 1000 1").starts_with("broken"));
        form_fresh(&mut ranks, 2);
        check_sum(&mut ranks);
        calls(&mut ranks);
    }
}

#[test]
fn g3_survivors_that_were_told_different_lists_miss_their_deadline_and_are_freed() {
    // Long enough for a world to be formed on a busy machine, before one that cannot be.
    let mut ranks = ranks(4, "form=3000");
    form_fresh(&mut ranks, 1);
    let mut ranks: Vec<Process> = ranks.drain(..3).collect();
    let told = ["form 2 3 0 shrink 1 3", "form 2 2 1 shrink 1 2,3"].map(str::to_owned);
    let answers = together(ranks.iter_mut().zip(told));
    // Who gives up first is seen by the other one.
    assert!(answers.contains(&"failed: it has not ended for 3s [Nothing]".to_owned()), "{answers:?}");
    assert!(answers.iter().all(|answer| answer.ends_with("[Nothing]")), "{answers:?}");
    // The one that is not asked has its own handle; a world is formed of all of them afresh.
    ranks.iter_mut().for_each(|rank| rank.expect("open", "ok"));
    form_fresh(&mut ranks, 3);
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn a_seat_that_is_not_the_one_told_is_not_taken() {
    let mut ranks = ranks(1, "");
    ranks[0].expect("faults seat=wrong", "ok");
    let id = ranks[0].ask("id");
    let answer = ranks[0].ask(&format!("form 1 1 0 fresh {id}"));
    assert_eq!(answer, "failed: NCCL gave rank 1 of 1, the world was told as rank 0 of 1 [Nothing]");
}

#[test]
fn g4_a_world_that_is_given_up_for_a_newer_one_makes_way_for_it() {
    let mut ranks = ranks(2, "");
    let id = ranks[0].ask("id");
    ranks[0].expect("arm 100", "ok");
    ranks[0].tell(&format!("form 1 2 0 fresh {id}"));
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "failed: it was given up: it was aborted [Nothing]");
    assert!(took < PROMPT, "{took:?}");
    form_fresh(&mut ranks, 2);
    let stale = ranks[0].ask(&format!("form 1 2 0 fresh {id}"));
    assert_eq!(stale, "refused: generation 1 is stale: 2 was told already");
    check_sum(&mut ranks);
    calls(&mut ranks);
}

#[test]
fn a_world_whose_root_dies_before_it_is_formed_is_formed_with_another_root() {
    let mut ranks = ranks(3, "form=2000");
    let id = ranks[2].ask("id");
    ranks[2].kill();
    ranks.pop();
    let told = ranks.iter_mut().enumerate().map(|(rank, r)| (r, format!("form 1 3 {rank} fresh {id}")));
    for answer in together(told) {
        assert_eq!(answer, "failed: it has not ended for 2s [Nothing]");
    }
    ranks.iter_mut().for_each(|rank| rank.expect("open", "ok"));
    form_fresh(&mut ranks, 2);
    check_sum(&mut ranks);
}

#[test]
fn a_release_that_is_known_to_hang_is_refused_with_the_reason() {
    let mut rank = Process::start();
    rank.expect("faults version=22501", "ok");
    let answer = rank.ask("open");
    assert!(answer.contains("is NCCL 2.25.1, which is not used: ncclCommAbort hangs"), "{answer}");
    rank.expect("faults version=21200", "ok");
    assert!(rank.ask("open").contains("take 2.14.3 or newer"));
}

#[test]
fn all_leave_in_good_order_and_by_abort_where_destroy_has_a_barrier() {
    for (version, last) in [("23007", "ncclCommDestroy"), ("23102", "ncclCommAbort")] {
        let mut ranks: Vec<Process> = (0..2).map(|_| Process::start()).collect();
        for rank in &mut ranks {
            rank.expect(&format!("faults version={version}"), "ok");
            rank.expect("open", "ok");
        }
        form_fresh(&mut ranks, 1);
        assert_eq!(together(ranks.iter_mut().map(|rank| (rank, "leave".to_owned()))), ["Ok(())", "Ok(())"]);
        for calls in calls(&mut ranks) {
            let made = only(&calls, &["ncclCommFinalize", "ncclCommDestroy", "ncclCommAbort"]);
            assert_eq!(made, ["ncclCommFinalize", last]);
        }
        form_fresh(&mut ranks, 2);
        check_sum(&mut ranks);
    }
}

#[test]
fn leaving_alone_ends_by_its_deadline() {
    let mut ranks = ranks(2, "leave=200");
    form_fresh(&mut ranks, 1);
    ranks[0].tell("leave");
    let (answer, took) = ranks[0].timed_answer();
    assert_eq!(answer, "Err(Nothing)");
    assert!(took < PROMPT, "{took:?}");
    calls(&mut ranks[..1]);
}

/// What a coordinator does about a death: it tells the survivors, a moment later, wherever they are.
#[test]
fn a_kill_at_any_instant_frees_the_survivors_for_the_next_world() {
    let mut ranks = ranks(3, "");
    let mut generation = 0;
    for round in 0..16u64 {
        generation += 1;
        let id = ranks[round as usize % 2].ask("id");
        for (rank, process) in ranks.iter_mut().enumerate() {
            process.expect("arm 300", "ok");
            process.tell(&format!("form {generation} 3 {rank} fresh {id}"));
        }
        // Before anything has happened, while it forms, and after: forming takes some milliseconds.
        std::thread::sleep(Duration::from_micros(round * 500));
        ranks.pop().unwrap().kill();
        for process in &mut ranks {
            let (formed, took) = process.timed_answer();
            assert!(took < PROMPT, "G-1: round {round}: {formed} after {took:?}");
            assert!(formed == "formed" || formed.starts_with("failed: "), "round {round}: {formed}");
            if formed == "formed" {
                process.tell("reduce 1000 1");
                let (reduced, took) = process.timed_answer();
                assert!(took < PROMPT, "G-1: round {round}: {reduced} after {took:?}");
                assert!(reduced.starts_with("broken: "), "round {round}: {reduced}");
            }
        }
        let mut newcomer = Process::start();
        newcomer.expect("open", "ok");
        ranks.push(newcomer);
        if round % 4 == 3 {
            generation += 1;
            form_fresh(&mut ranks, generation);
            check_sum(&mut ranks);
        }
    }
    calls(&mut ranks);
}

#[test]
fn worlds_leave_nothing_behind() {
    let mut ranks = ranks(2, "");
    form_fresh(&mut ranks, 1);
    check_sum(&mut ranks);
    let alive = |ranks: &mut [Process]| ranks.iter_mut().map(|rank| rank.ask("alive")).collect::<Vec<_>>();
    let threads = |ranks: &mut [Process]| -> usize {
        ranks.iter_mut().map(|rank| rank.ask("threads").parse::<usize>().unwrap()).sum()
    };
    let before = (alive(&mut ranks), threads(&mut ranks));
    for generation in 2..20 {
        if generation % 3 == 0 {
            ranks[0].expect("break", "ok");
            assert!(ranks[1].ask("reduce 10 1").starts_with("broken"));
        }
        form_fresh(&mut ranks, generation);
        check_sum(&mut ranks);
    }
    assert_eq!(alive(&mut ranks), before.0);
    assert!(threads(&mut ranks) <= before.1 + 2, "threads are left behind");
    for rank in &mut ranks {
        rank.expect("close", "ok");
        rank.expect("alive", "[0, 0, 0, 0, 0, 0]");
    }
}
