//! One run of one seed: first faults strike and every rule must hold; then nothing fails any more, and all must become
//! well within a bounded time; then what must not disturb a healthy job is tried; and a job with a last step must reach it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use reknit_membership::holding::Source;
use reknit_membership::record::Stage as RecordStage;
use reknit_membership::world::select;
use reknit_membership::{Generation, MemberId, Waiting};
use reknit_trainer::session::Directive;

use crate::coverage::Coverage;
use crate::happening::{Happening, ProcessKey};
use crate::options::Options;
use crate::process::{Held, Link};
use crate::queue::Ms;
use crate::sim::{Sim, Stage, Violation};

/// What became of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// What it was about.
    pub options: Options,
    /// The rule that did not hold, if one did not.
    pub violation: Option<Violation>,
    /// What happened at least once.
    pub coverage: Coverage,
    /// Follows from everything that happened.
    pub digest: u64,
    /// Virtual time that passed.
    pub virtual_ms: Ms,
    /// Things that happened.
    pub events: u64,
    /// The last generation.
    pub generations: u64,
    /// The last step that anybody committed.
    pub steps: u64,
    /// What happened, if it was to be kept.
    pub lines: Vec<String>,
}

/// Runs a seed.
pub fn run(options: Options, keep_trace: bool) -> Report {
    let copy = options.clone();
    let done = catch_unwind(AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without threads or sockets");
        runtime.block_on(tokio::task::unconstrained(live(options, keep_trace)))
    }));
    done.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let what = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let what = what.unwrap_or_else(|| "a panic without words".to_owned());
        Report {
            options: copy,
            violation: Some(Violation { invariant: "no panic", what, at: 0 }),
            coverage: Coverage::default(),
            digest: 0,
            virtual_ms: 0,
            events: 0,
            generations: 0,
            steps: 0,
            lines: Vec::new(),
        }
    })
}

async fn live(options: Options, keep_trace: bool) -> Report {
    let mut sim = Sim::new(options, keep_trace);
    sim.begin();
    let chaos_ms = sim.options.chaos_ms;
    sim.run_until(chaos_ms, |_| false).await;
    if sim.violation.is_none() {
        sim.heal();
        sim.becomes_well("faults ended").await;
    }
    if sim.violation.is_none() && sim.options.calm && !sim.is_job_over() && sim.options.steps.is_none() {
        sim.calm().await;
    }
    if sim.violation.is_none() && sim.options.steps.is_some() {
        sim.reaches_the_end().await;
    }
    Report {
        violation: sim.violation.clone(),
        coverage: sim.coverage.clone(),
        digest: sim.trace.digest,
        virtual_ms: sim.now,
        events: sim.queue.count(),
        generations: sim.store.record().map_or(0, |record| record.generation.0),
        steps: sim.top_step().0,
        lines: std::mem::take(&mut sim.trace.lines),
        options: sim.options,
    }
}

/// Steps that every member must commit in one generation before all counts as well.
const STEPS_TO_BE_WELL: u64 = 3;

impl Sim {
    fn begin(&mut self) {
        self.after(0, Happening::ServerStarts { server: 0 });
        for host in 0..self.options.hosts {
            if host < self.options.started {
                self.within((0, 1_000), Happening::Starts { host });
            } else {
                let chaos = self.options.chaos_ms;
                self.within((0, chaos), Happening::Starts { host });
            }
        }
        self.after(300, Happening::Looks);
        self.begin_faults();
    }

    /// Demands that within a bounded time a world of all healthy members runs, and goes on running.
    pub(crate) async fn becomes_well(&mut self, since: &'static str) {
        let until = self.now + self.options.heal_ms();
        let mut began: Option<(Generation, BTreeMap<ProcessKey, u64>)> = None;
        while self.now < until {
            let pause = (self.options.step_ms() / 2).clamp(20, 500);
            self.run_until(self.now + pause, |_| false).await;
            if self.violation.is_some() {
                return;
            }
            if self.is_job_over() {
                if self.present().next().is_none() {
                    self.coverage.hit("a job is over and everybody knows");
                    return;
                }
                continue;
            }
            let Some(generation) = self.well_in() else {
                began = None;
                continue;
            };
            let commits: BTreeMap<ProcessKey, u64> =
                self.present().map(|(key, p)| (key, p.commits)).collect();
            match &began {
                Some((since, then)) if *since == generation => {
                    let more = |(key, now): (&ProcessKey, &u64)| {
                        let seated = self.processes[*key].running == Some(generation);
                        !seated || then.get(key).is_some_and(|then| now - then >= STEPS_TO_BE_WELL)
                    };
                    if commits.iter().all(more) {
                        self.note_recovery();
                        return;
                    }
                }
                _ => began = Some((generation, commits)),
            }
        }
        if self.is_unrestorable() {
            return;
        }
        let what = self.what_is_wrong();
        self.violated(
            "liveness (L1)",
            format!("{} ms after {since} it is not well: {what}", self.options.heal_ms()),
        );
    }

    /// An older store names checkpoints that were deleted since, and nobody's memory is left.
    fn is_unrestorable(&mut self) -> bool {
        if !self.coverage.counts.contains_key("the store is put back from a backup") {
            return false;
        }
        let waits = self.operator.last_status.as_ref().map(|status| &status.waiting);
        let waits = matches!(
            waits,
            Some(Waiting::Unrestorable { .. } | Waiting::Restored { .. } | Waiting::Ready { .. })
        );
        let lost = waits && self.present().all(|(_, p)| p.held == Held::Torn || p.held.steps_done() == 0);
        if lost {
            self.coverage.hit("a backup was too old to restore from");
        }
        lost
    }

    fn note_recovery(&mut self) {
        let sources: Vec<Source> = self
            .store
            .record()
            .map(|r| r.changes.iter().filter_map(|c| c.source).collect())
            .unwrap_or_default();
        for source in sources {
            self.coverage.hit(match source {
                Source::Memory => "a world resumes from memory",
                Source::Checkpoint { .. } => "a world resumes from a checkpoint",
                Source::AbandonedMemory => "a world resumes from abandoned memory",
                Source::Initial => "a world begins",
            });
        }
    }

    /// The generation in which all is well, if it is.
    pub(crate) fn well_in(&self) -> Option<Generation> {
        let all_there = self.on_host.iter().flatten().filter(|key| self.processes[**key].is_there()).count();
        self.runs_well().filter(|_| all_there == self.options.hosts)
    }

    /// The generation in which all is well for those who are there.
    pub(crate) fn runs_well(&self) -> Option<Generation> {
        let record = self.store.record()?;
        let world = record.world.as_ref()?;
        if record.stage != RecordStage::Running || self.operator_waits() {
            return None;
        }
        let generation = world.generation;
        let fit = self.fitting().unwrap_or_default();
        if world.size().0 != fit || world.generation != record.generation {
            return None;
        }
        let all_run = world.seats.iter().all(|seat| {
            self.by_member(seat.member).is_some_and(|process| {
                let p = &self.processes[process];
                let runs = matches!(p.session.directive(), Directive::Run { .. });
                p.running == Some(generation) && runs && !p.session.boundary_requested()
            })
        });
        let all_attached = self.present().all(|(_, p)| {
            matches!(p.link, Link::Up(stream) if self.is_sound(stream)) && p.session.is_attached()
        });
        (all_run && all_attached).then_some(generation)
    }

    /// How many ranks a world of all who are there has, if there can be one.
    pub(crate) fn fitting(&self) -> Option<u32> {
        let record = self.store.record()?;
        let candidates: Vec<(MemberId, u32)> =
            self.present().map(|(_, p)| (p.member(), self.options.slots[p.host])).collect();
        let chosen = select(&record.spec, &candidates).ok()?;
        Some(candidates.iter().filter(|(member, _)| chosen.contains(member)).map(|(_, slots)| slots).sum())
    }

    pub(crate) fn what_is_wrong(&self) -> String {
        let record = self.store.record();
        let stage = record.map(|r| (r.generation, r.stage, r.spec, r.drains.len()));
        let status = self.operator.last_status.as_ref();
        let waits = status.map(|status| (status.phase, status.waiting.clone(), status.members.len()));
        let mut text = format!("store {stage:?}, status {waits:?}, fitting {:?}", self.fitting());
        for (key, p) in self.present() {
            text += &format!(
                "; {} {:?} in {:?} running {:?} {:?} {:?} {:?}",
                self.who(key),
                p.member(),
                p.generation(),
                p.running,
                p.link,
                p.held,
                p.program
            );
        }
        text.truncate(3_000);
        text
    }

    /// A job that has a last step reaches it, and everybody hears of that.
    async fn reaches_the_end(&mut self) {
        self.stage = Stage::Finish;
        let Some(last) = self.options.steps else { return };
        let left = last.saturating_sub(self.top_step().0) + 10;
        let until = self.now + left * self.options.step_ms() * 2 + self.options.heal_ms() + 60_000;
        self.run_until(until, |sim| sim.is_job_over() && sim.present().next().is_none()).await;
        if self.violation.is_some() {
            return;
        }
        let over = self.is_job_over() && self.present().next().is_none();
        if !over && !self.is_unrestorable() {
            let what = self.what_is_wrong();
            return self.violated("liveness (L1)", format!("the job does not end: {what}"));
        }
        if over {
            self.coverage.hit("a job reaches its last step");
        }
    }
}
