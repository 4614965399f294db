//! The store: one value, replaced by compare-and-swap, with everything that can go wrong between a coordinator and it.
//!
//! [`SimStore`] is what the driver holds; it only hands requests over. The simulation decides what becomes of each: a
//! request may be carried out although whoever asked is dead by then, and may be answered or not.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use reknit_coordinator::store::{Pending, Revision, Saved, Store, StoreError};
use reknit_membership::{Generation, JobId, JobRecord};
use tokio::sync::oneshot;

use crate::happening::Happening;
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::queue::Ms;
use crate::sim::{Sim, Stage};

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

/// What a driver asks for.
pub(crate) enum Asked {
    Save { expected: Revision, value: Vec<u8>, reply: Reply<Revision> },
    Load { reply: Reply<Option<Saved>> },
}

/// Who asked for it.
struct Request {
    server: usize,
    life: u32,
    asked: Asked,
}

type Requests = Arc<Mutex<Vec<Request>>>;

/// A coordinator's end of the store.
pub(crate) struct SimStore {
    server: usize,
    life: u32,
    requests: Requests,
}

impl SimStore {
    fn ask<T: Send + 'static>(&self, asked: impl FnOnce(Reply<T>) -> Asked) -> Pending<'_, T> {
        let (reply, answer) = oneshot::channel();
        let request = Request { server: self.server, life: self.life, asked: asked(reply) };
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        Box::pin(async move { answer.await.unwrap_or_else(|_| Err(unavailable())) })
    }
}

impl Store for SimStore {
    fn describe(&self) -> String {
        "simulated".to_owned()
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn load(&self, _job: &JobId) -> Pending<'_, Option<Saved>> {
        self.ask(|reply| Asked::Load { reply })
    }

    fn save(&self, _job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        self.ask(|reply| Asked::Save { expected, value, reply })
    }

    fn remove(&self, _job: &JobId, _expected: Revision) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Err(unavailable())))
    }
}

fn unavailable() -> StoreError {
    StoreError::Unavailable("the simulation says so".into())
}

/// A save or load on its way.
struct Underway {
    server: usize,
    life: u32,
    asked: Asked,
    /// What it will be answered with; decided when it is carried out.
    result: Option<Result<Revision, StoreError>>,
    then: Then,
}

/// What happens when a save is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Answer,
    LoseAnswer,
    Crash,
    CrashTelling,
}

/// The simulation's end.
#[derive(Default)]
pub(crate) struct StoreSide {
    requests: Requests,
    current: Option<(Saved, Rc<JobRecord>)>,
    last_revision: u64,
    underway: BTreeMap<u64, Underway>,
    numbers: u64,
    pub(crate) outage: bool,
    /// Which coordinator leads, in which of its lives.
    pub(crate) leader: Option<(usize, u32)>,
    /// Whether a backup was ever put back.
    rolled_back: bool,
    /// The roster of every generation that was ever published.
    rosters: BTreeMap<Generation, u64>,
    /// What it held before, oldest first, for a backup to be put back.
    before: Vec<(Saved, Rc<JobRecord>)>,
}

/// How many old values are kept.
const BEFORE_MAX: usize = 24;

impl StoreSide {
    pub(crate) fn end(&self, server: usize, life: u32) -> Arc<SimStore> {
        Arc::new(SimStore { server, life, requests: Arc::clone(&self.requests) })
    }

    pub(crate) fn record(&self) -> Option<&Rc<JobRecord>> {
        self.current.as_ref().map(|(_, record)| record)
    }

    pub(crate) fn saved(&self) -> Option<&Saved> {
        self.current.as_ref().map(|(saved, _)| saved)
    }
}

impl Sim {
    /// Takes what drivers have asked for, and decides what becomes of it.
    pub(crate) fn take_requests(&mut self) {
        let requests = {
            let mut requests = self.store.requests.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *requests)
        };
        for Request { server, life, asked } in requests {
            match asked {
                Asked::Save { expected, value, reply } => {
                    self.asked_to_save(server, life, expected, value, reply)
                }
                Asked::Load { reply } => {
                    let underway = Underway {
                        server,
                        life,
                        asked: Asked::Load { reply },
                        result: None,
                        then: Then::Answer,
                    };
                    let wait = self.rng.within(self.options.store_ms);
                    let request = self.underway(underway);
                    self.after(wait, Happening::StoreAnswers { request });
                }
            }
        }
    }

    fn underway(&mut self, underway: Underway) -> u64 {
        self.store.numbers += 1;
        self.store.underway.insert(self.store.numbers, underway);
        self.store.numbers
    }

    fn asked_to_save(
        &mut self,
        server: usize,
        life: u32,
        expected: Revision,
        value: Vec<u8>,
        reply: Reply<Revision>,
    ) {
        self.coverage.hit("save");
        if let Some(mutant) = self.options.mutant
            && self.stage == Stage::Chaos
            && self.saves_falsely(mutant, server, life, expected, &value)
        {
            let _ = reply.send(Ok(Revision(expected.0 + 1)));
            self.stirred = true;
            return;
        }
        let faults = self.options.faults.clone();
        let chaos = self.stage == Stage::Chaos;
        let strikes = |sim: &mut Sim, share: u32| chaos && sim.rng.chance(share);
        let mut took = self.rng.within(self.options.store_ms);
        if self.store.outage || strikes(self, faults.save_fails) {
            self.coverage.hit("a save fails");
            let result = Some(Err(unavailable()));
            let asked = Asked::Save { expected, value, reply };
            let request = self.underway(Underway { server, life, asked, result, then: Then::Answer });
            return self.after(took, Happening::StoreAnswers { request });
        }
        if strikes(self, faults.crash_before_save) {
            self.coverage.hit("the coordinator dies before a save");
            self.trace_save(server, "dies before a save");
            return self.server_crashes(server, true);
        }
        let mut then = Then::Answer;
        if strikes(self, faults.crash_after_save) {
            self.coverage.hit("the coordinator dies after a save, before it knows");
            then = Then::Crash;
        } else if strikes(self, faults.crash_telling) {
            self.coverage.hit("the coordinator dies between save and tell");
            then = Then::CrashTelling;
        } else if strikes(self, faults.reply_lost) {
            self.coverage.hit("a save's answer is lost");
            then = Then::LoseAnswer;
        }
        let late = strikes(self, faults.save_late);
        if strikes(self, faults.save_slow) || late {
            took += self.rng.within((50, 2_500));
        }
        let asked = if late {
            // Whoever asked hears that it failed, long before it is carried out.
            self.coverage.hit("a save is carried out late");
            let _ = reply.send(Err(unavailable()));
            self.stirred = true;
            let (lost, _) = oneshot::channel();
            Asked::Save { expected, value, reply: lost }
        } else {
            Asked::Save { expected, value, reply }
        };
        let request = self.underway(Underway { server, life, asked, result: None, then });
        self.after(took, Happening::StoreWrites { request });
    }

    /// What a mutant does instead of saving. Returns whether the save is to be answered at once.
    fn saves_falsely(
        &mut self,
        mutant: Mutant,
        server: usize,
        life: u32,
        expected: Revision,
        value: &[u8],
    ) -> bool {
        match mutant {
            Mutant::AckWithoutWriting => self.rng.chance(250),
            Mutant::TellBeforeSaving => {
                let (reply, _) = oneshot::channel();
                let asked = Asked::Save { expected, value: value.to_vec(), reply };
                let then = Then::Answer;
                let request = self.underway(Underway { server, life, asked, result: None, then });
                self.within((20, 200), Happening::StoreWrites { request });
                true
            }
            _ => false,
        }
    }

    /// A save is carried out, whoever may still wait for it.
    pub(crate) fn store_writes(&mut self, request: u64) {
        let Some(mut underway) = self.store.underway.remove(&request) else { return };
        let Asked::Save { expected, value, .. } = &mut underway.asked else { return };
        let (server, life, then) = (underway.server, underway.life, underway.then);
        let current = self.store.saved().map(|saved| saved.revision).unwrap_or_default();
        let result = if !self.leads(server, life) {
            // Its lease was ended while it was stopped, or is taken for dead.
            self.coverage.hit("a coordinator that does not lead any more saves nothing");
            self.seen(&Seen::Forgot { server });
            Err(StoreError::NotLeader)
        } else if current == *expected {
            let value = std::mem::take(value);
            Ok(self.store_applies(server, life, value))
        } else {
            self.coverage.hit("a save conflicts");
            self.seen(&Seen::Forgot { server });
            Err(StoreError::Conflict)
        };
        let asker_lives = self.servers[server].life == life;
        match then {
            Then::Crash if asker_lives => {
                self.trace_save(server, "dies after a save, before it knows");
                return self.server_crashes(server, true);
            }
            Then::Crash | Then::CrashTelling | Then::Answer | Then::LoseAnswer => {}
        }
        let result = if then == Then::LoseAnswer { Err(unavailable()) } else { result };
        underway.result = Some(result);
        let wait = self.rng.within(self.options.store_ms);
        self.store.underway.insert(request, underway);
        self.after(wait, Happening::StoreAnswers { request });
    }

    /// Whether the store takes what this coordinator saves: without a leader, it goes by the revision alone.
    pub(crate) fn leads(&self, server: usize, life: u32) -> bool {
        !self.options.fenced || self.servers.len() == 1 || self.store.leader == Some((server, life))
    }

    fn store_applies(&mut self, server: usize, life: u32, value: Vec<u8>) -> Revision {
        let decoded = reknit_proto::record::decode(&value);
        let (record, secret) = decoded.expect("a coordinator writes what it can read");
        let again = reknit_proto::record::decode(&reknit_proto::record::encode(&record, &secret));
        assert_eq!(again.as_ref(), Ok(&(record.clone(), secret)), "a record reads as it was written");
        self.store.last_revision += 1;
        let revision = Revision(self.store.last_revision);
        let record = Rc::new(record);
        let before = self.store.current.replace((Saved { revision, value }, Rc::clone(&record)));
        let old = before.as_ref().map(|(_, record)| Rc::clone(record));
        if let Some(before) = before {
            if self.store.before.len() == BEFORE_MAX {
                self.store.before.remove(0);
            }
            self.store.before.push(before);
        }
        self.log(10, revision.0, |_| {
            let world = record.world.as_ref().map(|world| {
                let seats: Vec<_> = world.seats.iter().map(|seat| seat.name.as_str().to_owned()).collect();
                (world.generation, seats)
            });
            let (stage, resume, source) = (record.stage, record.resume, record.source);
            let kept: Vec<_> = record.commits.iter().map(|commit| commit.key()).collect();
            let causes = record.changes.back().map(|change| change.causes.clone());
            format!(
                "store: r{} by c{server}: {:?} {stage:?} {world:?} {resume:?} {source:?} commits {kept:?} drains {:?} \
                 departed {:?} for {causes:?}",
                revision.0, record.generation, record.drains, record.departed.iter().rev().take(3).collect::<Vec<_>>()
            )
        });
        self.notes_fork(&record);
        let by_ghost = self.servers[server].life != life || !self.servers[server].up;
        self.seen(&Seen::Stored { server, by_ghost, before: old.as_deref(), after: &record });
        revision
    }

    /// A generation's number is given to another world than before: see [`Sim::has_forked`].
    fn notes_fork(&mut self, record: &JobRecord) {
        let Some(world) = &record.world else { return };
        let roster = world.roster_digest();
        let known = *self.store.rosters.entry(world.generation).or_insert(roster);
        if known != roster && self.store.rolled_back {
            self.store.rosters.insert(world.generation, roster);
            self.coverage.hit("a generation's number is used again after a backup");
            self.has_forked = true;
        }
    }

    /// The store's answer arrives, if whoever asked still lives.
    pub(crate) fn store_answers(&mut self, request: u64) {
        let Some(underway) = self.store.underway.remove(&request) else { return };
        match underway.asked {
            Asked::Save { reply, .. } => {
                let server = &mut self.servers[underway.server];
                server.dies_telling = underway.then == Then::CrashTelling && server.life == underway.life;
                // A coordinator that is dead hears nothing.
                let _ = reply.send(underway.result.unwrap_or_else(|| Err(unavailable())));
            }
            Asked::Load { reply } => {
                let found =
                    if self.store.outage { Err(unavailable()) } else { Ok(self.store.saved().cloned()) };
                let _ = reply.send(found);
            }
        }
        self.stirred = true;
    }

    pub(crate) fn store_outage(&mut self, length: Ms) {
        self.coverage.hit("the store is away");
        self.store.outage = true;
        self.after(length, Happening::StoreReturns);
    }

    pub(crate) fn store_returns(&mut self) {
        self.store.outage = false;
    }

    /// Puts an older value back, as an operator does with a backup. Its revisions are used again.
    pub(crate) fn store_rolls_back(&mut self) -> bool {
        let count = self.store.before.len() as u64;
        if count == 0 {
            return false;
        }
        let keep = self.rng.below(count) as usize;
        self.store.before.truncate(keep + 1);
        let older = self.store.before.pop().expect("there is one more than are kept");
        self.store.last_revision = older.0.revision.0;
        self.store.rolled_back = true;
        // What was on its way to the store that is gone does not reach this one.
        self.store.underway.clear();
        let record = Rc::clone(&older.1);
        self.store.current = Some(older);
        self.log(11, self.store.last_revision, |_| {
            format!("store: a backup is put back: {:?}", record.generation)
        });
        self.coverage.hit("the store is put back from a backup");
        self.seen(&Seen::RolledBack { found: &record });
        true
    }

    /// Loses the last value, for a mutant: nobody is told that the store is an older one.
    pub(crate) fn store_forgets_the_last(&mut self) {
        if let Some(older) = self.store.before.pop() {
            self.store.last_revision = older.0.revision.0;
            self.store.current = Some(older);
        }
    }

    fn trace_save(&mut self, server: usize, what: &'static str) {
        self.log(12, server as u64, |_| format!("c{server} {what}"));
    }
}
