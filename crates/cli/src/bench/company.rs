//! Processes that play the parts of a measurement: this same program, in a role.
//!
//! ```text
//!   the measurement ──setup, orders──► standard input of a player
//!                   ◄──what it says──── its standard output           one line of JSON each
//! ```
//! A player ends when its input does, so none outlives the measurement that started it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::Failure;
use crate::processes::{Process, log_file};

/// The parts there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Role {
    /// A training program: see `worker`.
    Worker,
    /// Many members that only speak the protocol: see `swarm::members`.
    Members,
    /// A rank of a ring without a coordinator: see `rank`.
    Rank,
    /// The other end of a connection: see `limits`.
    Peer,
    /// One of a ring that only moves bytes: see `collectives::streams`.
    Mover,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Members => "members",
            Role::Rank => "rank",
            Role::Peer => "peer",
            Role::Mover => "mover",
        }
    }

    /// Plays the part until the input ends.
    pub(super) fn play(self) -> Result<(), Failure> {
        match self {
            Role::Worker => super::worker::play()?,
            Role::Members => super::swarm::play_members()?,
            Role::Rank => super::rank::play()?,
            Role::Peer => super::limits::play_peer()?,
            Role::Mover => super::collectives::play_mover()?,
        }
        Ok(())
    }
}

/// Tells players apart. Never used again within one company.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PlayerId(pub(super) u32);

impl std::fmt::Display for PlayerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Something that came from a player.
pub(super) struct Heard<S> {
    pub(super) from: PlayerId,
    /// Nothing if it has ended.
    pub(super) said: Option<S>,
}

/// The players of one measurement, who say `S`.
pub(super) struct Company<S> {
    role: Role,
    logs: PathBuf,
    players: BTreeMap<PlayerId, Player>,
    next: PlayerId,
    sender: Sender<Heard<S>>,
    inbox: Receiver<Heard<S>>,
}

struct Player {
    process: Process,
    input: ChildStdin,
    may_end: bool,
}

impl<S: DeserializeOwned + Send + 'static> Company<S> {
    /// Nobody yet. What players write to standard error goes to files in `logs`.
    pub(super) fn new(role: Role, logs: &Path) -> Company<S> {
        let (sender, inbox) = channel();
        Company { role, logs: logs.to_owned(), players: BTreeMap::new(), next: PlayerId(0), sender, inbox }
    }

    /// One more, who is told `setup` first.
    pub(super) fn start(&mut self, setup: &impl Serialize) -> Result<PlayerId> {
        let id = self.next;
        self.next.0 += 1;
        let name = format!("{}-{id}", self.role.name());
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", "role", self.role.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file(&self.logs, &name)?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let process = Process::new(child, &name);
        let (input, output) =
            (input.context("a player without input")?, output.context("a player without output")?);
        let to_inbox = self.sender.clone();
        std::thread::spawn(move || {
            // What it says after something unreadable is of no use either.
            let lines = BufReader::new(output).lines().map_while(|line| line.ok());
            for said in lines.map_while(|line| serde_json::from_str(&line).ok()) {
                if to_inbox.send(Heard { from: id, said: Some(said) }).is_err() {
                    return;
                }
            }
            // The measurement may be over.
            let _ = to_inbox.send(Heard { from: id, said: None });
        });
        self.players.insert(id, Player { process, input, may_end: false });
        self.tell(id, setup)?;
        Ok(id)
    }

    /// Who will be started next.
    pub(super) fn upcoming(&self) -> PlayerId {
        self.next
    }

    fn player(&mut self, id: PlayerId) -> Result<&mut Player> {
        self.players.get_mut(&id).with_context(|| format!("there is no player {id} any more"))
    }

    /// Gives an order.
    pub(super) fn tell(&mut self, id: PlayerId, order: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        let input = &mut self.player(id)?.input;
        input
            .write_all(&line)
            .and_then(|()| input.flush())
            .with_context(|| format!("player {id} does not listen"))
    }

    /// SIGKILL. What it said before may still be heard.
    pub(super) fn kill(&mut self, id: PlayerId) -> Result<()> {
        let player = self.player(id)?;
        player.may_end = true;
        player.process.signal(Signal::KILL)
    }

    /// From now on its end is no surprise.
    pub(super) fn let_go(&mut self, id: PlayerId) -> Result<()> {
        self.player(id)?.may_end = true;
        Ok(())
    }

    /// Forgets a player that was killed or has ended, and whatever is left of its process.
    pub(super) fn remove(&mut self, id: PlayerId) {
        self.players.remove(&id);
    }

    /// The next thing that is heard from anybody until `until`; nothing if nothing is.
    pub(super) fn hear_until(&self, until: Instant) -> Option<Heard<S>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(heard) => return Some(heard),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return None,
                Err(RecvTimeoutError::Timeout) => {}
                // It holds a sender of its own.
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// The next thing that a living player says.
    ///
    /// # Errors
    /// If nobody says anything for `patience`, or one that should live has ended.
    pub(super) fn hear(&mut self, patience: Duration) -> Result<(PlayerId, S)> {
        let until = Instant::now() + patience;
        loop {
            let Some(Heard { from, said }) = self.hear_until(until) else {
                bail!(
                    "no {} said anything for {patience:?}; see the logs in {}",
                    self.role.name(),
                    self.logs.display()
                )
            };
            match said {
                Some(said) => return Ok((from, said)),
                None if self.players.get(&from).is_some_and(|player| !player.may_end) => {
                    let log = self.logs.join(format!("{}-{from}.log", self.role.name()));
                    let why = std::fs::read_to_string(&log).unwrap_or_default();
                    let last: Vec<&str> = why.lines().rev().take(3).collect();
                    bail!("a {} has ended too early: {}", self.role.name(), last.join(" / "))
                }
                None => {}
            }
        }
    }
}

/// What a player is told: first its setup, then orders.
pub(super) fn orders<O: DeserializeOwned>() -> impl Iterator<Item = Result<O>> {
    let lines = std::io::stdin().lines();
    lines.map(|line| serde_json::from_str(&line?).context("an order that is none"))
}

/// What a player is told first.
pub(super) fn setup<O: DeserializeOwned>() -> Result<O> {
    orders().next().context("nobody said what to do")?
}

/// Says something to the measurement.
pub(super) fn say(what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    out.flush()?;
    Ok(())
}
