//! One form for all states that differ only in what no rule looks at: when it is, how long ago something was, how many
//! came before, and states of the program that nobody holds any more. It keeps the walk finite.

use super::model::{EPOCH, Model, timing};
use super::process::{Held, Node};
use crate::ids::{Generation, Step, Timestamp};
use crate::job::{Job, MemberId, Phase};
use crate::reason::{Cause, Departure};
use crate::record::{JobRecord, WorldChange};

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

pub(super) fn job(job: &mut Job, speakers: &[MemberId]) {
    let now = job.now;
    job.each_deadline(&mut |at| *at = future(*at, now));
    job.takeover_until = if job.takeover_until <= now { EPOCH } else { job.takeover_until };
    job.blind_until = if job.blind_until <= now { EPOCH } else { job.blind_until };
    match &mut job.phase {
        Phase::Forming(forming) => {
            (forming.learned, forming.stopped, forming.before) = (Timestamp(0), Timestamp(0), 0);
            forming.causes = canonical_causes(&forming.causes);
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
            // What counts is whether it has heard of the last world, or of any.
            let last = job.record.generation;
            m.heard = if m.heard >= last { last } else { m.heard.min(Generation(1)) };
        }
    }
    job.arrivals = order.len() as u64;
    job.top_step = Step(0);
    job.grudges.clear();
    record(&mut job.record, now, speakers);
    job.now = EPOCH;
}

pub(super) fn record(record: &mut JobRecord, now: Timestamp, speakers: &[MemberId]) {
    // Worlds that never ran left no states; of the others only what they ran from counts.
    let last = record.changes.back().map(|change| change.generation);
    record.changes.retain(|change| change.restored.is_some() || Some(change.generation) == last);
    for change in &mut record.changes {
        let (generation, causes) = (change.generation, canonical_causes(&change.causes));
        let (restored, resume, source) =
            (change.restored.map(|_| Timestamp(0)), change.resume, change.source);
        *change = WorldChange {
            generation,
            causes,
            before: 0,
            after: 0,
            learned: Timestamp(0),
            stopped: Timestamp(0),
            agreed: None,
            rebuilt: None,
            restored,
            first_step: None,
            resume,
            source,
            steps_lost: 0,
        };
    }
    record.source = None;
    record.departed.retain(|(member, _)| speakers.contains(member));
    record.departed.make_contiguous().sort_by_key(|(member, _)| *member);
    record.commits.iter_mut().for_each(|commit| commit.at = Timestamp(0));
    for drain in record.drains.values_mut() {
        drain.deadline = drain.deadline.map(|at| future(at, now));
    }
}

/// What the core asks of causes: whether somebody was lost, whether the last was a link, whether the store fell back.
fn canonical_causes(causes: &[Cause]) -> Vec<Cause> {
    let mut kept: Vec<Cause> = Vec::new();
    for cause in causes {
        let cause = match cause {
            Cause::Lost { .. } => Cause::Lost { name: super::model::name(0), how: Departure::Died },
            Cause::LinkBroken | Cause::StoreRolledBack | Cause::Diverged | Cause::Unrestored => cause.clone(),
            Cause::Formed
            | Cause::Joined { .. }
            | Cause::Notice { .. }
            | Cause::Drain { .. }
            | Cause::Resized => {
                continue;
            }
        };
        kept.retain(|known| *known != cause);
        kept.push(cause);
    }
    kept
}

/// Drops states that nobody holds and that no held one comes from, and numbers the others in their order.
pub(super) fn truth(model: &mut Model) {
    let mut needed = vec![false; model.truth.len()];
    let held = model.processes.iter().filter_map(|p| p.held.node());
    let saved = model.processes.iter().flat_map(|p| p.saves.iter().map(|save| save.state));
    model.written.retain(|key, _| {
        let (generation, step) = *key;
        model.saved.commits.iter().chain(&model.job.record.commits).any(|c| c.key() == *key)
            || model
                .processes
                .iter()
                .any(|p| p.saves.iter().any(|s| (s.generation, s.step) == (generation, step)))
            || !model.job.savings.is_idle()
    });
    let known = model.processes.iter().flat_map(|p| p.saves.iter().map(|s| (s.generation, s.step))).collect();
    model.job.savings.forget_all_but(&known);
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
    order.sort_by_key(|node| {
        (model.truth[*node].parent.is_some(), model.truth[*node].world, model.truth[*node].step)
    });
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
