//! Parts of checkpoints: what this member has written, and says again until it is committed.

use reknit_membership::event::Event;
use reknit_membership::holding::ShardReport;
use reknit_membership::{Digest, Generation, Step};

use super::{Output, Session};

/// How many checkpoints may wait to be committed, those of earlier worlds among them.
const SAVES_MAX: usize = 4;

/// How many checkpoints of one world may wait to be committed before a further one is not begun: disks that are too slow
/// for the wish must not fill up with what never becomes a checkpoint.
const WAITING_MAX: usize = 2;

impl Session {
    /// Whether a part of a checkpoint of `step` waits to be committed.
    pub fn awaits_commit(&self, step: Step) -> bool {
        let mut steps = self.saves.keys().chain(&self.writing).map(|(_, step)| *step);
        steps.any(|saved| saved == step)
    }

    /// Whether a checkpoint of `step`, or of a later one, is known to be committed.
    pub fn has_commit_of(&self, step: Step) -> bool {
        self.committed >= Some(step)
    }

    /// Whether no checkpoint may be begun: the part before is still being written, or too many wait to be committed.
    /// Every rank raises the flag in its control word when its own session says so, and all pass over a checkpoint
    /// together: so the slowest disk sets the pace, and nothing is written in vain.
    pub fn is_saving_busy(&self) -> bool {
        let generation = self.generation();
        let waiting = self.saves.keys().filter(|(other, _)| *other == generation).count();
        self.writing.is_some() || waiting >= WAITING_MAX
    }

    /// This member's part of a checkpoint is about to be written. Fulfils an operator's wish for one, too.
    pub fn save_begins(&mut self, generation: Generation, step: Step) {
        self.fulfil_wish();
        self.writing = Some((generation, step));
    }

    fn fulfil_wish(&mut self) {
        self.world.iter_mut().for_each(|world| world.save_requested = false);
    }

    /// The part that was being written could not be.
    pub fn own_save_failed(&mut self) -> Vec<Output> {
        match self.writing.take() {
            Some((generation, step)) => self.save_failed(generation, step),
            None => Vec::new(),
        }
    }

    /// This member's part of a checkpoint is on its disk.
    pub fn shard_written(&mut self, generation: Generation, step: Step, report: ShardReport) -> Vec<Output> {
        self.writing.take_if(|writing| *writing == (generation, step));
        let event = Event::ShardWritten { member: self.member, generation, step, report };
        self.save_said(generation, step, event)
    }

    /// The list of a checkpoint's parts is on this member's disk.
    pub fn manifest_written(&mut self, generation: Generation, step: Step, manifest: Digest) -> Vec<Output> {
        let event = Event::ManifestWritten { member: self.member, generation, step, manifest };
        self.save_said(generation, step, event)
    }

    /// This member's part of a checkpoint could not be written.
    pub fn save_failed(&mut self, generation: Generation, step: Step) -> Vec<Output> {
        self.fulfil_wish();
        self.saves.remove(&(generation, step));
        self.failed_saves.insert((generation, step));
        while self.failed_saves.len() > SAVES_MAX {
            self.failed_saves.pop_first();
        }
        vec![Output::Send(Event::SaveFailed { member: self.member, generation, step })]
    }

    /// The coordinator says that a checkpoint will never be whole.
    pub(super) fn save_given_up(&mut self, generation: Generation, step: Step) -> Vec<Output> {
        self.saves.remove(&(generation, step));
        vec![Output::SaveGivenUp { generation, step }]
    }

    fn save_said(&mut self, generation: Generation, step: Step, event: Event) -> Vec<Output> {
        while self.saves.len() >= SAVES_MAX && !self.saves.contains_key(&(generation, step)) {
            // An older one that was never committed never will be.
            self.saves.pop_first();
        }
        self.saves.entry((generation, step)).or_default().push(event.clone());
        vec![Output::Send(event)]
    }
}
