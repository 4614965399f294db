//! Parts of checkpoints: what this member has written, and says again until it is committed.

use reknit_membership::event::Event;
use reknit_membership::holding::ShardReport;
use reknit_membership::{Digest, Generation, Step};

use super::{Output, Session};

/// How many checkpoints may wait to be committed: there is seldom more than one.
const SAVES_MAX: usize = 4;

impl Session {
    /// Whether a part of a checkpoint of `step` waits to be committed.
    pub fn awaits_commit(&self, step: Step) -> bool {
        let mut steps = self.saves.keys().chain(&self.writing).map(|(_, step)| *step);
        steps.any(|saved| saved == step)
    }

    /// This member's part of a checkpoint is being written. Fulfils an operator's wish for one, too.
    pub fn save_begun(&mut self, generation: Generation, step: Step) {
        if let Some(world) = &mut self.world {
            world.save_requested = false;
        }
        self.writing = Some((generation, step));
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
        self.saves.remove(&(generation, step));
        vec![Output::Send(Event::SaveFailed { member: self.member, generation, step })]
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
