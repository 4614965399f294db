//! The collectives of ranks that share a host, through memory that they share.
//!
//! Every rank has three slots of a window's size. A collective goes through its elements window by window; each rank puts
//! what it contributes to a window into a slot of its own, and takes what it needs from the others':
//! ```text
//!            count s              count s+1                      count s+2
//! offer 0 ────┤ wait s │ take 0, offer 1 ├ wait s+1 │ collect 0, take 1, offer 2 ├ wait s+2 │ collect 1, take 2 …
//!             └ card: which call?
//! ```
//! * offer: copies this rank's contribution to the window into the slot.
//! * take: of an all-reduce, combines this rank's share of the window from all slots, in rank order, and puts the result
//!   where its own contribution to that share would be, which nobody needs. Of the others, copies what it wants for good.
//! * collect: of an all-reduce, copies all shares of the result.
//!
//! One count a window does for both, and three slots are enough: slot `s mod 3` is written before `s` is counted and after
//! all have counted `s - 1`, which they do when they have collected what lay there before. Counts and slots go on from one
//! collective to the next.
//!
//! A sum in place must not touch its caller's elements before nothing can go wrong any more (C-2). Where it takes more than
//! a window, its results are put together in shared memory of their own, once for all ranks, and copied at the end.

#![allow(unsafe_code, reason = "reads and writes memory that other processes map")]

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use reknit_membership::ids::{Rank, WorldSize};

use crate::buffer::{Buffer, Halls};
use crate::call::{Call, HEADER_BYTES};
use crate::element::Element;
use crate::further::{self, Label};
use crate::inputs::{Inputs, elements, elements_mut};
use crate::progress::{Progress, Stop, Stuck, Waiting};
use crate::reduce::ReduceOp;
use crate::schedule::part;
use crate::secret::Nonce;
use crate::segment::{PAGE, Segment, Whereabouts};
use crate::windows::{Windows, stretch};
use crate::word::ControlWord;
use crate::words::{self, SegmentWords};

/// How many slots a rank has.
const SLOTS: u64 = 3;
/// A rank's card says what it calls: a header and a control word. It has two, which take turns.
const CARD_BYTES: usize = 64;
const WORD_AT: usize = HEADER_BYTES;
const IN_PLACE_AT: usize = WORD_AT + ControlWord::BYTES;
/// How many bytes of an all-reduce are combined by every rank for itself, which saves a wait.
const ALONE_BYTES: usize = 4 << 10;
/// How many bytes of a result are made before this rank looks whether it is to stop: well under a millisecond's work.
const ABORTABLE_BYTES: usize = 1 << 20;
/// The memory for results in place is at least so large, and then a power of two, so that it is seldom made anew.
const RESULTS_BYTES_MIN: usize = 4 << 20;

/// Where things are in the segment of so many ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    ranks: usize,
    window: usize,
}

impl Layout {
    /// `window` bytes are a multiple of every element's size.
    pub(crate) fn new(ranks: usize, window: usize) -> Layout {
        assert!(ranks > 0 && window > 0 && window.is_multiple_of(8), "a window holds whole elements");
        Layout { ranks, window }
    }

    fn nonce(self) -> usize {
        words::bytes(self.ranks)
    }

    /// Where the first rank says where a further segment is.
    fn further(self) -> usize {
        self.nonce() + 64
    }

    fn card(self, rank: usize, turn: u64) -> usize {
        self.further() + 64 + (2 * rank + (turn % 2) as usize) * CARD_BYTES
    }

    fn slot(self, rank: usize, step: u64) -> usize {
        let first = self.card(self.ranks, 0).next_multiple_of(PAGE);
        first + (rank * SLOTS as usize + (step % SLOTS) as usize) * self.window.next_multiple_of(PAGE)
    }

    pub(crate) fn bytes(self) -> usize {
        self.slot(self.ranks, 0)
    }
}

/// A segment that is ready to be found by the others: it holds a number that nobody else knows.
pub(crate) fn prepare(layout: Layout, nonce: Nonce) -> io::Result<Segment> {
    let segment = Segment::create(layout.bytes())?;
    let at = segment.at(layout.nonce(), size_of::<Nonce>());
    // SAFETY: it is in the segment, and nobody else knows of that one yet.
    unsafe { at.cast::<Nonce>().write(nonce) };
    Ok(segment)
}

/// The segment that another rank has prepared, if it is that one: a process of the same number in another machine's memory,
/// or one that took the number of a dead one, does not hold the nonce.
pub(crate) fn enter(layout: Layout, place: Whereabouts, nonce: Nonce) -> io::Result<Segment> {
    let segment = Segment::open(place, layout.bytes())?;
    let at = segment.at(layout.nonce(), size_of::<Nonce>());
    // SAFETY: it is in the segment, and was written before anybody was told of it.
    let found = unsafe { at.cast::<Nonce>().read() };
    let is_it = found == nonce;
    if is_it { Ok(segment) } else { Err(io::Error::new(io::ErrorKind::InvalidData, "it is another segment")) }
}

/// What this rank has of its host.
#[derive(Debug)]
pub(crate) struct Host {
    layout: Layout,
    segment: Arc<Segment>,
    progress: Progress,
    own: usize,
    /// How many steps all ranks have counted.
    step: u64,
    /// How many collectives there were.
    turn: u64,
    results: Option<Segment>,
    /// A further segment that this rank has made and not yet come to use: kept here, so that others find it, or that this rank
    /// has given up.
    made: Option<Segment>,
    buffers: u32,
    spin: Duration,
    stall: Duration,
}

/// Why a collective cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostFault {
    Stuck(Stuck),
    Mismatch { ours: Call, theirs: Call, rank: Rank },
    Protocol { what: &'static str, rank: Rank },
    System(io::ErrorKind),
}

impl From<Stuck> for HostFault {
    fn from(stuck: Stuck) -> HostFault {
        HostFault::Stuck(stuck)
    }
}

/// The elements that an all-reduce takes and those that it gives: the same or others.
pub(crate) enum Operands<'a, T> {
    Apart { input: &'a [T], output: &'a mut [T] },
    InPlace(&'a mut [T]),
}

impl<T> Operands<'_, T> {
    fn input(&self) -> &[T] {
        match self {
            Operands::Apart { input, .. } => input,
            Operands::InPlace(data) => data,
        }
    }

    fn output(&mut self) -> &mut [T] {
        match self {
            Operands::Apart { output, .. } => output,
            Operands::InPlace(data) => data,
        }
    }
}

impl Host {
    pub(crate) fn new(segment: Segment, layout: Layout, own: usize, spin: Duration, stall: Duration) -> Host {
        let segment = Arc::new(segment);
        let progress = Progress::new(SegmentWords(segment.clone()), own, layout.ranks);
        let (results, made) = (None, None);
        Host { layout, segment, progress, own, step: 0, turn: 0, results, made, buffers: 0, spin, stall }
    }

    pub(crate) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank(self.own as u32)
    }

    pub(crate) fn size(&self) -> WorldSize {
        WorldSize(self.layout.ranks as u32)
    }

    /// How the ranks wait for each other: what an abort and a loss have to ring.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Every rank's contributions become one result, the same bits on every rank.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        call: Call,
        op: ReduceOp,
        mut operands: Operands<'_, T>,
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        let len = operands.input().len();
        let windows = self.windows::<T>(len);
        if windows.len() == 1 && size_of_val(operands.input()) <= ALONE_BYTES {
            self.offer_all(operands.input(), self.step + 1);
            let word = self.begin(call, word, stop)?;
            let inputs = Inputs::new(self.ranks(), |rank| self.slot::<T>(rank, self.step, 0..len));
            inputs.combine(op, operands.output());
            return Ok(word);
        }
        // More than a window in place: results are put together elsewhere, by all ranks if any one needs it. Before they know
        // that, the memory is made; it takes none before it is written to.
        if windows.len() > 1 {
            self.make_room(size_of_val(operands.input()))?;
        }
        self.offer(&operands.input()[windows.at(0)], self.step + 1);
        let in_place = matches!(operands, Operands::InPlace(_)) && windows.len() > 1;
        let (word, aside) = self.begin_with(call, word, in_place, stop)?;
        if windows.len() > 1 {
            self.find_room(size_of_val(operands.input()))?;
        }
        for at in 0..windows.len() {
            let window = windows.at(at);
            if at > 0 && !aside {
                self.collect(&mut operands.output()[windows.at(at - 1)], self.step - 1);
            }
            self.take(op, operands.input(), window.clone(), aside);
            if at + 1 < windows.len() {
                self.offer(&operands.input()[windows.at(at + 1)], self.step + 1);
            }
            self.count_and_wait(stop)?;
        }
        if let Some(results) = self.results.as_mut().filter(|_| windows.len() > 1) {
            results.close();
        }
        if let (true, Some(results)) = (aside, &self.results) {
            // SAFETY: all have counted, so the results are there, and nobody writes to them before this rank has begun
            // another collective.
            let results = unsafe { elements::<T>(results, 0, len) };
            operands.output().copy_from_slice(results);
        } else {
            let last = windows.at(windows.len() - 1);
            self.collect(&mut operands.output()[last], self.step - 1);
        }
        Ok(word)
    }

    /// Every rank's contributions become one result, of which each rank gets its part: its place in `work`. What is in the
    /// rest of `work` is not touched.
    pub(crate) fn reduce_scatter<T: Element>(
        &mut self,
        call: Call,
        op: ReduceOp,
        input: &[T],
        work: &mut [T],
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        let (ranks, own, len) = (self.layout.ranks, self.own, input.len());
        // A window holds a stretch of every part.
        let each = self.window_len::<T>() / ranks;
        let stretch = |rank: usize, at: usize| stretch(len, ranks, rank, at * each, each);
        let windows = part(len, WorldSize(ranks as u32), Rank(0)).len().div_ceil(each);
        let offer = |host: &Host, at: usize, step: u64| {
            for rank in (0..ranks).filter(|rank| *rank != own) {
                let place = rank * each..rank * each + stretch(rank, at).len();
                // SAFETY: it is this rank's own slot, which nobody reads before the step is counted.
                let slot = unsafe { host.slot_mut::<T>(step, place) };
                slot.copy_from_slice(&input[stretch(rank, at)]);
            }
        };
        offer(self, 0, self.step + 1);
        let word = self.begin(call, word, stop)?;
        for at in 0..windows {
            let place = stretch(own, at);
            let inputs = Inputs::new(self.ranks(), |rank| {
                if rank == own {
                    &input[place.clone()]
                } else {
                    self.slot::<T>(rank, self.step, own * each..own * each + place.len())
                }
            });
            inputs.combine(op, &mut work[place.clone()]);
            if at + 1 < windows {
                offer(self, at + 1, self.step + 1);
                self.count_and_wait(stop)?;
            }
        }
        Ok(word)
    }

    /// Every rank gets what lies in the others' `of`, and gives what lies in its own.
    pub(crate) fn gather<T: Element>(
        &mut self,
        call: Call,
        of: impl Fn(usize) -> Range<usize>,
        work: &mut [T],
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        let each = self.window_len::<T>();
        let longest = (0..self.layout.ranks).map(|rank| of(rank).len()).max().unwrap_or(0);
        let windows = longest.div_ceil(each);
        let stretch = |rank: usize, at: usize| {
            let Range { start, end } = of(rank);
            (start + at * each).min(end)..(start + (at + 1) * each).min(end)
        };
        self.offer_all(&work[stretch(self.own, 0)], self.step + 1);
        let word = self.begin(call, word, stop)?;
        for at in 0..windows {
            for rank in (0..self.layout.ranks).filter(|rank| *rank != self.own) {
                let place = stretch(rank, at);
                let from = self.slot::<T>(rank, self.step, 0..place.len());
                work[place].copy_from_slice(from);
            }
            if at + 1 < windows {
                self.offer_all(&work[stretch(self.own, at + 1)], self.step + 1);
                self.count_and_wait(stop)?;
            }
        }
        Ok(word)
    }

    /// Only the words.
    pub(crate) fn barrier(
        &mut self,
        call: Call,
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        self.begin(call, word, stop)
    }

    /// A buffer of so many elements for every rank, and one for their results.
    pub(crate) fn buffer<T: Element>(
        &mut self,
        call: Call,
        len: usize,
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<(Buffer<T>, ControlWord), HostFault> {
        let too_large = HostFault::System(io::ErrorKind::InvalidInput);
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| too_large.clone())?;
        let halls = Halls::new(self.layout.ranks, bytes).ok_or(too_large)?;
        self.make_further(halls.bytes())?;
        let word = self.begin(call, word, stop)?;
        let mut segment = self.find_further(halls.bytes())?;
        self.count_and_wait(stop)?;
        segment.close();
        let id = self.buffers;
        self.buffers += 1;
        let home = self.segment.clone();
        Ok((Buffer::shared(Arc::new(segment), home, halls, self.own, len, id), word))
    }

    /// As [`all_reduce`](Host::all_reduce), of what lies in the buffers, into what all ranks read.
    pub(crate) fn all_reduce_buffer<T: Element>(
        &mut self,
        call: Call,
        op: ReduceOp,
        buffer: &mut Buffer<T>,
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        let word = self.begin(call, word, stop)?;
        let own = part(buffer.len(), WorldSize(self.layout.ranks as u32), Rank(self.own as u32));
        let most = ABORTABLE_BYTES / size_of::<T>();
        for start in own.clone().step_by(most) {
            if stop() == Some(Stop::Aborted) {
                return Err(Stuck::Stopped(Stop::Aborted).into());
            }
            // SAFETY: all ranks have entered, so their inputs are written and nobody reads the results; and each rank writes
            // its own part of these alone.
            unsafe { buffer.combine(op, start..own.end.min(start + most)) };
        }
        self.count_and_wait(stop)?;
        Ok(word)
    }

    /// Says what this rank calls, waits until all ranks have said so, and compares.
    fn begin(
        &mut self,
        call: Call,
        word: ControlWord,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<ControlWord, HostFault> {
        Ok(self.begin_with(call, word, false, stop)?.0)
    }

    /// The same, and says whether any rank is `in_place`.
    fn begin_with(
        &mut self,
        call: Call,
        word: ControlWord,
        in_place: bool,
        stop: &dyn Fn() -> Option<Stop>,
    ) -> Result<(ControlWord, bool), HostFault> {
        let card = self.segment.at(self.layout.card(self.own, self.turn), CARD_BYTES);
        let header = call.header(Rank(self.own as u32));
        // SAFETY: it is this rank's own card, which nobody reads any more: all have begun the collective after the one
        // that it was for. It is aligned to four bytes.
        unsafe {
            card.cast().write(header);
            card.add(WORD_AT).cast().write(word.0);
            card.add(IN_PLACE_AT).cast().write(u32::from(in_place));
        }
        self.count_and_wait(stop)?;
        let (mut all, mut any_in_place) = (word, in_place);
        for rank in (0..self.layout.ranks).filter(|rank| *rank != self.own) {
            let card = self.segment.at(self.layout.card(rank, self.turn), CARD_BYTES);
            // SAFETY: the rank has written it before it counted, and writes no other there before this one has begun the
            // next collective.
            let (theirs, word, in_place) = unsafe {
                let theirs = card.cast::<[u8; HEADER_BYTES]>().read();
                (theirs, card.add(WORD_AT).cast::<u32>().read(), card.add(IN_PLACE_AT).cast::<u32>().read())
            };
            all |= ControlWord(word);
            any_in_place |= in_place != 0;
            if theirs[..HEADER_BYTES - 4] == header[..HEADER_BYTES - 4] {
                continue;
            }
            let rank = Rank(rank as u32);
            return Err(match Call::from_header(&theirs) {
                Some((theirs, _)) => HostFault::Mismatch { ours: call, theirs, rank },
                None => HostFault::Protocol { what: "what it calls is not a call", rank },
            });
        }
        self.turn += 1;
        Ok((all, any_in_place))
    }

    fn count_and_wait(&mut self, stop: &dyn Fn() -> Option<Stop>) -> Result<(), Stuck> {
        // An abort ends also what nobody has to wait for. A loss does not: the lost one may have done its part.
        if stop() == Some(Stop::Aborted) {
            return Err(Stuck::Stopped(Stop::Aborted));
        }
        self.step += 1;
        self.progress.count(self.step);
        let waiting = Waiting { spin: self.spin, stall: self.stall, until: None, stop };
        self.progress.wait(self.step, &waiting)
    }

    /// Puts this rank's contribution to a window of an all-reduce into its slot, but for its own share.
    fn offer<T: Element>(&self, window: &[T], step: u64) {
        let own = self.share(window.len(), self.own);
        for place in [0..own.start, own.end..window.len()] {
            // SAFETY: it is this rank's own slot, which nobody reads before the step is counted.
            unsafe { self.slot_mut::<T>(step, place.clone()) }.copy_from_slice(&window[place]);
        }
    }

    /// Puts all of it into the slot.
    fn offer_all<T: Element>(&self, elements: &[T], step: u64) {
        // SAFETY: as above.
        unsafe { self.slot_mut::<T>(step, 0..elements.len()) }.copy_from_slice(elements);
    }

    /// Combines this rank's share of a window.
    fn take<T: Element>(&self, op: ReduceOp, input: &[T], window: Range<usize>, aside: bool) {
        let own = self.share(window.len(), self.own);
        let inputs = Inputs::new(self.ranks(), |rank| {
            if rank == self.own {
                &input[window.start + own.start..window.start + own.end]
            } else {
                self.slot::<T>(rank, self.step, own.clone())
            }
        });
        let result = match &self.results {
            // SAFETY: this share of the results is this rank's to write, and nobody reads it before the next count.
            Some(results) if aside => unsafe {
                elements_mut::<T>(results, (window.start + own.start) * size_of::<T>(), own.len())
            },
            // SAFETY: nobody reads a rank's contribution to its own share, and before the next count nobody reads the
            // result.
            _ => unsafe { self.slot_mut::<T>(self.step, own) },
        };
        inputs.combine(op, result);
    }

    /// Copies all shares of the window's result, which was taken at `step`.
    fn collect<T: Element>(&self, window: &mut [T], step: u64) {
        for rank in 0..self.layout.ranks {
            let share = self.share(window.len(), rank);
            window[share.clone()].copy_from_slice(self.slot::<T>(rank, step, share));
        }
    }

    fn share(&self, len: usize, rank: usize) -> Range<usize> {
        part(len, WorldSize(self.layout.ranks as u32), Rank(rank as u32))
    }

    fn ranks(&self) -> Range<usize> {
        0..self.layout.ranks
    }

    fn window_len<T>(&self) -> usize {
        self.layout.window / size_of::<T>()
    }

    fn windows<T>(&self, len: usize) -> Windows {
        Windows { len, each: self.window_len::<T>() }
    }

    /// What lies in a rank's slot of that step, which has been counted by all.
    fn slot<T: Element>(&self, rank: usize, step: u64, place: Range<usize>) -> &[T] {
        let at = self.layout.slot(rank, step) + place.start * size_of::<T>();
        // SAFETY: it is within the slot, whose rank has written it before it counted the step, and writes to it again
        // when all have counted two more.
        unsafe { elements(&self.segment, at, place.len()) }
    }

    /// A place in this rank's own slot of that step.
    ///
    /// # Safety
    /// Nobody reads it before this rank counts again.
    #[expect(clippy::mut_from_ref, reason = "what is shared between processes has no one owner")]
    unsafe fn slot_mut<T: Element>(&self, step: u64, place: Range<usize>) -> &mut [T] {
        assert!(place.end <= self.window_len::<T>(), "{place:?} is not in a window");
        let at = self.layout.slot(self.own, step) + place.start * size_of::<T>();
        // SAFETY: it is within the slot, to which nobody else writes.
        unsafe { elements_mut(&self.segment, at, place.len()) }
    }

    /// Makes memory for results of so many bytes if this rank is the one to do so and there is none.
    fn make_room(&mut self, bytes: usize) -> Result<(), HostFault> {
        if self.results.as_ref().is_some_and(|results| results.bytes() >= bytes) {
            return Ok(());
        }
        // The old one first: two at a time are not needed.
        self.results = None;
        self.make_further(results_bytes(bytes))
    }

    /// Maps the memory for results that was made, unless what there is will do.
    fn find_room(&mut self, bytes: usize) -> Result<(), HostFault> {
        if self.results.is_none() {
            self.results = Some(self.find_further(results_bytes(bytes))?);
        }
        Ok(())
    }

    /// Makes a further segment if this is the first rank, and says where it is.
    fn make_further(&mut self, bytes: usize) -> Result<(), HostFault> {
        let word = self.segment.long_word(self.layout.further());
        self.made = further::make(word, bytes, self.label(self.step), self.own == 0)?;
        Ok(())
    }

    /// The further segment that this rank or the first has made for the step that all have counted since.
    fn find_further(&mut self, bytes: usize) -> Result<Segment, HostFault> {
        if let Some(made) = self.made.take() {
            return Ok(made);
        }
        let word = self.segment.long_word(self.layout.further());
        further::find(word, bytes, self.label(self.step - 1)).map_err(|fault| match fault {
            // The first rank is gone, but not if it said so because another was.
            HostFault::Stuck(Stuck::GivenUp(first)) => {
                Stuck::GivenUp(self.progress.given_up().unwrap_or(first)).into()
            }
            other => other,
        })
    }

    /// What says that a further segment is one of this world, made in that step.
    fn label(&self, step: u64) -> Label {
        let nonce = self.segment.at(self.layout.nonce(), size_of::<Nonce>());
        // SAFETY: it is in the segment, and was written before anybody was told of that.
        (unsafe { nonce.cast::<Nonce>().read() }, step)
    }
}

fn results_bytes(bytes: usize) -> usize {
    bytes.next_power_of_two().max(RESULTS_BYTES_MIN)
}

#[cfg(test)]
mod tests;
