use super::*;

const NOW: i64 = 1_790_000_000_000_000;

/// What the agent does with a state: PyTorch's `_RendezvousJoinOp` and `_RendezvousExitOp`, as far as they write.
struct Torch {
    own: Agent,
    has_spares: bool,
}

/// What came of looking once.
#[derive(Debug, PartialEq)]
enum Looked {
    /// It wrote something.
    Wrote(Option<Wish>),
    Waits,
    Joined {
        round: i64,
        rank: i64,
        size: usize,
    },
    Closed {
        was_spare: bool,
    },
}

impl Torch {
    fn new(has_spares: bool) -> Torch {
        Torch { own: Agent { addr: "host".to_owned(), pid: 7, local_id: 0 }, has_spares }
    }

    /// The first state that an agent writes, and later ones as it reads them.
    fn read(&self, seat: &Seat) -> State {
        let shown = seat.shown(NOW);
        if shown != SENTINEL {
            return State::decode(&shown).unwrap();
        }
        let first = include_bytes!("../../tests/states/2.15.0.txt");
        let line = first.split(|byte| *byte == b'\n').find_map(|line| {
            line.split(|byte| *byte == b' ').rev().find_map(|word| State::decode(word).ok())
        });
        let mut state = line.expect("a state").emptied();
        state.round = 0;
        if !self.has_spares {
            state.redundancy_list = None;
        }
        state
    }

    fn write(&self, seat: &mut Seat, mut state: State) -> Looked {
        let now = Instant { unix_us: NOW, is_aware: true };
        state.last_heartbeats.insert(self.own.clone(), now);
        Looked::Wrote(seat.compare_set(&state.encode()).unwrap())
    }

    fn joins(&self, seat: &mut Seat) -> Looked {
        let mut state = self.read(seat);
        let spare = state.redundancy_list.as_ref().is_some_and(|list| list.contains(&self.own));
        if state.closed {
            return Looked::Closed { was_spare: spare };
        }
        if spare {
            return Looked::Waits;
        }
        match state.participants.get(&self.own) {
            Some(rank) if state.complete => {
                let size = state.participants.len();
                let ranks: BTreeSet<i64> = state.participants.values().copied().collect();
                assert_eq!(ranks, (0..size as i64).collect(), "everybody has a rank of their own");
                return Looked::Joined { round: state.round, rank: *rank, size };
            }
            Some(_) => {
                assert!(state.deadline.unwrap().unix_us > NOW, "it would complete the round by itself");
                return Looked::Waits;
            }
            None => {}
        }
        if state.complete {
            if !state.wait_list.insert(self.own.clone()) {
                return Looked::Waits;
            }
        } else {
            state.participants.insert(self.own.clone(), 0);
        }
        self.write(seat, state)
    }

    fn exits(&self, seat: &mut Seat) -> Looked {
        let mut state = self.read(seat);
        if state.participants.remove(&self.own).is_none() {
            return Looked::Waits;
        }
        self.write(seat, state)
    }

    fn keeps_alive(&self, seat: &mut Seat) -> Looked {
        let state = self.read(seat);
        self.write(seat, state)
    }
}

#[test]
fn an_agent_comes_in_and_is_told_when_its_round_is_over_e5() {
    for has_spares in [true, false] {
        let (mut seat, agent) = (Seat::new(4), Torch::new(has_spares));
        assert_eq!(seat.compare_set(SENTINEL).unwrap(), None);
        assert_eq!(agent.joins(&mut seat), Looked::Wrote(Some(Wish::Join)));
        assert_eq!(agent.joins(&mut seat), Looked::Waits);
        assert_eq!(agent.keeps_alive(&mut seat), Looked::Wrote(None), "it does not ask twice");
        seat.begins(5, 2, 3);
        assert_eq!(agent.joins(&mut seat), Looked::Joined { round: 5, rank: 2, size: 3 });
        assert_eq!(agent.keeps_alive(&mut seat), Looked::Wrote(None));
        assert_eq!(agent.read(&seat).wait_list.len(), 0);
        seat.ends();
        assert_eq!(agent.read(&seat).wait_list.len(), 1, "it sees somebody waiting");
        assert_eq!(agent.exits(&mut seat), Looked::Wrote(Some(Wish::Leave)));
        assert_eq!(agent.read(&seat).round, 6, "E-3");
        assert_eq!(agent.joins(&mut seat), Looked::Wrote(Some(Wish::Join)));
        seat.begins(6, 0, 1);
        assert_eq!(agent.joins(&mut seat), Looked::Joined { round: 6, rank: 0, size: 1 });
    }
}

#[test]
fn one_too_many_waits_and_is_let_in_later() {
    for has_spares in [true, false] {
        let (mut seat, agent) = (Seat::new(2), Torch::new(has_spares));
        agent.joins(&mut seat);
        seat.is_spare();
        assert_eq!(agent.joins(&mut seat), Looked::Waits);
        seat.begins(9, 1, 2);
        assert_eq!(agent.joins(&mut seat), Looked::Joined { round: 9, rank: 1, size: 2 });
    }
    let (mut seat, agent) = (Seat::new(2), Torch::new(true));
    agent.joins(&mut seat);
    seat.is_spare();
    seat.closes();
    assert_eq!(agent.joins(&mut seat), Looked::Closed { was_spare: true }, "it ends with success");
}

#[test]
fn who_gives_up_gets_no_place_that_comes_too_late() {
    let (mut seat, agent) = (Seat::new(2), Torch::new(true));
    agent.joins(&mut seat);
    assert_eq!(agent.exits(&mut seat), Looked::Wrote(Some(Wish::Leave)));
    seat.begins(3, 0, 2);
    seat.ends();
    assert!(!agent.read(&seat).complete);
    assert_eq!(agent.joins(&mut seat), Looked::Wrote(Some(Wish::Join)));
}

#[test]
fn a_run_is_closed_once_and_stays_so_e3() {
    let (mut seat, agent) = (Seat::new(2), Torch::new(true));
    agent.joins(&mut seat);
    seat.begins(1, 0, 1);
    let mut state = agent.read(&seat);
    state.closed = true;
    assert_eq!(agent.write(&mut seat, state), Looked::Wrote(Some(Wish::Close)));
    assert_eq!(agent.keeps_alive(&mut seat), Looked::Wrote(None));
    assert_eq!(agent.joins(&mut seat), Looked::Closed { was_spare: false });
}

#[test]
fn nothing_but_a_state_of_this_agent_is_read_e2() {
    let (mut seat, agent) = (Seat::new(2), Torch::new(true));
    agent.joins(&mut seat);
    let before = seat.shown(NOW);
    assert!(seat.compare_set(b"gASVJAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAl0b3VjaCAvdG1wlIWUUpQu").is_err());
    let other = Torch { own: Agent { addr: "host".to_owned(), pid: 8, local_id: 0 }, has_spares: true };
    let mut state = agent.read(&seat);
    state.participants.insert(other.own.clone(), 0);
    assert!(seat.compare_set(&state.encode()).is_err());
    state.participants.remove(&agent.own);
    assert!(seat.compare_set(&state.encode()).is_err());
    assert_eq!(seat.shown(NOW), before);
    assert_eq!(seat.agent(), Some(&agent.own));
}
