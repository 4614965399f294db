//! Every sequence of events up to a depth, with a model of the hands that hold the handles: the rules G-1 to G-6.

use std::collections::BTreeSet;

use super::life_tests::{fresh, grow, shrink};
use super::*;

const DEPTH: usize = 12;

/// Handles as the thread that makes the calls has them: by the generation they were formed for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Hands {
    /// What collectives would use, and what a shrink or a grow is made of.
    formed: Option<u64>,
    /// What is being formed.
    child: Option<u64>,
    /// What a child was made of.
    parent: Option<u64>,
    revoked: bool,
}

#[derive(Clone)]
struct Walked {
    life: Life,
    hands: Hands,
    /// What is being done.
    under_way: Option<Action>,
    /// All that was told.
    told: Vec<World>,
    missed: u32,
}

/// Does what `action` asks for, as far as it is done before it is answered.
fn perform(walked: &mut Walked, action: Action, way: &str) {
    let hands = &mut walked.hands;
    match &action {
        Action::Init(_, world) => {
            assert_eq!(*hands, Hands::default(), "G-2: an init beside a handle: {way}");
            hands.child = Some(world.generation.0);
        }
        Action::Shrink(_, world) => {
            assert_eq!(walked.told.last(), Some(world), "G-3: the list is the committed one: {way}");
            let Way::Shrink { parent, .. } = &world.way else { panic!("{way}") };
            assert_eq!(hands.formed, Some(parent.0), "G-2: a shrink of a handle that is gone: {way}");
            (hands.child, hands.parent, hands.formed) = (Some(world.generation.0), hands.formed, None);
        }
        Action::Grow(_, world) => {
            let Way::Grow { parent, .. } = &world.way else { panic!("{way}") };
            assert!(!hands.revoked, "a revoked communicator grows: {way}");
            if world.ranks[0].0 < 3 {
                assert_eq!(hands.formed, Some(parent.0), "G-2: growth of a handle that is gone: {way}");
            } else {
                assert_eq!(*hands, Hands::default(), "G-2: a newcomer has a handle: {way}");
            }
            (hands.child, hands.parent, hands.formed) = (Some(world.generation.0), hands.formed, None);
        }
        Action::Release(_) => {
            assert!(hands.parent.is_some() && hands.formed.is_some(), "nothing to release: {way}");
            hands.parent = None;
        }
        Action::Revoke(_) => {
            assert!(hands.formed.is_some() && !hands.revoked, "G-2: a revoke of what is gone: {way}");
            hands.revoked = true;
        }
        // From here on nobody may use one of them.
        Action::Abort(_) => *hands = Hands::default(),
        Action::Leave(_) => {
            assert!(hands.formed.is_some() && !hands.revoked, "G-2: leaving with what is gone: {way}");
            assert_eq!(hands.parent, None, "G-6: a parent is destroyed: {way}");
        }
        Action::Refuse(_) => return,
        Action::Exit(_) => {
            walked.under_way = None;
            return;
        }
    }
    walked.under_way = Some(action);
}

/// What success does to the handles.
fn succeed(hands: &mut Hands, action: &Action) {
    match action {
        Action::Init(..) | Action::Shrink(..) | Action::Grow(..) => {
            hands.formed = hands.child.take();
            hands.revoked = false;
        }
        Action::Leave(_) => *hands = Hands::default(),
        Action::Release(_) | Action::Revoke(_) | Action::Abort(_) | Action::Refuse(_) | Action::Exit(_) => {}
    }
}

fn events(walked: &Walked) -> Vec<Event> {
    let newest = walked.life.newest.0;
    let held = walked.life.parents().first().map_or(newest, |parent| parent.generation.0);
    let mut events = vec![
        Event::Told(fresh(newest + 1)),
        Event::Told(shrink(newest + 1, held)),
        Event::Told(shrink(newest + 1, held + 50)),
        Event::Told(grow(newest + 1, held, 1)),
        Event::Told(grow(newest + 1, held, 3)),
        Event::Told(fresh(newest)),
        Event::Broke,
        Event::Leave,
        Event::Stuck,
    ];
    let ticket = Ticket(walked.life.tickets);
    events.extend([Event::Done(ticket), Event::Failed(ticket), Event::Missed(ticket)]);
    if ticket.0 > 0 {
        events.push(Event::Done(Ticket(ticket.0 - 1)));
    }
    events
}

fn step(mut walked: Walked, event: Event, way: &str) -> Walked {
    let before = walked.life.clone();
    let answered = match &event {
        Event::Done(ticket) | Event::Failed(ticket) | Event::Missed(ticket) => Some(*ticket),
        Event::Told(_) | Event::Broke | Event::Leave | Event::Stuck => None,
    };
    let is_answer = answered.is_some() && answered == before.waits_for();
    if is_answer {
        let action = walked.under_way.take().expect("what is waited for is under way");
        assert_eq!(action.ticket(), answered, "{way}");
        match &event {
            Event::Done(_) => succeed(&mut walked.hands, &action),
            Event::Missed(_) => {
                walked.missed += 1;
                let hangs = matches!(action, Action::Abort(_) | Action::Release(_));
                if walked.missed >= 2 || hangs {
                    let after = {
                        let mut life = before.clone();
                        life.on(event.clone());
                        life.state
                    };
                    assert!(matches!(after, State::Exit(_)), "G-5: {way}");
                }
            }
            Event::Failed(_) | Event::Told(_) | Event::Broke | Event::Leave | Event::Stuck => {}
        }
    }
    match &event {
        Event::Told(world) if world.generation > before.newest && !matches!(before.state, State::Exit(_)) => {
            walked.told.push(world.clone());
        }
        _ => {}
    }
    let action = walked.life.on(event);
    if answered.is_some() && !is_answer {
        assert_eq!((&walked.life, &action), (&before, &None), "G-4: an old answer counts: {way}");
    }
    if let Some(action) = action {
        perform(&mut walked, action, way);
    }
    if let State::Healthy(held) = &walked.life.state {
        assert_eq!(walked.hands.formed, Some(held.generation.0), "G-2: {way}");
        if !matches!(before.state, State::Healthy(_)) {
            walked.missed = 0;
        }
    }
    walked
}

fn check_rules(walked: &Walked, way: &str) {
    let life = &walked.life;
    assert_eq!(life.waits_for(), walked.under_way.as_ref().and_then(Action::ticket), "G-1: {way}");
    let committed = walked.told.last().map(|world| world.generation).unwrap_or_default();
    assert_eq!(life.newest, committed, "{way}");
    if let Some(held) = life.usable() {
        assert_eq!(held.generation, committed, "G-4: what is used is the committed one: {way}");
        assert_eq!(walked.hands.formed, Some(held.generation.0), "G-2: what is used is there: {way}");
        assert!(!walked.hands.revoked, "G-2: {way}");
    }
    for parent in life.parents() {
        assert_eq!(walked.hands.formed, Some(parent.generation.0), "G-2: what is offered is there: {way}");
    }
    // G-1: whatever is waited for, clocks alone lead to where nothing is.
    let mut alone = walked.clone();
    for _ in 0..3 {
        let Some(ticket) = alone.life.waits_for() else { return };
        alone = step(alone, Event::Missed(ticket), way);
    }
    assert_eq!(alone.life.waits_for(), None, "G-1: it waits for ever: {way}");
}

/// What two walks must have in common to go on alike: tickets and generations only count relative to the newest.
fn likeness(walked: &Walked) -> String {
    let Walked { life, hands, under_way, told, missed } = walked;
    let newest = life.newest.0;
    let ages = |generation: Option<u64>| generation.map(|generation| newest - generation);
    let world = |world: &World| {
        let parent = match &world.way {
            Way::Fresh { .. } => None,
            Way::Shrink { parent, .. } | Way::Grow { parent, .. } => Some(newest as i64 - parent.0 as i64),
        };
        format!(
            "{}:{parent:?}:{:?}:{}",
            newest - world.generation.0,
            world.ranks,
            matches!(world.way, Way::Grow { .. })
        )
    };
    let state = match &life.state {
        State::Empty => "empty".to_owned(),
        State::Forming { world: w, of_parent, .. } => format!("forming {} {of_parent}", world(w)),
        State::Releasing { held, then, .. } => {
            let then = match then {
                Then::Use => "use".to_owned(),
                Then::Abort => "abort".to_owned(),
                Then::Form(w) => world(w),
            };
            format!("releasing {} {:?} {then}", newest - held.generation.0, held.ranks)
        }
        State::Healthy(held) => {
            format!("healthy {} {:?} {}", newest - held.generation.0, held.ranks, held.size)
        }
        State::Revoking { held, then, .. } => {
            let then = then.as_ref().map(world);
            format!("revoking {} {:?} {} {then:?}", newest - held.generation.0, held.ranks, held.size)
        }
        State::Revoked(held) => {
            format!("revoked {} {:?} {}", newest - held.generation.0, held.ranks, held.size)
        }
        State::Aborting { then, .. } => format!("aborting {:?}", then.as_ref().map(world)),
        State::Leaving { .. } => "leaving".to_owned(),
        State::Exit(reason) => format!("{reason:?}"),
    };
    let hands = (ages(hands.formed), ages(hands.child), ages(hands.parent), hands.revoked);
    format!("{state} {hands:?} {} {} {missed} {}", under_way.is_some(), life.missed, told.len().min(1))
}

fn walk(version: Version) -> usize {
    let start = Walked {
        life: Life::new(version),
        hands: Hands::default(),
        under_way: None,
        told: Vec::new(),
        missed: 0,
    };
    let mut seen = BTreeSet::from([likeness(&start)]);
    let mut layer = vec![(start, String::new())];
    for _ in 0..DEPTH {
        let mut next = Vec::new();
        for (walked, way) in layer {
            for event in events(&walked) {
                let way = format!("{way} {event:?};");
                let after = step(walked.clone(), event, &way);
                check_rules(&after, &way);
                if seen.insert(likeness(&after)) {
                    next.push((after, way));
                }
            }
        }
        layer = next;
    }
    seen.len()
}

#[test]
fn g1_to_g6_hold_over_every_sequence_of_events() {
    let walked = [(2, 26, 2), (2, 27, 3), (2, 28, 7), (2, 30, 7)]
        .map(|(major, minor, patch)| walk(Version::new(major, minor, patch)));
    // The more an NCCL can do, the more there is to be seen: if not, the walk has not got there.
    assert!(walked[0] > 50 && walked.windows(2).all(|pair| pair[0] < pair[1]), "{walked:?}");
}
