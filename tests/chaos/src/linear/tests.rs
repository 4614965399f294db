//! Histories of a register, and histories of none.

use super::*;

fn operation(called_us: u64, returned_us: Option<u64>, act: Act) -> Operation {
    Operation { job: "j".to_owned(), pid: 1, called_us, returned_us, act }
}

/// A save by the first leader, from `times.0` to `times.1`.
fn saved(times: (u64, u64), expected: u64, value: &str, revision: u64) -> Operation {
    saved_by(1, times, expected, value, revision)
}

fn saved_by(epoch: u64, times: (u64, u64), expected: u64, value: &str, revision: u64) -> Operation {
    save(epoch, times.0, Some(times.1), expected, value, Outcome::Saved(revision))
}

fn unknown(called_us: u64, expected: u64, value: &str) -> Operation {
    save(1, called_us, None, expected, value, Outcome::Unknown)
}

fn conflict(times: (u64, u64), expected: u64) -> Operation {
    save(1, times.0, Some(times.1), expected, "never", Outcome::Conflict)
}

fn not_leader(times: (u64, u64), expected: u64, value: &str) -> Operation {
    save(1, times.0, Some(times.1), expected, value, Outcome::NotLeader)
}

fn save(
    epoch: u64,
    called_us: u64,
    returned_us: Option<u64>,
    expected: u64,
    value: &str,
    outcome: Outcome,
) -> Operation {
    let value = value.to_owned();
    operation(called_us, returned_us, Act::Save { expected, value, generation: 1, epoch, outcome })
}

fn loaded(times: (u64, u64), revision: u64, value: &str) -> Operation {
    operation(times.0, Some(times.1), Act::Load { revision, value: value.to_owned(), epoch: 0 })
}

fn is_of_a_register(operations: &[Operation]) -> bool {
    match check(operations) {
        Ok(()) => true,
        Err(Violation::NoOrder { stuck, .. }) => {
            assert!(!stuck.is_empty(), "it says what does not fit");
            false
        }
        Err(Violation::GaveUp) => panic!("a short history is looked at whole"),
    }
}

#[test]
fn one_after_the_other() {
    assert!(is_of_a_register(&[]));
    assert!(is_of_a_register(&[
        loaded((1, 2), 0, ""),
        saved((3, 4), 0, "a", 10),
        saved((5, 6), 10, "b", 12),
        loaded((7, 8), 12, "b"),
        conflict((9, 10), 10),
    ]));
}

#[test]
fn what_overlaps_may_be_in_either_order() {
    let load = |value, revision| loaded((4, 9), revision, value);
    for load in [load("a", 10), load("b", 12)] {
        assert!(is_of_a_register(&[saved((1, 2), 0, "a", 10), load, saved((5, 8), 10, "b", 12)]));
    }
}

#[test]
fn a_lost_update_is_seen() {
    // Both followed the same record, and both are said to be saved.
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        saved((3, 6), 10, "b", 12),
        saved((4, 7), 10, "c", 13),
    ]));
}

#[test]
fn a_stale_read_is_seen() {
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        saved((3, 4), 10, "b", 12),
        loaded((5, 6), 10, "a"),
    ]));
}

#[test]
fn a_value_that_nobody_saved_is_seen() {
    assert!(!is_of_a_register(&[saved((1, 2), 0, "a", 10), loaded((3, 4), 10, "x")]));
    assert!(!is_of_a_register(&[saved((1, 2), 0, "a", 10), loaded((3, 4), 11, "a")]));
}

#[test]
fn one_revision_for_two_records_is_seen() {
    assert!(!is_of_a_register(&[saved((1, 2), 0, "a", 10), saved((3, 4), 10, "b", 10)]));
    assert!(!is_of_a_register(&[saved((1, 2), 0, "a", 10), saved((3, 4), 10, "b", 9)]));
}

#[test]
fn a_conflict_without_another_record_is_seen() {
    let conflict_with_nothing = [saved((1, 2), 0, "a", 10), conflict((3, 4), 10), loaded((5, 6), 10, "a")];
    assert!(!is_of_a_register(&conflict_with_nothing));
    assert!(is_of_a_register(&[saved((1, 2), 0, "a", 10), conflict((3, 4), 9)]));
}

#[test]
fn a_save_after_the_loss_of_leadership_is_seen() {
    assert!(!is_of_a_register(&[
        saved_by(5, (1, 2), 0, "a", 10),
        saved_by(9, (3, 4), 10, "b", 12),
        saved_by(5, (5, 6), 12, "c", 14),
    ]));
    // At the same time, but nothing can be put before what the later leader did.
    assert!(!is_of_a_register(&[saved_by(9, (1, 5), 0, "a", 10), saved_by(5, (2, 6), 10, "b", 12)]));
}

#[test]
fn a_save_after_a_later_leader_has_read_is_seen() {
    let read = |epoch| operation(3, Some(4), Act::Load { revision: 10, value: "a".to_owned(), epoch });
    let history = |read| [saved_by(5, (1, 2), 0, "a", 10), read, saved_by(5, (5, 6), 10, "b", 12)];
    assert!(is_of_a_register(&history(read(5))));
    assert!(!is_of_a_register(&history(read(9))));
}

#[test]
fn a_save_whose_outcome_is_unknown_may_have_been_taken() {
    let history = [
        saved((1, 2), 0, "a", 10),
        unknown(3, 10, "b"),
        loaded((8, 9), 11, "b"),
        saved_by(2, (10, 11), 11, "c", 15),
    ];
    assert!(is_of_a_register(&history));
}

#[test]
fn or_not() {
    let history = [saved((1, 2), 0, "a", 10), unknown(3, 10, "b"), loaded((8, 9), 10, "a")];
    assert!(is_of_a_register(&history));
}

#[test]
fn or_be_taken_much_later() {
    let history =
        [saved((1, 2), 0, "a", 10), unknown(3, 10, "b"), loaded((8, 9), 10, "a"), loaded((10, 11), 13, "b")];
    assert!(is_of_a_register(&history));
}

#[test]
fn but_not_before_it_was_asked_for_nor_twice_nor_after_another_leader() {
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        loaded((3, 4), 11, "b"),
        unknown(5, 10, "b"),
        loaded((6, 7), 11, "b"),
    ]));
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        unknown(3, 10, "b"),
        loaded((4, 5), 11, "b"),
        saved((6, 7), 11, "c", 12),
        loaded((8, 9), 13, "b"),
    ]));
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        unknown(3, 10, "b"),
        saved_by(2, (4, 5), 10, "c", 12),
        loaded((6, 7), 14, "b"),
    ]));
}

#[test]
fn a_conflict_may_come_from_a_save_whose_outcome_is_unknown() {
    assert!(is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        unknown(3, 10, "b"),
        conflict((5, 6), 10),
        loaded((7, 8), 11, "b"),
    ]));
    assert!(!is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        unknown(3, 10, "b"),
        conflict((5, 6), 10),
        loaded((7, 8), 10, "a"),
    ]));
}

#[test]
fn a_save_that_is_refused_may_have_been_taken_when_it_was_first_sent_but_not_after_the_answer() {
    let refusals = [conflict((3, 6), 10), not_leader((3, 6), 10, "never")];
    for refused in refusals {
        let first = || saved((1, 2), 0, "a", 10);
        assert!(is_of_a_register(&[first(), refused.clone(), loaded((7, 8), 11, "never")]));
        assert!(!is_of_a_register(&[
            first(),
            refused.clone(),
            saved_by(2, (7, 8), 10, "b", 12),
            loaded((9, 10), 12, "never"),
        ]));
        assert!(!is_of_a_register(&[
            first(),
            refused,
            loaded((7, 8), 10, "a"),
            loaded((9, 10), 11, "never")
        ]));
    }
    assert!(is_of_a_register(&[
        saved((1, 2), 0, "a", 10),
        not_leader((3, 4), 10, "never"),
        loaded((5, 6), 10, "a")
    ]));
}

#[test]
fn many_that_overlap_are_put_in_order_and_one_wrong_answer_among_them_is_found() {
    // Ten leaders die one after the other, each with a save whose outcome nobody knows; half of them were taken.
    let mut operations = Vec::new();
    let (mut revision, mut at) = (0, 1);
    for epoch in 1..=10u64 {
        for _ in 0..20 {
            operations.push(saved_by(epoch, (at, at + 3), revision, &format!("v{at}"), revision + 2));
            operations.push(loaded((at + 1, at + 9), revision + 2, &format!("v{at}")));
            (revision, at) = (revision + 2, at + 10);
        }
        operations.push(save(epoch, at, None, revision, &format!("u{at}"), Outcome::Unknown));
        if epoch % 2 == 0 {
            operations.push(loaded((at + 1, at + 2), revision + 1, &format!("u{at}")));
            revision += 1;
        }
        at += 10;
    }
    assert!(is_of_a_register(&operations));
    let mut wrong = operations.clone();
    let middle = wrong.len() / 2;
    let load = wrong.iter_mut().skip(middle).find_map(|operation| match &mut operation.act {
        Act::Load { value, .. } => Some(value),
        Act::Save { .. } => None,
    });
    "v1".clone_into(load.unwrap());
    assert!(!is_of_a_register(&wrong));
}
