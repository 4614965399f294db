use super::*;
use crate::pickle::PickleError;

/// What agents of these releases have written; `tests/torchelastic/states.py` makes them.
const BY_2_15: &str = include_str!("../../tests/states/2.15.0.txt");
const BY_2_5: &str = include_str!("../../tests/states/2.5.1.txt");

fn agent(addr: &str, pid: i64, local_id: i64) -> Agent {
    Agent { addr: addr.to_owned(), pid, local_id }
}

fn check(file: &str, is_aware: bool) {
    let (full, empty) = file.trim().split_once('\n').unwrap();
    let state = State::decode(full.as_bytes()).unwrap();
    let at = |unix_us| Instant { unix_us, is_aware };
    let [a, b, c, e] = [
        agent("node-a", 4321, 0),
        agent("node-b.example.org", 70_000, 1),
        agent("node-c", 3, 0),
        agent("node-e", 5, 0),
    ];
    let expected = State {
        round: 300,
        complete: true,
        // 2026-02-28 23:59:59.999999
        deadline: Some(at(1_772_323_199_999_999)),
        closed: false,
        participants: BTreeMap::from([(a.clone(), 0), (b.clone(), 1)]),
        wait_list: BTreeSet::from([c.clone()]),
        redundancy_list: Some(BTreeSet::from([e])),
        last_heartbeats: BTreeMap::from([
            (a, at(1_795_741_323_000_004)),
            // A leap day.
            (b, at(1_709_208_000_000_000)),
            (c, at(1_767_225_600_000_001)),
        ]),
        others: Vec::new(),
        protocol: 4,
    };
    assert_eq!(state, expected);
    assert_eq!(State::decode(&state.encode()).unwrap(), state);
    let empty = State::decode(empty.as_bytes()).unwrap();
    assert_eq!((empty.round, empty.complete, empty.deadline, empty.participants.len()), (0, false, None, 0));
    assert_eq!(State::decode(&empty.encode()).unwrap(), empty);
}

#[test]
fn what_agents_write_is_read_and_written_back_in_their_form() {
    check(BY_2_15, true);
    check(BY_2_5, false);
}

#[test]
fn days_are_counted_as_in_the_calendar() {
    for day in -200_000..200_000 {
        let (year, month, of_month) = civil_from_days(day);
        assert_eq!(days_from_civil(year, month, of_month), day);
        assert!((1..=12).contains(&month) && (1..=31).contains(&of_month));
    }
    assert_eq!(civil_from_days(0), (1970, 1, 1));
    assert_eq!(civil_from_days(19_782), (2024, 2, 29));
}

fn refused(pickle: &[u8]) -> StateError {
    State::decode(BASE64.encode(pickle).as_bytes()).unwrap_err()
}

#[test]
fn e1_a_pickle_that_would_run_something_is_refused_by_name() {
    // pickle.dumps of an object whose __reduce__ gives os.system, in versions 4 and 0.
    let version_4 = b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.";
    let name = StateError::Pickle(PickleError::Ends);
    let error = refused(version_4);
    assert_ne!(error, name);
    assert_eq!(
        error.to_string(),
        "the pickle names posix.system, which is not allowed in a rendezvous state"
    );
    assert_eq!(refused(b"cposix\nsystem\n(S'id'\ntR."), PickleError::Instruction(b'c').into());
    // A persistent id, an extension, an instance, a buffer of somebody else's.
    for instruction in [b'P', b'Q', 0x82, b'i', b'o', 0x97, 0x98, 0x92] {
        assert_eq!(refused(&[0x80, 4, instruction, 0, 0]), PickleError::Instruction(instruction).into());
    }
}

#[test]
fn e1_allowed_names_are_used_as_states_use_them_or_not_at_all() {
    let module = b"\x80\x04\x8c\x37torch.distributed.elastic.rendezvous.dynamic_rendezvous";
    // The class of states, called with an argument.
    let called = [&module[..], b"\x8c\x10_RendezvousState\x93N\x85R."].concat();
    assert!(matches!(refused(&called), StateError::Pickle(PickleError::Nonsense(_))));
    // It alone.
    let alone = [&module[..], b"\x8c\x10_RendezvousState\x93."].concat();
    assert!(matches!(refused(&alone), StateError::Nonsense(_)));
    // `datetime.datetime`, made like an object.
    assert!(matches!(refused(b"\x80\x04\x8c\x08datetime\x8c\x08datetime\x93)\x81."), StateError::Pickle(_)));
}

#[test]
fn e7_a_pickle_that_grows_or_lies_in_itself_is_refused() {
    // Each list holds the one before it ten times: 10^11 values from a few hundred bytes.
    let mut bomb = b"\x80\x04]\x94".to_vec();
    for level in 0..11_u8 {
        bomb.extend_from_slice(b"](");
        bomb.extend((0..10).flat_map(|_| [b'h', level]));
        bomb.extend_from_slice(b"e\x94");
    }
    bomb.push(b'.');
    let tidy: Vec<u8> = bomb;
    assert!(matches!(refused(&tidy), StateError::Pickle(PickleError::Large | PickleError::Nonsense(_))));
    // A long text, again and again.
    let text = [&b"X"[..], &300_000_u32.to_le_bytes(), &vec![b'a'; 300_000], b"\x94"].concat();
    let listed = [&b"\x80\x04]("[..], &text, &b"h\0".repeat(150_000), b"e."].concat();
    assert_eq!(refused(&listed), PickleError::Large.into());
    // A list that holds itself.
    assert_eq!(refused(b"\x80\x04]\x94h\0a."), PickleError::Large.into());
    let large = vec![b'A'; STATE_BYTES_MAX + 1];
    assert!(matches!(State::decode(&large), Err(StateError::Large { .. })));
}

#[test]
fn what_a_later_release_adds_is_kept() {
    let (full, _) = BY_2_15.trim().split_once('\n').unwrap();
    let mut state = State::decode(full.as_bytes()).unwrap();
    state.others.push(("generation_hint".to_owned(), Value::Tuple(vec![Value::Int(-7), Value::Float(0)])));
    assert_eq!(State::decode(&state.encode()).unwrap(), state);
}

#[test]
fn e1_whatever_bytes_come_they_are_a_state_that_can_be_written_again_or_refused() {
    let mut seen = 0;
    for file in [BY_2_15, BY_2_5] {
        let pickle = BASE64.decode(file.trim().split_once('\n').unwrap().0).unwrap();
        for seed in 0_u64..20_000 {
            // Xorshift: the same seed spoils the same bytes.
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut next = || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random as usize
            };
            let mut spoilt = pickle.clone();
            for _ in 0..1 + next() % 3 {
                let at = next() % spoilt.len();
                match next() % 4 {
                    0 => spoilt[at] = next() as u8,
                    1 => spoilt[at] ^= 1 << (next() % 8),
                    2 => {
                        spoilt.remove(at);
                    }
                    _ => spoilt.insert(at, next() as u8),
                }
            }
            if let Ok(state) = State::decode(BASE64.encode(&spoilt).as_bytes()) {
                seen += 1;
                assert_eq!(State::decode(&state.encode()).as_ref(), Ok(&state), "seed {seed}");
            }
        }
    }
    assert!(seen > 100, "some of them are still states: {seen}");
}
