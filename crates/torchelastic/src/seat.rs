//! The rendezvous as one agent is shown it by a relay on its own machine.
//!
//! Behind a relay an agent shares no rendezvous state with others: the coordinator decides, and the relay shows the agent a state
//! of its own from which it does what was decided. What the agent writes is never stored; it is read for what the agent *wants*
//! (to come in, to leave, to end the run), and answered with the state that is so then, as if another agent had been quicker. The
//! agent takes that, and decides anew (rule E-5).
//!
//! Of the other agents nothing but their number matters to it: stand-ins take their places.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::state::{Agent, Instant, SENTINEL, State, StateError};

/// A deadline that never comes: before it no agent completes a round by itself.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// The host of those that stand for other agents: no name of a host has a space.
const STAND_IN: &str = "another agent";

/// What an agent wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A place in the next round.
    Join,
    /// To give up its place, or its wish for one.
    Leave,
    /// The end of the run.
    Close,
}

/// How it stands with the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Out,
    Waits,
    /// There is no room for it at present.
    Spare,
    In {
        rank: u32,
        size: u32,
        /// Whether the round is over, or is to end.
        over: bool,
    },
}

/// One agent's view.
#[derive(Debug)]
pub struct Seat {
    /// How many agents a round has at the most, as the agent itself was told.
    max: u32,
    /// What the agent wrote last: in which form it reads, and what else it keeps there.
    template: Option<State>,
    agent: Option<Agent>,
    is_aware: bool,
    stage: Stage,
    round: i64,
    closed: bool,
}

impl Seat {
    /// Nobody yet, in a run whose rounds have at most `max` agents.
    pub fn new(max: u32) -> Seat {
        Seat { max, template: None, agent: None, is_aware: true, stage: Stage::Out, round: 0, closed: false }
    }

    /// Who the agent is, once it has said so.
    pub fn agent(&self) -> Option<&Agent> {
        self.agent.as_ref()
    }

    /// What lies under the key of the state, at the instant `now_us` (microseconds since the Unix epoch).
    pub fn shown(&self, now_us: i64) -> Vec<u8> {
        let (Some(template), Some(agent)) = (&self.template, &self.agent) else { return SENTINEL.to_vec() };
        let now = Instant { unix_us: now_us, is_aware: self.is_aware };
        let mut state = template.clone().emptied();
        (state.round, state.closed, state.deadline) = (self.round, self.closed, Some(now.after(NEVER)));
        let others = |count: u32| (0..count).map(|number| stand_in(i64::from(number)));
        match self.stage {
            Stage::Out => {}
            Stage::Waits => {
                state.participants.insert(agent.clone(), 0);
            }
            Stage::Spare => {
                (state.complete, state.deadline) = (true, None);
                state.participants.extend(others(self.max).zip(0..));
                state.redundancy_list.as_mut().unwrap_or(&mut state.wait_list).insert(agent.clone());
            }
            Stage::In { rank, size, over } => {
                (state.complete, state.deadline) = (true, None);
                let ranks = (0..i64::from(size)).filter(|other| *other != i64::from(rank));
                state.participants.extend(others(size.saturating_sub(1)).zip(ranks));
                state.participants.insert(agent.clone(), rank.into());
                if over {
                    state.wait_list.insert(stand_in(size.into()));
                }
            }
        }
        let spares = state.redundancy_list.iter().flatten();
        let all = state.participants.keys().chain(&state.wait_list).chain(spares);
        state.last_heartbeats = all.map(|agent| (agent.clone(), now)).collect();
        state.encode()
    }

    /// The agent tries to replace the state by `desired`. Says what it wants by that, if it is news; [`Seat::shown`] is the
    /// answer.
    ///
    /// # Errors
    /// [`StateError`] if it is no state, or one of another agent than before.
    pub fn compare_set(&mut self, desired: &[u8]) -> Result<Option<Wish>, StateError> {
        if desired == SENTINEL {
            return Ok(None);
        }
        let state = State::decode(desired)?;
        let (agent, is_in) = the_agent(&state)?;
        let is_same = agent.is_none() || self.agent.is_none() || self.agent == agent;
        if !is_same {
            return Err(ANOTHER);
        }
        if self.agent.is_none() {
            self.agent = agent;
        }
        let closes = state.closed && !self.closed;
        let instants = state.last_heartbeats.values().chain(&state.deadline);
        if let Some(instant) = instants.copied().next() {
            self.is_aware = instant.is_aware;
        }
        self.template = Some(state);
        if closes {
            self.closed = true;
            return Ok(Some(Wish::Close));
        }
        match (is_in, self.stage) {
            (true, Stage::Out) => {
                self.stage = Stage::Waits;
                Ok(Some(Wish::Join))
            }
            (false, Stage::Waits | Stage::Spare | Stage::In { .. }) => {
                // The round that follows, whichever number the next one will have.
                if matches!(self.stage, Stage::In { .. }) {
                    self.round += 1;
                }
                self.stage = Stage::Out;
                Ok(Some(Wish::Leave))
            }
            (true, Stage::Waits | Stage::Spare | Stage::In { .. }) | (false, Stage::Out) => Ok(None),
        }
    }

    /// The agent has a place in a round that begins. Ignored if it does not want one any more.
    pub fn begins(&mut self, round: u64, rank: u32, size: u32) {
        if matches!(self.stage, Stage::Waits | Stage::Spare) {
            self.round = self.round.max(i64::try_from(round).unwrap_or(i64::MAX));
            self.stage = Stage::In { rank, size, over: false };
        }
    }

    /// There is no room for the agent at present.
    pub fn is_spare(&mut self) {
        if self.stage == Stage::Waits {
            self.stage = Stage::Spare;
        }
    }

    /// The agent's round is over, or is to end.
    pub fn ends(&mut self) {
        if let Stage::In { over, .. } = &mut self.stage {
            *over = true;
        }
    }

    /// The run is over.
    pub fn closes(&mut self) {
        self.closed = true;
        self.ends();
    }
}

const ANOTHER: StateError = StateError::Nonsense("it is of another agent than the one of this connection");

/// The one agent in a state that is no stand-in, and whether it is in the round, or waits for one.
fn the_agent(state: &State) -> Result<(Option<Agent>, bool), StateError> {
    let spares = state.redundancy_list.iter().flatten();
    let sought = state.participants.keys().chain(&state.wait_list).chain(spares);
    let mut real: BTreeSet<&Agent> = sought.filter(|agent| agent.addr != STAND_IN).collect();
    let is_in = !real.is_empty();
    real.extend(state.last_heartbeats.keys().filter(|agent| agent.addr != STAND_IN));
    match real.len() {
        0 | 1 => Ok((real.first().map(|agent| (*agent).clone()), is_in)),
        _ => Err(ANOTHER),
    }
}

fn stand_in(number: i64) -> Agent {
    Agent { addr: STAND_IN.to_owned(), pid: number, local_id: 0 }
}

#[cfg(test)]
mod tests;
