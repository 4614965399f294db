//! Everything that lies behind one port: the store that agents share, with the runs that are in it.
//!
//! ```text
//! /torch.rendezvous.RUN                  what the agents of a run agree on         → crate::run
//! /torch.rendezvous.RUN.ROUND/MASTER_*   where the workers of a round meet         → ours, if it is
//! /torch.rendezvous.RUN.ROUND/…          what agents tell each other in a round
//! //worker/attempt_RESTARTS/…            the workers of a run, whose agents are of PyTorch 2.5
//! anything else                          a store for whoever uses it as one
//! ```
//!
//! Agents of PyTorch 2.5 tell their workers to meet in the agents' own store, and workers do not say of which run they are. They are
//! known by where they come from: a run that has an agent at the same address.

mod error;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use crate::kv::{ConnectionId, KvError, KvLimits, KvStore, Total, WORKER_PREFIX};
use crate::run::{Repairs, Run, Written};
use crate::wire::{Request, put_text};
pub use error::RequestError;

/// What every key of a run begins with.
pub const PREFIX: &str = "/torch.rendezvous.";

/// How many runs there may be at once, and how many that are over are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunLimits {
    /// At once.
    pub live: usize,
    /// Remembered.
    pub ended: usize,
}

impl Default for RunLimits {
    fn default() -> RunLimits {
        RunLimits { live: 1_000, ended: 100 }
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Its connection.
    pub connection: ConnectionId,
    /// Where it is.
    pub peer: IpAddr,
    /// Which of our addresses it has reached us by: its workers can, too.
    pub reached: IpAddr,
    /// Whether it has sent a ping: clients of PyTorch 2.5 and later do so when they connect.
    pub pings: bool,
}

/// What else is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A store for the workers of this run is to be opened; then [`Rendezvous::opened`] is to be called.
    OpenStore(String),
    /// The workers' store of this run is to be emptied, and its connections closed.
    EmptyStore(String),
    /// The workers' store of this run is not needed any more.
    CloseStore(String),
    /// These connections are to be closed: they are of workers of a round that is over.
    Close(Vec<ConnectionId>),
    /// A run has changed.
    Changed(String),
    /// Runs that are over are not remembered any more.
    Forgotten(String),
}

/// The store behind one port.
#[derive(Debug)]
pub struct Rendezvous {
    kv: KvStore,
    runs: BTreeMap<String, Entry>,
    /// Runs that are over, the oldest first.
    ended: Vec<String>,
    /// Who uses the rest of the store.
    others: BTreeSet<ConnectionId>,
    /// Of which run a connection is a worker's, for those who meet here.
    workers: HashMap<ConnectionId, String>,
    repairs: Repairs,
    kv_limits: KvLimits,
    total: Total,
    limits: RunLimits,
    advertise: Option<String>,
}

#[derive(Debug)]
struct Entry {
    run: Run,
    /// Where its agents are.
    peers: BTreeSet<IpAddr>,
    /// Where its workers meet if they meet here.
    here: KvStore,
    /// Where its workers meet, if in a store of ours.
    store: Store,
    has_ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// In theirs.
    Theirs,
    /// In ours, as soon as it is open.
    Opening,
    /// In ours, at this port.
    Ours(u16),
}

/// What a key belongs to.
enum Owner {
    /// A run's state.
    State(String),
    /// A round of a run.
    Round { run: String, name: String },
    /// Nothing that is known here.
    Nobody,
}

impl Rendezvous {
    /// An empty one, which has a share in what several stores may hold. Workers are told `advertise` as the host of their store,
    /// or else the address that their agent has reached us by.
    pub fn new(
        repairs: Repairs,
        kv: KvLimits,
        total: Total,
        limits: RunLimits,
        advertise: Option<String>,
    ) -> Rendezvous {
        Rendezvous {
            kv: KvStore::new(kv, &total),
            runs: BTreeMap::new(),
            ended: Vec::new(),
            others: BTreeSet::new(),
            workers: HashMap::new(),
            repairs,
            kv_limits: kv,
            total,
            limits,
            advertise,
        }
    }

    /// The runs there are, and those that are remembered, with whether they are over.
    pub fn run(&self, run: &str) -> Option<(&Run, bool)> {
        self.runs.get(run).map(|entry| (&entry.run, entry.has_ended))
    }

    /// Carries out a request, as [`KvStore::request`] does.
    ///
    /// # Errors
    /// [`RequestError`] if the connection is to be cut off.
    pub fn request(
        &mut self,
        now: Duration,
        from: Caller,
        request: Request<'_>,
        reply: &mut Vec<u8>,
        woken: &mut Vec<ConnectionId>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), RequestError> {
        let by = &mut Answer { reply, woken, effects };
        if let Some(entry) = self.run_of_worker(from, &request)? {
            return Ok(entry.here.request(from.connection, request, by.reply, by.woken)?);
        }
        match request {
            Request::CompareSet { key, expected, desired } => match self.owner(key) {
                Owner::State(run) => self.write_state(now, from, run, key, (expected, desired), by),
                Owner::Round { run, .. } => Err(RequestError::NotLikeThis { run }),
                Owner::Nobody => self.plain(from, request, by),
            },
            Request::Set { key, value } => self.set(from, key, value, by),
            Request::MultiSet { pairs } => {
                for (key, value) in pairs {
                    self.set(from, key, value, by)?;
                }
                Ok(())
            }
            // A client may clean up what is not there, as PyTorch's own tests do.
            Request::Delete { key } if self.kv.get(key).is_none() => self.carry_out(from, request, by),
            Request::Append { key, .. }
            | Request::Add { key, .. }
            | Request::Delete { key }
            | Request::QueuePush { key, .. }
            | Request::Barrier { key, .. } => match self.owner(key) {
                Owner::State(run) => Err(RequestError::NotLikeThis { run }),
                Owner::Round { run, .. } => {
                    self.live(&run)?;
                    self.carry_out(from, request, by)
                }
                Owner::Nobody => self.plain(from, request, by),
            },
            Request::Get { key } => {
                self.show_address(from, key);
                self.carry_out(from, request, by)
            }
            Request::MultiGet { keys } => {
                for key in keys {
                    self.show_address(from, key);
                }
                self.carry_out(from, request, by)
            }
            Request::Check { .. }
            | Request::Wait { .. }
            | Request::CountKeys
            | Request::CancelWait
            | Request::Ping { .. }
            | Request::QueuePop { .. }
            | Request::QueueLen { .. }
            | Request::ListKeys
            | Request::Validate { .. } => self.carry_out(from, request, by),
        }
    }

    /// The run that the request is of a worker of, if it is one's who meets the others here.
    fn run_of_worker(
        &mut self,
        from: Caller,
        request: &Request<'_>,
    ) -> Result<Option<&mut Entry>, RequestError> {
        if let Some(run) = self.workers.get(&from.connection) {
            return Ok(self.runs.get_mut(run));
        }
        if !self.repairs.own_store || !request.first_key().is_some_and(|key| key.starts_with(WORKER_PREFIX)) {
            return Ok(None);
        }
        let is_near =
            |(_, entry): &(&String, &mut Entry)| !entry.has_ended && entry.peers.contains(&from.peer);
        let mut near: Vec<_> = self.runs.iter_mut().filter(is_near).collect();
        match (near.pop(), near.len()) {
            (Some((run, entry)), 0) => {
                self.workers.insert(from.connection, run.clone());
                Ok(Some(entry))
            }
            (Some(_), others) => Err(RequestError::WhoseWorker { runs: others + 1 }),
            // Not torchrun's.
            (None, _) => Ok(None),
        }
    }

    fn carry_out(
        &mut self,
        from: Caller,
        request: Request<'_>,
        by: &mut Answer<'_>,
    ) -> Result<(), RequestError> {
        Ok(self.kv.request(from.connection, request, by.reply, by.woken)?)
    }

    fn is_live(&self, run: &str) -> bool {
        self.runs.get(run).is_some_and(|entry| !entry.has_ended)
    }

    /// Whatever is stored for a run goes with it: what is of none would stay.
    fn live(&self, run: &str) -> Result<(), RequestError> {
        self.is_live(run).then_some(()).ok_or_else(|| RequestError::NoRun { run: run.to_owned() })
    }

    /// A request that touches no run.
    fn plain(&mut self, from: Caller, request: Request<'_>, by: &mut Answer<'_>) -> Result<(), RequestError> {
        self.others.insert(from.connection);
        self.carry_out(from, request, by)
    }

    /// What a key belongs to. A run may be called anything, also like a round of another one: then what is there already
    /// has the key.
    fn owner(&self, key: &[u8]) -> Owner {
        let Some(rest) = key.strip_prefix(PREFIX.as_bytes()) else { return Owner::Nobody };
        // No agent can name a run whose key is no text: it is refused as one that is written wrongly.
        let rest = String::from_utf8_lossy(rest).into_owned();
        if self.is_live(&rest) {
            return Owner::State(rest);
        }
        for (slash, _) in rest.match_indices('/') {
            let (run_and_round, name) = (&rest[..slash], &rest[slash + 1..]);
            let Some((run, round)) = run_and_round.rsplit_once('.') else { continue };
            let is_round = !round.is_empty() && round.bytes().all(|byte| byte.is_ascii_digit());
            if is_round && (self.is_live(run) || is_written_by_agents(name)) {
                return Owner::Round { run: run.to_owned(), name: name.to_owned() };
            }
        }
        Owner::State(rest)
    }

    fn set(
        &mut self,
        from: Caller,
        key: &[u8],
        value: &[u8],
        by: &mut Answer<'_>,
    ) -> Result<(), RequestError> {
        match self.owner(key) {
            Owner::State(run) => Err(RequestError::NotLikeThis { run }),
            Owner::Round { run, name } => {
                self.live(&run)?;
                let ours = self.runs.get(&run).and_then(|entry| entry.store.port());
                match (name.as_str(), ours) {
                    // The agent has a store of its own, which nobody will use.
                    (MASTER_ADDR, Some(_)) => self.put_address(from.reached, key, by.woken)?,
                    (MASTER_PORT, Some(port)) => {
                        self.kv.set(key, port.to_string().as_bytes(), by.woken)?;
                    }
                    _ => self.kv.set(key, value, by.woken)?,
                }
                Ok(())
            }
            Owner::Nobody => {
                self.others.insert(from.connection);
                Ok(self.kv.set(key, value, by.woken)?)
            }
        }
    }

    /// Before somebody reads where the workers meet: each is told the address by which it has reached us itself.
    fn show_address(&mut self, from: Caller, key: &[u8]) {
        if !key.ends_with(MASTER_ADDR.as_bytes()) || self.kv.get(key).is_none() {
            return;
        }
        if let Owner::Round { run, .. } = self.owner(key)
            && self.runs.get(&run).is_some_and(|entry| entry.store.port().is_some())
        {
            // The key is there, and the new value is no longer than an address.
            let _ = self.put_address(from.reached, key, &mut Vec::new());
        }
    }

    /// Says where workers meet, to those whose agent has reached us by this address.
    fn put_address(
        &mut self,
        reached: IpAddr,
        key: &[u8],
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), KvError> {
        let host = self.advertise.clone().unwrap_or_else(|| reached.to_canonical().to_string());
        self.kv.set(key, host.as_bytes(), woken)
    }

    fn write_state(
        &mut self,
        now: Duration,
        from: Caller,
        run: String,
        key: &[u8],
        (expected, desired): (&[u8], &[u8]),
        by: &mut Answer<'_>,
    ) -> Result<(), RequestError> {
        if key.strip_prefix(PREFIX.as_bytes()) != Some(run.as_bytes()) {
            return Err(RequestError::NotLikeThis { run });
        }
        self.begin(&run, from, by.effects)?;
        let Some(entry) = self.runs.get_mut(&run) else { return Ok(()) };
        entry.run.heard(from.connection);
        entry.peers.insert(from.peer);
        let present = self.kv.get(key);
        if present.unwrap_or_default() != expected {
            // As the store does it: who expects something where nothing is, gets back what it expects.
            put_text(by.reply, present.unwrap_or(expected));
            return Ok(());
        }
        // Nothing is agreed on that cannot be stored: what is stored instead of it is little longer.
        self.kv.check_room(key, 2 * desired.len() + 1024)?;
        match entry.run.write(now, from.connection, desired) {
            Ok(written) => {
                let stored = written.instead.as_deref().unwrap_or(desired);
                self.kv.set(key, stored, by.woken)?;
                put_text(by.reply, stored);
                self.follow(&run, &written, Some(from), by.woken, by.effects)
            }
            // Whatever it is: it was asked for.
            Err(_) if !self.repairs.guard => {
                self.kv.set(key, desired, by.woken)?;
                put_text(by.reply, desired);
                Ok(())
            }
            Err(why) => Err(RequestError::State { run, why }),
        }
    }

    /// The run, made if it is not there.
    fn begin(&mut self, run: &str, from: Caller, effects: &mut Vec<Effect>) -> Result<(), RequestError> {
        if self.is_live(run) {
            return Ok(());
        }
        let is_another_s = |entry: &Entry| !entry.has_ended && entry.run.is_open(from.connection);
        if self.runs.values().any(is_another_s) {
            return Err(RequestError::OtherRun { run: run.to_owned() });
        }
        let live = self.runs.values().filter(|entry| !entry.has_ended).count();
        if live >= self.limits.live {
            return Err(RequestError::TooManyRuns { limit: self.limits.live });
        }
        self.ended.retain(|ended| ended != run);
        // Before 2.5 every round's workers meet in a store of their own, and there is nothing to repair.
        let store = if self.repairs.own_store && from.pings { Store::Opening } else { Store::Theirs };
        if store == Store::Opening {
            effects.push(Effect::OpenStore(run.to_owned()));
        }
        let here = KvStore::for_workers(self.kv_limits, &self.total);
        let run_of_it = Run::new(self.repairs);
        let entry = Entry { run: run_of_it, peers: BTreeSet::new(), here, store, has_ended: false };
        self.runs.insert(run.to_owned(), entry);
        Ok(())
    }

    /// A run's state has changed.
    fn follow(
        &mut self,
        run: &str,
        written: &Written,
        from: Option<Caller>,
        woken: &mut Vec<ConnectionId>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), RequestError> {
        effects.push(Effect::Changed(run.to_owned()));
        if written.is_new_round {
            effects.push(Effect::EmptyStore(run.to_owned()));
            self.empty_here(run, effects);
            self.supply(run, from, woken)?;
        }
        Ok(())
    }

    /// What the workers of a round have left here is of no use to those of the next one.
    fn empty_here(&mut self, run: &str, effects: &mut Vec<Effect>) {
        let theirs: Vec<ConnectionId> =
            self.workers.iter().filter(|(_, own)| *own == run).map(|(connection, _)| *connection).collect();
        if let Some(entry) = self.runs.get_mut(run) {
            entry.here = KvStore::for_workers(self.kv_limits, &self.total);
        }
        if !theirs.is_empty() {
            effects.push(Effect::Close(theirs));
        }
    }

    /// The workers' store of a run is open at this port; or it cannot be opened, and the run does without.
    ///
    /// # Errors
    /// [`RequestError`] if there is no room to say so.
    pub fn opened(
        &mut self,
        run: &str,
        port: Option<u16>,
        from: Caller,
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), RequestError> {
        if let Some(entry) = self.runs.get_mut(run) {
            entry.store = port.map_or(Store::Theirs, Store::Ours);
        }
        self.supply(run, Some(from), woken)
    }

    /// Says where the workers of the present round meet, before anybody asks.
    fn supply(
        &mut self,
        run: &str,
        from: Option<Caller>,
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), RequestError> {
        let Some(entry) = self.runs.get(run) else { return Ok(()) };
        let Some(port) = entry.store.port().filter(|_| self.repairs.supplied_keys) else { return Ok(()) };
        let round = entry.run.state().map_or(0, |state| state.round);
        let key = |name: &str| format!("{PREFIX}{run}.{round}/{name}").into_bytes();
        let reached = from.map_or(IpAddr::from([127, 0, 0, 1]), |from| from.reached);
        // Whoever reads it is told its own; see `show_address`.
        self.put_address(reached, &key(MASTER_ADDR), woken)?;
        Ok(self.kv.set(&key(MASTER_PORT), port.to_string().as_bytes(), woken)?)
    }

    /// A connection has ended.
    pub fn disconnected(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        woken: &mut Vec<ConnectionId>,
        effects: &mut Vec<Effect>,
    ) {
        self.kv.forget(connection);
        if let Some(run) = self.workers.remove(&connection)
            && let Some(entry) = self.runs.get_mut(&run)
        {
            entry.here.forget(connection);
        }
        if self.others.remove(&connection) && self.others.is_empty() {
            self.kv.clear(|key| !key.starts_with(PREFIX.as_bytes()));
        }
        let runs: Vec<String> =
            self.runs.iter().filter(|(_, entry)| !entry.has_ended).map(|(run, _)| run.clone()).collect();
        for run in runs {
            let Some(entry) = self.runs.get_mut(&run) else { continue };
            let was_attended = entry.run.is_attended();
            let round = entry.run.state().map_or(0, |state| state.round);
            // Some are done, and wait for those that are not.
            let ends = self.kv.get(format!("{PREFIX}{run}.{round}/{TERMINAL}").as_bytes()).is_some();
            if let Some(written) = entry.run.disconnected(now, connection, ends) {
                let stored = written.instead.as_deref().unwrap_or_default();
                // It replaces what is there, and is no longer.
                let set = self.kv.set(format!("{PREFIX}{run}").as_bytes(), stored, woken);
                let _ = set
                    .map_err(RequestError::from)
                    .and_then(|()| self.follow(&run, &written, None, woken, effects));
            }
            let Some(entry) = self.runs.get_mut(&run) else { continue };
            if was_attended && !entry.run.is_attended() {
                entry.has_ended = true;
                entry.run.ends();
                self.end(&run, effects);
            }
        }
    }

    /// Nobody is left of a run: its id is free to be used again, and what it was is remembered for a while.
    fn end(&mut self, run: &str, effects: &mut Vec<Effect>) {
        let state = format!("{PREFIX}{run}");
        let rounds = format!("{state}.");
        self.kv.clear(|key| {
            let name = key.strip_prefix(rounds.as_bytes()).unwrap_or_default();
            let digits = name.iter().take_while(|byte| byte.is_ascii_digit()).count();
            key == state.as_bytes() || (digits > 0 && name.get(digits) == Some(&b'/'))
        });
        self.empty_here(run, effects);
        effects.push(Effect::CloseStore(run.to_owned()));
        effects.push(Effect::Changed(run.to_owned()));
        self.ended.push(run.to_owned());
        while self.ended.len() > self.limits.ended {
            let oldest = self.ended.remove(0);
            self.runs.remove(&oldest);
            effects.push(Effect::Forgotten(oldest));
        }
    }
}

impl Store {
    fn port(self) -> Option<u16> {
        match self {
            Store::Ours(port) => Some(port),
            Store::Theirs | Store::Opening => None,
        }
    }
}

/// Where a request's answer goes.
struct Answer<'a> {
    reply: &'a mut Vec<u8>,
    woken: &'a mut Vec<ConnectionId>,
    effects: &'a mut Vec<Effect>,
}

/// Where agents count those whose workers have ended with success.
pub const TERMINAL: &str = "torchelastic/agent/terminal_state/num_members";

/// Under which host the workers of a round meet.
pub const MASTER_ADDR: &str = "MASTER_ADDR";
/// At which port they do.
pub const MASTER_PORT: &str = "MASTER_PORT";

/// Whether agents write keys of that name in a round.
fn is_written_by_agents(name: &str) -> bool {
    name == MASTER_ADDR || name == MASTER_PORT || name.starts_with("torchelastic/")
}
