//! One run of torchrun: what its agents have agreed on, and what is done about the faults of the agents' own algorithm.
//!
//! Agents change the state by themselves; a [`Run`] looks at each change, and may store something better instead. An agent that gets
//! back another state than the one it sent believes that it has lost a race, takes what it got, and decides anew: so nothing that is
//! done here needs its consent, or a change of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::kv::ConnectionId;
use crate::state::{Agent, SENTINEL, State, StateError};

/// How long agents wait for more of them when enough have come, unless they are told otherwise.
const LAST_CALL: Duration = Duration::from_secs(30);

/// What is done about the faults of stock torchrun. Each can be left out; see `Repair` for what each is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repairs {
    /// [`Repair::OwnStore`].
    pub own_store: bool,
    /// [`Repair::SuppliedKeys`].
    pub supplied_keys: bool,
    /// [`Repair::Eviction`].
    pub eviction: bool,
    /// [`Repair::ShortLastCall`].
    pub short_last_call: bool,
    /// [`Repair::Spares`].
    pub spares: bool,
    /// [`Repair::Guard`].
    pub guard: bool,
}

impl Default for Repairs {
    fn default() -> Repairs {
        Repairs {
            own_store: true,
            supplied_keys: true,
            eviction: true,
            short_last_call: true,
            spares: true,
            guard: true,
        }
    }
}

impl Repairs {
    /// Whether it is one of them.
    pub fn has(&self, repair: Repair) -> bool {
        match repair {
            Repair::OwnStore => self.own_store,
            Repair::SuppliedKeys => self.supplied_keys,
            Repair::Eviction => self.eviction,
            Repair::ShortLastCall => self.short_last_call,
            Repair::Spares => self.spares,
            Repair::Guard => self.guard,
        }
    }

    /// All but one.
    #[must_use]
    pub fn without(mut self, repair: Repair) -> Repairs {
        match repair {
            Repair::OwnStore => self.own_store = false,
            Repair::SuppliedKeys => self.supplied_keys = false,
            Repair::Eviction => self.eviction = false,
            Repair::ShortLastCall => self.short_last_call = false,
            Repair::Spares => self.spares = false,
            Repair::Guard => self.guard = false,
        }
        self
    }
}

/// One thing that is done about a fault of stock torchrun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Repair {
    /// Workers meet in a store of ours, which is emptied at every round. Since PyTorch 2.5 they would meet in one that the
    /// first agent of the first round keeps: it still has the addresses of workers that are dead, and dies with its agent.
    OwnStore,
    /// Every round has the address of that store from the beginning. Since 2.5 agents write it once in their lives, so that a
    /// newcomer in a later round waits for it in vain, gives up after a minute, and ends the run for everybody.
    SuppliedKeys,
    /// An agent whose connection has ended is taken out at once, and the others are told. They would find out after 15 s.
    Eviction,
    /// A later round begins once everybody who is connected has joined. It would begin 30 s after the least number has.
    ShortLastCall,
    /// Whoever is one too many when a round is full waits as a spare. Whoever waited for that round would stay in the list of those
    /// for whom the others form anew, and they would do so again and again.
    Spares,
    /// Nothing but a rendezvous state is stored as one. Agents unpickle it: it could be anything.
    Guard,
}

impl Repair {
    /// All of them.
    pub const ALL: [Repair; 6] = [
        Repair::OwnStore,
        Repair::SuppliedKeys,
        Repair::Eviction,
        Repair::ShortLastCall,
        Repair::Spares,
        Repair::Guard,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Repair::OwnStore => "own-store",
            Repair::SuppliedKeys => "supplied-keys",
            Repair::Eviction => "eviction",
            Repair::ShortLastCall => "short-last-call",
            Repair::Spares => "spares",
            Repair::Guard => "guard",
        }
    }
}

/// Why a round is formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// It is the first one.
    Formed,
    /// An agent came.
    Joined(Agent),
    /// An agent's connection ended.
    Lost(Agent),
    /// All agents left it by themselves: their workers have failed.
    Restarted,
}

/// One formation. Instants are since the Unix epoch, by the server's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The round that it led to.
    pub round: i64,
    /// Why.
    pub causes: Vec<Cause>,
    /// How many agents were in the round before.
    pub before: usize,
    /// How many are in this one.
    pub after: usize,
    /// When the first cause was known.
    pub learned: Duration,
    /// When everybody had left the round before.
    pub stopped: Duration,
    /// When it was complete, if it is.
    pub agreed: Option<Duration>,
}

/// One run.
#[derive(Debug)]
pub struct Run {
    repairs: Repairs,
    state: Option<State>,
    /// Over which connection each agent writes.
    connections: BTreeMap<Agent, ConnectionId>,
    /// Every connection that has written to the state and is open.
    open: BTreeSet<ConnectionId>,
    changes: VecDeque<Change>,
    forming: Option<Change>,
    /// Who was in the last round that was complete.
    last_round: BTreeSet<Agent>,
    min_seen: Option<usize>,
    max_seen: Option<usize>,
}

/// What has become of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// What is to be stored instead of what was sent.
    pub instead: Option<Vec<u8>>,
    /// A new round has begun: nothing of the one before is of use any more.
    pub is_new_round: bool,
}

/// How many changes a run remembers.
const CHANGES_MAX: usize = 256;
/// How many causes a change names.
const CAUSES_MAX: usize = 32;

/// Stands in the wait list when somebody has gone, so that the others see a reason to form anew: agents look at nothing else while
/// their workers run, and whoever is in that list costs nobody a restart.
pub fn absentee() -> Agent {
    Agent { addr: "reknit".to_owned(), pid: 0, local_id: 0 }
}

impl Run {
    /// A run that nobody has joined yet.
    pub fn new(repairs: Repairs) -> Run {
        Run {
            repairs,
            state: None,
            connections: BTreeMap::new(),
            open: BTreeSet::new(),
            changes: VecDeque::new(),
            forming: None,
            last_round: BTreeSet::new(),
            min_seen: None,
            max_seen: None,
        }
    }

    /// What its agents agree on, once one has written it.
    pub fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// Whether the agent's connection is open, as far as is known.
    pub fn is_connected(&self, agent: &Agent) -> bool {
        self.connections.contains_key(agent)
    }

    /// Whether this is an open connection of an agent.
    pub fn is_open(&self, connection: ConnectionId) -> bool {
        self.open.contains(&connection)
    }

    /// Nobody is left: what was being formed will not be.
    pub fn ends(&mut self) {
        self.forming = None;
    }

    /// Whether a connection of an agent is open.
    pub fn is_attended(&self) -> bool {
        !self.open.is_empty()
    }

    /// Its formations, oldest first, the last one perhaps not complete.
    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter().chain(&self.forming)
    }

    /// The least and the largest number of agents, as far as agents have shown them: the state does not say.
    pub fn bounds(&self) -> (Option<usize>, Option<usize>) {
        (self.min_seen, self.max_seen)
    }

    /// Somebody writes to the state over this connection, whether or not it is stored.
    pub fn heard(&mut self, connection: ConnectionId) {
        self.open.insert(connection);
    }

    /// The agent behind `from` puts `desired` in the place of what is stored.
    ///
    /// # Errors
    /// [`StateError`] if that is no state, or none that can follow: nothing is to be stored.
    pub fn write(
        &mut self,
        now: Duration,
        from: ConnectionId,
        desired: &[u8],
    ) -> Result<Written, StateError> {
        self.heard(from);
        if desired == SENTINEL && self.state.is_none() {
            return Ok(Written { instead: None, is_new_round: false });
        }
        let sent = State::decode(desired)?;
        self.check(&sent)?;
        self.learn_who(from, &sent);
        self.learn_bounds(&sent);
        let mut state = sent.clone();
        if !state.complete {
            state.wait_list.remove(&absentee());
        }
        if self.repairs.spares && self.is_filled_by(&state) {
            let waiting = std::mem::take(&mut state.wait_list);
            match &mut state.redundancy_list {
                Some(spares) => spares.extend(waiting),
                None => state.wait_list = waiting,
            }
        }
        self.shorten(&mut state);
        let instead = (state != sent).then(|| state.encode());
        Ok(Written { instead, is_new_round: self.adopt(now, state) })
    }

    /// Nobody's write makes the run forget what it has agreed on.
    fn check(&self, sent: &State) -> Result<(), StateError> {
        let Some(now) = &self.state else { return Ok(()) };
        if sent.round < now.round {
            return Err(StateError::Nonsense("it goes back to an earlier round"));
        }
        if now.closed && !sent.closed {
            return Err(StateError::Nonsense("it opens a run that is over"));
        }
        Ok(())
    }

    /// An agent writes the instant at which it writes: whose has changed, is who sent it.
    fn learn_who(&mut self, from: ConnectionId, sent: &State) {
        let known = self.state.as_ref().map(|state| &state.last_heartbeats);
        let is_new = |(agent, at): &(&Agent, &_)| known.and_then(|known| known.get(agent)) != Some(at);
        let mut writers = sent.last_heartbeats.iter().filter(is_new).map(|(agent, _)| agent);
        if let (Some(writer), None) = (writers.next(), writers.next()) {
            self.connections.insert(writer.clone(), from);
        }
    }

    /// The least number is there when an agent sets a deadline; the most, when the round is complete without it.
    fn learn_bounds(&mut self, sent: &State) {
        let had_deadline = self.state.as_ref().is_some_and(|state| state.deadline.is_some());
        let (there, was_complete) =
            (sent.participants.len(), self.state.as_ref().is_some_and(|s| s.complete));
        if sent.deadline.is_some() && !had_deadline {
            self.min_seen = Some(there);
        }
        if sent.complete && !was_complete && sent.round == 0 && !had_deadline {
            self.max_seen = Some(there);
            self.min_seen = self.min_seen.or(Some(there));
        }
    }

    /// Whether this completes the round because it is full: it does so by coming, instead of when the last call is over.
    fn is_filled_by(&self, sent: &State) -> bool {
        let comes = |before: &State| {
            !before.complete
                && before.round == sent.round
                && before.participants.len() < sent.participants.len()
        };
        sent.complete && self.state.as_ref().is_some_and(comes)
    }

    /// Saves agents from looking once more, and from waiting for nobody: what [`Repair::ShortLastCall`] is.
    fn shorten(&self, state: &mut State) {
        if self.repairs.short_last_call {
            self.draft(state);
            if self.is_last_call_over(state) {
                state.complete();
            }
        }
    }

    /// Whoever waits for the next round is in it as it begins, instead of when it has looked.
    fn draft(&self, state: &mut State) {
        let (Some(before), Some(min)) = (&self.state, self.min_seen) else { return };
        if before.round >= state.round || state.complete || state.closed {
            return;
        }
        // One that came to a round is in its wait list only if there was room for one more.
        let came = state.wait_list.iter().any(|agent| !self.last_round.contains(agent));
        let has_room = came && !before.wait_list.contains(&absentee());
        let max = self.max_seen.unwrap_or(self.last_round.len() + usize::from(has_room));
        // The one that has left last comes by itself, and finds room.
        let room = max.saturating_sub(state.participants.len() + 1);
        let is_here = |agent: &&Agent| self.connections.get(agent).is_some_and(|own| self.open.contains(own));
        let drafted: Vec<Agent> = state.wait_list.iter().filter(is_here).take(room).cloned().collect();
        for agent in drafted {
            state.wait_list.remove(&agent);
            state.participants.insert(agent, 0);
        }
        // Agents set it when they are the one that makes them enough.
        let last_heard = state.last_heartbeats.values().max();
        if state.participants.len() >= min && state.deadline.is_none() {
            state.deadline = last_heard.map(|at| at.after(LAST_CALL));
        }
    }

    /// Whether nobody is to be waited for any more: enough have joined, and everybody who is connected has. The first round
    /// waits as it always has, for those who have not even connected.
    fn is_last_call_over(&self, state: &State) -> bool {
        let has_joined = |connection: &ConnectionId| {
            let mut own = self.connections.iter().filter(|(_, own)| *own == connection);
            own.any(|(agent, _)| state.participants.contains_key(agent))
        };
        let waits = state.round > 0 && !state.complete && !state.closed && state.deadline.is_some();
        waits && self.open.iter().all(has_joined)
    }

    /// Takes over a state that is going to be stored. True if a new round begins with it.
    fn adopt(&mut self, now: Duration, state: State) -> bool {
        let before = self.state.take();
        let is_new_round = before.as_ref().is_some_and(|before| before.round < state.round);
        self.follow(now, before.as_ref(), &state);
        // Whoever has left comes again with its next write.
        self.connections.retain(|agent, _| {
            state.last_heartbeats.contains_key(agent) || state.participants.contains_key(agent)
        });
        self.state = Some(state);
        is_new_round
    }

    /// Writes down what the change means for the history.
    fn follow(&mut self, now: Duration, before: Option<&State>, state: &State) {
        let waited = before.map(|before| &before.wait_list);
        let is_new =
            |agent: &&Agent| !waited.is_some_and(|waited| waited.contains(agent)) && **agent != absentee();
        let newcomers: Vec<Agent> = state.wait_list.iter().filter(is_new).cloned().collect();
        self.came(now, newcomers);
        if before.is_none() {
            self.because(now, Cause::Formed);
        }
        if before.is_some_and(|before| before.round < state.round) {
            if self.forming.is_none() {
                self.because(now, Cause::Restarted);
            }
            if let Some(forming) = &mut self.forming {
                forming.stopped = now;
            }
        }
        let was_complete = before.is_some_and(|before| before.complete && before.round == state.round);
        if state.complete && !was_complete {
            if !self.last_round.is_empty() {
                self.came(now, state.participants.keys().cloned().collect());
            }
            if let Some(mut change) = self.forming.take() {
                change.round = state.round;
                change.after = state.participants.len();
                change.agreed = Some(now);
                self.changes.push_back(change);
                if self.changes.len() > CHANGES_MAX {
                    self.changes.pop_front();
                }
            }
            self.last_round = state.participants.keys().cloned().collect();
        }
        if was_complete && state.complete && state.wait_list.is_empty() {
            // Whoever came has gone again, or waits as a spare.
            self.forming = None;
        }
        if let Some(forming) = &mut self.forming {
            forming.round = state.round;
        }
    }

    /// These are there. Whoever was in the last round has only left it to come again.
    fn came(&mut self, now: Duration, agents: Vec<Agent>) {
        for agent in agents {
            if !self.last_round.contains(&agent) {
                self.because(now, Cause::Joined(agent));
            }
        }
    }

    fn because(&mut self, now: Duration, cause: Cause) {
        let forming = self.forming.get_or_insert_with(|| Change {
            round: 0,
            causes: Vec::new(),
            before: self.last_round.len(),
            after: 0,
            learned: now,
            stopped: now,
            agreed: None,
        });
        if forming.causes.len() < CAUSES_MAX && !forming.causes.contains(&cause) {
            forming.causes.push(cause);
        }
    }

    /// A connection has ended, and with it the agents that wrote over it. Returns what is to be stored now, if anything is.
    ///
    /// `ends`: some agents' workers have ended with success. They wait for the others, and will not come to another round.
    pub fn disconnected(&mut self, now: Duration, connection: ConnectionId, ends: bool) -> Option<Written> {
        if !self.open.remove(&connection) {
            return None;
        }
        let (gone, left) =
            std::mem::take(&mut self.connections).into_iter().partition(|(_, own)| *own == connection);
        let gone: BTreeMap<Agent, ConnectionId> = gone;
        self.connections = left;
        let mut state = self.state.clone()?;
        if !self.repairs.eviction {
            return None;
        }
        for agent in gone.keys() {
            let was_in = state.participants.contains_key(agent);
            state.remove(agent);
            if was_in && !state.closed {
                self.because(now, Cause::Lost(agent.clone()));
                if state.complete && !ends {
                    state.wait_list.insert(absentee());
                }
            }
        }
        if !state.closed && self.is_attended() {
            state.begin_next_if_left();
        }
        if !state.complete {
            state.wait_list.remove(&absentee());
            // As an agent does that leaves.
            if self.min_seen.is_some_and(|min| state.participants.len() < min) {
                state.deadline = None;
            }
        }
        self.shorten(&mut state);
        if self.state.as_ref() == Some(&state) {
            return None;
        }
        let instead = Some(state.encode());
        Some(Written { instead, is_new_round: self.adopt(now, state) })
    }
}
