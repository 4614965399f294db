//! The program's thread of a member: what the trainer's `trainer.rs` and `step.rs` do, one turn at a time. Between two
//! turns anything may happen on the other threads.

use reknit_membership::holding::Resume;
use reknit_membership::world::Place;
use reknit_membership::{Generation, Lineage, Rank, Step};
use reknit_trainer::ControlWord;
use reknit_trainer::session::{Directive, Session};

use crate::collective::Reduced;
use crate::happening::{Happening, ProcessKey};
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::process::{Content, Held, Program, StepWork};
use crate::queue::Ms;
use crate::rng::fold;
use crate::sim::{Sim, Stage};

/// How soon a thread that was woken runs.
const WAKE: (Ms, Ms) = (0, 2);
/// How often a program that has finished looks around.
const LOOK_EVERY: Ms = 100;
/// How long a finished program waits for its last checkpoint to be committed.
const LAST_COMMIT: Ms = 30_000;

impl Sim {
    /// Something may have changed for the program, if it waits.
    pub(crate) fn wakes(&mut self, process: ProcessKey) {
        let waits = matches!(self.processes[process].program, Program::Rests { .. } | Program::Finishes);
        if waits {
            self.turn_within(process, WAKE);
        }
    }

    /// The program takes its next turn within bounds, unless one is due before.
    pub(crate) fn turn_within(&mut self, process: ProcessKey, bounds: (Ms, Ms)) {
        let at = self.now + self.rng.within(bounds);
        let p = &mut self.processes[process];
        if p.due.is_some_and(|due| due <= at) {
            return;
        }
        p.due = Some(at);
        p.turn += 1;
        let turn = p.turn;
        let wait = at - self.now;
        self.after(wait, Happening::ProgramGoesOn { process, turn });
    }

    /// The program is somewhere else from now on, and takes its next turn within bounds.
    pub(crate) fn program_is(&mut self, process: ProcessKey, program: Program, bounds: (Ms, Ms)) {
        let p = &mut self.processes[process];
        p.program = program;
        p.due = None;
        self.turn_within(process, bounds);
    }

    /// The program is somewhere else from now on, and waits there until something else goes on.
    pub(crate) fn program_waits(&mut self, process: ProcessKey, program: Program) {
        let p = &mut self.processes[process];
        p.program = program;
        p.due = None;
        p.turn += 1;
    }

    pub(crate) fn program_goes_on(&mut self, process: ProcessKey, turn: u64) {
        let p = &mut self.processes[process];
        if p.turn != turn {
            return;
        }
        p.due = None;
        match p.program.clone() {
            Program::Looks => self.looks_around(process),
            Program::Rests { world } => self.rests_on(process, world),
            Program::RestEnds => self.rest_ends(process),
            Program::Restores(_) => {}
            Program::Computes(work) => self.enters(process, work),
            Program::Reduces(_) => {}
            Program::Broke { generation, suspects } => self.collective_failed(process, generation, suspects),
            Program::Updates(work) => self.commits(process, work),
            Program::Finishes => self.looks_around(process),
            Program::Over => {}
        }
    }

    /// `Trainer::next_step`, once round its loop.
    fn looks_around(&mut self, process: ProcessKey) {
        let p = &self.processes[process];
        match p.session.directive() {
            Directive::Over(_) => {
                self.program_waits(process, Program::Over);
                self.process_ends(process);
            }
            Directive::Restore(plan) => self.begins_restore(process, plan),
            Directive::Wait => self.begins_rest(process),
            Directive::Run { place, resume } => {
                if p.running != Some(place.generation) && !self.takes_go(process, place.generation, resume) {
                    return self.program_is(process, Program::Looks, (1, 2));
                }
                let p = &self.processes[process];
                let index = p.held.steps_done();
                if self.is_last(index) {
                    return self.finishes(process, &place);
                }
                let work = StepWork { place, index, calls: 0, word: ControlWord::default(), result: None };
                let bounds = self.options.compute_ms;
                let straggles = self.rng.chance(self.options.faults.straggle) && self.stage == Stage::Chaos;
                let bounds = if straggles { (bounds.0, bounds.1 * 20) } else { bounds };
                self.program_is(process, Program::Computes(work), bounds);
            }
        }
    }

    pub(crate) fn is_last(&self, steps: u64) -> bool {
        self.options.steps.is_some_and(|all| steps >= all)
    }

    /// `Trainer::rest`, up to where it waits.
    fn begins_rest(&mut self, process: ProcessKey) {
        let p = &mut self.processes[process];
        p.running = None;
        let mut holding = p.held.holding();
        if self.options.mutant == Some(Mutant::ClaimsTooMuch)
            && let reknit_membership::Holding::State { resume, .. } = &mut holding
            && process % 2 == 1
        {
            resume.step = Step(resume.step.0 + 1);
        }
        p.rest += 1;
        if p.rest == 1 && p.session.is_attached() {
            self.coverage.hit("a program asks for a world only after it was let in");
        }
        self.bring(process, |session| session.at_rest(holding));
        let world = self.processes[process].generation();
        self.log(50, process as u64, |sim| {
            format!("{} rests with {:?}", sim.who(process), sim.processes[process].held)
        });
        self.program_waits(process, Program::Rests { world });
        self.rests_on(process, world);
    }

    fn rests_on(&mut self, process: ProcessKey, world: Generation) {
        let p = &mut self.processes[process];
        if p.session.directive() != Directive::Wait || p.generation() != world {
            self.program_is(process, Program::RestEnds, WAKE);
        }
    }

    fn rest_ends(&mut self, process: ProcessKey) {
        if self.processes[process].session.directive() != Directive::Wait {
            self.is_busy(process);
        }
        self.program_is(process, Program::Looks, WAKE);
    }

    pub(crate) fn is_busy(&mut self, process: ProcessKey) {
        self.bring(process, |session| {
            session.busy();
            Vec::new()
        });
    }

    /// `Trainer::take_go`.
    fn takes_go(&mut self, process: ProcessKey, generation: Generation, resume: Resume) -> bool {
        let p = &mut self.processes[process];
        if p.group != Some(generation) {
            p.group = p.new_group.take_if(|new| *new == generation);
        }
        if p.group.is_none() {
            // This mutant's go is there before its ring, which is then waited for.
            if self.options.mutant != Some(Mutant::StaleGo) {
                self.bring(process, |session| session.broken(generation, Vec::new()));
            }
            return false;
        }
        self.is_busy(process);
        if !self.processes[process].held.is(resume) && self.options.mutant != Some(Mutant::StaleGo) {
            self.coverage.hit("a go is refused for want of its state");
            self.bring(process, |session| session.broken(generation, Vec::new()));
            return false;
        }
        let p = &mut self.processes[process];
        p.running = Some(generation);
        p.held = Held::At(resume);
        let content = p.content;
        self.log(51, process as u64, |sim| {
            format!("{} goes in {generation:?} from {resume:?} with {:x}", sim.who(process), content.hash)
        });
        self.seen(&Seen::TookGo { process, generation, resume, content });
        true
    }

    /// `Trainer::finish`.
    fn finishes(&mut self, process: ProcessKey, place: &Place) {
        let (now, generation) = (self.now, place.generation);
        let p = &mut self.processes[process];
        let step = Step(p.held.steps_done());
        let since = match p.finishing {
            Some((world, since)) if world == generation => since,
            _ => p.finishing.insert((generation, now)).1,
        };
        let is_to_come = self.is_last_to_come(process, place, step);
        let waits = is_to_come && now - since < LAST_COMMIT;
        if !waits {
            self.bring(process, |session| session.finished(generation, step));
        }
        self.program_is(process, Program::Finishes, (1, LOOK_EVERY));
    }

    /// `Trainer::is_last_to_come`.
    fn is_last_to_come(&mut self, process: ProcessKey, place: &Place, step: Step) -> bool {
        let p = &self.processes[process];
        let awaits = p.session.awaits_commit(step);
        if p.session.has_commit_of(step) || awaits || p.last_saved_in == Some(place.generation) {
            return awaits;
        }
        if !p.session.is_saving_busy() {
            self.coverage.hit("the last checkpoint is made when there is nothing else to do");
            self.saves_if_due(process, place, step, false);
        }
        self.options.save_every.is_some()
    }

    /// The program has its gradient and enters a collective.
    fn enters(&mut self, process: ProcessKey, work: StepWork) {
        let generation = work.place.generation;
        if self.processes[process].group != Some(generation) {
            return self.program_is(process, Program::Looks, WAKE);
        }
        let wishes = self.processes[process].session.wishes();
        self.program_waits(process, Program::Reduces(work.clone()));
        self.enters_collective(process, &work, wishes);
    }

    /// A collective gave its result.
    pub(crate) fn collective_done(&mut self, process: ProcessKey, word: ControlWord, result: Reduced) {
        self.processes[process].in_call = None;
        let Program::Reduces(mut work) = self.processes[process].program.clone() else { return };
        work.word |= word;
        work.calls += 1;
        work.result = Some(match work.result {
            None => result,
            Some(so_far) => {
                Reduced { hash: fold(&[so_far.hash, result.hash]), sampled: so_far.sampled && result.sampled }
            }
        });
        if work.calls < self.options.collectives {
            return self.program_is(process, Program::Computes(work), (0, 5));
        }
        let bounds = self.options.update_ms;
        self.program_is(process, Program::Updates(work), bounds);
    }

    /// A collective gave no result: the program will say so.
    pub(crate) fn collective_breaks(&mut self, process: ProcessKey, suspects: Vec<Rank>) {
        self.processes[process].in_call = None;
        let Program::Reduces(work) = self.processes[process].program.clone() else { return };
        if self.options.mutant == Some(Mutant::CommitsAfterBreak) && self.rng.chance(200) {
            let mut work = work;
            work.result = Some(Reduced { hash: fold(&[work.index, process as u64]), sampled: true });
            return self.program_is(process, Program::Updates(work), (0, 1));
        }
        let generation = work.place.generation;
        self.program_is(process, Program::Broke { generation, suspects }, (0, 1));
    }

    fn collective_failed(&mut self, process: ProcessKey, generation: Generation, suspects: Vec<Rank>) {
        self.bring(process, |session| session.broken(generation, suspects));
        self.program_is(process, Program::Looks, (0, 1));
        if self.options.mutant == Some(Mutant::AppliesTwice) && self.rng.chance(100) {
            self.applies_again(process);
        }
    }

    /// `Step::commit`.
    fn commits(&mut self, process: ProcessKey, work: StepWork) {
        let generation = work.place.generation;
        let steps = work.index + 1;
        let p = &mut self.processes[process];
        let lineage = match p.held {
            Held::At(resume) => resume.lineage,
            Held::Fresh(_) | Held::Torn => Lineage(0),
        };
        let before = p.content;
        let after = self.applied(&work, before);
        let p = &mut self.processes[process];
        let resume = Resume { lineage, step: Step(steps) };
        p.content = after;
        p.held = Held::At(resume);
        p.commits += 1;
        self.log(52, process as u64, |sim| {
            format!("{} commits step {steps} in {generation:?}: {:x}", sim.who(process), after.hash)
        });
        let index = work.index;
        self.seen(&Seen::Committed { process, generation, index, resume, before, after });
        if self.processes[process].session.place().is_none_or(|place| place.generation > generation) {
            self.coverage.hit("a step is committed when a later world is known");
        }
        self.bring(process, |session| session.committed(generation, Step(steps)));
        if work.word.contains(ControlWord::SAVE_BUSY) {
            self.coverage.hit("a checkpoint is passed over while one is being written");
        } else {
            let asked = work.word.contains(ControlWord::SAVE_REQUESTED);
            self.saves_if_due(process, &work.place, Step(steps), asked);
        }
        if work.word.contains(ControlWord::BOUNDARY_REQUESTED) && !self.is_last(steps) {
            let holding = Held::At(resume).holding();
            self.coverage.hit("a boundary is reached");
            self.bring(process, |session: &mut Session| session.boundary(generation, holding));
        }
        self.program_is(process, Program::Looks, (0, 1));
    }

    /// The memory of a program after a step.
    fn applied(&mut self, work: &StepWork, before: Content) -> Content {
        let result = work.result.expect("a step is committed when its collectives are done");
        let hash = fold(&[before.hash, result.hash, work.index]);
        let node = crate::truth::Node {
            parent: Some(before.hash),
            step: before.step + 1,
            world: work.place.generation,
            sampled: result.sampled,
        };
        self.truth.note(hash, node);
        Content { hash, step: before.step + 1, flipped: before.flipped }
    }

    /// For a mutant: what was applied is applied once more, and not counted.
    fn applies_again(&mut self, process: ProcessKey) {
        let p = &mut self.processes[process];
        let before = p.content;
        p.content = Content { hash: fold(&[before.hash, 1]), step: before.step + 1, ..before };
        let (held, after) = (p.held, p.content);
        let node = crate::truth::Node {
            parent: Some(before.hash),
            step: after.step,
            world: p.generation(),
            sampled: true,
        };
        self.truth.note(after.hash, node);
        self.log(53, process as u64, |sim| format!("{} applies a step again: {held:?}", sim.who(process)));
    }
}
