//! The crate's rules, as checks on one transition and on the truth of all processes.

use std::collections::{BTreeMap, BTreeSet};

use super::choices::Setting;
use super::model::{Model, Written};
use super::process::{Held, Node, Process};
use crate::event::{Effect, Event, Message, Transition};
use crate::ids::{Generation, MemberId, Rank, Step};
use crate::job::{Job, Phase, Stream};
use crate::reason::{Cause, Departure, Note, Refusal, Waiting};
use crate::record::{JobRecord, Stage};

type Checked = Result<(), String>;

fn rule(holds: bool, number: &str, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(format!("{number}: {}", what())) }
}

/// Whether `node` is `from`, or comes from it.
pub(super) fn descends(model: &Model, node: Node, from: Node) -> bool {
    std::iter::successors(Some(node), |node| model.truth[*node].parent).any(|node| node == from)
}

/// Whatever a transition says and saves, measured against the world before it.
pub(super) fn check_transition(
    before: &Model,
    event: &Event,
    t: &Transition,
    job: &Job,
    setting: &Setting,
) -> Checked {
    let durable: &JobRecord = t.save.as_ref().unwrap_or(&before.saved);
    check_record(before, durable)?;
    for effect in &t.then {
        if let Effect::Tell { member, message } = effect {
            check_told(before, durable, *member, message, t.save.is_some())?;
        }
    }
    let b = &setting.budget;
    if b.hurries == 0 && b.fails == 0 && b.links == 0 {
        check_innocents(before, t)?;
    }
    check_strangers(before, event, t, job)?;
    check_spare(before, event, t, job)?;
    let went = |record: &JobRecord| (record.stage == Stage::Running).then_some(record.generation);
    if went(durable).is_some() && went(durable) != went(&before.saved) {
        check_go(before, durable)?;
    }
    let news = durable.commits.last().filter(|commit| before.saved.commits.last() != Some(commit));
    if let Some(commit) = news.filter(|_| durable.commits.len() >= before.saved.commits.len()) {
        let written = before.written.get(&commit.key());
        let whole = |written: &Written| written.parts.values().all(|said| *said);
        rule(written.is_some_and(whole), "M-14", || {
            format!("{commit:?} was committed without all its parts")
        })?;
    }
    check_waiting(event, job)?;
    check_indices(job)
}

fn check_record(before: &Model, record: &JobRecord) -> Checked {
    let old = &before.saved;
    rule(record.generation >= old.generation, "M-2", || "the generation falls".to_owned())?;
    let Some(world) = &record.world else { return Ok(()) };
    if let Some(last) = old.world.as_ref().filter(|last| last.generation >= world.generation) {
        return rule(last == world, "M-1", || format!("{last:?} became {world:?}"));
    }
    rule(world.generation > old.generation, "M-2", || format!("{:?} is used twice", world.generation))?;
    let mut next = 0;
    for seat in &world.seats {
        rule(seat.rank == Rank(next), "M-3", || format!("a gap before {seat:?}"))?;
        next += seat.slots;
    }
    let bounds = (record.spec.min..=record.spec.max).contains(&next) && next.is_multiple_of(record.spec.unit);
    rule(bounds, "M-4", || format!("{next} ranks with {:?}", record.spec))?;
    let known: Vec<MemberId> = old.world.iter().flat_map(|w| w.seats.iter().map(|s| s.member)).collect();
    let place = |member: &MemberId| known.iter().position(|m| m == member).unwrap_or(usize::MAX);
    let places: Vec<usize> = world.seats.iter().map(|seat| place(&seat.member)).collect();
    rule(places.is_sorted(), "M-3", || format!("{known:?} became {:?}", world.seats))?;
    let causes = record.changes.back().map(|change| change.causes.clone()).unwrap_or_default();
    let unplanned = causes.iter().any(|cause| {
        matches!(
            cause,
            Cause::Lost { .. }
                | Cause::LinkBroken
                | Cause::Diverged
                | Cause::Unrestored
                | Cause::StoreRolledBack
        )
    });
    // Of a planned change everybody has heard at the boundary: no rank runs on in the old world.
    let running = |m: &MemberId| before.processes.iter().any(|p| p.id == *m && p.runs(old.generation));
    let disturbed = matches!(before.job.phase, Phase::Running(_)) && !unplanned && known.iter().any(running);
    rule(!disturbed, "M-13", || format!("{causes:?} interrupted a rank that runs"))
}

fn check_told(
    before: &Model,
    durable: &JobRecord,
    member: MemberId,
    message: &Message,
    saves: bool,
) -> Checked {
    let told = || format!("{member:?} is told {message:?} of what is not saved");
    let live = |generation: Generation| durable.generation == generation;
    match message {
        Message::World(place) => {
            let stage = matches!(durable.stage, Stage::Published | Stage::Running);
            let world = durable.world.as_ref().filter(|world| world.generation == place.generation);
            let index = world.and_then(|world| world.seats.iter().position(|seat| seat.member == member));
            let same = world
                .zip(index)
                .is_some_and(|(world, seat)| *place == world.place(seat, world.roster(), place.renew_every));
            let has_not = before.processes.iter().any(|p| p.id == member && !p.available);
            rule(!has_not, "M-16", || format!("{member:?} has not asked for a world, and gets a place"))?;
            rule(stage && live(place.generation) && same, "M-5", told)
        }
        Message::Plan(plan) => rule(live(plan.generation) && durable.stage == Stage::Published, "M-5", told),
        Message::Go { generation, resume } => rule(
            live(*generation) && durable.stage == Stage::Running && durable.resume == *resume,
            "M-5",
            told,
        ),
        Message::Boundary { generation } | Message::SaveNow { generation } => {
            rule(live(*generation) && durable.stage == Stage::Running, "M-5", told)
        }
        Message::Serve { generation } => {
            let outside = durable.world.as_ref().is_some_and(|world| world.seat(member).is_none());
            rule(live(*generation) && durable.stage == Stage::Published && outside, "M-5", told)
        }
        Message::Draining { .. } => rule(durable.drains.contains_key(&member), "M-5", told),
        // It deletes what was written: only whoever can save may say so, and it must not be of what is committed.
        Message::SaveGivenUp { generation, step } => {
            let committed = durable.commits.iter().any(|commit| commit.key() == (*generation, *step));
            rule(saves && !committed, "M-5", told)
        }
        Message::Committed { kept } => rule(*kept == durable.commits, "M-5", told),
        Message::Closed(closure) => rule(durable.stage == Stage::Closed(*closure), "M-5", told),
        Message::Released => rule(durable.departure(member) == Some(Departure::Drained), "M-5", told),
        Message::Refused(Refusal::Departed(how)) => {
            let seated = before.job.members.get(&member).is_some_and(|m| m.seat.is_some());
            rule(!seated || durable.departure(member) == Some(*how), "M-5", told)
        }
        Message::Break { generation } => {
            let seat =
                durable.world.as_ref().filter(|w| w.generation <= *generation).and_then(|w| w.seat(member));
            let lives = matches!(durable.stage, Stage::Published | Stage::Running);
            rule(*generation <= durable.generation && !(lives && seat.is_some()), "M-5", told)
        }
        Message::Attached { .. } | Message::Refused(_) | Message::Publish { .. } => Ok(()),
    }
}

/// Nobody is struck off who lives, has a stream and does in time what it is asked to.
fn check_innocents(before: &Model, t: &Transition) -> Checked {
    for effect in &t.then {
        let Effect::Note(Note::Departed { member, how, .. }) = effect else { continue };
        let asked_for = match how {
            Departure::Died | Departure::Silent | Departure::Gone | Departure::Unready => false,
            Departure::Unrestored | Departure::Stuck | Departure::Unreachable | Departure::Diverged => false,
            Departure::Replaced { .. } | Departure::Left | Departure::Drained | Departure::Evicted => true,
            Departure::StateLost => {
                let known =
                    |p: &&Process| before.job.members.get(&p.id).is_some_and(|m| m.heard > Generation(0));
                before.processes.iter().filter(known).all(|p| p.held == Held::Torn)
            }
        };
        let well = before.processes.iter().any(|p| p.id == *member && p.acts() && p.stream);
        rule(asked_for || !well, "innocent", || format!("{member:?} is struck off: {how}"))?;
    }
    Ok(())
}

/// Rule M-8: who is no member changes nothing.
fn check_strangers(before: &Model, event: &Event, t: &Transition, job: &Job) -> Checked {
    let member = match event {
        Event::Detached { member }
        | Event::Renew { member, .. }
        | Event::Available { member }
        | Event::Leave { member }
        | Event::Ready { member, .. }
        | Event::Restored { member, .. }
        | Event::RestoreFailed { member, .. }
        | Event::Broken { member, .. }
        | Event::Boundary { member, .. }
        | Event::FirstStep { member, .. }
        | Event::Finished { member, .. }
        | Event::ShardWritten { member, .. }
        | Event::SaveFailed { member, .. }
        | Event::ManifestWritten { member, .. }
        | Event::Notice { member, .. } => member,
        Event::Attach { .. } | Event::Operate { .. } | Event::Stalled { .. } | Event::Tick => return Ok(()),
    };
    if before.job.members.contains_key(member) {
        return Ok(());
    }
    let same = Job { now: before.job.now, ..job.clone() } == before.job;
    rule(t.save.is_none() && same, "M-8", || {
        format!("{member:?} is no member, but {event:?} changed the job")
    })
}

/// Rule M-12: a joiner for whom there is no room disturbs nobody.
fn check_spare(before: &Model, event: &Event, t: &Transition, job: &Job) -> Checked {
    let (Event::Attach { member, join }, Phase::Running(running)) = (event, &before.job.phase) else {
        return Ok(());
    };
    let full = before.job.roster.size.0 == before.saved.spec.max;
    let known = before.job.members.contains_key(member) || before.job.names.contains_key(&join.name);
    let ahead = join.history.is_some() && join.generation > before.job.record.generation;
    if !full || known || running.change.is_some() || ahead || before.saved.drains.contains_key(member) {
        return Ok(());
    }
    let to_others = |effect: &Effect| matches!(effect, Effect::Tell { member: to, .. } if to != member);
    let quiet = t.save.is_none() && !t.then.iter().any(to_others) && job.phase == before.job.phase;
    rule(quiet, "M-12", || format!("{member:?} came without room, and {t:?} followed"))
}

/// Rules M-6 and M-7, against what everybody truly holds.
fn check_go(before: &Model, record: &JobRecord) -> Checked {
    let resume = record.resume;
    let world = record.world.as_ref().ok_or("a world that is none goes")?;
    let seated: BTreeSet<MemberId> = world.seats.iter().map(|seat| seat.member).collect();
    let mut chosen = None;
    for p in before.processes.iter().filter(|p| p.alive && seated.contains(&p.id)) {
        let ready = p.generation() == record.generation;
        rule(ready, "M-6", || format!("{:?} has not built the world that goes", p.id))?;
        let node = p.held.node().ok_or_else(|| format!("M-6: {:?} goes with a torn state", p.id))?;
        rule(before.truth[node].step == resume.step, "M-6", || format!("{:?} is at another step", p.id))?;
        let same = *chosen.get_or_insert(node) == node;
        rule(same, "M-6", || format!("{:?} goes from another state than the rest", p.id))?;
    }
    let present = |node: Node| match before.base {
        Some(base) => descends(before, node, base) || descends(before, base, node),
        None => true,
    };
    for p in before.processes.iter().filter(|p| p.alive) {
        // Whoever is let go at this instant still counts, but not who loses its lease at it.
        let holds_lease = matches!(record.departure(p.id), None | Some(Departure::Drained));
        let counts = before.job.members.contains_key(&p.id)
            && holds_lease
            && !before.job.distrusted.contains(&p.id)
            // Who comes back as somebody else has lost its lease: what it holds is asked for only if it has a place.
            && (seated.contains(&p.id) || !p.came_back);
        let Held::At(_, node) = p.held else { continue };
        let lost = counts && present(node) && before.truth[node].step > resume.step;
        rule(!lost, "M-7", || format!("{:?} holds step {}, {resume:?} goes", p.id, before.truth[node].step))?;
    }
    let readable =
        before.saved.commits.iter().filter(|commit| !before.job.unreadable.contains(&commit.key()));
    let newest = readable.map(|commit| commit.step).max().unwrap_or(Step(0));
    rule(newest <= resume.step, "M-7", || format!("{newest:?} is committed, {resume:?} goes"))
}

/// Rule M-11: nobody waits without a reason and an end, and time does not stand still.
fn check_waiting(event: &Event, job: &Job) -> Checked {
    let at_rest = matches!(job.phase, Phase::Running(_) | Phase::Closed(_));
    let nobody = job.members.is_empty();
    rule(at_rest || job.waiting() != Waiting::Nothing, "M-11", || "waits for nothing".to_owned())?;
    let due = job.next_deadline();
    let idle = matches!(job.phase, Phase::Closed(_)) || nobody;
    rule(idle || due.is_some(), "M-11", || format!("{:?} is never looked at again", job.waiting()))?;
    let stands = *event == Event::Tick && due.is_some_and(|due| due <= job.now);
    rule(!stands, "M-11", || format!("{:?} is due again at once", job.waiting()))?;
    if let Phase::Forming(_) = job.phase {
        let reason = job.waiting();
        let left =
            matches!(reason, Waiting::LastCall { left } | Waiting::Unrestorable { left } if left.is_zero());
        rule(!left, "M-11", || format!("{reason:?} is over, and nothing follows"))?;
    }
    Ok(())
}

/// What is kept twice for speed says the same twice.
fn check_indices(job: &Job) -> Checked {
    let ids = |keep: &dyn Fn(&crate::job::Member) -> bool| -> BTreeSet<MemberId> {
        job.members.iter().filter(|(_, m)| keep(m)).map(|(id, _)| *id).collect()
    };
    rule(job.adrift == ids(&|m| m.seat.is_some() && m.stream != Stream::Up), "index", || {
        "adrift".to_owned()
    })?;
    let slots: u32 = job.members.values().filter(|m| m.available).map(|m| m.slots).sum();
    rule(job.slots_total == slots, "index", || "slots_total".to_owned())?;
    let names: BTreeMap<_, _> = job.members.iter().map(|(id, m)| (m.name.clone(), *id)).collect();
    rule(job.names == names && names.len() == job.members.len(), "index", || "names".to_owned())?;
    let spare = |id: &MemberId| job.members.get(id).is_some_and(|m| m.seat.is_none());
    rule(job.unheard.keys().all(spare), "index", || "unheard".to_owned())?;
    rule(job.rested.keys().all(|id| job.members.contains_key(id)), "index", || "rested".to_owned())?;
    let seats = job.seated().filter(|id| job.members.contains_key(id)).count();
    let closed = matches!(job.phase, Phase::Closed(_));
    rule(closed || seats == ids(&|m| m.seat.is_some()).len(), "index", || "seats".to_owned())
}

/// Rule M-15, over all processes.
pub(super) fn check_processes(model: &Model) -> Checked {
    let mut names = BTreeMap::new();
    for p in &model.processes {
        if let Held::At(resume, node) = p.held {
            let same = *names.entry(resume).or_insert(node) == node;
            rule(same, "M-15", || format!("{resume:?} names two states"))?;
        }
    }
    Ok(())
}
