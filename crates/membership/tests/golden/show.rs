//! What the core says, in words.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use reknit_membership::event::Answer;
use reknit_membership::holding::{Fetch, Plan};
use reknit_membership::record::{Commit, Stage};
use reknit_membership::{
    Cause, Effect, Job, JobRecord, MemberId, Message, Note, PhaseName, Resume, Source, Waiting,
};

/// What the script calls the members.
pub(crate) struct Names<'a>(pub(crate) &'a BTreeMap<MemberId, String>);

/// How many names a line lists.
const LISTED_MAX: usize = 6;

impl Names<'_> {
    fn one(&self, member: MemberId) -> String {
        self.0.get(&member).cloned().unwrap_or_else(|| format!("{member:?}"))
    }

    fn all(&self, members: impl IntoIterator<Item = MemberId>) -> String {
        list(members.into_iter().map(|member| self.one(member)).collect())
    }

    /// What was saved, as far as it is new.
    pub(crate) fn saved(&self, old: &JobRecord, new: &JobRecord) -> String {
        let mut parts = vec![format!("{} {:?}", stage(&new.stage), new.generation)];
        if old.spec != new.spec {
            parts.push(format!("bounds {}..{}", new.spec.min, new.spec.max));
        }
        if old.resume != new.resume || old.source != new.source {
            parts.push(format!("from {} {}", resume(new.resume), new.source.map_or(String::new(), source)));
        }
        if old.drains != new.drains {
            parts.push(format!("leaving: {}", self.all(new.drains.keys().copied())));
        }
        if old.closing != new.closing {
            parts.push("closing".to_owned());
        }
        if old.commits != new.commits {
            parts.push(format!("checkpoints: {}", commits(&new.commits)));
        }
        format!("save: {}", parts.join(", "))
    }

    pub(crate) fn effects(&self, effects: &[Effect], world: &JobRecord) -> Vec<String> {
        let mut lines: Vec<(Vec<String>, String)> = Vec::new();
        let mut told_world = false;
        for effect in effects {
            match effect {
                Effect::Tell { message: Message::World(_), .. } if told_world => {}
                Effect::Tell { message: Message::World(place), .. } => {
                    told_world = true;
                    let told = effects.iter().filter_map(|effect| match effect {
                        Effect::Tell { member, message: Message::World(place) } => {
                            Some(format!("{}={}", self.one(*member), place.rank))
                        }
                        Effect::Tell { .. } | Effect::Answer { .. } | Effect::Note(_) => None,
                    });
                    lines.push((
                        Vec::new(),
                        format!("world {:?}: {}", place.generation, list(told.collect())),
                    ));
                    self.check_places(effects, world);
                }
                Effect::Tell { member, message } => {
                    said_of(&mut lines, self.one(*member), format!("<- {}", self.message(message)));
                }
                Effect::Answer { answer, .. } => {
                    lines.push((Vec::new(), format!("answer: {}", self.answer(answer))))
                }
                Effect::Note(Note::Joined { member, .. }) => {
                    said_of(&mut lines, self.one(*member), "join".to_owned())
                }
                Effect::Note(Note::Departed { member, how, .. }) => {
                    said_of(&mut lines, self.one(*member), format!("gone: {how}"));
                }
                Effect::Note(note) => lines.push((Vec::new(), format!("note: {}", self.note(note)))),
            }
        }
        let shown = |(to, text): (Vec<String>, String)| match to.is_empty() {
            true => text,
            false => format!("{} {text}", list(to)),
        };
        lines.into_iter().map(shown).collect()
    }

    /// A line of ranks says it all only if every place is the one in the record.
    fn check_places(&self, effects: &[Effect], record: &JobRecord) {
        let world = record.world.as_ref().expect("who is told of a world is in one");
        for effect in effects {
            if let Effect::Tell { member, message: Message::World(place) } = effect {
                let seat = world.seats.iter().position(|seat| seat.member == *member).expect("it has a seat");
                assert_eq!(*place, world.place(seat, world.roster(), place.renew_every));
            }
        }
    }

    fn message(&self, message: &Message) -> String {
        match message {
            Message::Attached { .. } => "attached".to_owned(),
            Message::Refused(refusal) => format!("refused: {refusal}"),
            Message::World(place) => format!("world {:?}", place.generation),
            Message::Plan(plan) => self.plan(plan),
            Message::Go { generation, resume: state } => format!("go {generation:?} from {}", resume(*state)),
            Message::Break { generation } => format!("break {generation:?}"),
            Message::Boundary { generation } => format!("boundary {generation:?}"),
            Message::Draining { left } => match left {
                Some(left) => format!("draining, gone in {left:?}"),
                None => "draining".to_owned(),
            },
            Message::Serve { generation } => format!("serve {generation:?}"),
            Message::SaveGivenUp { generation, step } => format!("{step:?} of {generation:?} is given up"),
            Message::SaveNow { generation } => format!("save now {generation:?}"),
            Message::Publish { generation, step, shards } => {
                format!("publish {step:?} of {generation:?}, {} parts", shards.len())
            }
            Message::Committed { kept } => format!("committed: {}", commits(kept)),
            Message::Released => "released".to_owned(),
            Message::Closed(closure) => format!("closed: {closure}"),
        }
    }

    fn plan(&self, plan: &Plan) -> String {
        let mut text = format!("plan {} for {}:", plan.attempt, resume(plan.resume));
        for Fetch { shards, from } in &plan.fetch {
            let _ = write!(
                text,
                " fetch {}from {}",
                parts(shards),
                self.all(from.iter().map(|peer| peer.member))
            );
        }
        if let Some(load) = &plan.load {
            let _ = write!(text, " load {}{}", parts(&load.shards), commits(&[load.commit]));
        }
        text
    }

    fn answer(&self, answer: &Answer) -> String {
        match answer {
            Answer::Done => "done".to_owned(),
            Answer::NoSuchMember { name, known } => {
                format!(
                    "no member {name}; there are: {}",
                    list(known.iter().map(ToString::to_string).collect())
                )
            }
            Answer::BadSpec(why) => why.to_string(),
            Answer::JobClosed(closure) => format!("the job is over: {closure}"),
            Answer::NotRunning => "no world runs".to_owned(),
        }
    }

    fn note(&self, note: &Note) -> String {
        match note {
            Note::Joined { .. } | Note::Departed { .. } => unreachable!("said of several members at once"),
            Note::Formed { generation, size, causes } => {
                format!(
                    "{generation:?} formed, size {size}: {}",
                    causes.iter().map(Cause::to_string).collect::<Vec<_>>().join(", ")
                )
            }
            Note::Running { generation, resume: state } => {
                format!("{generation:?} runs from {}", resume(*state))
            }
            Note::BadSource { member, noticed_by } => {
                format!("{} did not get its state from {}", self.one(*noticed_by), self.one(*member))
            }
            Note::BadCheckpoint { step, noticed_by } => {
                format!("{} cannot load {step:?}", self.one(*noticed_by))
            }
            Note::Unrestorable { tried } => format!("nothing can be restored, tried {tried:?}"),
            Note::Diverged { step, members } => {
                format!("diverged at {step:?}: {}", self.all(members.iter().copied()))
            }
            Note::Committed { step, .. } => format!("{step:?} is committed"),
            Note::SaveFailed(trouble) => {
                format!("{} could not write its part of {:?}", trouble.member, trouble.step)
            }
            Note::SaveDropped { step } => format!("the checkpoint of {step:?} is given up"),
            Note::StoreRolledBack { knew, seen } => format!("the store knew {knew:?}, a member saw {seen:?}"),
            Note::Closed(closure) => closure.to_string(),
        }
    }

    /// The phase, what the job waits for, and when it looks again.
    pub(crate) fn state(&self, job: &Job, now: reknit_membership::Timestamp) -> String {
        let phase = match job.phase() {
            PhaseName::Forming => "forming".to_owned(),
            PhaseName::Establishing => "establishing".to_owned(),
            PhaseName::Restoring => "restoring".to_owned(),
            PhaseName::Running => "running".to_owned(),
            PhaseName::Closed(_) => "closed".to_owned(),
        };
        let waits = match job.waiting() {
            Waiting::Nothing => String::new(),
            Waiting::BelowMin { have, need } => format!(", has {have} ranks of {need}"),
            Waiting::UnitRemainder { have, unit } => format!(", {have} ranks make no multiple of {unit}"),
            Waiting::LastCall { left } => format!(", last call for {}", time(left)),
            Waiting::Reattaching { missing } if missing.is_empty() => {
                ", anybody else to come back".to_owned()
            }
            Waiting::Reattaching { missing } => format!(", {} to come back", self.all(missing)),
            Waiting::Settling { suspects } => format!(", {} to speak or hang up", self.all(suspects)),
            Waiting::Unrestorable { left } => format!(", nothing to restore from, again in {}", time(left)),
            Waiting::Ready { missing } => format!(", {} to answer", self.all(missing)),
            Waiting::Restored { missing } => format!(", {} to restore", self.all(missing)),
            Waiting::Merge { left } => format!(", a boundary to be asked for in {}", time(left)),
            Waiting::Boundary { missing } => format!(", {} to reach the boundary", self.all(missing)),
            Waiting::Finish { missing } => format!(", {} to finish", self.all(missing)),
        };
        let due = job.next_deadline().map_or(String::new(), |at| format!("; due in {}", time(at.since(now))));
        format!("= {phase} {:?}{waits}{due}", job.record().generation)
    }
}

/// The same of several members is one line.
fn said_of(lines: &mut Vec<(Vec<String>, String)>, name: String, text: String) {
    match lines.iter_mut().find(|(to, line)| !to.is_empty() && *line == text) {
        Some((to, _)) => to.push(name),
        None => lines.push((vec![name], text)),
    }
}

fn stage(stage: &Stage) -> String {
    match stage {
        Stage::Forming => "forming".to_owned(),
        Stage::Published => "published".to_owned(),
        Stage::Running => "running".to_owned(),
        Stage::Closed(closure) => closure.to_string(),
    }
}

fn resume(resume: Resume) -> String {
    format!("{:?}/{}", resume.lineage, resume.step)
}

fn source(source: Source) -> String {
    match source {
        Source::Memory => "(memory)".to_owned(),
        Source::Checkpoint { step } => format!("(checkpoint {step})"),
        Source::AbandonedMemory => "(abandoned memory)".to_owned(),
        Source::Initial => "(initial)".to_owned(),
    }
}

fn commits(commits: &[Commit]) -> String {
    commits
        .iter()
        .map(|commit| format!("{}@{:?}", commit.step, commit.generation))
        .collect::<Vec<_>>()
        .join(" ")
}

fn parts(shards: &[u32]) -> String {
    if shards.is_empty() { String::new() } else { format!("{shards:?} ") }
}

fn list(names: Vec<String>) -> String {
    match names.as_slice() {
        [] => "nobody".to_owned(),
        [first, .., last] if names.len() > LISTED_MAX => format!("{first} .. {last} ({})", names.len()),
        _ => names.join(" "),
    }
}

pub(crate) fn time(time: Duration) -> String {
    match time.as_millis() {
        ms if ms % 1000 == 0 => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}
