//! One step of training.

use reknit_checkpoint::{Stall, State};
use reknit_collectives::{BreakReason, Broken, Buffer, ControlWord, Element, Group, ReduceOp};
use reknit_membership::holding::Resume;
use reknit_membership::world::Place;
use reknit_membership::{Generation, Rank, Step as StepNumber, WorldSize};

use crate::error::Interrupted;
use crate::gradient::Gradient;
use crate::held::Held;
use crate::order::DataOrder;
use crate::retry::{Kept, Numbers, Stretch, with};
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
    /// What this rank is to compute, counted from the step's first position. None has no length.
    own: Vec<Stretch>,
    /// The same, and what it has from worlds that broke.
    covered: Vec<Stretch>,
    word: ControlWord,
    collectives: u32,
    /// Whether the gradients have been given.
    is_reduced: bool,
    failed: bool,
}

/// The samples of one rank in one step, as indices into the data set.
#[derive(Debug, Clone)]
pub struct Samples {
    order: DataOrder,
    positions: std::iter::Flatten<std::vec::IntoIter<Stretch>>,
    left: usize,
}

impl Iterator for Samples {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let position = self.positions.next()?;
        self.left -= 1;
        Some(self.order.sample(position))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Samples {}

/// Why a step is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The world is over, and the step comes in another one.
    WorldOver,
    /// A rank could not do its part, and the step comes again in the same world.
    RankFailed,
}

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
        place: &Place,
        mut own: Vec<Stretch>,
        state_replaced: bool,
    ) -> Step<'t> {
        let (index, word, collectives) = (trainer.steps_done(), ControlWord::default(), 0);
        let Place { generation, rank, size, .. } = *place;
        own.retain(|stretch| !stretch.is_empty());
        let (is_reduced, failed) = (false, false);
        let kept = trainer.kept();
        let kept = kept.as_ref().map_or(&[][..], |kept| &kept.stretches);
        let covered = with(kept, &own).expect("nobody is dealt what is kept");
        Step {
            trainer,
            generation,
            index,
            rank,
            size,
            state_replaced,
            own,
            covered,
            word,
            collectives,
            is_reduced,
            failed,
        }
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

    /// The samples that this rank is to compute. Over all ranks a step has exactly the global batch, and over a pass each
    /// sample comes once; of a step that was interrupted, ranks that [retry in place](crate::Options::retry_in_place) have
    /// some already.
    pub fn samples(&self) -> Samples {
        self.samples_of(self.own.clone())
    }

    /// The samples that this rank's part of the step's mean is for: those that it is to compute, and those that it has from
    /// a world that broke.
    pub fn covered_samples(&self) -> Samples {
        self.samples_of(self.covered.clone())
    }

    fn samples_of(&self, mut stretches: Vec<Stretch>) -> Samples {
        let order = self.trainer.order();
        let first = order.positions(self.index).start;
        let left = stretches.iter().map(|stretch| (stretch.end - stretch.start) as usize).sum();
        for stretch in &mut stretches {
            *stretch = first + stretch.start..first + stretch.end;
        }
        Samples { order, positions: stretches.into_iter().flatten(), left }
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
        let weight = self.begin_gradients()?;
        let (generation, len) = (self.generation, means.iter().map(|mean| mean.len()).sum());
        let kept = self.trainer.kept();
        let had = kept.as_ref().map(|kept| kept.numbers::<T>().filter(|numbers| numbers.len() == len));
        let had = match had {
            Some(None) => return Err(self.has_other_gradients()),
            had => had.flatten(),
        };
        let fill = |numbers: &mut [T]| {
            let mut rest = &mut *numbers;
            for mean in means.iter() {
                let weighted = rest.split_off_mut(..mean.len()).expect("there is room for all");
                weighted.copy_from_slice(mean);
                T::scale(weighted, weight);
            }
            had.iter().for_each(|had| T::add(numbers, had));
        };
        let mut buffer = self.trainer.take_buffer::<T>(generation, len);
        let mut is_full = false;
        let reduced = self.run(|group, word| {
            let buffer = match &mut buffer {
                Some(buffer) => buffer,
                none => none.insert(group.buffer(len)?),
            };
            buffer.set_len(len);
            // Weighted there: a weight cannot be taken back without rounding, and zero not at all.
            fill(&mut *buffer);
            is_full = true;
            group.all_reduce_buffer(buffer, ReduceOp::Sum, word)
        });
        match (reduced, buffer) {
            (Ok(()), buffer) => {
                let mut rest = buffer.as_ref().map_or(&[][..], Buffer::result);
                for mean in means {
                    let (result, others) = rest.split_at(mean.len());
                    mean.copy_from_slice(result);
                    rest = others;
                }
                self.trainer.keep_buffer(generation, buffer);
                Ok(())
            }
            (Err(Ended::WorldOver), buffer) if self.trainer.retries_in_place() && !self.failed => {
                // What it had is in what it has now.
                let numbers = match buffer.filter(|_| is_full) {
                    Some(buffer) => Numbers::InBuffer(buffer),
                    None => {
                        let mut numbers =
                            means.iter().flat_map(|mean| mean.iter().copied()).collect::<Vec<T>>();
                        fill(&mut numbers);
                        Numbers::Copied(numbers)
                    }
                };
                self.keep_for_retry(numbers);
                Err(Interrupted)
            }
            (Err(Ended::WorldOver | Ended::RankFailed), buffer) => {
                self.trainer.keep_buffer(generation, buffer);
                Err(Interrupted)
            }
        }
    }

    /// The weight of this rank's gradients in the step's.
    pub(crate) fn begin_gradients(&mut self) -> Result<f64, Interrupted> {
        if std::mem::replace(&mut self.is_reduced, true) && self.trainer.retries_in_place() {
            let one = "with Options::retry_in_place all gradients of a step go into one call";
            self.trainer.fail_for_good(one.to_owned());
            return Err(Interrupted);
        }
        Ok(self.samples().len() as f64 / self.trainer.order().global_batch as f64)
    }

    /// The others count on what this worker said it has, and it cannot be added to what it computes now.
    pub(crate) fn has_other_gradients(&mut self) -> Interrupted {
        let other = "a step that was interrupted came again with gradients of another type or number";
        self.trainer.fail_for_good(other.to_owned());
        Interrupted
    }

    /// Keeps what this rank has given for the next world, with what it had from older ones in it.
    pub(crate) fn keep_for_retry<T: Gradient>(&mut self, numbers: Numbers<T>) {
        self.trainer.keep(Some(Kept::new(self.index, self.covered.clone(), numbers)));
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
        self.run(run).map_err(|_| Interrupted)
    }

    fn run(
        &mut self,
        run: impl FnOnce(&mut Group, ControlWord) -> Result<ControlWord, Broken>,
    ) -> Result<(), Ended> {
        let word = self.word();
        let Some(group) = self.trainer.group(self.generation) else { return Err(Ended::WorldOver) };
        let result = run(group, word);
        self.ended(result)
    }

    /// What this rank wants the others to know at the next collective.
    fn word(&self) -> ControlWord {
        self.trainer.wishes() | self.failure()
    }

    /// Whether it can do its part, as the others are told.
    pub(crate) fn failure(&self) -> ControlWord {
        if self.failed { ControlWord::FAILED } else { ControlWord::default() }
    }

    /// What a collective that ended so means for the step.
    pub(crate) fn ended(&mut self, result: Result<ControlWord, Broken>) -> Result<(), Ended> {
        match result {
            // All ranks see it at the same collective, so all begin the step again.
            Ok(word) if word.contains(ControlWord::FAILED) => Err(Ended::RankFailed),
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
                Err(Ended::WorldOver)
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
        self.trainer.keep(None);
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
