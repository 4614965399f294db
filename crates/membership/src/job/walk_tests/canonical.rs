//! One form for all states that differ only in what no rule looks at: when it is, how long ago something was, how many
//! came before, and states of the program that nobody holds any more. It keeps the walk finite.

use super::model::{EPOCH, Model, timing};
use super::process::{Held, Node};
use crate::ids::{Generation, Step, Timestamp};
use crate::job::{Job, MemberId, Phase};
use crate::record::JobRecord;

/// `at` on a clock that shows [`EPOCH`] when the old one shows `now`; all that is past is now.
pub(super) fn future(at: Timestamp, now: Timestamp) -> Timestamp {
    EPOCH.after(at.since(now))
}

/// The same, but the past is kept for as long as any wait looks back.
fn recent(at: Timestamp, now: Timestamp) -> Timestamp {
    if at >= now {
        return future(at, now);
    }
    let ago = now.since(at).min(timing().busy);
    Timestamp(EPOCH.0 - u64::try_from(ago.as_micros()).expect("a few seconds"))
}

pub(super) fn job(job: &mut Job) {
    let now = job.now;
    job.each_deadline(&mut |at| *at = future(*at, now));
    job.takeover_until = if job.takeover_until <= now { EPOCH } else { job.takeover_until };
    job.blind_until = if job.blind_until <= now { EPOCH } else { job.blind_until };
    match &mut job.phase {
        Phase::Forming(forming) => {
            (forming.learned, forming.stopped) = (Timestamp(0), Timestamp(0));
            if let Some(call) = &mut forming.last_call {
                (call.at_most, call.until) = (future(call.at_most, now), future(call.until, now));
            }
            forming.hold.iter_mut().for_each(|at| *at = future(*at, now));
        }
        Phase::Establishing(establishing) => establishing.since = recent(establishing.since, now),
        Phase::Running(running) => {
            if let Some(change) = &mut running.change {
                change.first = recent(change.first, now);
                change.last = recent(change.last, now);
                change.when = change.when.map(|at| future(at, now));
            }
        }
        Phase::Restoring(_) | Phase::Closed(_) => {}
    }
    let mut order: Vec<(u64, MemberId)> = job.members.iter().map(|(id, m)| (m.arrival, *id)).collect();
    order.sort_unstable();
    for (arrival, (_, id)) in order.iter().enumerate() {
        if let Some(m) = job.members.get_mut(id) {
            m.arrival = arrival as u64;
            m.step = Step(0);
            m.heard = if m.heard < job.record.generation { Generation(0) } else { job.record.generation };
        }
    }
    job.arrivals = order.len() as u64;
    job.top_step = Step(0);
    record(&mut job.record, now);
    job.now = EPOCH;
}

pub(super) fn record(record: &mut JobRecord, now: Timestamp) {
    let stamp = |at: &mut Option<Timestamp>| *at = at.map(|_| Timestamp(0));
    for change in &mut record.changes {
        (change.learned, change.stopped, change.steps_lost) = (Timestamp(0), Timestamp(0), 0);
        stamp(&mut change.agreed);
        stamp(&mut change.rebuilt);
        stamp(&mut change.restored);
        stamp(&mut change.first_step);
    }
    record.commits.iter_mut().for_each(|commit| commit.at = Timestamp(0));
    for drain in record.drains.values_mut() {
        drain.deadline = drain.deadline.map(|at| future(at, now));
    }
}

/// Drops states that nobody holds and that no held one comes from, and numbers the others in their order.
pub(super) fn truth(model: &mut Model) {
    let mut needed = vec![false; model.truth.len()];
    let held = model.processes.iter().filter_map(|p| p.held.node());
    let saved = model.processes.iter().flat_map(|p| p.saves.iter().map(|save| save.state));
    model.written.retain(|key, _| {
        let (generation, step) = *key;
        model.saved.commits.iter().chain(&model.job.record.commits).any(|c| c.key() == *key)
            || model.processes.iter().any(|p| p.saves.iter().any(|s| (s.generation, s.step) == (generation, step)))
            || model.job.saving.is_some()
    });
    let written = model.written.values().map(|written| written.state);
    for mut node in held.chain(saved).chain(written).chain(model.base) {
        while !std::mem::replace(&mut needed[node], true) {
            match model.truth[node].parent {
                Some(parent) => node = parent,
                None => break,
            }
        }
    }
    // Roots stay: processes that are yet to start will hold them.
    for (node, truth) in model.truth.iter().enumerate() {
        needed[node] |= truth.parent.is_none();
    }
    let mut order: Vec<Node> = (0..needed.len()).filter(|node| needed[*node]).collect();
    order.sort_by_key(|node| (model.truth[*node].parent.is_some(), model.truth[*node].world, model.truth[*node].step));
    let mut number = vec![usize::MAX; needed.len()];
    order.iter().enumerate().for_each(|(new, old)| number[*old] = new);
    let renumbered = |node: &mut Node| *node = number[*node];
    model.truth = order.iter().map(|node| model.truth[*node]).collect();
    model.truth.iter_mut().flat_map(|truth| &mut truth.parent).for_each(renumbered);
    model.base.iter_mut().for_each(renumbered);
    model.written.values_mut().for_each(|written| renumbered(&mut written.state));
    for p in &mut model.processes {
        match &mut p.held {
            Held::Fresh(node) | Held::At(_, node) => renumbered(node),
            Held::Torn => {}
        }
        p.saves.iter_mut().for_each(|save| renumbered(&mut save.state));
    }
}
