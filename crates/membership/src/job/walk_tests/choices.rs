//! What can happen in the world around a job, and how much of it may.

use super::model::Model;
use super::process::Process;
use crate::ids::{Generation, Step};
use crate::spec::Spec;

/// How much of each kind may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Budget {
    pub(super) deaths: u8,
    pub(super) starts: u8,
    pub(super) blips: u8,
    pub(super) hangs: u8,
    /// Times at which a process is slow to take in what it is told.
    pub(super) lags: u8,
    pub(super) links: u8,
    pub(super) crashes: u8,
    /// Times at which the store is backed up, and put back from the backup.
    pub(super) backups: u8,
    pub(super) rollbacks: u8,
    pub(super) fails: u8,
    pub(super) leaves: u8,
    pub(super) notices: u8,
    pub(super) drains: u8,
    pub(super) evictions: u8,
    pub(super) undrains: u8,
    pub(super) resizes: u8,
    pub(super) saves: u8,
    pub(super) steps: u8,
    /// Times at which somebody is too slow for a deadline.
    pub(super) hurries: u8,
    pub(super) generations: u64,
}

/// What one walk is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) spec: Spec,
    pub(super) places: usize,
    /// How many places have a process from the beginning.
    pub(super) started: usize,
    /// Whether every process starts from a state of its own.
    pub(super) strangers: bool,
    /// Whether programs do something else before they ask for a world.
    pub(super) late: bool,
    /// Whether the first place brings two ranks.
    pub(super) wide: bool,
    pub(super) resize_to: (u32, u32),
    /// The job is over at this step.
    pub(super) last_step: Option<u64>,
    pub(super) budget: Budget,
}

/// Something that can happen. The number is a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Start(usize),
    Attach(usize),
    Deliver(usize),
    Say(usize),
    Ask(usize),
    StreamEnds(usize),
    GhostEnds(usize),
    Notice(usize),
    Begin(usize),
    Restore(usize),
    RestoreFails(usize, Fault),
    Commit(usize),
    Stop(Generation),
    Save(Generation),
    SeesBreak(usize),
    LinkBreaks(usize),
    Die(usize),
    Leave(usize),
    Hang(usize),
    Lag(usize),
    Wake(usize),
    Drain(usize),
    Undrain(usize),
    Evict(usize),
    Resize,
    BackUp,
    PutBack,
    Advance,
}

/// What goes wrong with a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Source,
    Own,
}

/// Whether the coordinator dies of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    None,
    BeforeSave,
    AfterSave,
}

/// The most ids one place may use.
const INCARNATIONS_MAX: u8 = 14;

impl Model {
    /// What can happen next, by itself: no fault, no wish.
    pub(super) fn proceedings(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        for (place, p) in self.processes.iter().enumerate() {
            if p.ghost.is_some() {
                actions.push(Action::GhostEnds(place));
            }
            if !p.alive && p.stream {
                actions.push(Action::StreamEnds(place));
            }
            if !p.acts() {
                continue;
            }
            if !p.inbox.is_empty() {
                actions.push(Action::Deliver(place));
            }
            if !p.stream && p.incarnations < INCARNATIONS_MAX {
                actions.push(Action::Attach(place));
            }
            if !p.available {
                actions.push(Action::Ask(place));
            }
            if p.stream && p.word().is_some() {
                actions.push(Action::Say(place));
            }
            match p.planned() {
                Some(planned) if !planned.begun => actions.push(Action::Begin(place)),
                Some(_) => actions.push(Action::Restore(place)),
                None => {}
            }
            if self.sees_break(p).is_some() {
                actions.push(Action::SeesBreak(place));
            }
        }
        let generation = self.saved.generation;
        if let Some(places) = self.even_ring(generation) {
            if self.stop_requested(&places) {
                actions.push(Action::Stop(generation));
            }
        } else if self.ring(generation).is_some() {
            actions.extend(self.committers(generation).into_iter().map(Action::Commit));
        }
        actions
    }

    /// Faults, wishes and the next step, as far as the budget goes.
    pub(super) fn choices(&self, setting: &Setting) -> Vec<Action> {
        let b = &self.budget;
        let mut actions = Vec::new();
        let any =
            |left: u8, action: fn(usize) -> Action, may: &dyn Fn(&Process) -> bool, out: &mut Vec<Action>| {
                if left > 0 {
                    let places = self.processes.iter().enumerate().filter(|(_, p)| may(p));
                    out.extend(places.map(|(place, _)| action(place)));
                }
            };
        any(b.starts, Action::Start, &|p| !p.alive && !p.over && p.ghost.is_none(), &mut actions);
        any(b.deaths, Action::Die, &|p| p.alive, &mut actions);
        any(b.blips, Action::StreamEnds, &|p| p.alive && p.stream, &mut actions);
        any(b.hangs, Action::Hang, &|p| p.acts(), &mut actions);
        any(b.lags, Action::Lag, &|p| p.acts() && p.stream && !p.lags, &mut actions);
        any(1, Action::Wake, &|p| p.hung, &mut actions);
        any(b.leaves, Action::Leave, &|p| p.acts() && p.stream, &mut actions);
        any(b.notices, Action::Notice, &|p| p.acts() && p.stream && p.notice.is_none(), &mut actions);
        let member = |p: &Process| self.job.members.contains_key(&p.id);
        any(b.drains, Action::Drain, &|p| member(p), &mut actions);
        any(b.undrains, Action::Undrain, &|p| self.saved.drains.contains_key(&p.id), &mut actions);
        any(b.evictions, Action::Evict, &|p| member(p), &mut actions);
        let source = Action::RestoreFails as fn(usize, Fault) -> Action;
        for (place, p) in self.processes.iter().enumerate() {
            if b.fails > 0 && p.acts() && p.planned().is_some_and(|planned| planned.begun) {
                let fetches = p.planned().is_some_and(|planned| !planned.plan.fetch.is_empty());
                actions.extend(fetches.then(|| source(place, Fault::Source)));
                actions.push(source(place, Fault::Own));
            }
        }
        actions.extend((b.resizes > 0).then_some(Action::Resize));
        actions.extend((b.backups > 0).then_some(Action::BackUp));
        actions.extend((b.rollbacks > 0 && self.kept != self.saved).then_some(Action::PutBack));
        let generation = self.saved.generation;
        if let Some(places) = self.even_ring(generation) {
            if b.links > 0 && places.len() > 1 {
                actions.extend(places.iter().copied().map(Action::LinkBreaks));
            }
            if b.saves > 0
                && !places.iter().any(|p| self.processes[*p].saves.iter().any(|s| s.generation == generation))
            {
                actions.push(Action::Save(generation));
            }
            let step = self.step_of(&self.processes[places[0]]).unwrap_or_default();
            if b.steps > 0 && setting.last_step.is_none_or(|last| step < Step(last)) {
                actions.extend(places.into_iter().map(Action::Commit));
            }
        }
        actions
    }

    /// Whether time passes without anybody being late.
    pub(super) fn is_quiet(&self) -> bool {
        self.proceedings().is_empty()
    }
}
