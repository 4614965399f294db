//! What torchrun's agents agree on: the rendezvous state, as it lies in the store.
//!
//! It is `torch.distributed.elastic.rendezvous.dynamic_rendezvous._RendezvousState`, pickled and then encoded as base64. Every agent
//! reads it, changes its copy, and replaces the whole by compare-and-set; whoever loses that race begins again from what is there.
//! The form has changed twice: agents of 2.3 and later have a list of spares, those of 2.6 and later write instants with a time zone. An
//! agent cannot compare the two kinds, so an instant is written back in the form in which it was read.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::pickle::{self, Global, PickleError, PickleLimits, Value};

/// What agents put in the place of a state before there is one.
pub const SENTINEL: &[u8] = b"Y2FuaW1hZGFt";

/// How large a state may be: about eight thousand agents.
pub const STATE_BYTES_MAX: usize = 1 << 20;

/// One agent: a `torchrun` process. The order is the one in which PyTorch gives ranks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Agent {
    /// Its host.
    pub addr: String,
    /// Its process there.
    pub pid: i64,
    /// Which of the agents of that process.
    pub local_id: i64,
}

/// An instant as agents write it, by their clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant {
    /// Microseconds since the Unix epoch.
    pub unix_us: i64,
    /// Whether it says that it is in UTC (2.6 and later), or is so without saying.
    pub is_aware: bool,
}

/// The longest a host's name may be (RFC 1035), and a round that no run comes to.
const ADDR_BYTES_MAX: usize = 255;
const ROUND_MAX: i64 = 1 << 31;

/// What the agents of a run agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Which formation this is, the first being 0.
    pub round: i64,
    /// Whether it is complete: nobody comes in any more.
    pub complete: bool,
    /// When it will be complete with whoever is there; none before the least number is there.
    pub deadline: Option<Instant>,
    /// Whether the run is over.
    pub closed: bool,
    /// Who is in this round; the ranks count once it is complete.
    pub participants: BTreeMap<Agent, i64>,
    /// Who came too late, and makes the others form anew.
    pub wait_list: BTreeSet<Agent>,
    /// Who is one too many, and waits for somebody to go. None before 2.3.
    pub redundancy_list: Option<BTreeSet<Agent>>,
    /// When each agent was last heard of.
    pub last_heartbeats: BTreeMap<Agent, Instant>,
    /// What else a later release puts there: plain data, kept as it is.
    pub others: Vec<(String, Value)>,
    protocol: u8,
}

/// Why a value is no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It is larger than any state.
    #[error("a rendezvous state of {bytes} bytes; {limit} are allowed")]
    Large {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It is not base64.
    #[error("a rendezvous state is base64, and this is not")]
    Encoding,
    /// It is not a pickle that may be read.
    #[error(transparent)]
    Pickle(#[from] PickleError),
    /// It is one of something else.
    #[error("the rendezvous state makes no sense: {0}")]
    Nonsense(&'static str),
}

type Checked<T> = Result<T, StateError>;

impl State {
    /// The state that a value of the store spells.
    ///
    /// # Errors
    /// [`StateError`] if it spells none, or more than a state: agents must not get to see it then.
    pub fn decode(value: &[u8]) -> Checked<State> {
        if value.len() > STATE_BYTES_MAX {
            return Err(StateError::Large { bytes: value.len(), limit: STATE_BYTES_MAX });
        }
        let bytes = BASE64.decode(value).map_err(|_| StateError::Encoding)?;
        let (value, protocol) = pickle::read(&bytes, &PickleLimits::default())?;
        let Value::Object(Global::State, attributes) = value else {
            return Err(StateError::Nonsense("it is no _RendezvousState"));
        };
        let mut state = State {
            round: 0,
            complete: false,
            deadline: None,
            closed: false,
            participants: BTreeMap::new(),
            wait_list: BTreeSet::new(),
            redundancy_list: None,
            last_heartbeats: BTreeMap::new(),
            others: Vec::new(),
            protocol,
        };
        let mut seen = BTreeSet::new();
        for (name, value) in attributes {
            let name = text(name)?;
            match name.as_str() {
                "round" => state.round = round(value)?,
                "complete" => state.complete = truth(value)?,
                "deadline" => state.deadline = optional_instant(value)?,
                "closed" => state.closed = truth(value)?,
                "participants" => state.participants = by_agent(value, int)?,
                "wait_list" => state.wait_list = agents(value)?,
                "redundancy_list" => state.redundancy_list = Some(agents(value)?),
                "last_heartbeats" => state.last_heartbeats = by_agent(value, instant)?,
                _ => state.others.push((name.clone(), value)),
            }
            if !seen.insert(name) {
                return Err(StateError::Nonsense("an attribute is there twice"));
            }
        }
        let needed =
            ["round", "complete", "deadline", "closed", "participants", "wait_list", "last_heartbeats"];
        match needed.iter().all(|name| seen.contains(*name)) {
            true => Ok(state),
            false => Err(StateError::Nonsense("an attribute is missing")),
        }
    }

    /// The same with nobody in it, neither complete nor closed: in the form in which it was read, and with what else is there.
    #[must_use]
    pub fn emptied(self) -> State {
        State {
            complete: false,
            deadline: None,
            closed: false,
            participants: BTreeMap::new(),
            wait_list: BTreeSet::new(),
            redundancy_list: self.redundancy_list.map(|_| BTreeSet::new()),
            last_heartbeats: BTreeMap::new(),
            ..self
        }
    }

    /// The value of the store that spells it.
    pub fn encode(&self) -> Vec<u8> {
        let participants = self.participants.iter().map(|(agent, rank)| (agent.value(), Value::Int(*rank)));
        let heartbeats = self.last_heartbeats.iter().map(|(agent, at)| (agent.value(), at.value()));
        let set = |agents: &BTreeSet<Agent>| Value::Set(agents.iter().map(Agent::value).collect());
        let mut attributes = vec![
            ("round", Value::Int(self.round)),
            ("complete", Value::Bool(self.complete)),
            ("deadline", self.deadline.map_or(Value::None, |at| at.value())),
            ("closed", Value::Bool(self.closed)),
            ("participants", Value::Dict(participants.collect())),
            ("wait_list", set(&self.wait_list)),
        ];
        attributes.extend(self.redundancy_list.as_ref().map(|agents| ("redundancy_list", set(agents))));
        attributes.push(("last_heartbeats", Value::Dict(heartbeats.collect())));
        attributes.extend(self.others.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let attributes =
            attributes.into_iter().map(|(name, value)| (Value::Text(name.to_owned()), value)).collect();
        let value = Value::Object(Global::State, attributes);
        BASE64.encode(pickle::write(&value, self.protocol)).into_bytes()
    }

    /// Makes the round complete with whoever is in it, as an agent does: ranks follow the order of agents.
    pub fn complete(&mut self) {
        self.complete = true;
        self.deadline = None;
        for (rank, of_agent) in (0..).zip(self.participants.values_mut()) {
            *of_agent = rank;
        }
    }

    /// Takes an agent out of everything. True if it was in anything.
    pub fn remove(&mut self, agent: &Agent) -> bool {
        let was_in = self.participants.remove(agent).is_some();
        let waited = self.wait_list.remove(agent);
        let was_spare = self.redundancy_list.as_mut().is_some_and(|list| list.remove(agent));
        let was_heard = self.last_heartbeats.remove(agent).is_some();
        was_in || waited || was_spare || was_heard
    }

    /// Begins the next round, if the present one is complete and nobody is left in it: what the last agent to leave does.
    pub fn begin_next_if_left(&mut self) {
        if self.complete && self.participants.is_empty() {
            self.complete = false;
            self.round += 1;
        }
    }
}

impl Agent {
    fn value(&self) -> Value {
        let attributes = [
            ("addr", Value::Text(self.addr.clone())),
            ("pid", Value::Int(self.pid)),
            ("local_id", Value::Int(self.local_id)),
        ];
        let attributes = attributes.map(|(name, value)| (Value::Text(name.to_owned()), value));
        Value::Object(Global::Node, attributes.into())
    }
}

fn text(value: Value) -> Checked<String> {
    match value {
        Value::Text(text) => Ok(text),
        _ => Err(StateError::Nonsense("a text is expected")),
    }
}

fn int(value: Value) -> Checked<i64> {
    match value {
        Value::Int(number) => Ok(number),
        _ => Err(StateError::Nonsense("a number is expected")),
    }
}

fn round(value: Value) -> Checked<i64> {
    match int(value)? {
        round @ 0..=ROUND_MAX => Ok(round),
        _ => Err(StateError::Nonsense("no run has come to that round")),
    }
}

fn truth(value: Value) -> Checked<bool> {
    match value {
        Value::Bool(truth) => Ok(truth),
        _ => Err(StateError::Nonsense("true or false is expected")),
    }
}

fn agent(value: Value) -> Checked<Agent> {
    const NO_AGENT: StateError = StateError::Nonsense("a _NodeDesc is expected");
    let Value::Object(Global::Node, attributes) = value else { return Err(NO_AGENT) };
    let (mut addr, mut pid, mut local_id) = (None, None, None);
    for (name, value) in attributes {
        match text(name)?.as_str() {
            "addr" => addr = Some(text(value)?),
            "pid" => pid = Some(int(value)?),
            "local_id" => local_id = Some(int(value)?),
            _ => return Err(NO_AGENT),
        }
    }
    match (addr, pid, local_id) {
        (Some(addr), Some(pid), Some(local_id)) if addr.len() <= ADDR_BYTES_MAX => {
            Ok(Agent { addr, pid, local_id })
        }
        _ => Err(NO_AGENT),
    }
}

fn agents(value: Value) -> Checked<BTreeSet<Agent>> {
    match value {
        Value::Set(agents) => agents.into_iter().map(agent).collect(),
        _ => Err(StateError::Nonsense("a set of agents is expected")),
    }
}

fn by_agent<T>(value: Value, read: impl Fn(Value) -> Checked<T>) -> Checked<BTreeMap<Agent, T>> {
    match value {
        Value::Dict(items) => items.into_iter().map(|(key, value)| Ok((agent(key)?, read(value)?))).collect(),
        _ => Err(StateError::Nonsense("a dict of agents is expected")),
    }
}

fn optional_instant(value: Value) -> Checked<Option<Instant>> {
    match value {
        Value::None => Ok(None),
        value => instant(value).map(Some),
    }
}

fn instant(value: Value) -> Checked<Instant> {
    const NO_INSTANT: StateError = StateError::Nonsense("a datetime is expected, in UTC");
    let Value::Made(Global::DateTime, mut arguments) = value else { return Err(NO_INSTANT) };
    let is_aware = match arguments.len() {
        1 => false,
        2 if arguments.pop().is_some_and(|zone| zone == utc()) => true,
        _ => return Err(NO_INSTANT),
    };
    let Some(Value::Bytes(bytes)) = arguments.pop() else { return Err(NO_INSTANT) };
    let bytes: [u8; 10] = bytes.try_into().map_err(|_| NO_INSTANT)?;
    let [y1, y0, month, day, hour, minute, second, us2, us1, us0] = bytes;
    // The highest bit of the month tells a repeated hour; in UTC there is none.
    let (year, month) = (i64::from(u16::from_be_bytes([y1, y0])), i64::from(month & 0x7f));
    let us = i64::from(u32::from_be_bytes([0, us2, us1, us0]));
    let is_one = (1..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60
        && us < 1_000_000;
    if !is_one {
        return Err(NO_INSTANT);
    }
    let days = days_from_civil(year, month, day.into());
    let seconds = ((days * 24 + i64::from(hour)) * 60 + i64::from(minute)) * 60 + i64::from(second);
    Ok(Instant { unix_us: seconds * 1_000_000 + us, is_aware })
}

impl Instant {
    /// That much later.
    #[must_use]
    pub fn after(self, wait: Duration) -> Instant {
        let wait = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX);
        Instant { unix_us: self.unix_us.saturating_add(wait), ..self }
    }

    fn value(self) -> Value {
        let (seconds, us) = (self.unix_us.div_euclid(1_000_000), self.unix_us.rem_euclid(1_000_000));
        let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = civil_from_days(days);
        let [y1, y0] = (year as u16).to_be_bytes();
        let [_, us2, us1, us0] = (us as u32).to_be_bytes();
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        let bytes = [month, day, hour, minute, second].map(|part| part as u8);
        let bytes = Value::Bytes([&[y1, y0][..], &bytes, &[us2, us1, us0]].concat());
        let arguments = if self.is_aware { vec![bytes, utc()] } else { vec![bytes] };
        Value::Made(Global::DateTime, arguments)
    }
}

fn utc() -> Value {
    let zero = Value::Made(Global::TimeDelta, vec![Value::Int(0), Value::Int(0), Value::Int(0)]);
    Value::Made(Global::TimeZone, vec![zero])
}

/// Days since the Unix epoch, in the Gregorian calendar. Years are counted from March, so that a leap day is a year's last.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The year, month and day of that many days since the Unix epoch.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = (year + era * 400, month + 3);
    if month > 12 { (year + 1, month - 12, day) } else { (year, month, day) }
}

#[cfg(test)]
#[path = "state/tests.rs"]
mod tests;
