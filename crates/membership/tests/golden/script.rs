//! Plays a script: every command becomes events, and what follows from them is written below it.

use std::collections::BTreeMap;
use std::time::Duration;

use reknit_membership::event::Request;
use reknit_membership::holding::{Moved, Plan, ShardReport, Shards};
use reknit_membership::{
    Digest, Effect, Event, Generation, HistoryId, Holding, Job, JobId, JobRecord, Join, Lineage, MemberId,
    MemberName, Message, Operation, Rank, Resume, Shape, Sharding, Spec, Step, Timestamp, Timing,
};

use super::show::{Names, time};

/// The script with what truly happens below each command.
pub(crate) fn play(script: &str) -> String {
    let mut out = String::new();
    let mut stage: Option<Stage> = None;
    for line in script.lines() {
        if line.starts_with("  ") {
            continue;
        }
        out.push_str(line);
        out.push('\n');
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[0] == "job" {
            stage = Some(Stage::new(&words[1..]));
        }
        let stage = stage.as_mut().expect("a script begins with a job");
        if words[0] != "job" {
            stage.command(&words);
        }
        for line in stage.lines.drain(..) {
            out.push_str(&format!("  {line}\n"));
        }
        out.push_str(&format!("  {}\n", Names(&stage.labels).state(&stage.job, stage.now)));
    }
    out
}

/// A member as the script sees it: what it was told, so that it need not be repeated.
#[derive(Default)]
struct Actor {
    name: String,
    slots: u32,
    history: Option<HistoryId>,
    generation: Generation,
    rank: Rank,
    running: bool,
    available: bool,
    plan: Option<Plan>,
    attached: bool,
    hangs: bool,
    deaf: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Crash {
    BeforeSave,
    AfterSave,
}

struct Stage {
    job: Job,
    saved: JobRecord,
    kept: Option<JobRecord>,
    now: Timestamp,
    spec: Spec,
    timing: Timing,
    members_max: u32,
    labels: BTreeMap<MemberId, String>,
    actors: BTreeMap<String, (MemberId, Actor)>,
    crash: Option<Crash>,
    lines: Vec<String>,
}

const START: Timestamp = Timestamp(1_000_000_000_000);

impl Stage {
    fn new(words: &[&str]) -> Stage {
        let mut spec = Spec { min: 1, max: 8, unit: 1, keep: 2 };
        let mut members_max = 100;
        let mut running = Vec::new();
        for (key, value) in words.iter().filter_map(|word| word.split_once('=')) {
            if key == "running" {
                running.extend(value.split(','));
                continue;
            }
            let value = value.parse().expect("a number");
            match key {
                "min" => spec.min = value,
                "max" => spec.max = value,
                "unit" => spec.unit = value,
                "keep" => spec.keep = value,
                "members" => members_max = value,
                _ => panic!("no such bound: {key}"),
            }
        }
        let record = JobRecord::new(JobId::new("job").expect("a plain name"), HistoryId(7), spec);
        let timing = Timing::default();
        let mut stage = Stage {
            job: Job::restore(record.clone(), timing, members_max, START),
            saved: record,
            kept: None,
            now: START,
            spec,
            timing,
            members_max,
            labels: BTreeMap::new(),
            actors: BTreeMap::new(),
            crash: None,
            lines: Vec::new(),
        };
        if !running.is_empty() {
            stage.runs(&running);
        }
        stage
    }

    /// The story begins with a world that runs: how it came about is told elsewhere.
    fn runs(&mut self, members: &[&str]) {
        self.command(&[&["join"], members].concat());
        self.wait(Duration::from_millis(500));
        self.command(&["ready", "all", "fresh:1"]);
        self.command(&["renew", "all"]);
        self.lines.clear();
    }

    fn command(&mut self, words: &[&str]) {
        let mut words = words;
        if words[0] == "crash" {
            self.crash = Some(if words[1] == "before" { Crash::BeforeSave } else { Crash::AfterSave });
            words = &words[2..];
        }
        let (verb, rest) = (words[0], Rest::new(&words[1..]));
        match verb {
            "wait" => self.wait(duration(&rest.plain[0])),
            "tick" => self.feed(vec![Event::Tick]),
            "stall" => self.feed(vec![Event::Stalled { by: duration(&rest.plain[0]) }]),
            "restart" => self.restart(),
            "keep" => self.kept = Some(self.saved.clone()),
            "put" => {
                self.saved = self.kept.clone().expect("something was kept");
                self.restart();
            }
            "op" => {
                let operation = self.operation(&rest.plain);
                self.feed(vec![Event::Operate { request: Request(1), operation }]);
            }
            _ => {
                let (who, what): (Vec<String>, Vec<String>) = rest.plain.iter().cloned().partition(|word| {
                    verb == "join" || self.actors.contains_key(word) || word.contains("..") || word == "all"
                });
                let rest = Rest { plain: what, ..rest };
                let who: Vec<String> = who.iter().flat_map(|word| self.expand(word)).collect();
                let events = who.iter().filter_map(|label| self.event(verb, label, &rest)).collect();
                self.feed(events);
            }
        }
    }

    /// `w1..w3` is w1 w2 w3; `all` is whoever is in the last world and attached.
    fn expand(&self, word: &str) -> Vec<String> {
        if word == "all" {
            let seats = self.job.record().world.iter().flat_map(|world| &world.seats);
            let labels = seats.filter_map(|seat| self.labels.get(&seat.member)).cloned();
            return labels.filter(|label| self.actors[label].1.attached).collect();
        }
        let Some((first, last)) = word.split_once("..") else { return vec![word.to_owned()] };
        let stem = first.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = |text: &str| text[stem.len()..].parse::<u32>().expect("a number");
        (number(first)..=number(last)).map(|n| format!("{stem}{n}")).collect()
    }

    fn event(&mut self, verb: &str, label: &str, rest: &Rest) -> Option<Event> {
        if verb == "join" {
            return Some(self.join(label, rest));
        }
        let job_step = rest.plain.first().and_then(|word| word.parse().ok()).map(Step).unwrap_or_default();
        let (member, actor) = self.actors.get_mut(label).unwrap_or_else(|| panic!("{label} never joined"));
        let member = *member;
        let generation = rest.number("in").map_or(actor.generation, Generation);
        let plan = actor.plan.clone();
        Some(match verb {
            "die" => {
                actor.attached = false;
                Event::Detached { member }
            }
            "hang" => {
                actor.hangs = true;
                return None;
            }
            "deaf" => {
                actor.deaf = true;
                return None;
            }
            "wake" => {
                actor.hangs = false;
                return None;
            }
            "renew" => Event::Renew { member, generation, step: job_step },
            "ask" => {
                actor.available = true;
                Event::Available { member }
            }
            "leave" => Event::Leave { member },
            "ready" => Event::Ready { member, generation, holding: holding(&rest.plain[0]) },
            "boundary" => Event::Boundary { member, generation, holding: holding(&rest.plain[0]) },
            "first" => Event::FirstStep { member, generation, step: job_step },
            "finished" => Event::Finished { member, generation, step: job_step },
            "restored" => {
                let plan = plan.unwrap_or_else(|| panic!("{label} has no plan"));
                let attempt = rest.number("attempt").map_or(plan.attempt, |n| n as u32);
                let wrong = rest.value("wrong").map(|label| self.actors[label].0);
                let source = plan.fetch.first().and_then(|fetch| fetch.from.first()).map(|peer| peer.member);
                let got = Digest(if wrong.is_some() { 2 } else { 1 });
                let moved = wrong.or(source).map(|from| Moved { from, bytes: 1, sent: Digest(1), got });
                let (generation, resume) = (plan.generation, plan.resume);
                Event::Restored { member, generation, attempt, resume, moved: moved.into_iter().collect() }
            }
            "failed" => {
                let plan = plan.unwrap_or_else(|| panic!("{label} has no plan"));
                let culprit = rest.value("culprit").map(|label| self.actors[label].0);
                let (generation, attempt) = (plan.generation, plan.attempt);
                Event::RestoreFailed { member, generation, attempt, culprit }
            }
            "broken" => {
                let suspects = rest.value("suspects").into_iter().flat_map(|names| names.split(','));
                let suspects = suspects.map(|label| self.rank(label)).collect();
                Event::Broken { member, generation, suspects }
            }
            "wrote" => {
                let state = Digest(rest.number("state").map_or(1, u128::from));
                let report = ShardReport { bytes: 1, file: Digest(1), state };
                Event::ShardWritten { member, generation, step: job_step, report }
            }
            "unsaved" => Event::SaveFailed { member, generation, step: job_step },
            "manifest" => Event::ManifestWritten {
                member,
                generation,
                step: job_step,
                manifest: Digest(u128::from(job_step.0)),
            },
            "notice" => Event::Notice { member, deadline: self.now.after(duration(&rest.plain[0])) },
            _ => panic!("no such command: {verb}"),
        })
    }

    /// The rank that a member had in the last world it was told of.
    fn rank(&self, label: &str) -> Rank {
        self.actors[label].1.rank
    }

    fn join(&mut self, label: &str, rest: &Rest) -> Event {
        let fresh = self.actors.len() as u64 + 1;
        let (member, actor) = self.actors.entry(label.to_owned()).or_insert_with(|| {
            let name = rest.value("as").unwrap_or(label).to_owned();
            (
                MemberId(fresh),
                Actor { name, slots: rest.number("slots").unwrap_or(1) as u32, ..Actor::default() },
            )
        });
        self.labels.insert(*member, label.to_owned());
        actor.attached = true;
        let spec = Spec { min: rest.number("min").map_or(self.spec.min, |n| n as u32), ..self.spec };
        let shape = Shape {
            tensors: Digest(rest.number("tensors").map_or(1, u128::from)),
            count: 10,
            bytes: 4000,
            recipe: Digest(rest.number("recipe").map_or(1, u128::from)),
            sharding: rest
                .number("shards")
                .map_or(Sharding::Replicated, |n| Sharding::Sharded { count: n as u32 }),
        };
        let join = Join {
            name: MemberName::new(&actor.name).expect("a plain name"),
            slots: actor.slots,
            address: format!("{label}:1"),
            spec,
            shape,
            history: rest.number("history").map(HistoryId).or(actor.history),
            generation: rest.number("knows").map_or(actor.generation, Generation),
            running: actor.running,
            available: rest.number("early").is_none() || actor.available,
        };
        actor.available = join.available;
        Event::Attach { member: *member, join }
    }

    fn operation(&self, words: &[String]) -> Operation {
        let name = || MemberName::new(&words[1]).expect("a plain name");
        match words[0].as_str() {
            "drain" => Operation::Drain { name: name() },
            "notice" => Operation::Notice { name: name(), deadline: self.now.after(duration(&words[2])) },
            "undrain" => Operation::Undrain { name: name() },
            "evict" => Operation::Evict { name: name() },
            "resize" => {
                let number = |i: usize| words[i].parse().expect("a number");
                Operation::Resize { min: number(1), max: number(2) }
            }
            "save" => Operation::SaveNow,
            "close" => Operation::Close,
            other => panic!("no such operation: {other}"),
        }
    }

    /// Gives the core the events of one command, one after the other.
    fn feed(&mut self, events: Vec<Event>) {
        let old = self.saved.clone();
        let (mut saves, mut effects) = (0, Vec::new());
        for event in events {
            let transition = self.job.step(self.now, event);
            if let Some(record) = transition.save
                && self.crash != Some(Crash::BeforeSave)
            {
                self.saved = record;
                saves += 1;
            }
            if self.crash.is_none() {
                if saves > 0 {
                    self.job.published(self.now);
                }
                effects.extend(transition.then);
            }
        }
        if saves > 0 {
            self.lines.push(Names(&self.labels).saved(&old, &self.saved));
        }
        self.lines.extend(Names(&self.labels).effects(&effects, &self.saved));
        effects.iter().for_each(|effect| self.perform(effect));
        if self.crash.take().is_some() {
            self.restart();
        }
    }

    /// What members learn from what they are told.
    fn perform(&mut self, effect: &Effect) {
        let Effect::Tell { member, message } = effect else { return };
        let Some(label) = self.labels.get(member) else { return };
        let Some((_, actor)) = self.actors.get_mut(label).filter(|(_, actor)| actor.attached) else { return };
        actor.attached = !message.is_last();
        match message {
            Message::Attached { history, .. } => actor.history = Some(*history),
            Message::World(place) => {
                actor.running = actor.running && actor.generation == place.generation;
                (actor.generation, actor.rank) = (place.generation, place.rank);
            }
            Message::Plan(plan) => actor.plan = Some(plan.clone()),
            Message::Go { .. } => actor.running = true,
            Message::Refused(_)
            | Message::Break { .. }
            | Message::Boundary { .. }
            | Message::SaveNow { .. }
            | Message::Draining { .. }
            | Message::Serve { .. }
            | Message::SaveGivenUp { .. }
            | Message::Publish { .. }
            | Message::Committed { .. }
            | Message::Released
            | Message::Closed(_) => {}
        }
    }

    fn restart(&mut self) {
        self.job = Job::restore(self.saved.clone(), self.timing, self.members_max, self.now);
        self.actors.values_mut().for_each(|(_, actor)| actor.attached = false);
    }

    /// Lets time pass, from one deadline to the next; says when something happened.
    fn wait(&mut self, length: Duration) {
        let (begin, end) = (self.now, self.now.after(length));
        // Who is alive renews its lease a few times before it would run out.
        let breath = self.timing.silence / 5;
        while self.now < end {
            let due = self.job.next_deadline().map_or(end, |at| at.max(self.now));
            self.now = due.min(end).min(self.now.after(breath));
            let alive = self.actors.values().filter(|(_, actor)| actor.attached && !actor.hangs);
            let renewals = alive.map(|(member, actor)| {
                let generation = if actor.deaf { Generation(0) } else { actor.generation };
                Event::Renew { member: *member, generation, step: Step(0) }
            });
            for event in renewals.collect::<Vec<_>>() {
                let told = self.job.step(self.now, event);
                assert!(told.save.is_none() && told.then.is_empty(), "a renewal says nothing: {told:?}");
            }
            if self.job.next_deadline().is_some_and(|at| at <= self.now) {
                let before = self.lines.len();
                self.feed(vec![Event::Tick]);
                if self.lines.len() > before {
                    self.lines.insert(before, format!("after {}:", time(self.now.since(begin))));
                }
                let due = self.job.next_deadline();
                assert!(due.is_none_or(|due| due > self.now), "it is due again at once");
            }
        }
    }
}

/// The words after a command: `key=value`, and others.
struct Rest {
    plain: Vec<String>,
    keyed: BTreeMap<String, String>,
}

impl Rest {
    fn new(words: &[&str]) -> Rest {
        let mut rest = Rest { plain: Vec::new(), keyed: BTreeMap::new() };
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => drop(rest.keyed.insert(key.to_owned(), value.to_owned())),
                None => rest.plain.push((*word).to_owned()),
            }
        }
        rest
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.keyed.get(key).map(String::as_str)
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.value(key).map(|value| value.parse().expect("a number"))
    }
}

fn duration(word: &str) -> Duration {
    match word.strip_suffix("ms") {
        Some(ms) => Duration::from_millis(ms.parse().expect("milliseconds")),
        None => Duration::from_secs(word.strip_suffix('s').expect("seconds").parse().expect("seconds")),
    }
}

/// `nothing`, `fresh:1`, `l2/7`, or with shards `l2/7[0,1]`.
fn holding(word: &str) -> Holding {
    if word == "nothing" {
        return Holding::Nothing;
    }
    if let Some(digest) = word.strip_prefix("fresh:") {
        return Holding::Fresh { digest: Digest(digest.parse().expect("a number")) };
    }
    let (state, some) = word.strip_suffix(']').and_then(|w| w.split_once('[')).unwrap_or((word, ""));
    let (lineage, step) = state.trim_start_matches('l').split_once('/').expect("l1/5");
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let some = some.split(',').filter(|shard| !shard.is_empty()).map(|shard| number(shard) as u32);
    let shards = if word.ends_with(']') { Shards::Only(some.collect()) } else { Shards::Whole };
    Holding::State { resume: Resume { lineage: Lineage(number(lineage)), step: Step(number(step)) }, shards }
}
