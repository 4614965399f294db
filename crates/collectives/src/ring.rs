//! One collective on one rank: the schedule's steps as one continuous stream of bytes, out to the next rank and in from
//! the previous one.
//!
//! ```text
//! out   header │ word part │ word part │ word part │ ...         one frame per step; parts may be empty
//!               ▲ step 0    ▲ step 1: each byte goes out once the byte of step 0 that it depends on has come in
//! in    header │ word part │ word part │ ...
//! ```
//! There is no message and no wait between steps. A frame's word is the union of all words known here when it goes out,
//! so after `n - 1` frames everybody knows all of them. (A word that goes out in two pieces may gain flags in between.
//! That does no harm: flags are only ever added, so each piece still holds all that are due.) Zeros after the word fill a
//! frame's head up to [`HEAD_BYTES`].
//!
//! What comes in for good is received straight into its place, even where an unfinished sum of this rank still lies:
//! the final value of an element cannot arrive before this rank's share of it has gone out, for it is made of it.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::ops::Range;
use std::time::{Duration, Instant};

use reknit_membership::ids::{Rank, WorldSize};

use crate::abort::AbortHandle;
use crate::call::{Call, HEADER_BYTES, WORDLESS_AT};
use crate::element::Element;
use crate::reduce::ReduceOp;
use crate::schedule::{Action, Pattern, Schedule};
use crate::transport::{Transport, Want};
use crate::word::ControlWord;

/// How many bytes are received beyond what goes straight into its place: enough for the next words and small parts.
const BEYOND_BYTES: usize = 4096;

/// How many bytes of a frame come before its elements. The header and the word need fewer; but behind four bytes alone
/// the system copies all elements at odd addresses, on both sides, and the all-reduce of a megabyte takes a fifth longer
/// (`reknit bench steady` shows it).
pub(crate) const HEAD_BYTES: usize = 64;

/// How many pieces of memory one send gathers at most.
const PIECES_MAX: usize = 4 * PIECES_A_FRAME;
const PIECES_A_FRAME: usize = 3;

/// One collective in progress.
pub(crate) struct Run<'a, T> {
    call: Call,
    schedule: Schedule,
    size: WorldSize,
    prev: Rank,
    header: [u8; HEADER_BYTES],
    word: ControlWord,
    /// Whether frames have a word; always, but to measure what that costs.
    has_words: bool,
    /// What this rank contributes to a reduction; empty in the other collectives.
    input: &'a [T],
    /// All elements, in whatever state they are.
    work: &'a mut [T],
    /// Where bytes wait for the rest of what they belong to. Its length is the size of a chunk.
    staging: &'a mut [u8],
    staged: usize,
    /// How many bytes of this collective are still to be received.
    to_come: usize,
    outgoing: Cursor,
    incoming: Cursor,
    /// Whether sending is worth trying: false once it has found no room, until there is some again.
    room: bool,
    /// Whether receiving is worth trying.
    bytes: bool,
}

/// A place in the stream: so many bytes of the frame of this step are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Cursor {
    step: usize,
    at: usize,
}

/// Why a collective cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    NextLost(ErrorKind),
    PrevLost(ErrorKind),
    /// Nothing moved; what it waited for says whose fault it may be.
    Stalled {
        waited: Duration,
        want: Want,
    },
    Mismatch {
        ours: Call,
        theirs: Call,
    },
    Protocol(&'static str),
    Aborted,
    System(ErrorKind),
}

/// Who runs it, and in which world.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seat {
    pub(crate) size: WorldSize,
    pub(crate) rank: Rank,
    pub(crate) prev: Rank,
}

/// How long to wait, counted from the last byte that moved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Until then, keep trying.
    pub(crate) spin: Duration,
    /// Until then, sleep until there is something to do; after it, give up.
    pub(crate) stall: Duration,
    /// Give up then in any case.
    pub(crate) until: Option<Instant>,
}

/// Runs a collective to its end: the word of all ranks, or why there is none.
pub(crate) fn drive<T: Element>(
    mut run: Run<'_, T>,
    transport: &mut impl Transport,
    abort: &AbortHandle,
    limits: Limits,
) -> Result<ControlWord, Fault> {
    let mut waiting_since = None;
    loop {
        if abort.is_aborted() {
            return Err(Fault::Aborted);
        }
        let moved = run.advance(transport)?;
        if run.is_done() {
            return Ok(run.word);
        }
        if moved {
            waiting_since = None;
            continue;
        }
        let want = run.want();
        let waited = waiting_since.get_or_insert_with(Instant::now).elapsed();
        if waited < limits.spin {
            // Sleeping and being woken takes longer than a neighbour takes to answer, and the core is given away
            // meanwhile to whoever has work.
            std::thread::yield_now();
            (run.room, run.bytes) = (true, true);
            continue;
        }
        let left = limits.stall.saturating_sub(waited);
        let left =
            limits.until.map_or(left, |until| left.min(until.saturating_duration_since(Instant::now())));
        if left.is_zero() {
            return Err(Fault::Stalled { waited, want });
        }
        let ready = transport.wait(want, left).map_err(|error| Fault::System(error.kind()))?;
        run.room |= ready.room;
        run.bytes |= ready.bytes;
        if ready.next_gone {
            return Err(run.last_words(transport, Fault::NextLost(ErrorKind::UnexpectedEof)));
        }
    }
}

impl<'a, T: Element> Run<'a, T> {
    /// A collective that is about to start. Its elements move in the call's own pattern, or in that of another collective
    /// which does a part of it.
    pub(crate) fn new(
        pattern: Pattern,
        call: Call,
        seat: Seat,
        input: &'a [T],
        work: &'a mut [T],
        staging: &'a mut [u8],
        word: ControlWord,
    ) -> Run<'a, T> {
        assert!(staging.len() >= HEADER_BYTES, "a header must fit the staging");
        let Seat { size, rank, prev } = seat;
        let schedule = Schedule::new(pattern, work.len(), size, rank);
        let mut run = Run {
            call,
            schedule,
            size,
            prev,
            header: call.header(rank),
            word,
            has_words: true,
            input,
            work,
            staging,
            staged: 0,
            to_come: 0,
            outgoing: Cursor::default(),
            incoming: Cursor::default(),
            room: true,
            bytes: true,
        };
        run.to_come = run.all_received_bytes();
        run
    }

    /// The same without the word in its stream: what comes out is this rank's own. Only to measure what the word costs,
    /// and only if no rank's part is empty.
    pub(crate) fn without_word(mut self) -> Run<'a, T> {
        let has_elements = (0..self.schedule.steps())
            .all(|step| !self.schedule.sent(step).is_empty() && !self.schedule.received(step).is_empty());
        assert!(has_elements, "a frame without a word must have elements");
        self.has_words = false;
        self.header[WORDLESS_AT] = 1;
        self.to_come = self.all_received_bytes();
        self
    }

    fn all_received_bytes(&self) -> usize {
        (0..self.schedule.steps()).map(|step| self.frame_bytes(step, self.schedule.received(step))).sum()
    }

    /// Moves what can be moved without waiting, a chunk each way at most, and says whether anything did.
    pub(crate) fn advance(&mut self, transport: &mut impl Transport) -> Result<bool, Fault> {
        let sent = match self.send(transport) {
            Ok(sent) => sent,
            Err(error) => return Err(self.last_words(transport, Fault::NextLost(error.kind()))),
        };
        let received = self.receive(transport)?;
        Ok(sent + received > 0)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.all_sent() && self.all_received()
    }

    fn want(&self) -> Want {
        let sendable = self.available(self.outgoing.step) > self.outgoing.at;
        Want { room: sendable && !self.all_sent(), next: !self.all_sent(), bytes: !self.all_received() }
    }

    fn all_sent(&self) -> bool {
        self.outgoing.step == self.schedule.steps()
    }

    fn all_received(&self) -> bool {
        self.incoming.step == self.schedule.steps()
    }

    /// The fault to report when the next rank is gone: if it left because the ranks called different things, then the
    /// previous rank's header may be here and say so, which explains more.
    fn last_words(&mut self, transport: &mut impl Transport, fault: Fault) -> Fault {
        self.bytes = true;
        match self.receive(transport) {
            Err(mismatch @ Fault::Mismatch { .. }) => mismatch,
            Ok(_) | Err(_) => fault,
        }
    }

    fn send(&mut self, transport: &mut impl Transport) -> io::Result<usize> {
        if !self.room || self.all_sent() {
            return Ok(0);
        }
        let mut word = [0; HEAD_BYTES];
        word[..ControlWord::BYTES].copy_from_slice(&self.word.0.to_le_bytes());
        let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
        let (mut count, mut offered) = (0, 0);
        let Cursor { mut step, mut at } = self.outgoing;
        while step < self.schedule.steps() && count + PIECES_A_FRAME <= PIECES_MAX {
            let (lead, head) = (lead(step), self.head_bytes(step));
            let end = self.available(step).min(at + self.staging.len() - offered);
            for (start, bytes) in
                [(0, &self.header[..lead]), (lead, &word[..head - lead]), (head, self.payload(step))]
            {
                let from = at.saturating_sub(start).min(bytes.len());
                let to = end.saturating_sub(start).min(bytes.len());
                if from < to {
                    pieces[count] = IoSlice::new(&bytes[from..to]);
                    count += 1;
                    offered += to - from;
                }
            }
            if end < self.frame_bytes(step, self.schedule.sent(step)) {
                break;
            }
            (step, at) = (step + 1, 0);
        }
        if count == 0 {
            return Ok(0);
        }
        let sent = transport.send(&pieces[..count])?;
        self.room = sent == offered;
        let mut rest = sent;
        while rest > 0 {
            let frame = self.frame_bytes(self.outgoing.step, self.schedule.sent(self.outgoing.step));
            let take = rest.min(frame - self.outgoing.at);
            self.outgoing.advance(take, frame);
            rest -= take;
        }
        Ok(sent)
    }

    /// How many bytes of the frame of `step` can go out: as many as have come in of the frame before, from which they
    /// are made.
    fn available(&self, step: usize) -> usize {
        let frame = || self.frame_bytes(step, self.schedule.sent(step));
        match step.checked_sub(self.incoming.step) {
            _ if step == 0 => frame(),
            None | Some(0) => frame(),
            Some(1) => match self.incoming.at.checked_sub(self.head_bytes(self.incoming.step)) {
                Some(elements) => frame().min(self.head_bytes(step) + elements),
                None => 0,
            },
            Some(_) => 0,
        }
    }

    /// The elements that are sent in `step`.
    fn payload(&self, step: usize) -> &[u8] {
        let sent = self.schedule.sent(step);
        if step == 0 && self.schedule.starts_from_input() {
            bytemuck::cast_slice(&self.input[sent])
        } else {
            bytemuck::cast_slice(&self.work[sent])
        }
    }

    fn receive(&mut self, transport: &mut impl Transport) -> Result<usize, Fault> {
        if !self.bytes || self.all_received() {
            return Ok(0);
        }
        let Cursor { step, at } = self.incoming;
        let (place, head) = (self.schedule.received(step), self.head_bytes(step));
        let frame = self.frame_bytes(step, place.clone());
        let chunk = self.staging.len();
        let places = self.schedule.action(step) == Action::Place;
        let (direct, beyond) = if places && at >= head {
            // Nothing is staged now: it would have been put in its place.
            let rest = &mut bytemuck::cast_slice_mut(&mut self.work[place])[at - head..];
            let beyond = if rest.len() <= chunk { BEYOND_BYTES } else { 0 };
            let bytes = rest.len().min(chunk);
            (&mut rest[..bytes], beyond)
        } else if places && at >= lead(step) && frame > BEYOND_BYTES {
            // The head alone, so that the elements can then go straight into their place.
            (&mut [][..], head - at - self.staged)
        } else {
            (&mut [][..], chunk)
        };
        // Never beyond this collective's last byte: what follows belongs to the next one.
        let beyond = beyond.min(chunk - self.staged).min(self.to_come - direct.len());
        let direct_bytes = direct.len();
        let staging = &mut self.staging[self.staged..self.staged + beyond];
        let received = transport
            .receive(&mut [IoSliceMut::new(direct), IoSliceMut::new(staging)])
            .map_err(|error| Fault::PrevLost(error.kind()))?;
        self.bytes = received == direct_bytes + beyond;
        self.to_come -= received;
        let placed = received.min(direct_bytes);
        self.incoming.advance(placed, frame);
        self.staged += received - placed;
        self.digest()?;
        Ok(received)
    }

    /// Makes use of what is staged, as far as it is complete.
    fn digest(&mut self) -> Result<(), Fault> {
        let mut used = 0;
        while !self.all_received() {
            let Cursor { step, at } = self.incoming;
            let (lead, head) = (lead(step), self.head_bytes(step));
            let place = self.schedule.received(step);
            let frame = self.frame_bytes(step, place.clone());
            let staged = &self.staging[used..self.staged];
            let took = if at < lead {
                let Some(header) = staged.first_chunk() else { break };
                self.check(header)?;
                HEADER_BYTES
            } else if at == lead && self.has_words {
                let Some(word) = staged.first_chunk() else { break };
                self.word |= ControlWord(u32::from_le_bytes(*word));
                ControlWord::BYTES
            } else if at < head {
                staged.len().min(head - at)
            } else {
                let from = at - head;
                let staged = &staged[..staged.len().min(frame - at)];
                match self.schedule.action(step) {
                    Action::Place => {
                        let place: &mut [u8] = bytemuck::cast_slice_mut(&mut self.work[place]);
                        place[from..from + staged.len()].copy_from_slice(staged);
                        staged.len()
                    }
                    action @ (Action::Fold | Action::FoldLast) => {
                        let start = place.start + from / size_of::<T>();
                        let place = start..start + staged.len() / size_of::<T>();
                        let staged = &staged[..place.len() * size_of::<T>()];
                        let op = self.call.kind.op().expect("only a reduction's schedule folds");
                        T::fold(op, staged, &self.input[place.clone()], &mut self.work[place.clone()]);
                        if (action, op) == (Action::FoldLast, ReduceOp::Mean) {
                            T::divide(&mut self.work[place], self.size.0);
                        }
                        staged.len()
                    }
                }
            };
            if took == 0 {
                break;
            }
            used += took;
            self.incoming.advance(took, frame);
        }
        self.staging.copy_within(used..self.staged, 0);
        self.staged -= used;
        Ok(())
    }

    /// Whether the previous rank is about to do the same as this one.
    fn check(&self, header: &[u8; HEADER_BYTES]) -> Result<(), Fault> {
        let mut header = *header;
        let is_wordless = std::mem::take(&mut header[WORDLESS_AT]);
        if is_wordless != self.header[WORDLESS_AT] {
            return Err(Fault::Protocol("one of the two ranks leaves the control word out"));
        }
        match Call::from_header(&header) {
            Some((theirs, sender)) if sender == self.prev && theirs == self.call => Ok(()),
            Some((theirs, sender)) if sender == self.prev => Err(Fault::Mismatch { ours: self.call, theirs }),
            Some(_) => Err(Fault::Protocol("it is another rank than it said when it connected")),
            None => Err(Fault::Protocol("its stream does not start with a header")),
        }
    }

    fn frame_bytes(&self, step: usize, part: Range<usize>) -> usize {
        self.head_bytes(step) + part.len() * size_of::<T>()
    }

    /// How many bytes of a frame come before its elements.
    fn head_bytes(&self, step: usize) -> usize {
        if self.has_words || step == 0 { HEAD_BYTES } else { 0 }
    }
}

impl Cursor {
    /// Moves on by some bytes of its frame; to the next frame at this one's end.
    fn advance(&mut self, bytes: usize, frame_bytes: usize) {
        self.at += bytes;
        if self.at == frame_bytes {
            *self = Cursor { step: self.step + 1, at: 0 };
        }
    }
}

/// How many bytes come before the word of a step's frame.
fn lead(step: usize) -> usize {
    if step == 0 { HEADER_BYTES } else { 0 }
}

#[cfg(test)]
mod tests;
