//! Commands that look.

pub(crate) mod show;

use std::path::{Path, PathBuf};
use std::time::Duration;

use reknit_checkpoint::{Condition, Listed};
use reknit_membership::record::Commit;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::{inspect, v1};

use crate::args::{Checkpoints, Connection, Coordinators, Job, Status, Watch};
use crate::failure::{self, Failure, Kind};
use crate::print;

pub(crate) fn status(args: &Status) -> Result<(), Failure> {
    let connection = &args.connection;
    let Some(job) = &args.job else { return jobs(connection) };
    let request = v1::StatusRequest { job: job.clone(), members_max: args.members };
    let reply = connection.inspect(async |mut client| client.status(request.clone()).await)?;
    show_status(connection, reply)
}

fn show_status(connection: &Connection, reply: v1::JobStatus) -> Result<(), Failure> {
    let total = reply.members_total;
    let age = reply.saved_age_us.map(Duration::from_micros);
    let status = inspect::status(reply).map_err(garbled)?;
    if connection.json {
        print::json(&show::status_json(&status, total, age))?;
    } else {
        show::status(&status, total);
        say_age(age);
    }
    Ok(())
}

/// Says that an answer comes from a coordinator that does not lead, which knows only what is saved.
fn say_age(age: Option<Duration>) {
    if let Some(age) = age {
        print::talk(format_args!(
            "no coordinator that leads answers: this was saved, as of {:.1} s ago; leases and steps are not known",
            age.as_secs_f64()
        ));
    }
}

fn garbled(why: reknit_proto::BadMessage) -> Failure {
    let error = anyhow::Error::from(why).context("the coordinator's answer cannot be read");
    Failure::new(Kind::Failed, error, "use the same release of reknit on both sides")
}

fn jobs(connection: &Connection) -> Result<(), Failure> {
    let reply = connection.inspect(async |mut client| client.jobs(v1::JobsRequest {}).await)?;
    if !connection.json {
        say_age(reply.saved_age_us.map(Duration::from_micros));
    }
    if connection.json {
        let jobs: Vec<_> = reply.jobs.iter().map(show::job_json).collect();
        print::json(&jobs)?;
        return Ok(());
    }
    if reply.jobs.is_empty() {
        print::talk(format_args!("no jobs: a job begins when its first worker joins"));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = reply.jobs.iter().map(show::job_row).collect();
    print::table(&["JOB", "PHASE", "GENERATION", "RANKS", "MEMBERS", "STEP"], &rows);
    Ok(())
}

/// Shows each, and fails if one does not answer.
pub(crate) fn coordinators(args: &Coordinators) -> Result<(), Failure> {
    let connection = &args.connection;
    let answers = connection.run(async || Ok(connection.each().await))?;
    if connection.json {
        let all: Vec<_> =
            answers.iter().map(|(url, answer)| show::server_json(url, answer.as_ref())).collect();
        print::json(&all)?;
    } else {
        let rows: Vec<Vec<String>> =
            answers.iter().map(|(url, answer)| show::server_row(url, answer.as_ref())).collect();
        print::table(&["COORDINATOR", "ROLE", "EPOCH", "JOBS", "MEMBERS", "UP", "VERSION", "STORE"], &rows);
    }
    answers.into_iter().try_for_each(|(_, answer)| answer.map(|_| ()))
}

pub(crate) fn watch(args: &Watch) -> Result<(), Failure> {
    let connection = &args.connection;
    let request = v1::StatusRequest { job: args.job.clone(), members_max: args.members };
    // What was shown last, without what changes by the clock alone.
    let mut shown = None;
    connection.run(async || {
        loop {
            let mut stream = connection
                .call(async |channel| InspectClient::new(channel).watch(request.clone()).await)
                .await?;
            let why = loop {
                let reply = match stream.message().await {
                    Ok(Some(reply)) => reply,
                    Ok(None) => break None,
                    Err(why) => break Some(why),
                };
                let is_over = reply.phase() == v1::Phase::Closed;
                let timeless = Some(without_times(reply.clone()));
                if shown == timeless {
                    continue;
                }
                shown = timeless;
                if connection.json {
                    let total = reply.members_total;
                    let status = inspect::status(reply).map_err(garbled)?;
                    // One line each: a reader takes them apart by line.
                    print::data(format_args!("{}", show::status_json(&status, total, None)));
                } else {
                    show::clear_screen();
                    show_status(connection, reply)?;
                }
                if is_over || print::is_over() {
                    return Ok(());
                }
            };
            if connection.is_several() {
                // Another one leads, or will in a moment.
                print::talk(format_args!("the coordinator has stopped; looking for the one that leads"));
                continue;
            }
            return Err(match why {
                Some(status) => failure::call(&status, &connection.coordinator),
                None => {
                    let error = anyhow::anyhow!("it has stopped, or does not serve {} any more", args.job);
                    failure::unreachable(&connection.coordinator, error)
                }
            });
        }
    })
}

fn without_times(mut status: v1::JobStatus) -> v1::JobStatus {
    status.members.iter_mut().for_each(|member| member.lease_left_us = 0);
    status.waiting.iter_mut().for_each(|waiting| waiting.left_us = 0);
    status
}

pub(crate) fn history(args: &Job) -> Result<(), Failure> {
    let connection = &args.connection;
    let request = v1::HistoryRequest { job: args.job.clone() };
    let reply = connection.inspect(async |mut client| client.history(request.clone()).await)?;
    say_age(reply.saved_age_us.map(Duration::from_micros));
    let changes =
        reply.changes.into_iter().map(inspect::change).collect::<Result<Vec<_>, _>>().map_err(garbled)?;
    if connection.json {
        let changes: Vec<_> = changes.iter().map(show::change_json).collect();
        print::json(&changes)?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = changes.iter().map(show::change_row).collect();
    let head = [
        "GEN",
        "CAUSE",
        "RANKS",
        "STOP",
        "AGREE",
        "REBUILD",
        "RESTORE",
        "FIRST STEP",
        "TOTAL",
        "LOST",
        "FROM",
    ];
    print::table(&head, &rows);
    Ok(())
}

pub(crate) fn checkpoints(args: &Checkpoints) -> Result<(), Failure> {
    let connection = &args.connection;
    if let Some(dir) = &args.dir {
        return files(connection, dir);
    }
    let job = args.job.clone().unwrap_or_default();
    let request = v1::StatusRequest { job, members_max: 1 };
    let reply = connection.inspect(async |mut client| client.status(request.clone()).await)?;
    let commits: Vec<Commit> = inspect::status(reply).map_err(garbled)?.commits;
    if connection.json {
        let commits: Vec<_> = commits.iter().map(show::commit_json).collect();
        print::json(&commits)?;
        return Ok(());
    }
    if commits.is_empty() {
        print::talk(format_args!("no checkpoint has been committed"));
        return Ok(());
    }
    let rows: Vec<Vec<String>> = commits.iter().map(show::commit_row).collect();
    print::table(&["STEP", "GENERATION", "SHARDS", "MANIFEST", "COMMITTED"], &rows);
    Ok(())
}

/// Whatever lies there is read to the last byte.
fn files(connection: &Connection, dir: &Path) -> Result<(), Failure> {
    if !dir.is_dir() {
        let error = anyhow::anyhow!("there is no directory {}", dir.display());
        return Err(Failure::new(
            Kind::Failed,
            error,
            "name the one that the workers were given, or one within it",
        ));
    }
    let mut listed = reknit_checkpoint::list(dir).map_err(|why| {
        let hint = why.hint();
        Failure::new(Kind::Failed, why, hint)
    })?;
    for one in &mut listed {
        if let Condition::Complete { manifest, .. } = &one.condition
            && let Err(error) = reknit_checkpoint::verify(dir, manifest)
        {
            one.condition = Condition::Damaged { error };
        }
    }
    show_files(connection, dir, &listed)?;
    let damaged = listed.iter().filter(|one| matches!(one.condition, Condition::Damaged { .. })).count();
    if damaged == 0 {
        return Ok(());
    }
    let error = anyhow::anyhow!("{damaged} of {} checkpoints cannot be loaded", listed.len());
    Err(Failure::new(Kind::Failed, error, "a job that needs one of them goes back to the one before"))
}

fn show_files(connection: &Connection, dir: &Path, listed: &[Listed]) -> Result<(), Failure> {
    if connection.json {
        let listed: Vec<_> = listed.iter().map(show::listed_json).collect();
        print::json(&listed)?;
        return Ok(());
    }
    if listed.is_empty() {
        print::talk(format_args!("no checkpoint lies in {}", dir.display()));
        for job in directories_within(dir) {
            print::talk(format_args!(
                "hint: a job's checkpoints lie in a directory of its own, like {}",
                job.display()
            ));
        }
        return Ok(());
    }
    let rows: Vec<Vec<String>> = listed.iter().map(show::listed_row).collect();
    print::table(&["STEP", "GENERATION", "BYTES", "SHARDS", "CONDITION"], &rows);
    Ok(())
}

/// How many of a directory's directories are named as a hint.
const HINTS_MAX: usize = 5;

fn directories_within(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).take(HINTS_MAX).collect()
}
