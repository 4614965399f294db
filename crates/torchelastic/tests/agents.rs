//! Agents of stock torchrun as a model, against the real rendezvous, in virtual time and by seed: they come, die, crash their
//! workers, and in the end all that live are in one round. What an agent does follows
//! `torch.distributed.elastic.rendezvous.dynamic_rendezvous` of PyTorch 2.15.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use reknit_torchelastic::kv::{ConnectionId, KvLimits, Total};
use reknit_torchelastic::rendezvous::{Caller, Effect, Rendezvous, RequestError, RunLimits};
use reknit_torchelastic::run::{Repair, Repairs, absentee};
use reknit_torchelastic::state::{Agent, Instant, SENTINEL, State};
use reknit_torchelastic::wire::{Parsed, Request, WireLimits, parse};

const KEY: &[u8] = b"/torch.rendezvous.job";
const KEEP_ALIVE: i64 = 5_000_000;
const DEAD_AFTER: i64 = 15_000_000;
const LAST_CALL: i64 = 30_000_000;
const SECOND: i64 = 1_000_000;
/// How long all that live may take to be in one round, once nothing happens to them any more: twice, for what happened last may come in
/// the middle of a formation, to see that somebody has gone (1 s), to stop their workers (2 s), and to look three times (1 s each).
const HEALED_AFTER: i64 = 12 * SECOND;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: i64) -> i64 {
        (self.next() % bound as u64) as i64
    }

    fn chance(&mut self, percent: i64) -> bool {
        self.below(100) < percent
    }
}

/// What an agent is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Leaving,
    Joining,
    Running {
        round: i64,
    },
    /// It stops its workers.
    Stopping,
}

struct Model {
    own: Agent,
    connection: ConnectionId,
    phase: Phase,
    /// When it does something next, and when it writes that it lives.
    wakes: i64,
    heartbeat: i64,
    rank: Option<i64>,
}

struct World {
    rendezvous: Rendezvous,
    now: i64,
    min: usize,
    max: usize,
    agents: BTreeMap<u64, Model>,
    came: u64,
    random: Random,
    rounds: i64,
    effects: Vec<Effect>,
    emptied: usize,
    closed: Vec<ConnectionId>,
}

impl World {
    fn new(seed: u64, repairs: Repairs, min: usize, max: usize) -> World {
        World {
            rendezvous: Rendezvous::new(
                repairs,
                KvLimits::default(),
                Total::default(),
                RunLimits::default(),
                None,
            ),
            // Some day in 2026.
            now: 1_790_000_000 * SECOND,
            min,
            max,
            agents: BTreeMap::new(),
            came: 0,
            random: Random(seed),
            rounds: 0,
            effects: Vec::new(),
            emptied: 0,
            closed: Vec::new(),
        }
    }

    fn comes(&mut self) {
        self.came += 1;
        let own =
            Agent { addr: format!("host-{}", self.random.below(5)), pid: self.came as i64, local_id: 0 };
        let wakes = self.now + self.random.below(SECOND);
        let connection = ConnectionId(self.came);
        let model = Model { own, connection, phase: Phase::Starting, wakes, heartbeat: 0, rank: None };
        self.agents.insert(self.came, model);
    }

    fn dies(&mut self, agent: u64) {
        let gone = self.agents.remove(&agent).unwrap();
        let now = Duration::from_micros(self.now as u64);
        self.rendezvous.disconnected(now, gone.connection, &mut Vec::new(), &mut self.effects);
        self.looks_right();
    }

    fn ask(&mut self, connection: ConnectionId, request: Request<'_>) -> Result<Vec<u8>, RequestError> {
        let caller = Caller {
            connection,
            peer: IpAddr::from([10, 0, 1, 0]),
            reached: IpAddr::from([10, 0, 0, 1]),
            pings: true,
        };
        let (mut reply, mut woken) = (Vec::new(), Vec::new());
        let now = Duration::from_micros(self.now as u64);
        let asked = self.rendezvous.request(now, caller, request, &mut reply, &mut woken, &mut self.effects);
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::OpenStore(run) => self.rendezvous.opened(&run, Some(29_500), caller, &mut woken)?,
                Effect::EmptyStore(_) => self.emptied += 1,
                Effect::Close(connections) => self.closed.extend(connections),
                Effect::CloseStore(_) | Effect::Changed(_) | Effect::Forgotten(_) => {}
            }
        }
        asked?;
        self.looks_right();
        Ok(reply.get(8..).unwrap_or_default().to_vec())
    }

    fn stored(&self) -> Option<&State> {
        self.rendezvous.run("job").filter(|(_, has_ended)| !has_ended).and_then(|(run, _)| run.state())
    }

    /// What always holds of what agents can read.
    fn looks_right(&mut self) {
        let Some(state) = self.stored() else {
            // Nobody is left who would remember.
            self.rounds = 0;
            return;
        };
        assert!(state.round >= self.rounds, "E-3: {} after {}", state.round, self.rounds);
        let (round, complete) = (state.round, state.complete);
        if complete {
            let ranks: BTreeSet<i64> = state.participants.values().copied().collect();
            // An agent that has gone leaves a gap in a round that is over anyway.
            assert!(ranks.len() == state.participants.len() && ranks.iter().all(|rank| *rank >= 0));
            assert!(state.participants.len() <= self.max);
        } else {
            assert!(!state.wait_list.contains(&absentee()), "it stands for a round that is over");
        }
        self.rounds = round;
    }

    fn moves(&mut self, agent: u64) {
        let connection = self.agents[&agent].connection;
        if self.agents[&agent].phase == Phase::Starting {
            let first = Request::CompareSet { key: KEY, expected: b"", desired: SENTINEL };
            self.ask(connection, first).unwrap();
            self.agents.get_mut(&agent).unwrap().phase = Phase::Leaving;
        }
        // It tries again at once when it loses a race; so often it does not.
        for _ in 0..50 {
            let raw = self.ask(connection, Request::Get { key: KEY }).unwrap();
            let mut state = match raw == SENTINEL {
                true => None,
                false => Some(State::decode(&raw).unwrap()),
            };
            let wanted = self.decides(agent, &mut state);
            let Some(wanted) = wanted else { return };
            let desired = wanted.encode();
            let back = self
                .ask(connection, Request::CompareSet { key: KEY, expected: &raw, desired: &desired })
                .unwrap();
            if back == desired {
                let model = self.agents.get_mut(&agent).unwrap();
                if wanted.last_heartbeats.contains_key(&model.own) {
                    model.heartbeat = self.now;
                }
            }
        }
        panic!("an agent writes again and again: {:?} {:?}", self.agents[&agent].phase, self.stored());
    }

    /// What the agent writes next, if it writes; else it sleeps.
    fn decides(&mut self, agent: u64, state: &mut Option<State>) -> Option<State> {
        let (now, min, max) = (self.now, self.min, self.max);
        let pause = self.random.below(SECOND);
        let model = self.agents.get_mut(&agent).unwrap();
        let own = model.own.clone();
        let heartbeat = Instant { unix_us: now, is_aware: true };
        let Some(state) = state else {
            // The first state of all.
            let mut first = first_state();
            model.phase = Phase::Joining;
            join(&mut first, &own, heartbeat, min, max);
            return Some(first);
        };
        // It drops whoever it has not heard of; others see that when it writes next.
        let dead: Vec<Agent> = state
            .last_heartbeats
            .iter()
            .filter(|(_, at)| at.unix_us < now - DEAD_AFTER)
            .map(|(agent, _)| agent.clone())
            .collect();
        for agent in dead {
            state.remove(&agent);
        }
        loop {
            match model.phase {
                Phase::Starting => unreachable!("it has started"),
                Phase::Stopping => model.phase = Phase::Leaving,
                Phase::Leaving => {
                    if state.participants.contains_key(&own) {
                        state.participants.remove(&own);
                        state.last_heartbeats.remove(&own);
                        state.begin_next_if_left();
                        if !state.complete && state.participants.len() < min {
                            state.deadline = None;
                        }
                        return Some(state.clone());
                    }
                    model.phase = Phase::Joining;
                }
                Phase::Joining => {
                    let is_in = state.participants.contains_key(&own);
                    if state.complete && is_in {
                        model.phase = Phase::Running { round: state.round };
                        model.rank = state.participants.get(&own).copied();
                        model.wakes = now + pause;
                        return None;
                    }
                    let waits = state.wait_list.contains(&own)
                        || state.redundancy_list.as_ref().unwrap().contains(&own);
                    if state.complete && !waits {
                        if state.participants.len() < max {
                            state.wait_list.insert(own.clone());
                        } else {
                            state.redundancy_list.as_mut().unwrap().insert(own.clone());
                        }
                        state.last_heartbeats.insert(own, heartbeat);
                        return Some(state.clone());
                    }
                    let spare = state.redundancy_list.as_ref().unwrap().contains(&own);
                    if spare && state.participants.len() < max {
                        state.redundancy_list.as_mut().unwrap().remove(&own);
                        if state.complete {
                            state.wait_list.insert(own.clone());
                            state.last_heartbeats.insert(own, heartbeat);
                            return Some(state.clone());
                        }
                    }
                    if !state.complete && !is_in && state.participants.len() < max {
                        join(state, &own, heartbeat, min, max);
                        return Some(state.clone());
                    }
                    let is_due = state.deadline.is_some_and(|deadline| deadline.unix_us <= now);
                    if !state.complete && is_in && state.participants.len() >= min && is_due {
                        state.complete();
                        return Some(state.clone());
                    }
                    if now - model.heartbeat >= KEEP_ALIVE {
                        state.last_heartbeats.insert(own, heartbeat);
                        return Some(state.clone());
                    }
                    model.wakes = now + SECOND;
                    return None;
                }
                Phase::Running { round } => {
                    // It looks at nothing else.
                    assert!(round <= state.round);
                    if !state.wait_list.is_empty() {
                        model.phase = Phase::Stopping;
                        model.rank = None;
                        model.wakes = now + 2 * pause;
                        return None;
                    }
                    if now - model.heartbeat >= KEEP_ALIVE {
                        state.last_heartbeats.insert(own, heartbeat);
                        return Some(state.clone());
                    }
                    model.wakes = now + SECOND;
                    return None;
                }
            }
        }
    }

    /// Lets time pass.
    fn runs(&mut self, until: i64) {
        loop {
            let next = self.agents.iter().map(|(agent, model)| (model.wakes, *agent)).min();
            let Some((at, agent)) = next.filter(|(at, _)| *at <= until) else { break };
            self.now = self.now.max(at);
            self.moves(agent);
        }
        self.now = until;
    }

    /// Whether all that live are in one round, as many as it may have, with nothing to wait for.
    fn is_healed(&self) -> bool {
        let Some(state) = self.stored() else { return self.agents.is_empty() };
        let fit = self.agents.len().min(self.max);
        let running =
            self.agents.values().filter(|model| model.phase == Phase::Running { round: state.round });
        let ranks: BTreeSet<i64> = running.filter_map(|model| model.rank).collect();
        state.complete
            && state.wait_list.is_empty()
            && state.participants.len() == fit
            && ranks == (0..fit as i64).collect::<BTreeSet<_>>()
    }
}

fn first_state() -> State {
    // What an agent of 2.15 begins with.
    let file = include_str!("states/2.15.0.txt");
    State::decode(file.trim().split_once('\n').unwrap().1.as_bytes()).unwrap()
}

fn join(state: &mut State, own: &Agent, now: Instant, min: usize, max: usize) {
    state.wait_list.remove(own);
    state.participants.insert(own.clone(), 0);
    state.last_heartbeats.insert(own.clone(), now);
    if state.participants.len() == min {
        state.deadline = Some(Instant { unix_us: now.unix_us + LAST_CALL, ..now });
    }
    if state.participants.len() == max {
        state.complete();
    }
}

/// A job of agents to which everything happens, and which is then left alone.
fn lives_through(seed: u64, repairs: Repairs) -> Result<(), String> {
    let mut world = World::new(seed, repairs, 1, 5);
    for _ in 0..1 + world.random.below(5) {
        world.comes();
    }
    // The first round waits for its last call.
    world.runs(world.now + LAST_CALL + 3 * SECOND);
    for _ in 0..12 {
        let (after, agents) = (world.random.below(4 * SECOND), world.agents.len() as i64);
        world.runs(world.now + after);
        if agents > 1 && world.random.chance(40) {
            let victim = *world.agents.keys().nth(world.random.below(agents) as usize).unwrap();
            world.dies(victim);
        } else if agents < 7 {
            world.comes();
        }
    }
    // If everybody had died, what goes on is a new run, whose first round waits for its last call.
    let is_new = world.stored().is_none_or(|state| state.round == 0);
    world.runs(world.now + HEALED_AFTER + if is_new { LAST_CALL } else { 0 });
    if !world.is_healed() {
        let phases: Vec<Phase> = world.agents.values().map(|model| model.phase).collect();
        return Err(format!("seed {seed}: {phases:?}, {:?}", world.stored()));
    }
    for agent in world.agents.keys().copied().collect::<Vec<_>>() {
        world.dies(agent);
    }
    let probe = Caller {
        connection: ConnectionId(u64::MAX),
        peer: IpAddr::from([127, 0, 0, 1]),
        reached: IpAddr::from([127, 0, 0, 1]),
        pings: true,
    };
    let (mut reply, mut nothing) = (Vec::new(), Vec::new());
    let now = Duration::from_micros(world.now as u64);
    world
        .rendezvous
        .request(now, probe, Request::CountKeys, &mut reply, &mut nothing, &mut world.effects)
        .unwrap();
    assert_eq!(reply, 0_i64.to_le_bytes(), "E-6: nothing is left of it, seed {seed}");
    Ok(())
}

#[test]
fn e3_e5_e6_whatever_happens_to_agents_those_that_live_are_soon_in_one_round() {
    for seed in 0..400 {
        lives_through(seed, Repairs::default()).unwrap();
    }
}

#[test]
fn each_repair_of_the_algorithm_is_missed_when_it_is_left_out() {
    for repair in [Repair::Eviction, Repair::ShortLastCall, Repair::Spares] {
        let left_out =
            (0..60).filter(|seed| lives_through(*seed, Repairs::default().without(repair)).is_err());
        let left_out = left_out.count();
        assert!(left_out > 5, "without {repair:?} only {left_out} take longer");
    }
}

/// A rendezvous with one agent of the run `job` in it, and what it is asked next.
fn with_one_agent() -> World {
    let mut world = World::new(1, Repairs::default(), 1, 1);
    world.comes();
    world.runs(world.now + 3 * SECOND);
    assert!(world.is_healed());
    world
}

fn text(operation: u8, texts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = vec![operation];
    for text in texts {
        reknit_torchelastic::wire::put_text(&mut bytes, text);
    }
    bytes
}

fn asked(world: &mut World, from: u64, bytes: &[u8]) -> Result<Vec<u8>, RequestError> {
    let Parsed::Whole(request, _) = parse(bytes, &WireLimits::default()).unwrap() else { panic!() };
    world.ask(ConnectionId(from), request)
}

#[test]
fn e2_nothing_but_a_state_is_stored_as_one_however_it_is_tried() {
    let mut world = with_one_agent();
    let before = asked(&mut world, 9, &text(3, &[KEY])).unwrap();
    let evil = b"gASVHQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAJpZJSFlFKULg==";
    let other = b"/torch.rendezvous.not yet there";
    let number = 1_i64.to_le_bytes();
    for key in [KEY, other] {
        let expected: &[u8] = if key == KEY { &before } else { b"" };
        let attempts = [
            text(1, &[key, evil]),
            text(2, &[key, expected, evil]),
            text(2, &[key, expected, b"anything"]),
            text(9, &[key, evil]),
            [text(4, &[key]), number.to_vec()].concat(),
            [&[11][..], &number, &text(0, &[key, evil])[1..]].concat(),
            text(14, &[key, evil]),
            [text(18, &[key]), number.to_vec()].concat(),
        ];
        for attempt in attempts {
            assert!(asked(&mut world, 9, &attempt).is_err(), "{attempt:?}");
        }
    }
    assert!(asked(&mut world, 9, &text(8, &[KEY])).is_err());
    assert!(asked(&mut world, 9, &text(8, &[other])).is_ok(), "it is not there");
    assert_eq!(asked(&mut world, 9, &text(3, &[KEY])).unwrap(), before);
    assert_eq!(asked(&mut world, 9, &text(3, &[other])).unwrap(), b"");
    // A run may not be called like a key that others may write.
    let disguised = b"/torch.rendezvous.job.7/torchelastic/role_info/0";
    assert!(asked(&mut world, 9, &text(2, &[disguised, b"", SENTINEL])).is_err());
    asked(&mut world, 9, &text(1, &[disguised, b"{}"])).unwrap();
}

#[test]
fn e3_a_state_that_goes_back_or_opens_what_is_closed_is_refused() {
    let mut world = with_one_agent();
    let raw = asked(&mut world, 1, &text(3, &[KEY])).unwrap();
    let mut state = State::decode(&raw).unwrap();
    state.round = 5;
    let later = state.encode();
    assert_eq!(asked(&mut world, 1, &text(2, &[KEY, &raw, &later])).unwrap(), later);
    state.round = 4;
    assert!(asked(&mut world, 1, &text(2, &[KEY, &later, &state.encode()])).is_err());
    state.round = 5;
    state.closed = true;
    let closed = state.encode();
    asked(&mut world, 1, &text(2, &[KEY, &later, &closed])).unwrap();
    state.closed = false;
    assert!(asked(&mut world, 1, &text(2, &[KEY, &closed, &state.encode()])).is_err());
}

#[test]
fn workers_are_told_of_our_store_in_every_round_by_the_address_that_their_agent_knows() {
    let mut world = with_one_agent();
    let key = |round: i64, name: &str| format!("/torch.rendezvous.job.{round}/{name}").into_bytes();
    let (addr, port) = (key(0, "MASTER_ADDR"), key(0, "MASTER_PORT"));
    // What the agent writes is replaced.
    asked(&mut world, 1, &text(1, &[&addr, b"its-host"])).unwrap();
    asked(&mut world, 1, &text(1, &[&port, b"1234"])).unwrap();
    assert_eq!(asked(&mut world, 1, &text(3, &[&addr])).unwrap(), b"10.0.0.1");
    assert_eq!(asked(&mut world, 1, &text(3, &[&port])).unwrap(), b"29500");
    let emptied = world.emptied;
    let raw = asked(&mut world, 1, &text(3, &[KEY])).unwrap();
    let mut state = State::decode(&raw).unwrap();
    (state.round, state.complete) = (1, false);
    asked(&mut world, 1, &text(2, &[KEY, &raw, &state.encode()])).unwrap();
    assert_eq!(world.emptied, emptied + 1, "what the workers of the last round left is gone");
    assert_eq!(
        asked(&mut world, 1, &text(3, &[&key(1, "MASTER_PORT")])).unwrap(),
        b"29500",
        "nobody has written it"
    );
    // Another run's workers have a store of their own.
    assert_eq!(asked(&mut world, 1, &text(3, &[b"/torch.rendezvous.other.1/MASTER_PORT"])).unwrap(), b"");
}

#[test]
fn e6_a_run_takes_only_its_own_keys_with_it() {
    let mut world = with_one_agent();
    asked(&mut world, 60, &text(2, &[b"/torch.rendezvous.job2", b"", SENTINEL])).unwrap();
    for key in ["/torch.rendezvous.job.0/torchelastic/x", "/torch.rendezvous.job2.0/torchelastic/x", "/mine"]
    {
        asked(&mut world, 50, &text(1, &[key.as_bytes(), b"v"])).unwrap();
    }
    world.dies(1);
    let left = |world: &mut World, key: &str| asked(world, 50, &text(3, &[key.as_bytes()])).unwrap();
    assert_eq!(left(&mut world, "/torch.rendezvous.job.0/torchelastic/x"), b"");
    assert_eq!(left(&mut world, "/torch.rendezvous.job2.0/torchelastic/x"), b"v");
    assert_eq!(left(&mut world, "/mine"), b"v");
    // What belongs to no run goes with the last who used it.
    let now = Duration::from_micros(world.now as u64);
    world.rendezvous.disconnected(now, ConnectionId(50), &mut Vec::new(), &mut world.effects);
    assert_eq!(asked(&mut world, 51, &text(3, &[b"/mine"])).unwrap(), b"");
}

#[test]
fn workers_that_meet_where_agents_do_are_told_apart_by_their_address_and_begin_every_round_anew() {
    let mut world = with_one_agent();
    let (one, other) = (b"//worker/attempt_0/default_pg/k", b"//worker/attempt_3/default_pg/k");
    asked(&mut world, 70, &text(1, &[one, b"v"])).unwrap();
    assert_eq!(
        asked(&mut world, 71, &text(3, &[other])).unwrap(),
        b"v",
        "whatever their agents have counted to"
    );
    let raw = asked(&mut world, 1, &text(3, &[KEY])).unwrap();
    let mut state = State::decode(&raw).unwrap();
    (state.round, state.complete) = (1, false);
    asked(&mut world, 1, &text(2, &[KEY, &raw, &state.encode()])).unwrap();
    world.closed.sort();
    assert_eq!(world.closed, [ConnectionId(70), ConnectionId(71)]);
    assert_eq!(asked(&mut world, 72, &text(3, &[one])).unwrap(), b"");
    // A second run with an agent at that address: nobody can tell whose worker it is.
    asked(&mut world, 80, &text(2, &[b"/torch.rendezvous.other", b"", SENTINEL])).unwrap();
    assert_eq!(asked(&mut world, 73, &text(3, &[one])), Err(RequestError::WhoseWorker { runs: 2 }));
    assert_eq!(asked(&mut world, 72, &text(3, &[one])).unwrap(), b"", "who is known already goes on");
}

#[test]
fn e6_e7_nobody_writes_for_a_run_that_is_not_there_and_an_agent_is_of_one_run() {
    let mut world = with_one_agent();
    let keys = [&b"/torch.rendezvous.nope.1/MASTER_ADDR"[..], b"/torch.rendezvous.nope.1/torchelastic/x"];
    for key in keys {
        assert_eq!(
            asked(&mut world, 9, &text(1, &[key, b"v"])),
            Err(RequestError::NoRun { run: "nope".to_owned() })
        );
        assert!(asked(&mut world, 9, &text(14, &[key, b"v"])).is_err());
    }
    assert!(asked(&mut world, 9, &text(2, &[b"/torch.rendezvous.\xff", b"", SENTINEL])).is_err(), "no text");
    let other = text(2, &[b"/torch.rendezvous.other", b"", SENTINEL]);
    assert_eq!(asked(&mut world, 1, &other), Err(RequestError::OtherRun { run: "other".to_owned() }));
    // Queues go like keys.
    asked(&mut world, 50, &text(14, &[b"/queue", b"v"])).unwrap();
    asked(&mut world, 50, &text(1, &[b"/key", b"v"])).unwrap();
    let now = Duration::from_micros(world.now as u64);
    world.rendezvous.disconnected(now, ConnectionId(50), &mut Vec::new(), &mut world.effects);
    let length = asked_whole(&mut world, 51, &text(16, &[b"/queue"]));
    assert_eq!(length, 0_i64.to_le_bytes());
}

#[test]
fn an_agent_that_goes_while_others_have_ended_with_success_makes_nobody_begin_anew() {
    for ends in [false, true] {
        let mut world = World::new(5, Repairs::default(), 2, 2);
        world.comes();
        world.comes();
        world.runs(world.now + 3 * SECOND);
        assert!(world.is_healed());
        if ends {
            let key = b"/torch.rendezvous.job.0/torchelastic/agent/terminal_state/num_members";
            asked(&mut world, 2, &[text(4, &[key]), 1_i64.to_le_bytes().to_vec()].concat()).unwrap();
        }
        world.dies(1);
        let state = world.stored().unwrap();
        assert_eq!((state.participants.len(), state.wait_list.contains(&absentee())), (1, !ends));
    }
}

fn asked_whole(world: &mut World, from: u64, bytes: &[u8]) -> Vec<u8> {
    let Parsed::Whole(request, _) = parse(bytes, &WireLimits::default()).unwrap() else { panic!() };
    let peer = IpAddr::from([10, 0, 1, 0]);
    let caller = Caller { connection: ConnectionId(from), peer, reached: peer, pings: true };
    let (mut reply, mut woken) = (Vec::new(), Vec::new());
    let now = Duration::from_micros(world.now as u64);
    world.rendezvous.request(now, caller, request, &mut reply, &mut woken, &mut world.effects).unwrap();
    reply
}
