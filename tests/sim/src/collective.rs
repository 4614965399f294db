//! Collectives: one completes only when every member of one ring has entered it, and then not everywhere at the same
//! instant; if the ring breaks meanwhile, some members may have the result and some not.

use std::collections::BTreeMap;

use reknit_membership::world::Place;
use reknit_membership::{Generation, Rank};
use reknit_trainer::ControlWord;
use reknit_trainer::order::{DataOrder, share};

use crate::happening::{Happening, ProcessKey};
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::process::{Content, StepWork, Watch};
use crate::rng::fold;
use crate::sim::Sim;

/// What one member brings to a collective.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) index: u64,
    pub(crate) content: Content,
    pub(crate) samples: std::ops::Range<u64>,
    pub(crate) ranks: (Rank, u32),
    word: ControlWord,
}

/// Which collective: the rings of two worlds differ even if a store that was put back gave both one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CallKey {
    pub(crate) generation: Generation,
    roster: u64,
    pub(crate) number: u64,
}

/// One collective of one ring.
#[derive(Debug, Default)]
pub(crate) struct Call {
    pub(crate) entered: BTreeMap<ProcessKey, Entry>,
    done: Option<Done>,
}

/// What everybody finds at its end.
#[derive(Debug, Clone, Copy)]
struct Done {
    word: ControlWord,
    result: Reduced,
}

/// What a step's collectives came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reduced {
    /// Follows from what everybody brought.
    pub(crate) hash: u64,
    /// Whether all samples of the step were in it, each once.
    pub(crate) sampled: bool,
}

/// How often a collective that a cut connection holds up tries again.
const RESUMES: (u64, u64) = (50, 200);

/// The data order of every simulated job.
pub(crate) fn order(batch: u64) -> DataOrder {
    DataOrder { dataset: 97, global_batch: batch, seed: 1 }
}

impl Sim {
    /// A member enters a collective. `Group::call`.
    pub(crate) fn enters_collective(&mut self, process: ProcessKey, work: &StepWork, word: ControlWord) {
        let generation = work.place.generation;
        let samples = self.samples(&work.place, work.index);
        let p = &mut self.processes[process];
        let content = p.content;
        let Some(ring) = p.ring_of(generation) else { return self.collective_breaks(process, Vec::new()) };
        if ring.aborted {
            return self.collective_breaks(process, Vec::new());
        }
        if ring.watch == Watch::Down {
            let suspects = vec![ring.place.next.rank];
            return self.collective_breaks(process, suspects);
        }
        ring.watch = Watch::Running;
        let call = CallKey { generation, roster: work.place.roster, number: ring.call };
        ring.call += 1;
        p.in_call = Some(call);
        let ranks = (work.place.rank, work.place.slots);
        let entry = Entry { index: work.index, content, samples, ranks, word };
        self.calls.entry(call).or_default().entered.insert(process, entry);
        self.try_complete(process, call);
    }

    /// The positions of the data order that a member's ranks use.
    fn samples(&self, place: &Place, index: u64) -> std::ops::Range<u64> {
        let order = order(self.options.batch);
        let step = order.positions(index);
        let shifted = u32::from(self.options.mutant == Some(Mutant::ShiftsShares) && place.seat > 0);
        let first = share(order.global_batch, place.size.0, place.rank.0 - shifted);
        let last = share(order.global_batch, place.size.0, place.rank.0 + place.slots - 1);
        step.start + first.start..step.start + last.end
    }

    /// Lets a collective complete, if everybody is in it and connected.
    pub(crate) fn try_complete(&mut self, process: ProcessKey, call: CallKey) {
        let Some(c) = self.calls.get(&call) else { return };
        if c.done.is_some() || !c.entered.contains_key(&process) {
            return;
        }
        match self.ring_around(process, call.generation) {
            Around::Whole(members) => {
                if members.iter().all(|member| c.entered.contains_key(member)) {
                    self.completes(&members, call);
                }
            }
            Around::HeldUp => self.within(RESUMES, Happening::CollectiveResumes { process, call }),
            Around::Broken => {}
        }
    }

    /// The members of the ring from `process` on, if every connection of it is there.
    fn ring_around(&self, process: ProcessKey, generation: Generation) -> Around {
        let mut members = vec![process];
        let mut held_up = false;
        loop {
            let at = members[members.len() - 1];
            let ring = self.processes[at].ring.as_ref().filter(|ring| ring.generation() == generation);
            let Some(ring) = ring.filter(|ring| !ring.aborted && ring.watch != Watch::Down) else {
                return Around::Broken;
            };
            let next = if ring.place.seats == 1 { Some(at) } else { ring.next };
            let Some(next) = next.filter(|next| self.processes[*next].is_there()) else {
                return Around::Broken;
            };
            held_up |= self.data_cut(at, next) || !self.processes[next].runs();
            if next == process {
                return if held_up { Around::HeldUp } else { Around::Whole(members) };
            }
            if members.contains(&next) {
                return Around::Broken;
            }
            members.push(next);
        }
    }

    fn completes(&mut self, members: &[ProcessKey], call: CallKey) {
        let generation = call.generation;
        let Some(c) = self.calls.get(&call) else { return };
        let mut entries: Vec<&Entry> = members.iter().filter_map(|member| c.entered.get(member)).collect();
        entries.sort_by_key(|entry| entry.ranks.0);
        let word = entries.iter().fold(ControlWord::default(), |word, entry| word | entry.word);
        let mut numbers = vec![generation.0, call.number];
        numbers.extend(entries.iter().flat_map(|e| [e.content.hash, e.samples.start, e.samples.end]));
        let step = order(self.options.batch).positions(entries[0].index);
        let mut next = step.start;
        let tiled = entries
            .iter()
            .all(|entry| std::mem::replace(&mut next, entry.samples.end) == entry.samples.start);
        let sampled = tiled && next == step.end;
        let entries: Vec<Entry> = entries.into_iter().cloned().collect();
        self.log(70, generation.0, |_| format!("collective {} of {generation:?} has everybody", call.number));
        self.seen(&Seen::Reduced { generation, entries: &entries });
        let result = Reduced { hash: fold(&numbers), sampled };
        if let Some(c) = self.calls.get_mut(&call) {
            c.done = Some(Done { word, result });
        }
        // The one before is over for everybody: all have entered this one.
        self.calls.remove(&CallKey { number: call.number.wrapping_sub(1), ..call });
        let bounds = self.options.data_ms;
        for process in members.iter().copied() {
            self.within((bounds.0, bounds.1 * 3), Happening::CollectiveEnds { process, call });
        }
    }

    /// One member has all of the result.
    pub(crate) fn collective_ends(&mut self, process: ProcessKey, call: CallKey) {
        let generation = call.generation;
        let Some(done) = self.calls.get(&call).and_then(|c| c.done) else { return };
        let p = &mut self.processes[process];
        if p.in_call != Some(call) {
            return;
        }
        match p.ring_of(generation).map(|ring| ring.watch) {
            Some(Watch::Running) => {
                p.ring_of(generation).into_iter().for_each(|ring| ring.watch = Watch::Idle)
            }
            Some(Watch::RunningOut(neighbour)) => {
                self.loss_follows(process, generation, neighbour);
                self.shuts_down(process, generation);
            }
            Some(Watch::Idle | Watch::Down) | None => {}
        }
        self.collective_done(process, done.word, done.result);
    }

    /// A neighbour is gone while a collective runs: the bytes that are there may still complete it.
    pub(crate) fn collective_runs_out(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        neighbour: ProcessKey,
    ) {
        let address = self.processes[neighbour].address.clone();
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        let suspect = ring.rank_at(&address);
        let Some(call) = self.processes[process].in_call else { return };
        let complete = self.is_complete(call);
        if complete && self.rng.chance(500) {
            self.coverage.hit("a collective completes after a neighbour was lost");
            return;
        }
        self.note_one_ahead(complete, call);
        self.loss_follows(process, generation, neighbour);
        self.shuts_down(process, generation);
        self.collective_breaks(process, vec![suspect]);
    }

    /// The world is over while a collective runs.
    pub(crate) fn collective_aborts(&mut self, process: ProcessKey) {
        let Some(call) = self.processes[process].in_call else { return };
        let complete = self.is_complete(call);
        if complete && self.rng.chance(300) {
            return;
        }
        self.note_one_ahead(complete, call);
        self.collective_breaks(process, Vec::new());
    }

    fn note_one_ahead(&mut self, complete: bool, call: CallKey) {
        let (generation, last) = (call.generation, u64::from(self.options.collectives));
        if complete && (call.number + 1).is_multiple_of(last) {
            self.coverage.hit("a break leaves some a step ahead");
            self.log(71, generation.0, |_| {
                format!("collective {} of {generation:?} completes for some only", call.number)
            });
        }
    }

    fn is_complete(&self, call: CallKey) -> bool {
        self.calls.get(&call).is_some_and(|c| c.done.is_some())
    }
}

/// What a walk around a ring finds.
enum Around {
    Whole(Vec<ProcessKey>),
    /// All connections are there, but nothing moves on some.
    HeldUp,
    Broken,
}
