//! What the run came to: the table, the JSON, and whether everything held.

use std::time::Duration;

use reknit_membership::Timestamp;
use reknit_membership::record::WorldChange;
use serde::Serialize;

use super::acts::{Act, Acts};
use super::evidence::{Done, Evidence};
use crate::look::show;
use crate::print;

/// All that is known of a run.
pub(super) struct Facts {
    pub(super) acts: Acts,
    pub(super) history: Vec<WorldChange>,
    pub(super) evidence: Evidence,
    pub(super) accuracy_undisturbed: f64,
    pub(super) accuracy_tolerance: f64,
    pub(super) steps: u64,
    pub(super) took: Duration,
}

/// One change of the world. Times are in milliseconds and follow each other; `total_ms` is from the instant at which
/// the cause was set to the first committed step of the new world.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Recovery {
    /// What was done to the fleet; if nothing was, what the coordinator noticed.
    pub(super) cause: String,
    /// What the coordinator noticed.
    pub(super) details: String,
    pub(super) generation: u64,
    pub(super) before: u32,
    pub(super) after: u32,
    /// From the cause to the coordinator's knowledge of it.
    pub(super) detect_ms: f64,
    /// From there to a new world, saved and told. For a planned change training goes on until its last part.
    pub(super) agree_ms: f64,
    /// From there until every member has left the old ring and built the new one.
    pub(super) rebuild_ms: f64,
    /// From there until every member has the same state.
    pub(super) restore_ms: f64,
    /// From there to the first committed step.
    pub(super) first_step_ms: f64,
    pub(super) total_ms: f64,
    /// How long nobody trained: for a planned change, only from the step boundary on.
    pub(super) stall_ms: f64,
    /// Committed steps that had to be done again.
    pub(super) steps_lost: u64,
    /// Where the state came from.
    pub(super) source: String,
    /// The step that it went on from.
    pub(super) resumed_at: u64,
    /// When the world's first step was committed.
    #[serde(skip)]
    pub(super) at: Timestamp,
}

#[derive(Serialize)]
pub(super) struct Json<'a> {
    recoveries: &'a [Recovery],
    samples_exactly_once: bool,
    passes: u64,
    accuracy: f64,
    accuracy_undisturbed: f64,
    generations_spent_on_coordinator_restart: u64,
    steps_without_coordinator: u64,
    steps: u64,
    took_s: f64,
    complaints: &'a [String],
    ok: bool,
}

pub(super) struct Outcome {
    recoveries: Vec<Recovery>,
    accuracy: f64,
    accuracy_undisturbed: f64,
    samples_exactly_once: bool,
    passes: u64,
    generations_spent_on_coordinator_restart: u64,
    steps_without_coordinator: u64,
    coordinator_away: Option<(Timestamp, Timestamp)>,
    steps: u64,
    took: Duration,
    losses: Vec<Done>,
    complaints: Vec<String>,
}

impl Outcome {
    pub(super) fn new(facts: Facts) -> Outcome {
        let Facts { acts, history, evidence, accuracy_undisturbed, accuracy_tolerance, steps, took } = facts;
        let recoveries = recoveries(&acts.acts, &history, &evidence);
        let sample_complaints = evidence.complaints(steps);
        let samples_exactly_once = sample_complaints.is_empty();
        let accuracy = evidence.accuracy().unwrap_or(0.0);
        let mut complaints = sample_complaints;
        complaints.extend(complaints_of(&acts, &recoveries, &evidence));
        if accuracy < accuracy_undisturbed - accuracy_tolerance {
            complaints.push(format!("accuracy {accuracy:.4} is below {accuracy_undisturbed:.4} undisturbed"));
        }
        Outcome {
            recoveries,
            accuracy,
            accuracy_undisturbed,
            samples_exactly_once,
            passes: evidence.passes(),
            generations_spent_on_coordinator_restart: acts.generations_spent_on_coordinator_restart,
            steps_without_coordinator: acts.steps_without_coordinator,
            coordinator_away: acts.coordinator_away,
            steps,
            took,
            losses: evidence.losses(),
            complaints,
        }
    }

    pub(super) fn ok(&self) -> bool {
        self.complaints.is_empty()
    }

    pub(super) fn complaints(&self) -> &[String] {
        &self.complaints
    }

    pub(super) fn recoveries(&self) -> &[Recovery] {
        &self.recoveries
    }

    /// When the coordinator was killed, and when it listened again.
    pub(super) fn coordinator_away(&self) -> Option<(Timestamp, Timestamp)> {
        self.coordinator_away
    }

    pub(super) fn losses(&self) -> &[Done] {
        &self.losses
    }

    /// What is said below the table, a line each.
    pub(super) fn summary(&self) -> Vec<String> {
        let once = if self.samples_exactly_once { "exactly once" } else { "NOT exactly once" };
        vec![
            format!(
                "accuracy {:.4} on images that no step has seen; undisturbed {:.4}",
                self.accuracy, self.accuracy_undisturbed
            ),
            format!(
                "every image was used {once} per pass, over {} steps ({} passes) of the committed history",
                self.steps, self.passes
            ),
            format!(
                "while the coordinator was away {} steps were done; its restart cost {} generations",
                self.steps_without_coordinator, self.generations_spent_on_coordinator_restart
            ),
            format!("took {:.0} s, the undisturbed run included", self.took.as_secs_f64()),
        ]
    }

    pub(super) fn print(&self) {
        print::table(&HEAD, &self.rows());
        print::data(format_args!(""));
        for line in self.summary() {
            print::data(format_args!("{line}"));
        }
        for complaint in &self.complaints {
            print::data(format_args!("NOT SO: {complaint}"));
        }
    }

    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let ms = |ms: f64| if ms < 10.0 { format!("{ms:.1}") } else { format!("{ms:.0}") };
        let row = |r: &Recovery| {
            vec![
                r.cause.clone(),
                r.generation.to_string(),
                format!("{} → {}", r.before, r.after),
                ms(r.detect_ms),
                ms(r.agree_ms),
                ms(r.rebuild_ms),
                ms(r.restore_ms),
                ms(r.first_step_ms),
                ms(r.total_ms),
                ms(r.stall_ms),
                r.steps_lost.to_string(),
                r.source.clone(),
            ]
        };
        self.recoveries.iter().map(row).collect()
    }

    pub(super) fn json(&self) -> Json<'_> {
        Json {
            recoveries: &self.recoveries,
            samples_exactly_once: self.samples_exactly_once,
            passes: self.passes,
            accuracy: self.accuracy,
            accuracy_undisturbed: self.accuracy_undisturbed,
            generations_spent_on_coordinator_restart: self.generations_spent_on_coordinator_restart,
            steps_without_coordinator: self.steps_without_coordinator,
            steps: self.steps,
            took_s: self.took.as_secs_f64(),
            complaints: &self.complaints,
            ok: self.ok(),
        }
    }
}

/// The head of the table.
pub(super) const HEAD: [&str; 12] = [
    "CAUSE",
    "GEN",
    "WORKERS",
    "DETECT ms",
    "AGREE",
    "REBUILD",
    "RESTORE",
    "FIRST STEP",
    "TOTAL",
    "STALL",
    "LOST",
    "STATE FROM",
];

fn ms(from: Timestamp, to: Timestamp) -> f64 {
    to.since(from).as_secs_f64() * 1000.0
}

/// The changes that led to a running world, each with the act that caused it: the last one before the coordinator
/// learned of it.
fn recoveries(acts: &[Act], history: &[WorldChange], evidence: &Evidence) -> Vec<Recovery> {
    history.iter().filter_map(|change| recovery(acts, change, evidence)).collect()
}

fn recovery(acts: &[Act], change: &WorldChange, evidence: &Evidence) -> Option<Recovery> {
    let (agreed, rebuilt, restored) = (change.agreed?, change.rebuilt?, change.restored?);
    let first_step = change.first_step?;
    let act =
        acts.iter().rev().find(|act| act.at <= change.learned && act.after_generation < change.generation.0);
    let caused = act.map_or(change.learned, |act| act.at);
    let resumed_at = change.resume.map_or(0, |resume| resume.step.0);
    Some(Recovery {
        cause: act.map_or_else(|| show::causes_text(&change.causes), |act| act.title.to_owned()),
        details: show::causes_text(&change.causes),
        generation: change.generation.0,
        before: change.before,
        after: change.after,
        detect_ms: ms(caused, change.learned),
        agree_ms: ms(change.learned, agreed),
        rebuild_ms: ms(agreed, rebuilt),
        restore_ms: ms(rebuilt, restored),
        first_step_ms: ms(restored, first_step),
        total_ms: ms(caused, first_step),
        stall_ms: if is_planned(change) { ms(change.stopped, first_step) } else { ms(caused, first_step) },
        steps_lost: evidence.steps_before(change.generation.0).saturating_sub(resumed_at),
        source: change.source.map(show::source_text).unwrap_or_default(),
        resumed_at,
        at: first_step,
    })
}

fn is_planned(change: &WorldChange) -> bool {
    change.stopped > change.learned
}

/// What the play promises, beyond samples and accuracy.
fn complaints_of(acts: &Acts, recoveries: &[Recovery], evidence: &Evidence) -> Vec<String> {
    let mut complaints = Vec::new();
    for act in &acts.acts {
        let acted = acts.acts.iter().filter(|other| other.title == act.title).count();
        if recoveries.iter().filter(|recovery| recovery.cause == act.title).count() < acted {
            complaints.push(format!("no recovery follows from: {}", act.title));
        }
    }
    complaints.dedup();
    let spent = acts.generations_spent_on_coordinator_restart;
    if spent > 0 {
        complaints.push(format!("{spent} generations were spent on the restart of the coordinator"));
    }
    if acts.steps_without_coordinator == 0 {
        complaints.push("training stood still while the coordinator was away".to_owned());
    }
    match acts.killed_inside {
        Some(attempt) if evidence.finished(attempt) => {
            complaints.push(format!("step {} was finished although a rank died in it", attempt.step));
        }
        Some(_) => {}
        None => complaints.push("nobody was killed in the middle of an all-reduce".to_owned()),
    }
    for recovery in recoveries.iter().filter(|recovery| recovery.source == "memory") {
        if recovery.steps_lost > 0 {
            complaints.push(format!("generation {} lost {} steps", recovery.generation, recovery.steps_lost));
        }
    }
    let newest = acts.committed_before_the_end;
    match recoveries.iter().rfind(|recovery| recovery.source.starts_with("checkpoint")) {
        None => complaints.push("nothing was restored from a checkpoint".to_owned()),
        Some(recovery) if recovery.resumed_at < newest => complaints.push(format!(
            "training went on from step {} although the checkpoint of step {newest} was committed",
            recovery.resumed_at
        )),
        Some(_) => {}
    }
    if recoveries.windows(2).any(|pair| pair[0].generation >= pair[1].generation) {
        complaints.push("generations do not rise".to_owned());
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::evidence::Attempt;

    const KILLED: &str = "SIGKILL in an all-reduce";
    const ALL: &str = "SIGKILL of all; three come back";

    fn recovery(generation: u64, cause: &str, source: &str, resumed_at: u64) -> Recovery {
        Recovery {
            cause: cause.to_owned(),
            details: String::new(),
            generation,
            before: 4,
            after: 3,
            detect_ms: 1.0,
            agree_ms: 1.0,
            rebuild_ms: 1.0,
            restore_ms: 1.0,
            first_step_ms: 1.0,
            total_ms: 5.0,
            stall_ms: 5.0,
            steps_lost: 0,
            source: source.to_owned(),
            resumed_at,
            at: Timestamp(generation),
        }
    }

    /// A run in which everything held.
    fn good() -> (Acts, Vec<Recovery>) {
        let act = |title, after_generation| Act { title, at: Timestamp(0), after_generation };
        let acts = Acts {
            acts: vec![act(KILLED, 1), act(ALL, 2)],
            steps_without_coordinator: 90,
            committed_before_the_end: 400,
            killed_inside: Some(Attempt { step: 7, generation: 1 }),
            ..Acts::default()
        };
        let recoveries = vec![
            recovery(1, "start", "initial state", 0),
            recovery(2, KILLED, "memory", 7),
            recovery(3, ALL, "checkpoint of step 400", 400),
        ];
        (acts, recoveries)
    }

    fn complaints(spoil: impl FnOnce(&mut Acts, &mut Vec<Recovery>)) -> Vec<String> {
        let (mut acts, mut recoveries) = good();
        spoil(&mut acts, &mut recoveries);
        complaints_of(&acts, &recoveries, &Evidence::default())
    }

    #[test]
    fn each_promise_of_the_play_that_is_not_kept_is_told() {
        assert_eq!(complaints(|_, _| {}), Vec::<String>::new());
        let told = |part: &str, spoil: &dyn Fn(&mut Acts, &mut Vec<Recovery>)| {
            let complaints = complaints(|acts, recoveries| spoil(acts, recoveries));
            assert!(complaints.iter().any(|complaint| complaint.contains(part)), "{part}: {complaints:?}");
        };
        told("no recovery follows from: SIGKILL in", &|_, recoveries| {
            recoveries.remove(1);
        });
        told("2 generations were spent", &|acts, _| acts.generations_spent_on_coordinator_restart = 2);
        told("stood still while the coordinator", &|acts, _| acts.steps_without_coordinator = 0);
        told("nobody was killed in the middle", &|acts, _| acts.killed_inside = None);
        told("generation 2 lost 3 steps", &|_, recoveries| recoveries[1].steps_lost = 3);
        told("nothing was restored from a checkpoint", &|_, recoveries| {
            recoveries[2].source = "initial state".to_owned();
        });
        told("the checkpoint of step 400 was committed", &|_, recoveries| recoveries[2].resumed_at = 350);
        told("generations do not rise", &|_, recoveries| recoveries[2].generation = 2);
    }

    #[test]
    fn a_step_that_was_finished_without_one_of_its_ranks_is_told() {
        let (acts, recoveries) = good();
        let mut evidence = Evidence::default();
        evidence.add("done 7 1 0 0.5").unwrap();
        let complaints = complaints_of(&acts, &recoveries, &evidence);
        assert!(complaints[0].contains("step 7 was finished although a rank died in it"), "{complaints:?}");
    }
}
