//! What must not disturb a healthy job, and what may disturb it only once. A few trials of each kind, when all is well.

use std::collections::BTreeMap;

use reknit_membership::Generation;
use reknit_membership::event::Operation;

use crate::happening::{Happening, ProcessKey};
use crate::invariants::Seen;
use crate::process::Link;
use crate::queue::Ms;
use crate::sim::{Sim, Stage};

/// One trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trial {
    /// A stream breaks; its member comes back at once.
    Break,
    /// The coordinator dies, and another one takes over.
    Restart,
    /// A member that has no place dies, and comes back.
    Spare,
    /// A member is killed.
    Death,
    /// Several members are drained at once, and come back at once.
    Burst,
    /// The store is away for a while.
    Outage,
}

const TRIALS: [Trial; 6] =
    [Trial::Break, Trial::Restart, Trial::Spare, Trial::Death, Trial::Burst, Trial::Outage];

impl Sim {
    pub(crate) async fn calm(&mut self) {
        self.stage = Stage::Calm;
        if self.has_flipped {
            // A checkpoint may find out at any time.
            return;
        }
        for _ in 0..4 {
            if self.well_in().is_none() {
                // A job that cannot be restored is no healthy one.
                return;
            }
            let Some(trial) = self.rng.pick(&TRIALS) else { return };
            self.log(140, trial as u64, |_| format!("all is well; trial: {trial:?}"));
            match trial {
                Trial::Break => self.tries_a_break().await,
                Trial::Restart => self.tries_a_restart().await,
                Trial::Spare => self.tries_a_spare().await,
                Trial::Death => self.tries_a_death().await,
                Trial::Burst => self.tries_a_burst().await,
                Trial::Outage => self.tries_an_outage().await,
            }
            if self.violation.is_none() {
                self.hold_starts = false;
                self.becomes_well("a trial").await;
            }
            if self.violation.is_some() {
                return;
            }
        }
    }

    fn generation(&self) -> Generation {
        self.store.record().map(|record| record.generation).unwrap_or_default()
    }

    async fn passes(&mut self, wait: Ms) {
        self.run_until(self.now + wait, |_| false).await;
    }

    /// Lets some time pass and demands that the world stays as it is.
    async fn stays(&mut self, what: &'static str, before: Generation) {
        let t = self.options.timing;
        let wait = t.takeover + t.silence * 2 + t.merge_max + t.last_call;
        self.passes(wait.as_millis() as Ms + 500).await;
        let after = self.generation();
        self.coverage.hit(what);
        self.seen(&Seen::Undisturbed { what, before, after });
    }

    async fn tries_a_break(&mut self) {
        let before = self.generation();
        let up: Vec<usize> = self
            .present()
            .filter_map(|(_, p)| match p.link {
                Link::Up(stream) => Some(stream),
                Link::Pauses | Link::Calls(_) | Link::Parts(_) | Link::Over => None,
            })
            .collect();
        if self.comes_back_in_time()
            && let Some(stream) = self.rng.pick(&up)
        {
            self.stream_resets(stream);
            self.stays("a stream's end in peace", before).await;
        }
    }

    /// Whether a member whose stream ends is back before anybody would give it up: alone in its world it is waited for
    /// only as long as others are while the world waits.
    fn comes_back_in_time(&self) -> bool {
        let back = 4 * self.options.control_ms.1 + 60;
        back < self.options.timing.reattach.as_millis() as Ms
    }

    async fn tries_a_restart(&mut self) {
        let before = self.generation();
        let Some(server) = self.servers.iter().find(|server| server.up).map(|server| server.number) else {
            return;
        };
        let back = 4 * self.options.control_ms.1 + 600;
        if back > self.options.timing.takeover.as_millis() as Ms {
            return;
        }
        self.server_crashes(server, false);
        let wait = self.rng.within((1, 5_000));
        self.after(wait, Happening::ServerStarts { server });
        self.passes(wait).await;
        self.stays("a coordinator's death in peace", before).await;
    }

    async fn tries_an_outage(&mut self) {
        if self.options.window < 100 && !self.comes_back_in_time() {
            // What was held up comes at once when the store is back: a slow reader may be cut off.
            return;
        }
        let before = self.generation();
        let length = self.rng.within((100, 20_000));
        self.store_outage(length);
        self.passes(length).await;
        self.stays("a store's absence in peace", before).await;
    }

    fn seated(&self) -> Vec<ProcessKey> {
        let generation = self.generation();
        self.present().filter(|(_, p)| p.running == Some(generation)).map(|(key, _)| key).collect()
    }

    async fn tries_a_spare(&mut self) {
        let before = self.generation();
        let seated = self.seated();
        let spares: Vec<ProcessKey> =
            self.present().map(|(key, _)| key).filter(|key| !seated.contains(key)).collect();
        if let Some(spare) = self.rng.pick(&spares) {
            self.dies(spare, false);
            self.stays("a spare's death and return in peace", before).await;
        }
    }

    async fn tries_a_death(&mut self) {
        let seated = self.seated();
        let Some(victim) = self.rng.pick(&seated) else { return };
        let settle = self.options.timing.settle.as_millis() as Ms;
        if self.options.control_ms.1 + self.options.data_ms.1 * 2 >= settle {
            // The end of its stream would not arrive while it is waited for: a world is formed with it in vain.
            return;
        }
        self.hold_starts = true;
        let commits: BTreeMap<ProcessKey, u64> =
            seated.iter().map(|key| (*key, self.processes[*key].commits)).collect();
        let before = self.generation();
        self.dies(victim, false);
        if self.fitting().is_none() || seated.len() < 2 {
            // Nobody can go on before it is back.
            return;
        }
        let (began, allowed) = (self.now, self.death_may_cost());
        let goes_on = |sim: &Sim| {
            let generation = sim.generation();
            let committed = |(key, p): (ProcessKey, &crate::process::Process)| {
                p.running == Some(generation) && Some(&p.commits) > commits.get(&key)
            };
            generation > before && sim.present().any(committed)
        };
        self.run_until(began + allowed * 4, goes_on).await;
        let took = self.now - began;
        self.coverage.hit("a death in peace");
        self.seen(&Seen::Recovered { took, allowed });
        let generations = self.generation().0 - before.0;
        self.seen(&Seen::Burst { changes: 1, generations });
    }

    /// From a death to the next committed step: no time-out of silence is in it, for the survivors' connections tell. A
    /// program that computes is waited for, and state that has to be moved is moved.
    fn death_may_cost(&self) -> Ms {
        let o = &self.options;
        let settle = o.timing.settle.as_millis() as Ms;
        8 * o.control_ms.1
            + 8 * o.store_ms.1
            + 8 * o.data_ms.1
            + settle
            + 3 * o.step_ms()
            + o.transfer_ms.1
            + 500
    }

    async fn tries_a_burst(&mut self) {
        let window = self.options.timing.merge_quiet.as_millis() as Ms;
        if 4 * self.options.control_ms.1 + 80 > window || self.options.inbound < self.options.hosts * 4 {
            // Requests of one instant would not arrive, or not be let in, within one window.
            return;
        }
        let mut leaving = self.seated();
        let Some(record) = self.store.record() else { return };
        let (min, before) = (record.spec.min, self.generation());
        while leaving.len() > 1 && self.rng.chance(600) {
            let at = self.rng.below(leaving.len() as u64) as usize;
            leaving.remove(at);
        }
        let ranks = |sim: &Sim, keys: &[ProcessKey]| -> u32 {
            keys.iter().map(|key| sim.options.slots[sim.processes[*key].host]).sum()
        };
        let all: Vec<ProcessKey> = self.present().map(|(key, _)| key).collect();
        if ranks(self, &all) < ranks(self, &leaving) + min + self.options.spec.unit {
            return;
        }
        self.hold_starts = true;
        let changes = leaving.len() as u64;
        for process in &leaving {
            let name = self.processes[*process].name.clone();
            self.asks(Operation::Drain { name }, true);
        }
        let until = self.now + self.options.heal_ms();
        let gone = |sim: &Sim| {
            leaving.iter().all(|key| !sim.processes[*key].is_there()) && sim.runs_well().is_some()
        };
        self.run_until(until, gone).await;
        if self.violation.is_some() {
            return;
        }
        let generations = self.generation().0 - before.0;
        self.coverage.hit("a burst of drains in peace");
        self.seen(&Seen::Burst { changes, generations });
        let before = self.generation();
        self.hold_starts = false;
        let hosts: Vec<usize> = leaving.iter().map(|key| self.processes[*key].host).collect();
        for host in hosts {
            self.within((0, 20), Happening::Starts { host });
        }
        self.becomes_well("a burst of drains").await;
        let generations = self.generation().0 - before.0;
        self.coverage.hit("a burst of joins in peace");
        self.seen(&Seen::Burst { changes, generations });
    }
}
