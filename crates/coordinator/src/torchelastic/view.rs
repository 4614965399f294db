//! The runs of torchrun as those see them who look at jobs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reknit_membership::ids::NAME_CHARS_MAX;
use reknit_membership::reason::{Cause, Closure, Departure, Waiting};
use reknit_membership::record::WorldChange;
use reknit_membership::status::{MemberStatus, PhaseName, Status};
use reknit_membership::{
    Generation, HistoryId, JobId, MemberId, MemberName, Rank, Spec, Step, Timestamp, WorldSize,
};
use reknit_torchelastic::run::{self, Run, absentee};
use reknit_torchelastic::state::{Agent, Instant, State};

/// After how long agents give up one that they have not heard of, by their own default.
const SILENCE: Duration = Duration::from_secs(15);

/// What is known of each run. The thread that serves writes it, everybody else reads.
#[derive(Default)]
pub(crate) struct Runs {
    shown: Mutex<BTreeMap<JobId, Shown>>,
}

#[derive(Clone)]
struct Shown {
    state: Option<State>,
    connected: Vec<Agent>,
    bounds: (Option<usize>, Option<usize>),
    changes: Vec<WorldChange>,
    has_ended: bool,
}

impl Runs {
    fn shown(&self) -> MutexGuard<'_, BTreeMap<JobId, Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run is now like this.
    pub(super) fn changed(&self, id: &str, run: &Run, has_ended: bool) {
        let state = run.state().cloned();
        let agents = state.iter().flat_map(all_agents);
        let connected = agents.filter(|agent| run.is_connected(agent)).cloned().collect();
        let changes = run.changes().map(change).collect();
        let shown = Shown { state, connected, bounds: run.bounds(), changes, has_ended };
        self.shown().insert(called(id), shown);
    }

    /// A run is not remembered any more.
    pub(super) fn forget(&self, id: &str) {
        self.shown().remove(&called(id));
    }

    /// Nothing is known of any run any more.
    pub(super) fn clear(&self) {
        self.shown().clear();
    }

    /// Every run.
    pub(crate) fn ids(&self) -> Vec<JobId> {
        self.shown().keys().cloned().collect()
    }

    /// A run like a job, and how many members it has.
    pub(crate) fn status(&self, id: &JobId, now: Timestamp, members_max: usize) -> Option<(Status, u32)> {
        let shown = self.shown().get(id)?.clone();
        Some(status(id.clone(), &shown, now, members_max))
    }

    /// The formations of a run.
    pub(crate) fn changes(&self, id: &JobId) -> Option<Vec<WorldChange>> {
        self.shown().get(id).map(|shown| shown.changes.clone())
    }
}

/// A run's id as a job's: what a job's may not have is replaced, and its digest added.
fn called(id: &str) -> JobId {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    if let Ok(same) = JobId::new(id) {
        return same;
    }
    // What two of them have in common does not make them one.
    let tail = blake3::hash(id.as_bytes()).to_hex();
    let head: String = id.chars().take(NAME_CHARS_MAX - 9).map(allowed).collect();
    JobId::new(&format!("{head}-{}", &tail[..8])).expect("only what a job's id may have is left")
}

fn name(agent: &Agent) -> MemberName {
    let local = if agent.local_id == 0 { String::new() } else { format!(".{}", agent.local_id) };
    let tail = format!("-{}{local}", agent.pid);
    let host: String = agent.addr.chars().take(NAME_CHARS_MAX.saturating_sub(tail.len())).collect();
    MemberName::new(called(&format!("{host}{tail}")).as_str()).expect("a job's id may be a member's name")
}

fn id(agent: &Agent) -> MemberId {
    let text = format!("{}\n{}\n{}", agent.addr, agent.pid, agent.local_id);
    let digest = blake3::hash(text.as_bytes());
    let (first, _) = digest.as_bytes().split_first_chunk().expect("a digest has more bytes than an id");
    MemberId(u64::from_le_bytes(*first))
}

fn all_agents(state: &State) -> impl Iterator<Item = &Agent> {
    let spares = state.redundancy_list.iter().flatten();
    let waiting = state.wait_list.iter().filter(|agent| **agent != absentee());
    state.participants.keys().chain(waiting).chain(spares)
}

fn timestamp(since_epoch: Duration) -> Timestamp {
    Timestamp(u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX))
}

/// How long it is from `now` until that instant of an agent's clock.
fn left(at: Instant, now: Timestamp) -> Duration {
    let now = i64::try_from(now.0).unwrap_or(i64::MAX);
    Duration::from_micros(u64::try_from(at.unix_us.saturating_sub(now)).unwrap_or(0))
}

fn change(change: &run::Change) -> WorldChange {
    let cause = |cause: &run::Cause| match cause {
        run::Cause::Formed => Cause::Formed,
        run::Cause::Joined(agent) => Cause::Joined { name: name(agent) },
        run::Cause::Lost(agent) => Cause::Lost { name: name(agent), how: Departure::Gone },
        run::Cause::Restarted => Cause::LinkBroken,
    };
    WorldChange {
        generation: Generation(u64::try_from(change.round).unwrap_or(0)),
        causes: change.causes.iter().map(cause).collect(),
        before: change.before as u32,
        after: change.after as u32,
        learned: timestamp(change.learned),
        stopped: timestamp(change.stopped),
        agreed: change.agreed.map(timestamp),
        rebuilt: None,
        restored: None,
        first_step: None,
        resume: None,
        source: None,
        steps_lost: 0,
    }
}

fn status(job: JobId, shown: &Shown, now: Timestamp, members_max: usize) -> (Status, u32) {
    let count = |number: Option<usize>| number.map_or(0, |number| number as u32);
    let (min, max) = shown.bounds;
    let mut status = Status {
        job,
        history: HistoryId(0),
        spec: Spec { min: count(min), max: count(max), unit: 1, keep: 0 },
        phase: PhaseName::Forming,
        waiting: Waiting::BelowMin { have: 0, need: count(min) },
        generation: Generation(0),
        size: WorldSize(0),
        step: Step(0),
        members: Vec::new(),
        commits: Vec::new(),
        save_trouble: None,
    };
    let Some(state) = &shown.state else { return (status, 0) };
    let there = state.participants.len() as u32;
    status.generation = Generation(u64::try_from(state.round).unwrap_or(0));
    status.size = WorldSize(if state.complete { there } else { 0 });
    (status.phase, status.waiting) = if state.closed || shown.has_ended {
        (PhaseName::Closed(Closure::ByMembers), Waiting::Nothing)
    } else if state.complete && state.wait_list.is_empty() {
        (PhaseName::Running, Waiting::Nothing)
    } else if state.complete {
        // They leave the round as soon as they have stopped their workers.
        let missing = state.participants.keys().map(id).collect();
        (PhaseName::Running, Waiting::Boundary { missing })
    } else if let Some(deadline) = state.deadline {
        (PhaseName::Forming, Waiting::LastCall { left: left(deadline, now) })
    } else {
        (PhaseName::Forming, Waiting::BelowMin { have: there, need: count(min) })
    };
    let mut agents: Vec<(i64, &Agent)> = all_agents(state)
        .map(|agent| (state.participants.get(agent).copied().unwrap_or(i64::MAX), agent))
        .collect();
    agents.sort();
    let total = agents.len() as u32;
    let member = |(rank, agent): (i64, &Agent)| MemberStatus {
        member: id(agent),
        name: name(agent),
        rank: u32::try_from(rank).ok().filter(|_| state.complete).map(Rank),
        slots: 1,
        address: agent.addr.clone(),
        attached: shown.connected.contains(agent),
        available: true,
        lease_left: state
            .last_heartbeats
            .get(agent)
            .map_or(Duration::ZERO, |at| left(at.after(SILENCE), now)),
        drain: None,
        step: Step(0),
    };
    status.members = agents.into_iter().take(members_max).map(member).collect();
    (status, total)
}
