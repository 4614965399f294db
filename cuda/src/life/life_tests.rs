//! The ways of a life, one by one.

use super::*;
use crate::unique_id::UniqueId;

const ALL: Version = Version::new(2, 30, 7);

pub(super) fn world(generation: u64, size: u32, rank: u32, way: Way) -> World {
    World { generation: Generation(generation), size: WorldSize(size), ranks: vec![Rank(rank)], way }
}

pub(super) fn fresh(generation: u64) -> World {
    world(generation, 3, 1, Way::Fresh { id: UniqueId::new([0; 128]) })
}

pub(super) fn shrink(generation: u64, parent: u64) -> World {
    world(generation, 2, 0, Way::Shrink { parent: Generation(parent), exclude: vec![Rank(0)] })
}

pub(super) fn grow(generation: u64, parent: u64, rank: u32) -> World {
    let way = Way::Grow { parent: Generation(parent), quorum: WorldSize(3), id: UniqueId::new([1; 128]) };
    world(generation, 4, rank, way)
}

/// Feeds the events; an event that needs the ticket of the last action is made of it. What each led to.
fn check(version: Version, script: &[&dyn Fn(Ticket) -> Event]) -> (Life, Vec<Option<Action>>) {
    let mut life = Life::new(version);
    let mut ticket = Ticket(0);
    let actions = script
        .iter()
        .map(|event| {
            let action = life.on(event(ticket));
            ticket = action.as_ref().and_then(Action::ticket).unwrap_or(ticket);
            action
        })
        .collect();
    (life, actions)
}

fn told(world: World) -> impl Fn(Ticket) -> Event {
    move |_| Event::Told(world.clone())
}

fn broke(_: Ticket) -> Event {
    Event::Broke
}

fn names(actions: &[Option<Action>]) -> Vec<&'static str> {
    let name = |action: &Option<Action>| match action {
        None => "",
        Some(Action::Init(..)) => "init",
        Some(Action::Shrink(..)) => "shrink",
        Some(Action::Grow(..)) => "grow",
        Some(Action::Release(_)) => "release",
        Some(Action::Revoke(_)) => "revoke",
        Some(Action::Abort(_)) => "abort",
        Some(Action::Leave(_)) => "leave",
        Some(Action::Refuse(_)) => "refuse",
        Some(Action::Exit(_)) => "exit",
    };
    actions.iter().map(name).collect()
}

#[test]
fn a_break_is_revoked_shrunk_and_its_parent_aborted() {
    let (life, actions) = check(
        ALL,
        &[
            &told(fresh(1)),
            &Event::Done,
            &broke,
            &Event::Done,
            &told(shrink(2, 1)),
            &Event::Done,
            &Event::Done,
        ],
    );
    assert_eq!(names(&actions), ["init", "", "revoke", "", "shrink", "release", ""]);
    let held = Held { generation: Generation(2), size: WorldSize(2), ranks: vec![Rank(0)] };
    assert_eq!(life.usable(), Some(&held));
}

#[test]
fn without_revoke_a_break_is_aborted_and_formed_afresh() {
    let (life, actions) = check(
        Version::new(2, 27, 3),
        &[
            &told(fresh(1)),
            &Event::Done,
            &broke,
            &Event::Done,
            &told(shrink(2, 1)),
            &told(fresh(3)),
            &Event::Done,
        ],
    );
    assert_eq!(names(&actions), ["init", "", "abort", "", "refuse", "init", ""]);
    assert_eq!(life.usable().map(|held| held.generation), Some(Generation(3)));
}

#[test]
fn a_healthy_world_grows_and_a_revoked_one_does_not() {
    let (_, actions) =
        check(ALL, &[&told(fresh(1)), &Event::Done, &told(grow(2, 1, 1)), &Event::Done, &Event::Done]);
    assert_eq!(names(&actions), ["init", "", "grow", "release", ""]);
    let (_, actions) =
        check(ALL, &[&told(fresh(1)), &Event::Done, &broke, &Event::Done, &told(grow(2, 1, 1))]);
    assert_eq!(actions[4], Some(Action::Refuse(Refusal::NotQuiet { parent: Generation(1) })));
    let (life, actions) = check(ALL, &[&told(grow(2, 1, 3)), &Event::Done]);
    assert_eq!(names(&actions), ["grow", ""], "a newcomer has no parent to release");
    assert_eq!(life.usable().map(|held| held.generation), Some(Generation(2)));
}

#[test]
fn g5_a_second_missed_deadline_ends_in_exit() {
    let (life, actions) = check(
        ALL,
        &[&told(fresh(1)), &Event::Missed, &Event::Done, &told(fresh(2)), &Event::Missed, &told(fresh(3))],
    );
    assert_eq!(names(&actions), ["init", "abort", "", "init", "exit", "refuse"]);
    assert_eq!(life.state(), &State::Exit(ExitReason::MissedTwice));
    let (_, actions) = check(ALL, &[&told(fresh(1)), &Event::Missed, &Event::Missed]);
    assert_eq!(actions[2], Some(Action::Exit(ExitReason::AbortHangs)));
}

#[test]
fn g5_a_world_that_stood_forgets_a_missed_deadline() {
    let (_, actions) = check(
        ALL,
        &[
            &told(fresh(1)),
            &Event::Missed,
            &Event::Done,
            &told(fresh(2)),
            &Event::Done,
            &told(fresh(3)),
            &Event::Done,
            &Event::Missed,
        ],
    );
    assert_eq!(names(&actions), ["init", "abort", "", "init", "", "abort", "init", "abort"]);
}

#[test]
fn g3_a_list_that_does_not_fit_the_parent_is_refused() {
    let wrong = |change: &dyn Fn(&mut World)| {
        let mut world = shrink(2, 1);
        change(&mut world);
        check(ALL, &[&told(fresh(1)), &Event::Done, &told(world)]).1.pop().unwrap()
    };
    let exclude = |ranks: &[u32]| Way::Shrink {
        parent: Generation(1),
        exclude: ranks.iter().map(|rank| Rank(*rank)).collect(),
    };
    let refused = |action: Option<Action>| match action {
        Some(Action::Refuse(Refusal::WrongSeat { what, .. })) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(wrong(&|w| w.way = exclude(&[1]))), "this process is on the list of who is gone");
    assert_eq!(refused(wrong(&|w| w.way = exclude(&[2]))), "survivors are renumbered in order");
    assert_eq!(refused(wrong(&|w| w.way = exclude(&[5]))), "somebody is gone who never was there");
    assert_eq!(refused(wrong(&|w| w.way = exclude(&[0, 2]))), "the size is not that of who is left");
    assert!(refused(wrong(&|w| w.way = exclude(&[]))).contains("empty"));
}

#[test]
fn g4_a_world_told_while_another_forms_replaces_it() {
    let (life, actions) = check(
        ALL,
        &[&told(fresh(1)), &told(fresh(2)), &|_| Event::Done(Ticket(1)), &Event::Done, &Event::Done],
    );
    assert_eq!(names(&actions), ["init", "abort", "", "init", ""]);
    assert_eq!(life.usable().map(|held| held.generation), Some(Generation(2)));
    let (_, actions) = check(ALL, &[&told(fresh(2)), &Event::Done, &told(fresh(1))]);
    let stale = Refusal::Stale { told: Generation(1), newest: Generation(2) };
    assert_eq!(actions[2], Some(Action::Refuse(stale)));
}
