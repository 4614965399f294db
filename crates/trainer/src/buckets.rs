//! Gradients that are added up while others are still being computed.
//!
//! A backward pass makes the last layer's gradients first. They are put into buckets, one after the other, and a full one is
//! added up over all ranks on a thread of its own while the pass goes on:
//! ```text
//! the program   layer 9 ─► layer 8 ─► layer 7 ─► …              ─► (waits for the last one) ─► applies the means
//!                  └─ bucket 0 full ─┐  └─ bucket 1 full ─┐
//! the thread                         └─ all-reduce 0 ─────┴─ all-reduce 1 ─ …
//! ```
//! S. Li and others, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020, section 3.2, has
//! this design, and how much it gains.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use reknit_collectives::{AbortHandle, BreakReason, Broken, Buffer, ControlWord, Group, ReduceOp};

use crate::error::Interrupted;
use crate::gradient::Gradient;
use crate::retry::Numbers;
use crate::session::Session;
use crate::step::{Ended, Step};

/// Takes gradients as they become ready.
pub struct Buckets<'a, T: Gradient> {
    full: Sender<(Numbers<T>, ControlWord)>,
    /// Buckets of the steps before, to be filled again.
    empty: VecDeque<Buffer<T>>,
    /// The one that is being filled, and how far. It goes off when it is full, and the last one, which may be empty, when nothing
    /// more comes: what this rank says with that, it says after everything.
    filling: Numbers<T>,
    filled: usize,
    /// How many elements a bucket has.
    len: usize,
    weight: f64,
    /// What this rank has of the step from a world that broke.
    had: Option<&'a [T]>,
    given: usize,
    word: ControlWord,
    done: &'a AtomicUsize,
}

/// Breaks the world if the program panics while it computes: the others are not to wait for what does not come, nor is the
/// thread.
struct Panicking(AbortHandle);

impl Drop for Panicking {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort(BreakReason::Aborted);
        }
    }
}

impl<T: Gradient> Buckets<'_, T> {
    /// The mean gradient, over this rank's samples, of what comes next. All ranks give as many elements, in the same order;
    /// in how many pieces makes no difference.
    pub fn give(&mut self, mean: &[T]) {
        let mut rest = mean;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(self.len - self.filled));
            let place = match &mut self.filling {
                Numbers::InBuffer(buffer) => {
                    let place = &mut buffer[self.filled..][..now.len()];
                    place.copy_from_slice(now);
                    place
                }
                Numbers::Copied(numbers) => {
                    numbers.extend_from_slice(now);
                    &mut numbers[self.filled..]
                }
            };
            T::scale(place, self.weight);
            // Whether they are as many, is seen at the end.
            if let Some(had) = self.had.and_then(|had| had.get(self.given..self.given + now.len())) {
                T::add(place, had);
            }
            (self.filled, self.given, rest) = (self.filled + now.len(), self.given + now.len(), later);
            if self.filled == self.len {
                self.hand_over();
                self.filling = self.next();
            }
        }
    }

    /// This worker cannot do its part of the step: see [`Step::fail`]. It gives as many elements as the others nevertheless,
    /// whatever they are.
    pub fn fail(&mut self) {
        self.word |= ControlWord::FAILED;
    }

    /// How many buckets are done with: added up, or passed over because the step is interrupted.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// The end of what was given: says what this rank says with its last bucket, which is empty if the one before was full.
    /// Whether it gave as many elements as it has.
    fn end(&mut self, wishes: ControlWord) -> bool {
        let is_alike = self.had.is_none_or(|had| had.len() == self.given);
        if !is_alike {
            // The others must not take what this rank has for more than it is.
            self.fail();
        }
        self.word |= wishes;
        self.hand_over();
        is_alike
    }

    fn next(&mut self) -> Numbers<T> {
        match self.empty.pop_front() {
            Some(mut buffer) => {
                buffer.set_len(self.len);
                Numbers::InBuffer(buffer)
            }
            None => Numbers::Copied(Vec::new()),
        }
    }

    /// Sends the bucket off, as full as it is.
    fn hand_over(&mut self) {
        let mut full = std::mem::replace(&mut self.filling, Numbers::Copied(Vec::new()));
        if let Numbers::InBuffer(buffer) = &mut full {
            buffer.set_len(self.filled);
        }
        self.filled = 0;
        // Nobody is there to take it only if the thread has panicked, which is seen when it is joined.
        let _ = self.full.send((full, self.word));
    }
}

/// The means over the whole step, in the order in which the gradients were given.
pub struct Means<'s, 't, T: Gradient> {
    step: &'s mut Step<'t>,
    buckets: VecDeque<Buffer<T>>,
    /// The bucket that is read next, and from where.
    at: (usize, usize),
    /// How many are still to be read.
    left: usize,
    len: usize,
}

impl<T: Gradient> Means<'_, '_, T> {
    /// Copies the next ones into `means`.
    ///
    /// # Panics
    /// If so many were not given.
    pub fn take(&mut self, means: &mut [T]) {
        let left = self.left.checked_sub(means.len());
        self.left = left.unwrap_or_else(|| panic!("{} means are left, not {}", self.left, means.len()));
        let mut rest = means;
        while !rest.is_empty() {
            let (bucket, from) = self.at;
            let result = self.buckets[bucket].result();
            let some = &result[from..][..rest.len().min(result.len() - from)];
            let now = rest.split_off_mut(..some.len()).expect("it is no longer");
            now.copy_from_slice(some);
            self.at =
                if from + some.len() == result.len() { (bucket + 1, 0) } else { (bucket, from + some.len()) };
        }
    }
}

impl<T: Gradient> Drop for Means<'_, '_, T> {
    fn drop(&mut self) {
        let generation = self.step.generation;
        self.step.trainer.keep_buckets(generation, self.len, std::mem::take(&mut self.buckets));
    }
}

impl<'t> Step<'t> {
    /// Turns mean gradients over this rank's samples into the means over the whole step, as
    /// [`all_reduce_means`](Step::all_reduce_means) does, while `compute` still makes others: it gives each to the
    /// [`Buckets`] when it is ready. Adding up begins whenever `bucket_bytes` are there; 25 MB is a usual size, and all ranks
    /// name the same.
    ///
    /// It returns what `compute` does, and the means.
    ///
    /// # Errors
    /// [`Interrupted`] if the world broke or a rank has [failed](Buckets::fail). What `compute` returned is then lost.
    pub fn all_reduce_while<T: Gradient, R>(
        &mut self,
        bucket_bytes: usize,
        compute: impl FnOnce(&mut Buckets<'_, T>) -> R,
    ) -> Result<(R, Means<'_, 't, T>), Interrupted> {
        let len = (bucket_bytes / size_of::<T>()).max(1);
        let (weight, word, generation) = (self.begin_gradients()?, self.failure(), self.generation);
        let (kept, hub) = (self.trainer.kept(), Arc::clone(self.trainer.hub()));
        let had = match kept.as_ref().map(|kept| kept.numbers::<T>()) {
            Some(None) => return Err(self.has_other_gradients()),
            had => had.flatten(),
        };
        let empty = self.trainer.take_buckets::<T>(generation, len);
        let Some(group) = self.trainer.group(generation) else { return Err(Interrupted) };
        let abort = group.abort_handle();
        let (full, to_reduce) = channel();
        let done = &AtomicUsize::new(0);
        let filling = Numbers::Copied(Vec::new());
        let mut buckets = Buckets { full, empty, filling, filled: 0, len, weight, had, given: 0, word, done };
        buckets.filling = buckets.next();
        let ran = std::thread::scope(|scope| {
            // If `compute` panics, both are dropped on the way out, and the thread ends.
            let (mut buckets, _panicking) = (buckets, Panicking(abort));
            let thread = std::thread::Builder::new().name("reknit-reduce".to_owned());
            let thread = thread.spawn_scoped(scope, move || reduce_all(group, len, to_reduce, done))?;
            let computed = compute(&mut buckets);
            // As late as can be: what is known by now counts.
            let is_alike = buckets.end(hub.look(Session::wishes));
            let Buckets { full, empty, given, word, .. } = buckets;
            drop(full);
            match thread.join() {
                Ok(all) => Ok((computed, empty, (given, is_alike), word, all)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        let (computed, empty, (given, is_alike), word, (numbers, result)) = match ran {
            Ok(ran) => ran,
            Err(why) => {
                let why: std::io::Error = why;
                let why = format!("no thread to add up gradients on: {why}");
                self.trainer.hub().bring(|session| session.machine_failed(why));
                return Err(Interrupted);
            }
        };
        let ended = self.ended(result);
        if !is_alike {
            return Err(self.has_other_gradients());
        }
        let has_failed = word.contains(ControlWord::FAILED);
        if ended == Err(Ended::WorldOver) && self.trainer.retries_in_place() && !has_failed {
            let numbers = numbers.iter().flat_map(|numbers| numbers.iter().copied()).collect();
            self.keep_for_retry(Numbers::Copied::<T>(numbers));
            return Err(Interrupted);
        }
        let buffer = |numbers| match numbers {
            Numbers::InBuffer(buffer) => Some(buffer),
            Numbers::Copied(_) => None,
        };
        let buckets = numbers.into_iter().filter_map(buffer).chain(empty).collect();
        // Dropped, they are there for the next step.
        let means = Means { step: self, buckets, at: (0, 0), left: given, len };
        ended.map(|()| (computed, means)).map_err(|_| Interrupted)
    }
}

/// Adds bucket after bucket up, until one cannot be or a rank has failed; returns all that came, what was added up first, and
/// the word of all.
fn reduce_all<T: Gradient>(
    group: &mut Group,
    len: usize,
    full: Receiver<(Numbers<T>, ControlWord)>,
    done: &AtomicUsize,
) -> (Vec<Numbers<T>>, Result<ControlWord, Broken>) {
    let mut all = Vec::new();
    let mut result = Ok(ControlWord::default());
    for (mut numbers, word) in full {
        // All ranks see it at the same bucket.
        if let Ok(words) = &result
            && !words.contains(ControlWord::FAILED)
        {
            let words = *words;
            let outcome;
            (numbers, outcome) = reduce(group, len, numbers, word);
            result = outcome.map(|word| words | word);
        }
        done.fetch_add(1, Ordering::Relaxed);
        all.push(numbers);
    }
    (all, result)
}

fn reduce<T: Gradient>(
    group: &mut Group,
    len: usize,
    numbers: Numbers<T>,
    word: ControlWord,
) -> (Numbers<T>, Result<ControlWord, Broken>) {
    let mut buffer = match numbers {
        Numbers::InBuffer(buffer) => buffer,
        // The first step of a world: there was no bucket yet.
        Numbers::Copied(numbers) => match group.buffer::<T>(len) {
            Ok(mut buffer) => {
                buffer.set_len(numbers.len());
                buffer.copy_from_slice(&numbers);
                buffer
            }
            Err(broken) => return (Numbers::Copied(numbers), Err(broken)),
        },
    };
    let result = group.all_reduce_buffer(&mut buffer, ReduceOp::Sum, word);
    (Numbers::InBuffer(buffer), result)
}
