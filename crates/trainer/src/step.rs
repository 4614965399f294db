//! One step of training.

use reknit_checkpoint::{Stall, State};
use reknit_collectives::{BreakReason, Broken, ControlWord, Element, Group, ReduceOp};
use reknit_membership::holding::Resume;
use reknit_membership::{Generation, Rank, Step as StepNumber, WorldSize};

use crate::error::Interrupted;
use crate::gradient::Gradient;
use crate::held::Held;
use crate::order::{DataOrder, share};
use crate::trainer::Trainer;

/// A step that this worker is to do: which samples, and with whom. It counts once it is committed; dropped without
/// that, it is given out again.
pub struct Step<'t> {
    pub(crate) trainer: &'t mut Trainer,
    pub(crate) generation: Generation,
    pub(crate) index: u64,
    pub(crate) rank: Rank,
    pub(crate) size: WorldSize,
    pub(crate) state_replaced: bool,
    word: ControlWord,
    collectives: u32,
    failed: bool,
}

/// The samples of one rank in one step, as indices into the data set.
#[derive(Debug, Clone)]
pub struct Samples {
    order: DataOrder,
    positions: std::ops::Range<u64>,
}

impl Iterator for Samples {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.positions.next().map(|position| self.order.sample(position))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.positions.end - self.positions.start) as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Samples {}

/// What a committed step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// How many steps are committed now.
    pub steps: u64,
    /// What the checkpoint that was begun after it cost, if one was.
    pub checkpoint: Option<Stall>,
}

impl<'t> Step<'t> {
    pub(crate) fn new(
        trainer: &'t mut Trainer,
        generation: Generation,
        rank: Rank,
        size: WorldSize,
        state_replaced: bool,
    ) -> Step<'t> {
        let index = trainer.steps_done();
        let (word, collectives, failed) = (ControlWord::default(), 0, false);
        Step { trainer, generation, index, rank, size, state_replaced, word, collectives, failed }
    }

    /// Which step it is, counted from zero: as many have been committed before it.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The world it is done in.
    pub fn generation(&self) -> u64 {
        self.generation.0
    }

    /// This worker's rank in the world.
    pub fn rank(&self) -> u32 {
        self.rank.0
    }

    /// How many ranks the world has.
    pub fn world_size(&self) -> u32 {
        self.size.0
    }

    /// Whether the library has replaced the program's state since the step before: whatever the program derived from
    /// it must be derived anew.
    pub fn state_was_replaced(&self) -> bool {
        self.state_replaced
    }

    /// This rank's samples. Over all ranks a step has exactly the global batch, and over a pass each sample comes once.
    pub fn samples(&self) -> Samples {
        let order = self.trainer.order();
        let step = order.positions(self.index);
        let part = share(order.global_batch, self.size.0, self.rank.0);
        Samples { order, positions: step.start + part.start..step.start + part.end }
    }

    /// A number that is the same on every rank for this step, and another one for every other step: a seed for what
    /// must be random but alike, like dropout. Mix in a sample's index to have one per sample.
    pub fn seed(&self) -> u64 {
        crate::order::mix(self.trainer.order().seed ^ crate::order::mix(self.index))
    }

    /// Turns the mean gradients over this rank's samples into the mean over the whole step, on every rank the same
    /// bits. Shares of different sizes are weighted; a rank without samples adds nothing, whatever is in `mean`.
    ///
    /// # Errors
    /// [`Interrupted`] if the world broke or a rank has [failed](Step::fail): `mean` is then what it was.
    pub fn all_reduce_mean<T: Gradient>(&mut self, mean: &mut [T]) -> Result<(), Interrupted> {
        self.all_reduce_means(&mut [mean])
    }

    /// The same for many gradients, in one collective: so small ones cost no more than large ones.
    ///
    /// # Errors
    /// [`Interrupted`] if the world broke or a rank has [failed](Step::fail): all `means` are then what they were.
    pub fn all_reduce_means<T: Gradient>(&mut self, means: &mut [&mut [T]]) -> Result<(), Interrupted> {
        let samples = self.samples().len();
        let weight = samples as f64 / self.trainer.order().global_batch as f64;
        let (generation, len) = (self.generation, means.iter().map(|mean| mean.len()).sum());
        let mut kept = self.trainer.take_buffer::<T>(generation, len);
        let reduced = self.collective(|group, word| {
            let buffer = match &mut kept {
                Some(buffer) => buffer,
                none => none.insert(group.buffer(len)?),
            };
            buffer.set_len(len);
            // Weighted there: a weight cannot be taken back without rounding, and zero not at all.
            let mut rest = &mut buffer[..];
            for mean in means.iter() {
                let weighted = rest.split_off_mut(..mean.len()).expect("there is room for all");
                weighted.copy_from_slice(mean);
                T::scale(weighted, weight);
            }
            group.all_reduce_buffer(buffer, ReduceOp::Sum, word)
        });
        if let (Ok(()), Some(buffer)) = (&reduced, &kept) {
            let mut rest = buffer.result();
            for mean in means {
                let (result, others) = rest.split_at(mean.len());
                mean.copy_from_slice(result);
                rest = others;
            }
        }
        if let Some(buffer) = kept {
            self.trainer.keep_buffer(generation, buffer);
        }
        reduced
    }

    /// This worker cannot do its part of the step: its samples cannot be read, say, or its numbers are none. The step's
    /// next collective, which it must still take part in, then ends as [`Interrupted`] on every rank, and the step is
    /// given out again, in the same world.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// Combines one value per element over all ranks, in place.
    ///
    /// # Errors
    /// [`Interrupted`] if the world broke: `data` is then what it was. Or if a rank has [failed](Step::fail): then it
    /// holds what the ranks gave.
    pub fn all_reduce<T: Element>(&mut self, data: &mut [T], op: ReduceOp) -> Result<(), Interrupted> {
        self.collective(|group, word| group.all_reduce(data, op, word))
    }

    /// Runs any collective of the world's group. All ranks must run the same ones in the same order, and pass on the
    /// control word they are given.
    ///
    /// # Errors
    /// [`Interrupted`] if the world broke, or a rank has [failed](Step::fail).
    pub fn collective(
        &mut self,
        run: impl FnOnce(&mut Group, ControlWord) -> Result<ControlWord, Broken>,
    ) -> Result<(), Interrupted> {
        let mut wishes = self.trainer.wishes();
        if self.failed {
            wishes |= ControlWord::FAILED;
        }
        let Some(group) = self.trainer.group(self.generation) else { return Err(Interrupted) };
        match run(group, wishes) {
            // All ranks see it at the same collective, so all begin the step again.
            Ok(word) if word.contains(ControlWord::FAILED) => Err(Interrupted),
            Ok(word) => {
                self.word |= word;
                self.collectives += 1;
                Ok(())
            }
            Err(broken) => {
                if let BreakReason::Mismatch { .. } = broken.reason {
                    self.trainer.fail_for_good(broken.reason.to_string());
                }
                self.trainer.ring_broke(&broken);
                Err(Interrupted)
            }
        }
    }

    /// The step is done: the program's state is now that after it. Ranks agree here whether to stop for a change of the
    /// world, and make a checkpoint if one is due, which is then written in the background.
    ///
    /// The state may change only after the step's last collective has succeeded; from then on the step must be committed.
    pub fn commit(mut self, state: &dyn State) -> Committed {
        if self.collectives == 0 {
            // Ranks that have nothing to exchange still stay together. If the world has broken, the step is done
            // nevertheless: the next one goes on from here.
            let _ = self.collective(|group, word| group.barrier(word));
        }
        let steps = self.index + 1;
        let resume = Resume { lineage: self.trainer.lineage(), step: StepNumber(steps) };
        self.trainer.set_held(Held::At(resume));
        self.trainer.hub().bring(|session| session.committed(self.generation, resume.step));
        let asked_for = self.word.contains(ControlWord::SAVE_REQUESTED);
        let checkpoint = if self.word.contains(ControlWord::SAVE_BUSY) {
            tracing::debug!(steps, "no checkpoint: a rank is still busy with the one before");
            None
        } else {
            let meta = self.trainer.save_meta(self.generation, self.rank, self.size, resume.step);
            self.trainer.save_if_due(meta, asked_for, state)
        };
        if self.word.contains(ControlWord::BOUNDARY_REQUESTED) && !self.trainer.is_last(steps) {
            let holding = Held::At(resume).holding();
            self.trainer.hub().bring(|session| session.boundary(self.generation, holding));
        }
        Committed { steps, checkpoint }
    }
}
