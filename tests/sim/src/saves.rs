//! Checkpoints of a member: what the trainer's `saves.rs` does, on the shared disk.

use reknit_membership::holding::ShardReport;
use reknit_membership::record::Commit;
use reknit_membership::world::Place;
use reknit_membership::{Digest, Generation, Rank, Step};

use crate::disk::{Manifest, PartKey, file_digest, manifest_digest, state_digest};
use crate::happening::{Happening, ProcessKey};
use crate::mutants::Mutant;
use crate::sim::{Sim, Stage};

/// Parts that are written and may still become part of a checkpoint.
const WRITTEN_MAX: usize = 4;

impl Sim {
    /// `Trainer::save_if_due`.
    pub(crate) fn saves_if_due(&mut self, process: ProcessKey, place: &Place, step: Step, asked_for: bool) {
        let Some(every) = self.options.save_every else { return };
        if !asked_for && !step.0.is_multiple_of(every) && !self.is_last(step.0) {
            return;
        }
        let generation = place.generation;
        let key = PartKey { generation, step, rank: place.rank };
        let last = self.is_last(step.0);
        let p = &mut self.processes[process];
        if last {
            p.last_saved_in = Some(generation);
        }
        self.bring(process, |session| {
            session.save_begins(generation, step);
            Vec::new()
        });
        let p = &mut self.processes[process];
        debug_assert_eq!(p.saver.writing, None, "the flag in the control word has kept it from this");
        p.saver.writing = Some((key, p.content));
        let bounds = self.options.write_ms;
        self.within(bounds, Happening::PartEnds { process, key });
    }

    fn fails(&mut self) -> bool {
        self.stage == Stage::Chaos && self.rng.chance(self.options.faults.write_fails)
    }

    pub(crate) fn part_ends(&mut self, process: ProcessKey, key: PartKey) {
        let fails = self.fails();
        let p = &mut self.processes[process];
        let Some((_, content)) = p.saver.writing.take_if(|(writing, _)| *writing == key) else { return };
        if fails {
            self.coverage.hit("a part of a checkpoint cannot be written");
            return self.bring(process, |session| session.own_save_failed());
        }
        let PartKey { generation, step, .. } = key;
        while p.saver.written.len() >= WRITTEN_MAX {
            p.saver.written.pop_first();
        }
        p.saver.written.insert((generation, step), (key, content));
        let mut state = state_digest(&content);
        match self.options.mutant {
            Some(Mutant::LosesParts) if key.rank.0 % 2 == 1 => {}
            Some(Mutant::BlindDigests) => {
                state = Digest(7);
                self.disk.parts.insert(key, content);
            }
            _ => {
                self.disk.parts.insert(key, content);
            }
        }
        let report = ShardReport { bytes: 1, file: file_digest(&key, &content), state };
        self.log(90, process as u64, |sim| {
            format!("{} has written its part of {generation:?} {step:?}", sim.who(process))
        });
        self.bring(process, |session| session.shard_written(generation, step, report));
    }

    /// It is this member's turn to write a manifest.
    pub(crate) fn is_to_publish(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        step: Step,
        shards: Vec<ShardReport>,
    ) {
        let p = &mut self.processes[process];
        let Some((key, _)) = p.saver.written.get(&(generation, step)) else {
            self.coverage.hit("a manifest is asked of a member that has no part of it");
            return self.bring(process, |session| session.save_failed(generation, step));
        };
        let key = *key;
        p.saver.publishing.insert((generation, step), shards);
        self.within((0, 20), Happening::ManifestEnds { process, key });
    }

    pub(crate) fn manifest_ends(&mut self, process: ProcessKey, key: PartKey) {
        let fails = self.fails();
        let PartKey { generation, step, .. } = key;
        let Some(parts) = self.processes[process].saver.publishing.remove(&(generation, step)) else {
            return;
        };
        if fails {
            self.coverage.hit("a manifest cannot be written");
            return self.bring(process, |session| session.save_failed(generation, step));
        }
        let digest = manifest_digest(generation, step, &parts);
        self.disk.manifests.insert((generation, step), Manifest { digest, parts });
        self.bring(process, |session| session.manifest_written(generation, step, digest));
    }

    /// A checkpoint will never be whole: this member's part of it goes.
    pub(crate) fn part_is_given_up(&mut self, process: ProcessKey, generation: Generation, step: Step) {
        let Some((key, _)) = self.processes[process].saver.written.remove(&(generation, step)) else {
            return;
        };
        self.coverage.hit("a part of a checkpoint is given up");
        self.disk.remove_part(&key);
    }

    /// Checkpoints are committed: older ones may go.
    pub(crate) fn hears_of_commits(&mut self, process: ProcessKey, kept: &[Commit]) {
        let newest = kept.last().map(|commit| commit.step).unwrap_or_default();
        let p = &mut self.processes[process];
        p.saver.written.retain(|(_, step), _| *step > newest);
        if p.session.place().is_none_or(|place| place.rank != Rank(0)) {
            return;
        }
        let mut kept: Vec<_> = kept.iter().map(Commit::key).collect();
        if self.options.mutant == Some(Mutant::DeletesKept) && kept.len() > 1 {
            kept.remove(0);
        }
        self.disk.retain(&kept);
    }
}
