//! Carrying out a plan: state from other members' memory, or from a checkpoint. It does what the trainer's `restore` does.

use reknit_membership::holding::{Moved, Plan, Resume};
use reknit_membership::world::Peer;
use reknit_membership::{Digest, Generation, MemberId};

use crate::disk::state_digest;
use crate::happening::{Happening, ProcessKey};
use crate::invariants::Seen;
use crate::process::{Content, Fetch, FetchStage, Held, Program, Restoring};
use crate::queue::Ms;
use crate::rng::fold;
use crate::sim::{Sim, Stage};

/// How long reaching a source may take.
const DIAL: Ms = 10_000;
/// How long a transfer may go without a byte.
const STALL: Ms = 30_000;
const AGAIN: (Ms, Ms) = (5, 80);

impl Sim {
    /// `Trainer::restore`.
    pub(crate) fn begins_restore(&mut self, process: ProcessKey, plan: Plan) {
        self.is_busy(process);
        let p = &mut self.processes[process];
        if p.ring_of(plan.generation).is_none() {
            return self.program_is(process, Program::Looks, (1, 2));
        }
        p.held = Held::Torn;
        let peers: Vec<Peer> = plan.fetch.iter().flat_map(|fetch| fetch.from.iter().cloned()).collect();
        let loads = plan.load.is_some();
        self.log(80, process as u64, |sim| format!("{} restores {:?}", sim.who(process), plan.resume));
        if peers.iter().any(Peer::is_outside) {
            self.coverage.hit("state is fetched from outside the world");
        }
        let source =
            |peer: Peer| Fetch { from: peer.member, address: peer.address, stage: FetchStage::Dials };
        let sources: Vec<Fetch> = peers.into_iter().map(source).collect();
        let count = sources.len();
        let since = self.now;
        self.program_waits(process, Program::Restores(Restoring { plan, sources, since }));
        let turn = self.processes[process].turn;
        if loads {
            let bounds = self.options.transfer_ms;
            self.within(bounds, Happening::LoadEnds { process, turn });
        }
        for source in 0..count {
            self.within((0, 5), Happening::FetchGoesOn { process, turn, source });
        }
        if count == 0 && !loads {
            self.restore_is_done(process);
        }
    }

    fn restoring(&mut self, process: ProcessKey, turn: u64) -> Option<&mut Restoring> {
        let p = &mut self.processes[process];
        match &mut p.program {
            Program::Restores(restoring) if p.turn == turn => Some(restoring),
            _ => None,
        }
    }

    pub(crate) fn fetch_goes_on(&mut self, process: ProcessKey, turn: u64, source: usize) {
        let now = self.now;
        let Some(restoring) = self.restoring(process, turn) else { return };
        let (generation, resume, since) = (restoring.plan.generation, restoring.plan.resume, restoring.since);
        let fetch = restoring.sources[source].clone();
        let again = Happening::FetchGoesOn { process, turn, source };
        match fetch.stage {
            FetchStage::Dials => match self.listener(&fetch.address) {
                None => self.fetch_fails(process, fetch.from, "nobody listens there"),
                Some(holder) if now - since > DIAL => {
                    self.seen(&Seen::LetsNobodyIn { holder, by: process, since });
                    self.fetch_fails(process, fetch.from, "it does not answer");
                }
                Some(holder) => {
                    let reached = self.processes[holder].runs() && !self.data_cut(process, holder);
                    match self.door(process, holder, generation) {
                        _ if !reached => self.within(AGAIN, again),
                        Door::Open => {
                            self.fetch_is_at(process, turn, source, FetchStage::Waits { holder, since: now });
                            self.within(AGAIN, again);
                        }
                        Door::NotYet => self.within(AGAIN, again),
                        Door::Over => self.fetch_fails(process, fetch.from, "its world is over"),
                        Door::Stranger => self.fetch_fails(process, fetch.from, "it is a stranger"),
                    }
                }
            },
            FetchStage::Waits { holder, since } => {
                let p = &self.processes[holder];
                if !p.is_there() {
                    self.fetch_fails(process, fetch.from, "it is gone");
                } else if now - since > STALL {
                    self.fetch_fails(process, fetch.from, "it does not serve");
                } else if !p.runs() || !p.is_resting() {
                    self.within(AGAIN, again);
                } else if !p.held.is(resume) {
                    self.coverage.hit("a holder is asked for what it does not hold");
                    self.fetch_fails(process, fetch.from, "it does not hold the state");
                } else {
                    let (rest, took) = (p.rest, self.rng.within(self.options.transfer_ms));
                    let flows = FetchStage::Flows { holder, rest, until: now + took };
                    self.fetch_is_at(process, turn, source, flows);
                    self.after(took, again);
                }
            }
            FetchStage::Flows { holder, rest, until } => {
                let p = &self.processes[holder];
                let rests_on = p.is_there() && p.is_resting() && p.rest == rest;
                if !rests_on {
                    self.coverage.hit("a holder stops serving half way");
                    self.fetch_fails(process, fetch.from, "it stopped serving");
                } else if self.data_cut(process, holder) || !p.runs() {
                    if now.saturating_sub(until) > STALL {
                        return self.fetch_fails(process, fetch.from, "nothing moves");
                    }
                    self.within(AGAIN, again);
                } else {
                    self.fetch_arrives(process, turn, source, holder);
                }
            }
            FetchStage::Done { .. } => {}
        }
    }

    /// Whether a holder lets a receiver of a generation in.
    fn door(&self, process: ProcessKey, holder: ProcessKey, generation: Generation) -> Door {
        let ours = self.processes[process].ring.as_ref().map(|ring| ring.secret);
        let theirs = &self.processes[holder];
        match theirs.doors.get(&generation) {
            Some(secret) if Some(*secret) == ours => Door::Open,
            Some(_) => Door::Stranger,
            None if theirs.doors_over >= Some(generation) => Door::Over,
            None => Door::NotYet,
        }
    }

    fn fetch_is_at(&mut self, process: ProcessKey, turn: u64, source: usize, stage: FetchStage) {
        if let Some(restoring) = self.restoring(process, turn) {
            restoring.sources[source].stage = stage;
        }
    }

    fn fetch_arrives(&mut self, process: ProcessKey, turn: u64, source: usize, holder: ProcessKey) {
        let faults = &self.options.faults;
        let (fails, wrong) = match self.stage {
            Stage::Chaos => (self.rng.chance(faults.fetch_fails), self.rng.chance(faults.wrong_digest)),
            Stage::Heal | Stage::Calm | Stage::Finish => (false, false),
        };
        let mut content = self.processes[holder].content;
        if fails {
            self.coverage.hit("a state does not arrive");
            let from = self.processes[holder].member();
            return self.fetch_fails(process, from, "by the seed's will");
        }
        let sent = state_digest(&content);
        if wrong {
            self.coverage.hit("a state arrives wrong");
            content.hash = fold(&[content.hash, self.now]);
        }
        let got = state_digest(&content);
        self.fetch_is_at(process, turn, source, FetchStage::Done { content, sent, got });
        let Some(restoring) = self.restoring(process, turn) else { return };
        if restoring.sources.iter().all(|source| matches!(source.stage, FetchStage::Done { .. })) {
            self.restore_is_done(process);
        }
    }

    /// A source did not deliver.
    fn fetch_fails(&mut self, process: ProcessKey, culprit: MemberId, why: &'static str) {
        let Program::Restores(Restoring { plan, .. }) = self.processes[process].program.clone() else {
            return;
        };
        self.log(81, process as u64, |sim| {
            format!("{} gets nothing from {culprit:?}: {why}", sim.who(process))
        });
        self.coverage.hit("a restore fails because of a source");
        self.seen(&Seen::Accused { member: culprit });
        self.bring(process, |session| session.restore_failed(&plan, Some(culprit)));
        self.program_is(process, Program::Looks, (0, 2));
    }

    /// Everything has arrived.
    fn restore_is_done(&mut self, process: ProcessKey) {
        let Program::Restores(Restoring { plan, sources, .. }) = self.processes[process].program.clone()
        else {
            return;
        };
        let arrived: Vec<(MemberId, Content, Digest, Digest)> = sources
            .iter()
            .filter_map(|source| match source.stage {
                FetchStage::Done { content, sent, got } => Some((source.from, content, sent, got)),
                FetchStage::Dials | FetchStage::Waits { .. } | FetchStage::Flows { .. } => None,
            })
            .collect();
        let moved: Vec<Moved> = arrived
            .iter()
            .map(|(from, _, sent, got)| Moved { from: *from, bytes: 1, sent: *sent, got: *got })
            .collect();
        let sound = moved.iter().all(|part| part.sent == part.got);
        for part in moved.iter().filter(|part| part.sent != part.got) {
            self.seen(&Seen::Accused { member: part.from });
        }
        let contents: Vec<Content> = arrived.iter().map(|(_, content, ..)| *content).collect();
        if let Some(content) = mixture(&contents) {
            self.processes[process].content = content;
        }
        if sound {
            self.holds(process, plan.resume);
        }
        self.bring(process, |session| session.restored(&plan, moved));
        self.program_is(process, Program::Looks, (0, 2));
    }

    fn holds(&mut self, process: ProcessKey, resume: Resume) {
        let p = &mut self.processes[process];
        p.held = Held::At(resume);
        let content = p.content;
        self.log(82, process as u64, |sim| {
            format!("{} has restored {resume:?}: {:x}", sim.who(process), content.hash)
        });
        self.coverage.hit("a state is restored");
        self.seen(&Seen::Restored { resume, content });
    }

    pub(crate) fn load_ends(&mut self, process: ProcessKey, turn: u64) {
        let Some(restoring) = self.restoring(process, turn) else { return };
        let plan = restoring.plan.clone();
        let Some(load) = &plan.load else { return };
        let fails = self.stage == Stage::Chaos && self.rng.chance(self.options.faults.load_fails);
        let loaded = if fails { Err("by the seed's will") } else { self.disk.load(&load.commit) };
        self.program_is(process, Program::Looks, (0, 2));
        match loaded {
            Ok(content) => {
                self.coverage.hit("a checkpoint is loaded");
                self.processes[process].content = content;
                self.holds(process, plan.resume);
                self.bring(process, |session| session.restored(&plan, Vec::new()));
            }
            Err(why) => {
                self.coverage.hit("a checkpoint cannot be loaded");
                self.log(83, process as u64, |sim| {
                    format!("{} cannot load {:?}: {why}", sim.who(process), load.commit.key())
                });
                self.seen(&Seen::LoadFailed { commit: &load.commit, on_purpose: fails, why });
                self.bring(process, |session| session.restore_failed(&plan, None));
            }
        }
    }

    /// The world is over, or its plan void, while its state is being moved.
    pub(crate) fn restore_aborts(&mut self, process: ProcessKey, generation: Generation) {
        let Program::Restores(Restoring { plan, .. }) = &self.processes[process].program else { return };
        // Reading a checkpoint goes on to its end.
        if plan.generation == generation && plan.load.is_none() {
            self.coverage.hit("a restore is interrupted");
            self.program_is(process, Program::Looks, (0, 50));
        }
    }
}

/// What a receiver finds at a holder's listener.
enum Door {
    Open,
    NotYet,
    Over,
    Stranger,
}

/// What memory holds when parts of several states were written into it.
fn mixture(contents: &[Content]) -> Option<Content> {
    let first = *contents.first()?;
    let same = contents.iter().all(|content| content.hash == first.hash);
    if same {
        return Some(first);
    }
    let hashes: Vec<u64> = contents.iter().map(|content| content.hash).collect();
    Some(Content {
        hash: fold(&hashes),
        step: first.step,
        flipped: contents.iter().any(|content| content.flipped),
    })
}
