//! An exhaustive walk: every interleaving of a few honest workers, their faults, an operator's wishes, the coordinator's
//! own deaths and the passing of time, up to a budget of each. After every transition the crate's rules are checked
//! against what the workers truly hold; and from every state, once faults stop, the job must run again.
//!
//! | file | what it is |
//! |---|---|
//! | `process.rs` | one honest worker |
//! | `model.rs` | the world around the job, and what follows from what happens |
//! | `choices.rs` | what can happen, and how much of it may |
//! | `ring.rs` | steps and breaks of a ring, of which the coordinator sees nothing |
//! | `rules.rs` | the rules as checks |
//! | `canonical.rs` | one form for states that differ in nothing that matters |
//!
//! Any other walk, for as long as it takes:
//! `REKNIT_WALK='places=4 deaths=2 crashes=1 steps=2' cargo test -p reknit-membership environment -- --nocapture`

mod canonical;
mod choices;
mod model;
mod process;
mod ring;
mod rules;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};

use super::{Job, Phase};
use crate::reason::Waiting;
use crate::spec::Spec;
use crate::world::select;
use choices::{Action, Budget, Crash, Setting};
use model::Model;

/// 128 bits of a state: two lanes that mix differently.
#[derive(Default)]
struct Lanes(u64, u64);

impl Hasher for Lanes {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.1 = (self.1.rotate_left(17) ^ word).wrapping_mul(0xd6e8_feb8_6659_fd93);
        self.1 ^= self.1 >> 32;
    }

    fn write_u8(&mut self, byte: u8) {
        self.write_u64(u64::from(byte));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn fingerprint(model: &Model) -> u128 {
    let mut lanes = Lanes::default();
    model.hash(&mut lanes);
    u128::from(lanes.0 ^ (lanes.0 >> 31)) << 64 | u128::from(lanes.1)
}

/// How a state was reached: from which one, by what.
type Origin = (u32, Action, Crash);

struct Walk {
    setting: Setting,
    seen: BTreeMap<u128, ()>,
    origins: Vec<Option<Origin>>,
    healed: BTreeMap<u128, ()>,
    transitions: u64,
}

impl Walk {
    fn new(setting: Setting) -> Walk {
        Walk { setting, seen: BTreeMap::new(), origins: Vec::new(), healed: BTreeMap::new(), transitions: 0 }
    }

    fn run(&mut self, what: &str) {
        let first = Model::new(&self.setting);
        let mut frontier = VecDeque::from([(0, first.clone())]);
        self.seen.insert(fingerprint(&first), ());
        self.origins.push(None);
        let mut widest = 0;
        while let Some((index, model)) = frontier.pop_front() {
            widest = widest.max(frontier.len());
            self.heal(index, &model);
            if model.saved.generation.0 > self.setting.budget.generations {
                continue;
            }
            for (action, crash) in self.moves(&model) {
                let next = match model.after(action, crash, &self.setting) {
                    Ok(Some(next)) => next,
                    Ok(None) => continue,
                    Err(broken) => self.explain(index, &[(action, crash)], &broken),
                };
                self.transitions += 1;
                if self.seen.insert(fingerprint(&next), ()).is_none() {
                    self.origins.push(Some((index, action, crash)));
                    frontier.push_back((self.origins.len() as u32 - 1, next));
                }
            }
        }
        println!(
            "{what}: {} states, {} transitions, {} states of recovery, widest frontier {widest}",
            self.seen.len(),
            self.transitions,
            self.healed.len()
        );
    }

    fn moves(&self, model: &Model) -> Vec<(Action, Crash)> {
        let mut actions = model.proceedings();
        if actions.is_empty() || model.budget.hurries > 0 {
            actions.push(Action::Advance);
        }
        actions.extend(model.choices(&self.setting));
        let crashes: &[Crash] = match model.budget.crashes {
            0 => &[Crash::None],
            _ => &[Crash::None, Crash::BeforeSave, Crash::AfterSave],
        };
        actions.into_iter().flat_map(|action| crashes.iter().map(move |crash| (action, *crash))).collect()
    }

    /// From here on nothing goes wrong any more, and everything that can proceed does, in a fixed order.
    fn heal(&mut self, index: u32, model: &Model) {
        let mut now = model.clone();
        now.budget = Budget::default();
        let mut path = Vec::new();
        let mut trail = Vec::new();
        loop {
            let mark = fingerprint(&now);
            if self.healed.contains_key(&mark) {
                break;
            }
            trail.push(mark);
            if is_well(&now) {
                break;
            }
            if path.len() > 400 {
                self.explain(index, &path, &format!("it does not heal: {:?}", now.job.waiting()));
            }
            let hung = now.processes.iter().position(|p| p.hung);
            let action = hung.map(Action::Wake).or(now.proceedings().first().copied());
            let action = action.unwrap_or(Action::Advance);
            path.push((action, Crash::None));
            now = match now.after(action, Crash::None, &self.setting) {
                Ok(Some(next)) => next,
                Ok(None) => unreachable!("without a crash something follows"),
                Err(broken) => self.explain(index, &path, &broken),
            };
        }
        self.healed.extend(trail.into_iter().map(|mark| (mark, ())));
    }

    /// Shows the way to a broken rule, and panics.
    fn explain(&self, index: u32, then: &[(Action, Crash)], broken: &str) -> ! {
        let mut path = then.to_vec();
        let mut at = index;
        while let Some((before, action, crash)) = self.origins[at as usize] {
            path.insert(0, (action, crash));
            at = before;
        }
        let mut model = Model::new(&self.setting);
        for (number, (action, crash)) in path.iter().enumerate() {
            println!(
                "{number:3} {action:?} {}",
                if *crash == Crash::None { String::new() } else { format!("{crash:?}") }
            );
            if number >= path.len().saturating_sub(then.len()) {
                model.budget = if then.len() > 1 { Budget::default() } else { model.budget };
            }
            match model.after(*action, *crash, &self.setting) {
                Ok(Some(next)) => model = next,
                Ok(None) => {}
                Err(_) => break,
            }
            println!("      {}", summary(&model));
        }
        panic!("{broken}");
    }
}

fn summary(model: &Model) -> String {
    let job = &model.job;
    let seats: Vec<_> = job.seated().collect();
    let mut text = format!("{:?} {:?} {seats:?} {:?}", job.phase(), job.record.generation, job.waiting());
    for p in model.processes.iter().filter(|p| p.alive || p.stream) {
        let world = p.world.as_ref();
        let halt = world.and_then(|world| world.halt.as_ref());
        text += &format!(
            " | {:?}{}{}{} {:?} go={} {halt:?} {:?} inbox={}",
            p.id,
            if p.alive { "" } else { " dead" },
            if p.hung { " hung" } else { "" },
            if p.stream { "" } else { " alone" },
            p.generation(),
            world.is_some_and(|world| world.go),
            p.held,
            p.inbox.len()
        );
    }
    text
}

/// Whether the job runs undisturbed, is over, or has a good reason not to run.
fn is_well(model: &Model) -> bool {
    let job: &Job = &model.job;
    if !model.is_quiet() {
        return false;
    }
    // Everybody who lives has a stream by now, so these are all who could be in a world.
    let chosen = select(&job.record.spec, &job.candidates()).ok();
    let runs = |member| model.processes.iter().any(|p| p.id == member && p.runs(job.record.generation));
    match (&job.phase, job.waiting()) {
        (Phase::Closed(_), _) => true,
        (Phase::Running(_), Waiting::Nothing) => {
            // Whoever has a place runs, and whoever could have one has one; a world that has become smaller than the
            // bounds allow runs on.
            job.seated().all(runs) && chosen.is_none_or(|chosen| chosen.into_iter().eq(job.seated()))
        }
        (Phase::Forming(_), Waiting::BelowMin { .. } | Waiting::UnitRemainder { .. }) => chosen.is_none(),
        (Phase::Forming(_), Waiting::Unrestorable { .. }) => {
            let torn = |p: &process::Process| !p.alive || p.held == process::Held::Torn;
            model.processes.iter().all(torn) && job.record.commits.is_empty()
        }
        (Phase::Forming(_) | Phase::Establishing(_) | Phase::Restoring(_) | Phase::Running(_), _) => false,
    }
}

const SPEC: Spec = Spec { min: 1, max: 3, unit: 1, keep: 2 };

const SETTING: Setting = Setting {
    spec: SPEC,
    places: 3,
    started: 3,
    strangers: false,
    late: false,
    wide: false,
    resize_to: (1, 2),
    last_step: None,
    budget: Budget {
        deaths: 0,
        starts: 0,
        blips: 0,
        hangs: 0,
        lags: 0,
        links: 0,
        crashes: 0,
        backups: 0,
        rollbacks: 0,
        fails: 0,
        leaves: 0,
        notices: 0,
        drains: 0,
        evictions: 0,
        undrains: 0,
        resizes: 0,
        saves: 0,
        steps: 1,
        hurries: 0,
        generations: 4,
    },
};

/// `deaths=2 crashes=1 places=4 min=2`: a setting as the environment spells it.
fn spelled(text: &str) -> Setting {
    let mut setting = SETTING;
    for word in text.split_whitespace() {
        let (key, value) = word.split_once('=').expect("key=value");
        let value: u8 = value.parse().expect("a small number");
        let budget = &mut setting.budget;
        match key {
            "places" => setting.places = usize::from(value),
            "started" => setting.started = usize::from(value),
            "strangers" => setting.strangers = value > 0,
            "late" => setting.late = value > 0,
            "wide" => setting.wide = value > 0,
            "min" => setting.spec.min = u32::from(value),
            "max" => setting.spec.max = u32::from(value),
            "unit" => setting.spec.unit = u32::from(value),
            "to_min" => setting.resize_to.0 = u32::from(value),
            "to_max" => setting.resize_to.1 = u32::from(value),
            "last_step" => setting.last_step = Some(u64::from(value)),
            "deaths" => budget.deaths = value,
            "starts" => budget.starts = value,
            "blips" => budget.blips = value,
            "hangs" => budget.hangs = value,
            "lags" => budget.lags = value,
            "links" => budget.links = value,
            "crashes" => budget.crashes = value,
            "backups" => budget.backups = value,
            "rollbacks" => budget.rollbacks = value,
            "fails" => budget.fails = value,
            "leaves" => budget.leaves = value,
            "notices" => budget.notices = value,
            "drains" => budget.drains = value,
            "undrains" => budget.undrains = value,
            "evictions" => budget.evictions = value,
            "resizes" => budget.resizes = value,
            "saves" => budget.saves = value,
            "steps" => budget.steps = value,
            "hurries" => budget.hurries = value,
            "generations" => budget.generations = u64::from(value),
            _ => panic!("no such budget: {key}"),
        }
    }
    setting
}

fn walk(settings: &[&str]) {
    for setting in settings {
        Walk::new(spelled(setting)).run(setting);
    }
}

#[test]
fn a_walk_that_the_environment_asks_for() {
    if let Ok(setting) = std::env::var("REKNIT_WALK") {
        walk(&[&setting]);
    }
}

#[test]
fn three_members_die_and_come_back() {
    walk(&["deaths=2", "deaths=1 starts=1", "min=2 deaths=1 starts=1", "last_step=1 deaths=1 starts=1"]);
}

/// Rule M-16.
#[test]
fn three_members_ask_for_a_world_late() {
    walk(&["late=1 deaths=1", "late=1 blips=1", "late=1 crashes=1", "late=1 min=2 starts=1 deaths=1"]);
}

#[test]
fn three_members_lose_their_streams_or_are_slow() {
    walk(&["blips=1 deaths=1", "lags=1 deaths=1", "hurries=1 deaths=1"]);
}

#[test]
fn three_members_fall_silent_or_cannot_reach_each_other() {
    walk(&["hangs=1 steps=2", "places=2 started=2 hangs=1 steps=3", "links=3 generations=6"]);
}

#[test]
fn three_members_outlive_their_coordinator() {
    walk(&[
        "crashes=2",
        "crashes=1 deaths=1",
        "crashes=1 blips=1",
        "places=2 started=2 hangs=1 crashes=1 steps=3",
    ]);
}

#[test]
fn three_members_outlive_a_store_that_is_put_back() {
    walk(&["rollbacks=1", "rollbacks=1 backups=1"]);
}

#[test]
fn three_members_are_drained_and_evicted_and_their_bounds_change() {
    walk(&[
        "drains=1 deaths=1",
        "drains=1 crashes=1",
        "drains=1 undrains=1 min=3",
        "resizes=1 deaths=1",
        "resizes=1 crashes=1",
        "evictions=1 crashes=1 starts=1",
        "notices=1 min=2 deaths=1",
    ]);
}

#[test]
fn three_members_restore_and_save_and_fail_to() {
    walk(&[
        "fails=2 deaths=1 starts=1",
        "fails=1 crashes=1 strangers=1 steps=0",
        "saves=1 deaths=1",
        "saves=1 crashes=1",
        "places=2 started=2 saves=1 fails=2 deaths=1 starts=1",
    ]);
}

#[test]
fn three_members_leave_or_bring_several_ranks() {
    walk(&["leaves=1 deaths=1", "leaves=1 crashes=1", "wide=1 max=4 deaths=1 starts=1"]);
}

#[test]
fn four_members_die() {
    walk(&["places=4 started=4 max=4 deaths=1"]);
}

#[test]
fn four_members_of_which_one_joins_later_or_leaves_as_planned() {
    walk(&[
        "places=4 started=3 max=4 min=2 starts=1",
        "places=4 started=4 max=4 min=3 starts=1 deaths=1 steps=0",
        "places=4 started=4 max=4 late=1 steps=0",
        "places=4 started=4 max=4 drains=1",
        "places=4 started=4 max=4 notices=1 min=3",
        "places=4 started=4 max=4 evictions=1 starts=1",
        "places=4 started=4 max=4 resizes=1",
    ]);
}

#[test]
fn four_members_lose_each_other_or_their_coordinator_and_save() {
    walk(&[
        "places=4 started=4 max=4 blips=1",
        "places=4 started=4 max=4 links=2",
        "places=4 started=4 max=4 crashes=1",
        "places=4 started=4 max=4 saves=1",
    ]);
}

#[test]
fn four_members_of_which_two_or_three_run() {
    walk(&["places=4 started=4 max=4 unit=2 deaths=1", "places=4 started=4 max=3 deaths=1"]);
}
