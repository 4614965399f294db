//! Commands that change something. Each says what follows from it, and for whom, once it is done.

use std::fmt;

use reknit_membership::MemberStatus;
use reknit_proto::{inspect, v1};

use crate::args::{Connection, Job, Member, Notice, Resize};
use crate::failure::Failure;
use crate::look::show::short;
use crate::print;

fn done(connection: &Connection, what: fmt::Arguments<'_>) -> Result<(), Failure> {
    if connection.json {
        print::json(&serde_json::json!({ "done": true }))?;
    } else {
        print::talk(what);
    }
    Ok(())
}

fn member_request(member: &Member) -> v1::MemberRequest {
    v1::MemberRequest { job: member.job.clone(), member: member.member.clone() }
}

fn job_request(job: &Job) -> v1::JobRequest {
    v1::JobRequest { job: job.job.clone() }
}

/// What becomes of the others. If that cannot be told, the request itself will fail and say why.
fn without(member: &Member) -> String {
    let go_on = "the others go on without it".to_owned();
    let request = v1::StatusRequest { job: member.job.clone(), members_max: u32::MAX };
    let asked = member.connection.inspect(async |mut client| client.status(request.clone()).await);
    let Ok(reply) = asked else { return go_on };
    let listed_all = reply.members_total as usize <= reply.members.len();
    let Ok(status) = inspect::status(reply) else { return go_on };
    let stays = |other: &&MemberStatus| other.name.as_str() != member.member && other.drain.is_none();
    let left: u32 = status.members.iter().filter(stays).map(|other| other.slots).sum();
    if left >= status.spec.min || !listed_all {
        return go_on;
    }
    let (job, min) = (&member.job, status.spec.min);
    format!(
        "{job} then WAITS for others to come: it needs {min} ranks and has {left} without it; until they come, its newest \
         state is only in the memory of those that are there"
    )
}

pub(crate) fn drain(member: &Member) -> Result<(), Failure> {
    let connection = &member.connection;
    connection.operate(async |mut client| client.drain(member_request(member)).await)?;
    done(
        connection,
        format_args!(
            "{} leaves {} at the next step boundary; {}",
            member.member,
            member.job,
            without(member)
        ),
    )
}

pub(crate) fn undrain(member: &Member) -> Result<(), Failure> {
    let connection = &member.connection;
    connection.operate(async |mut client| client.undrain(member_request(member)).await)?;
    done(connection, format_args!("{} stays in {}", member.member, member.job))
}

pub(crate) fn evict(member: &Member) -> Result<(), Failure> {
    let connection = &member.connection;
    connection.operate(async |mut client| client.evict(member_request(member)).await)?;
    done(
        connection,
        format_args!("{} is taken out of {} now; {}", member.member, member.job, without(member)),
    )
}

pub(crate) fn notice(notice: &Notice) -> Result<(), Failure> {
    let connection = &notice.member.connection;
    let left_ms = u64::try_from(notice.left.as_millis()).unwrap_or(u64::MAX);
    let (job, member) = (notice.member.job.clone(), notice.member.member.clone());
    let request = v1::NoticeRequest { job, member, left_ms };
    connection.operate(async |mut client| client.notice(request.clone()).await)?;
    done(
        connection,
        format_args!(
            "{} will be gone from {} in {}; it leaves at a step boundary before that, and {}",
            notice.member.member,
            notice.member.job,
            short(notice.left),
            without(&notice.member)
        ),
    )
}

pub(crate) fn resize(resize: &Resize) -> Result<(), Failure> {
    let connection = &resize.connection;
    let request = v1::ResizeRequest { job: resize.job.clone(), min: resize.min, max: resize.max };
    connection.operate(async |mut client| client.resize(request.clone()).await)?;
    let (job, min, max) = (&resize.job, resize.min, resize.max);
    let request = v1::StatusRequest { job: job.clone(), members_max: 1 };
    let now = connection.inspect(async |mut client| client.status(request.clone()).await);
    let has_fewer = now.is_ok_and(|now| now.phase() == v1::Phase::Running && now.size < min);
    let but = if has_fewer { "; the world that runs has fewer, and goes on until it changes" } else { "" };
    done(connection, format_args!("{job} has {min} to {max} ranks from now on{but}"))
}

pub(crate) fn save(job: &Job) -> Result<(), Failure> {
    let connection = &job.connection;
    connection.operate(async |mut client| client.save_now(job_request(job)).await)?;
    done(connection, format_args!("{} makes a checkpoint at the next step boundary", job.job))
}

pub(crate) fn close(job: &Job) -> Result<(), Failure> {
    let connection = &job.connection;
    connection.operate(async |mut client| client.close(job_request(job)).await)?;
    done(connection, format_args!("{} ends at the next step boundary, for all its members", job.job))
}

pub(crate) fn forget(job: &Job) -> Result<(), Failure> {
    let connection = &job.connection;
    connection.operate(async |mut client| client.forget(job_request(job)).await)?;
    done(connection, format_args!("the record of {} is deleted; its checkpoints' files stay", job.job))
}
