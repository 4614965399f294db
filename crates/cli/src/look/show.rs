//! How what was looked at is shown: for people, and as JSON. The JSON's field names are a promise to scripts.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use reknit_checkpoint::{Condition, Listed};
use reknit_membership::Timestamp;
use reknit_membership::holding::Source;
use reknit_membership::reason::{Cause, Waiting};
use reknit_membership::record::{Commit, WorldChange};
use reknit_membership::status::{MemberStatus, PhaseName, Status};
use reknit_membership::{MemberId, MemberName};
use reknit_proto::v1;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::print;

pub(crate) fn phase(phase: PhaseName) -> &'static str {
    match phase {
        PhaseName::Forming => "forming",
        PhaseName::Establishing => "establishing",
        PhaseName::Restoring => "restoring",
        PhaseName::Running => "running",
        PhaseName::Closed(_) => "closed",
    }
}

fn wire_phase(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified => "no answer",
        v1::Phase::Forming => "forming",
        v1::Phase::Establishing => "establishing",
        v1::Phase::Restoring => "restoring",
        v1::Phase::Running => "running",
        v1::Phase::Closed => "closed",
    }
}

pub(super) fn job_row(job: &v1::JobSummary) -> Vec<String> {
    vec![
        job.job.clone(),
        wire_phase(job.phase()).to_owned(),
        job.generation.to_string(),
        job.size.to_string(),
        job.members.to_string(),
        job.step.to_string(),
    ]
}

pub(super) fn job_json(job: &v1::JobSummary) -> Value {
    json!({
        "job": job.job,
        "phase": wire_phase(job.phase()),
        "generation": job.generation,
        "ranks": job.size,
        "members": job.members,
        "step": job.step,
    })
}

pub(super) fn server_row(url: &str, answer: Result<&v1::ServerStatus, &Failure>) -> Vec<String> {
    let dash = || "-".to_owned();
    match answer {
        Ok(server) => {
            // One that does not lead knows no numbers of its own.
            let of_leader = |number: u64| if server.role == "leading" { number.to_string() } else { dash() };
            vec![
                url.to_owned(),
                server.role.clone(),
                of_leader(server.epoch),
                of_leader(server.jobs.into()),
                of_leader(server.members.into()),
                format!("{} s", server.uptime_ms / 1000),
                server.version.clone(),
                server.store.clone(),
            ]
        }
        Err(_) => {
            let mut row = vec![url.to_owned(), "no answer".to_owned()];
            row.resize_with(8, dash);
            row
        }
    }
}

pub(super) fn server_json(url: &str, answer: Result<&v1::ServerStatus, &Failure>) -> Value {
    match answer {
        Ok(server) => json!({
            "coordinator": url,
            "role": server.role,
            "leader": if server.role == "leading" { url } else { &server.leader },
            "epoch": server.epoch,
            "jobs": server.jobs,
            "members": server.members,
            "uptime_ms": server.uptime_ms,
            "version": server.version,
            "store": server.store,
            "store_transactions": server.store_transactions,
        }),
        Err(_) => json!({ "coordinator": url, "role": Value::Null }),
    }
}

/// The name of a member, if it is listed; else its id.
fn called(status: &Status, member: MemberId) -> String {
    let listed = status.members.iter().find(|m| m.member == member);
    listed.map_or_else(|| member.to_string(), |m| m.name.as_str().to_owned())
}

/// The same reason that the core has, with members by name.
fn waiting_text(status: &Status) -> String {
    let names = |members: &[MemberId]| {
        let some: Vec<String> = members.iter().take(8).map(|member| called(status, *member)).collect();
        let more = if members.len() > 8 { format!(" and {} more", members.len() - 8) } else { String::new() };
        format!("{}{more}", some.join(", "))
    };
    match &status.waiting {
        Waiting::Nothing => "nothing".to_owned(),
        Waiting::BelowMin { have, need } => {
            format!("more members: {have} of at least {need} ranks are there")
        }
        Waiting::UnitRemainder { have, unit } => {
            format!("more members: {have} ranks are there, no usable multiple of {unit}")
        }
        Waiting::LastCall { left } => format!("one more member, for another {}", short(*left)),
        Waiting::Reattaching { missing } => format!("{} to come back", names(missing)),
        Waiting::Settling { suspects } => format!("word from {}, whom neighbours have lost", names(suspects)),
        Waiting::Unrestorable { left } => {
            format!("a checkpoint that can be loaded; tried again in {}", short(*left))
        }
        Waiting::Ready { missing } => format!("{} to answer the new world", names(missing)),
        Waiting::Restored { missing } => format!("{} to load the state", names(missing)),
        Waiting::Merge { left } => format!("further changes, for another {}", short(*left)),
        Waiting::Boundary { missing } => format!("{} to reach the step boundary", names(missing)),
        Waiting::Finish { missing } => format!("{} to finish the last step", names(missing)),
    }
}

/// A duration in the unit that suits it.
pub(crate) fn short(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    match ms {
        _ if ms < 10.0 => format!("{ms:.1} ms"),
        _ if ms < 1000.0 => format!("{ms:.0} ms"),
        _ if ms < 120_000.0 => format!("{:.1} s", ms / 1000.0),
        _ => format!("{:.0} min", ms / 60_000.0),
    }
}

pub(super) fn clear_screen() {
    let mut out = std::io::stdout().lock();
    if out.is_terminal() {
        let _ = write!(out, "\x1b[H\x1b[2J");
    }
}

pub(super) fn status(status: &Status, members_total: u32) {
    let spec = status.spec;
    let unit = if spec.unit > 1 { format!(", a multiple of {}", spec.unit) } else { String::new() };
    let closure = closure_text(status.phase).map(|text| format!(": {text}")).unwrap_or_default();
    print::data(format_args!("job         {}", status.job));
    print::data(format_args!("phase       {}{closure}", phase(status.phase)));
    print::data(format_args!("waits for   {}", waiting_text(status)));
    print::data(format_args!("generation  {}", status.generation));
    print::data(format_args!("ranks       {} (may be {} to {}{unit})", status.size, spec.min, spec.max));
    print::data(format_args!("step        {}", status.step));
    let checkpoint = status.commits.last().map_or("none".to_owned(), |c| format!("step {}", c.step));
    let trouble = status.save_trouble.as_ref().map_or(String::new(), |trouble| {
        format!(
            "; NOT of step {}: {} could not write its part, and its log says why",
            trouble.step, trouble.member
        )
    });
    print::data(format_args!("checkpoint  {checkpoint}{trouble}"));
    if status.members.is_empty() {
        return;
    }
    print::data(format_args!(""));
    let runs = status.phase == PhaseName::Running;
    let rows: Vec<Vec<String>> = status.members.iter().map(|member| member_row(member, runs)).collect();
    print::table(&["RANK", "MEMBER", "STATE", "STEP", "LEASE", "ADDRESS"], &rows);
    let hidden = members_total as usize - status.members.len().min(members_total as usize);
    if hidden > 0 {
        print::talk(format_args!("{hidden} more members; show them with --members {members_total}"));
    }
}

fn member_state(member: &MemberStatus, runs: bool) -> &'static str {
    match (member.drain, member.attached, member.rank) {
        (Some(_), _, _) => "draining",
        (None, false, _) => "detached",
        (None, true, None) if !member.available => "starting",
        (None, true, None) if !runs => "waiting",
        (None, true, None) => "spare",
        (None, true, Some(_)) => "in",
    }
}

fn ranks(member: &MemberStatus) -> String {
    match member.rank {
        None => "-".to_owned(),
        Some(rank) if member.slots == 1 => rank.to_string(),
        Some(rank) => format!("{rank}-{}", rank.0 + member.slots - 1),
    }
}

fn member_row(member: &MemberStatus, runs: bool) -> Vec<String> {
    vec![
        ranks(member),
        member.name.as_str().to_owned(),
        member_state(member, runs).to_owned(),
        member.step.to_string(),
        short(member.lease_left),
        member.address.clone(),
    ]
}

/// How a job that is over ended.
fn closure_text(phase: PhaseName) -> Option<String> {
    match phase {
        PhaseName::Closed(closure) => Some(closure.to_string()),
        PhaseName::Forming | PhaseName::Establishing | PhaseName::Restoring | PhaseName::Running => None,
    }
}

pub(super) fn status_json(status: &Status, members_total: u32, saved_age: Option<Duration>) -> Value {
    let members: Vec<Value> = status
        .members
        .iter()
        .map(|member| {
            json!({
                "name": member.name.as_str(),
                "member": member.member.to_string(),
                "rank": member.rank.map(|rank| rank.0),
                "slots": member.slots,
                "state": member_state(member, status.phase == PhaseName::Running),
                "step": member.step.0,
                "lease_ms": member.lease_left.as_millis() as u64,
                "deadline_us": member.drain.and_then(|drain| drain.deadline).map(|at| at.0),
                "address": member.address,
            })
        })
        .collect();
    json!({
        "job": status.job.as_str(),
        "phase": phase(status.phase),
        "closure": closure_text(status.phase),
        "waiting": waiting_json(status),
        "generation": status.generation.0,
        "ranks": status.size.0,
        "min": status.spec.min,
        "max": status.spec.max,
        "unit": status.spec.unit,
        "step": status.step.0,
        "members_total": members_total,
        "members": members,
        "save_trouble": status.save_trouble.as_ref().map(|trouble| {
            json!({ "step": trouble.step.0, "member": trouble.member.as_str() })
        }),
        "checkpoints": status.commits.iter().map(commit_json).collect::<Vec<_>>(),
        // Only from a coordinator that does not lead.
        "saved_age_ms": saved_age.map(|age| age.as_millis() as u64),
    })
}

fn waiting_json(status: &Status) -> Value {
    let names = |members: &[MemberId]| members.iter().map(|m| called(status, *m)).collect::<Vec<_>>();
    let left = |left: &Duration| left.as_millis() as u64;
    match &status.waiting {
        Waiting::Nothing => json!({ "for": "nothing" }),
        Waiting::BelowMin { have, need } => json!({ "for": "below_min", "have": have, "need": need }),
        Waiting::UnitRemainder { have, unit } => {
            json!({ "for": "unit_remainder", "have": have, "unit": unit })
        }
        Waiting::LastCall { left: l } => json!({ "for": "last_call", "left_ms": left(l) }),
        Waiting::Reattaching { missing } => json!({ "for": "reattaching", "members": names(missing) }),
        Waiting::Settling { suspects } => json!({ "for": "settling", "members": names(suspects) }),
        Waiting::Unrestorable { left: l } => json!({ "for": "unrestorable", "left_ms": left(l) }),
        Waiting::Ready { missing } => json!({ "for": "ready", "members": names(missing) }),
        Waiting::Restored { missing } => json!({ "for": "restored", "members": names(missing) }),
        Waiting::Merge { left: l } => json!({ "for": "merge", "left_ms": left(l) }),
        Waiting::Boundary { missing } => json!({ "for": "boundary", "members": names(missing) }),
        Waiting::Finish { missing } => json!({ "for": "finish", "members": names(missing) }),
    }
}

/// How long something took, if it has happened.
fn between(from: Option<Timestamp>, to: Option<Timestamp>) -> Option<Duration> {
    Some(to?.since(from?))
}

/// The parts of a change, in the order in which they follow each other.
struct Parts {
    stop: Option<Duration>,
    agree: Option<Duration>,
    rebuild: Option<Duration>,
    restore: Option<Duration>,
    first_step: Option<Duration>,
}

fn parts(change: &WorldChange) -> Parts {
    Parts {
        stop: between(Some(change.learned), Some(change.stopped)),
        agree: between(Some(change.stopped), change.agreed),
        rebuild: between(change.agreed, change.rebuilt),
        restore: between(change.rebuilt, change.restored),
        first_step: between(change.restored, change.first_step),
    }
}

pub(crate) fn causes_text(causes: &[Cause]) -> String {
    let some: Vec<String> = causes.iter().take(3).map(ToString::to_string).collect();
    let more = if causes.len() > 3 { format!("; and {} more", causes.len() - 3) } else { String::new() };
    format!("{}{more}", some.join("; "))
}

pub(crate) fn source_text(source: Source) -> String {
    match source {
        Source::Memory => "memory".to_owned(),
        Source::Checkpoint { step } => format!("checkpoint of step {step}"),
        Source::AbandonedMemory => "memory of an abandoned branch".to_owned(),
        Source::Initial => "initial state".to_owned(),
    }
}

pub(super) fn change_row(change: &WorldChange) -> Vec<String> {
    let time = |part: Option<Duration>| part.map_or("-".to_owned(), short);
    let p = parts(change);
    vec![
        change.generation.to_string(),
        causes_text(&change.causes),
        format!("{} → {}", change.before, change.after),
        time(p.stop),
        time(p.agree),
        time(p.rebuild),
        time(p.restore),
        time(p.first_step),
        time(change.total()),
        match change.source {
            // Steps are not told one by one: there may have been more.
            Some(Source::Checkpoint { .. }) => format!("≥ {}", change.steps_lost),
            Some(Source::Memory | Source::AbandonedMemory | Source::Initial) | None => {
                change.steps_lost.to_string()
            }
        },
        change.source.map_or("-".to_owned(), source_text),
    ]
}

fn name_of(cause: &Cause) -> Option<&MemberName> {
    match cause {
        Cause::Joined { name }
        | Cause::Lost { name, .. }
        | Cause::Notice { name }
        | Cause::Drain { name } => Some(name),
        Cause::Formed
        | Cause::Resized
        | Cause::LinkBroken
        | Cause::Diverged
        | Cause::Unrestored
        | Cause::StoreRolledBack => None,
    }
}

pub(super) fn change_json(change: &WorldChange) -> Value {
    let ms = |part: Option<Duration>| part.map(|part| part.as_secs_f64() * 1000.0);
    let p = parts(change);
    let causes: Vec<Value> = change
        .causes
        .iter()
        .map(|cause| json!({ "text": cause.to_string(), "member": name_of(cause).map(|n| n.as_str()) }))
        .collect();
    json!({
        "generation": change.generation.0,
        "causes": causes,
        "before": change.before,
        "after": change.after,
        "learned_us": change.learned.0,
        "stop_ms": ms(p.stop),
        "agree_ms": ms(p.agree),
        "rebuild_ms": ms(p.rebuild),
        "restore_ms": ms(p.restore),
        "first_step_ms": ms(p.first_step),
        "total_ms": ms(change.total()),
        "steps_lost": change.steps_lost,
        "source": change.source.map(source_text),
        "resumed_at": change.resume.map(|resume| resume.step.0),
    })
}

pub(super) fn commit_row(commit: &Commit) -> Vec<String> {
    vec![
        commit.step.to_string(),
        commit.generation.to_string(),
        commit.shards.to_string(),
        commit.manifest.to_string(),
        ago(commit.at),
    ]
}

fn ago(at: Timestamp) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{} ago", short(Timestamp::default().after(now).since(at)))
}

pub(super) fn commit_json(commit: &Commit) -> Value {
    json!({
        "step": commit.step.0,
        "generation": commit.generation.0,
        "shards": commit.shards,
        "manifest": commit.manifest.to_string(),
        "at_us": commit.at.0,
    })
}

fn condition(listed: &Listed) -> (Option<usize>, String) {
    match &listed.condition {
        Condition::Complete { manifest, .. } => (Some(manifest.shards().len()), "complete".to_owned()),
        Condition::Unpublished { shards } => (Some(*shards), "not published".to_owned()),
        Condition::Damaged { error } => (None, format!("damaged: {error}")),
        _ => (None, "unknown".to_owned()),
    }
}

pub(super) fn listed_row(listed: &Listed) -> Vec<String> {
    let (shards, condition) = condition(listed);
    vec![
        listed.step.to_string(),
        listed.generation.to_string(),
        listed.bytes.to_string(),
        shards.map_or("-".to_owned(), |n| n.to_string()),
        condition,
    ]
}

pub(super) fn listed_json(listed: &Listed) -> Value {
    let (shards, condition) = condition(listed);
    json!({
        "step": listed.step.0,
        "generation": listed.generation.0,
        "path": listed.path.display().to_string(),
        "bytes": listed.bytes,
        "shards": shards,
        "condition": condition,
    })
}
