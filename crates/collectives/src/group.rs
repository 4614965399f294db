//! The live ring of one world, and the collectives that run on it.

use std::fmt;
use std::io::ErrorKind;
use std::time::Instant;

use bytemuck::Zeroable;
use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::abort::AbortHandle;
use crate::broken::{BreakReason, Broken};
use crate::buffer::Buffer;
use crate::call::{Call, CallKind};
use crate::door::Door;
use crate::element::Element;
use crate::form::{FormError, GroupOptions, Place, connect};
use crate::host::{Host, HostFault, Operands};
use crate::links::{Links, chunk_bytes};
use crate::meeting::{CARD_BYTES, Card, SharedMemory, Stake, window};
use crate::patience::after;
use crate::progress::Stop;
use crate::reduce::ReduceOp;
use crate::schedule::part;
use crate::scratch::Scratch;
use crate::word::ControlWord;

/// The live connections of one rank in one world's ring.
///
/// All ranks call the same collectives in the same order, with the same type, operation, root and number of elements.
/// Every collective is a barrier too: nobody finishes it before everybody has entered it. Once one has failed, or a
/// neighbour is gone, every later one fails at once and the world has to be formed anew.
///
/// Dropping a group closes its connections, which breaks the groups of its neighbours: on purpose, if all ranks agreed
/// to leave.
pub struct Group {
    generation: Generation,
    rank: Rank,
    size: WorldSize,
    abort: AbortHandle,
    /// Nothing in a world of one.
    links: Option<Links>,
    broken: Option<Broken>,
    sequence: u64,
    /// Room for the elements of an operation that may not touch its caller's before it has succeeded.
    scratch: Scratch,
}

impl Group {
    /// Joins the ring at `place`: connects to the next rank and takes the previous one's connection from `door`.
    ///
    /// Unless shared memory is [unasked](SharedMemory::Unasked) for, it returns when all ranks have told each other which
    /// host they are on. Else it returns when both neighbours are connected, which does not mean that the whole ring is.
    pub fn form(
        door: &Door,
        place: &Place,
        options: &GroupOptions,
        abort: AbortHandle,
    ) -> Result<Group, FormError> {
        let Place { generation, rank, size, .. } = *place;
        let until = after(Instant::now(), options.form);
        let links = match connect(door, place, options, &abort)? {
            None => None,
            Some(neighbours) => {
                let links = Links::new(neighbours, place, options, &abort);
                Some(links.map_err(|source| FormError::System { source })?)
            }
        };
        let mut group = Group {
            generation,
            rank,
            size,
            abort,
            links,
            broken: None,
            sequence: 0,
            scratch: Scratch::default(),
        };
        match options.shared_memory {
            SharedMemory::Offered | SharedMemory::Declined => group.meet(options, until)?,
            SharedMemory::Unasked => {}
        }
        Ok(group)
    }

    /// Finds out whether all ranks share a host, and has them share memory if so.
    fn meet(&mut self, options: &GroupOptions, until: Instant) -> Result<(), FormError> {
        let Some(links) = &mut self.links else { return Ok(()) };
        links.limits.until = Some(until);
        let failed = |source: Broken| match source.reason {
            BreakReason::Aborted => FormError::Aborted { reason: source.reason },
            _ => FormError::Meeting { source },
        };
        let stake = Stake::new(options.shared_memory, self.size, window(chunk_bytes(options), self.size));
        let (own, size) = (self.rank.0 as usize, self.size.0 as usize);
        let mut table = vec![0; size * CARD_BYTES];
        self.all_gather(&stake.card.to_bytes(), &mut table, ControlWord::NONE).map_err(failed)?;
        let cards: Vec<Card> = table.as_chunks().0.iter().map(Card::from_bytes).collect();
        // Each knows from the cards alone whether there is a second round.
        if let Some(shared) = stake.share(&cards, own) {
            let word = if shared.is_ok() { ControlWord::NONE } else { ControlWord::FAILED };
            let word = self.barrier(word).map_err(failed)?;
            if let (Ok((segment, layout)), ControlWord::NONE, Some(links)) = (shared, word, &mut self.links) {
                links.share(segment, layout, options);
            }
        }
        if let Some(links) = &mut self.links {
            links.limits.until = None;
        }
        // What is counted are the caller's.
        self.sequence = 0;
        Ok(())
    }

    /// Whether all ranks are on one host and share memory.
    pub fn shares_memory(&self) -> bool {
        self.links.as_ref().is_some_and(|links| links.host.is_some())
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> WorldSize {
        self.size
    }

    /// Of which world it is.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What ends it from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// Has `callback` called, once and from a thread of the group's own, when the connection with a neighbour ends on
    /// the neighbour's side: within about a millisecond, also while no collective is running, and also if it happened
    /// before this call. It is not called after an abort or for a failure of another kind.
    ///
    /// A neighbour that leaves in good order looks the same as one that dies, and one that passes a break on does too.
    /// The callback should be short: dropping the group waits for it. Setting another one replaces the first.
    pub fn on_neighbour_lost(&mut self, callback: impl FnOnce(Rank) + Send + 'static) {
        if let Some(links) = &self.links {
            links.watcher.on_lost(Box::new(callback));
        }
    }

    /// Has `callback` called, once and from a thread of the group's own, when the previous rank has begun the next
    /// collective and this one has not. Who then begins it too passes that on to the next rank: so ranks that otherwise do
    /// nothing together learn that one of them wants to, without a message before. Once this rank has begun a collective by
    /// itself, the callback may be called for that one, for a later one, or not at all: set it again after each.
    ///
    /// It is never called in a group that [shares memory](Group::shares_memory), where no message tells of a collective:
    /// who needs it forms the group with [`SharedMemory::Unasked`].
    pub fn on_neighbour_ahead(&mut self, callback: impl FnOnce() + Send + 'static) {
        if let Some(links) = &self.links {
            links.watcher.on_ahead(Box::new(callback));
        }
    }

    /// Leaves the control word out from the next collective on, or puts it back: only to measure what it costs. All
    /// ranks must do so at the same time, no part may be empty, and the words that calls return mean nothing.
    #[doc(hidden)]
    pub fn carry_word(&mut self, carry: bool) {
        if let Some(links) = &mut self.links {
            links.carries_word = carry;
        }
    }

    /// Combines the elements of all ranks, in place. If it fails, `data` is bit for bit what it was.
    ///
    /// For that it works in memory of its own, as large as `data`, and copies at the end;
    /// [`all_reduce_into`](Group::all_reduce_into) does without. Ranks that share memory need it once for all.
    pub fn all_reduce<T: Element>(
        &mut self,
        data: &mut [T],
        op: ReduceOp,
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        if self.shares_memory() && !needs_wide::<T>(op) {
            let kind = CallKind::AllReduce { dtype: T::DTYPE, op };
            return self.on_host(kind, data.len(), word, |host, call, stop| {
                host.all_reduce(call, op, Operands::InPlace(data), word, stop)
            });
        }
        self.with_scratch(data.len(), |group, scratch| {
            let word = group.all_reduce_into(data, scratch, op, word)?;
            data.copy_from_slice(scratch);
            Ok(word)
        })
    }

    /// Combines the `input`s of all ranks into `output`, the same bits on every rank. If it fails, what is in `output`
    /// is undefined.
    ///
    /// # Panics
    /// If the two have different lengths.
    pub fn all_reduce_into<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        assert_eq!(input.len(), output.len(), "an all_reduce gives as many elements as it takes");
        self.reduce(CallKind::AllReduce { dtype: T::DTYPE, op }, input, output, word)
    }

    /// Memory for so many elements, zeros at first, from which [`all_reduce_buffer`](Group::all_reduce_buffer) takes them
    /// without a copy. All ranks make the same buffers in the same order; it is a collective like the others, and breaks the
    /// group if there is no memory for it.
    pub fn buffer<T: Element>(&mut self, len: usize) -> Result<Buffer<T>, Broken> {
        let kind = CallKind::Buffer { dtype: T::DTYPE };
        if !self.shares_memory() {
            // The same call everywhere, or it is none: that is all there is to agree upon.
            self.counted_call::<u8>(kind, len as u64, &[], &mut [], ControlWord::NONE)?;
            let none = BreakReason::System { kind: ErrorKind::OutOfMemory };
            return Buffer::private(len).ok_or_else(|| self.breaks(Vec::new(), none));
        }
        let mut made = None;
        self.on_host(kind, len, ControlWord::NONE, |host, call, stop| {
            let (buffer, word) = host.buffer(call, len, ControlWord::NONE, stop)?;
            made = Some(buffer);
            Ok(word)
        })?;
        Ok(made.expect("it was made, or an error"))
    }

    /// Combines the elements of all ranks' buffers into [`Buffer::result`], the same bits on every rank. Each rank's own
    /// elements stay what they are, also if it fails.
    ///
    /// Where ranks share memory no element is copied. A buffer of another group is combined as other memory is; whether it
    /// is one of this group must be the same for all ranks.
    pub fn all_reduce_buffer<T: Element>(
        &mut self,
        buffer: &mut Buffer<T>,
        op: ReduceOp,
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        buffer.set_has_result(false);
        let home = self.links.as_ref().and_then(|links| links.host.as_ref());
        let shared = home.and_then(|host| buffer.id_at(host.segment()));
        let result = match shared {
            Some(id) if !needs_wide::<T>(op) => {
                let kind = CallKind::AllReduceBuffer { dtype: T::DTYPE, op, buffer: id };
                let len = buffer.len();
                let result = self.on_host(kind, len, word, |host, call, stop| {
                    host.all_reduce_buffer(call, op, buffer, word, stop)
                });
                if result.is_err() {
                    buffer.detach();
                }
                result
            }
            _ => {
                let (own, result) = buffer.detach();
                self.all_reduce_into(own, result, op, word)
            }
        };
        buffer.set_has_result(result.is_ok());
        result
    }

    /// Combines the `input`s of all ranks and gives this rank its own [`part`] of the result. If it fails, what is in
    /// `output` is undefined.
    ///
    /// # Panics
    /// If `output` is not as long as this rank's part of `input`.
    pub fn reduce_scatter<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        let own = part(input.len(), self.size, self.rank);
        assert_eq!(own.len(), output.len(), "a reduce_scatter gives a rank its part");
        self.with_scratch(input.len(), |group, scratch| {
            let word = group.reduce(CallKind::ReduceScatter { dtype: T::DTYPE, op }, input, scratch, word)?;
            output.copy_from_slice(&scratch[own]);
            Ok(word)
        })
    }

    /// Gives every rank the `input`s of all ranks, one after the other: each is its rank's [`part`] of `output`. If it
    /// fails, what is in `output` is undefined.
    ///
    /// # Panics
    /// If `input` is not as long as this rank's part of `output`.
    pub fn all_gather<T: Element>(
        &mut self,
        input: &[T],
        output: &mut [T],
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        let own = part(output.len(), self.size, self.rank);
        assert_eq!(own.len(), input.len(), "an all_gather takes a rank's part");
        output[own].copy_from_slice(input);
        self.call(CallKind::AllGather { dtype: T::DTYPE }, &[], output, word)
    }

    /// Gives every rank the `data` of `root`. If it fails, what is in `data` is undefined, but for the root's, which
    /// is never written to.
    ///
    /// # Panics
    /// If `root` is not a rank of this world.
    pub fn broadcast<T: Element>(
        &mut self,
        data: &mut [T],
        root: Rank,
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        assert!(root.0 < self.size.0, "{root:?} is not in a world of {:?}", self.size);
        self.call(CallKind::Broadcast { dtype: T::DTYPE, root }, &[], data, word)
    }

    /// Returns when every rank has called it.
    pub fn barrier(&mut self, word: ControlWord) -> Result<ControlWord, Broken> {
        self.call::<u8>(CallKind::Barrier, &[], &mut [], word)
    }

    /// Runs a reduction, in a wider type where the sum of a mean may not fit.
    fn reduce<T: Element>(
        &mut self,
        kind: CallKind,
        input: &[T],
        work: &mut [T],
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        if kind.op().is_none_or(|op| !needs_wide::<T>(op)) {
            return self.call(kind, input, work, word);
        }
        let wide: Vec<T::Wide> = input.iter().map(|number| number.widen()).collect();
        let mut means = vec![T::Wide::zeroed(); work.len()];
        let word = self.call(kind, &wide, &mut means, word)?;
        work.iter_mut().zip(means).for_each(|(number, mean)| *number = T::narrow(mean));
        Ok(word)
    }

    /// Runs one collective. `input` is what a reduction takes, `work` holds all elements.
    fn call<T: Element>(
        &mut self,
        kind: CallKind,
        input: &[T],
        work: &mut [T],
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        let count = work.len() as u64;
        if self.shares_memory() {
            return self.on_host(kind, work.len(), word, |host, call, stop| match kind {
                CallKind::AllReduce { op, .. } => {
                    host.all_reduce(call, op, Operands::Apart { input, output: work }, word, stop)
                }
                CallKind::ReduceScatter { op, .. } => host.reduce_scatter(call, op, input, work, word, stop),
                CallKind::AllGather { .. } => {
                    let (len, size) = (work.len(), host.size());
                    host.gather(call, |rank| part(len, size, Rank(rank as u32)), work, word, stop)
                }
                CallKind::Broadcast { root, .. } => {
                    let len = work.len();
                    host.gather(
                        call,
                        |rank| if rank == root.0 as usize { 0..len } else { 0..0 },
                        work,
                        word,
                        stop,
                    )
                }
                CallKind::Barrier | CallKind::Buffer { .. } | CallKind::AllReduceBuffer { .. } => {
                    host.barrier(call, word, stop)
                }
            });
        }
        self.counted_call(kind, count, input, work, word)
    }

    /// Runs one collective in the memory that all ranks share.
    fn on_host(
        &mut self,
        kind: CallKind,
        count: usize,
        word: ControlWord,
        work: impl FnOnce(&mut Host, Call, &dyn Fn() -> Option<Stop>) -> Result<ControlWord, HostFault>,
    ) -> Result<ControlWord, Broken> {
        let call = self.next_call(kind, count as u64)?;
        let result = match &mut self.links {
            Some(links) => links.run_on_host(|host, stop| work(host, call, stop)),
            None => Ok(word),
        };
        self.ended(result)
    }

    /// Runs one collective on the ring.
    fn counted_call<T: Element>(
        &mut self,
        kind: CallKind,
        count: u64,
        input: &[T],
        work: &mut [T],
        word: ControlWord,
    ) -> Result<ControlWord, Broken> {
        let call = self.next_call(kind, count)?;
        let result = match &mut self.links {
            None if self.abort.is_aborted() => Err((Vec::new(), BreakReason::Aborted)),
            None => {
                // With one rank every result is its input. The collectives that are no reductions have it in place.
                if kind.op().is_some() {
                    work.copy_from_slice(input);
                }
                Ok(word)
            }
            Some(links) => links.run(call, input, work, word),
        };
        self.ended(result)
    }

    /// The next collective, unless one has failed.
    fn next_call(&mut self, kind: CallKind, count: u64) -> Result<Call, Broken> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let call = Call { sequence: self.sequence, kind, count };
        self.sequence += 1;
        Ok(call)
    }

    /// What a collective that ended so gives its caller.
    fn ended(
        &mut self,
        result: Result<ControlWord, (Vec<Rank>, BreakReason)>,
    ) -> Result<ControlWord, Broken> {
        result.map_err(|(suspects, reason)| self.breaks(suspects, reason))
    }

    /// Remembers that the group is broken.
    fn breaks(&mut self, suspects: Vec<Rank>, reason: BreakReason) -> Broken {
        // Whatever an abort leads to, the abort is the reason.
        let (suspects, reason) = match self.abort.reason() {
            Some(reason) => (Vec::new(), reason),
            None => (suspects, reason),
        };
        self.broken.insert(Broken { generation: self.generation, suspects, reason }).clone()
    }

    /// Lends out the scratch, as `len` elements of whatever value.
    fn with_scratch<T: Element, R>(&mut self, len: usize, work: impl FnOnce(&mut Group, &mut [T]) -> R) -> R {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = work(self, scratch.lend(len));
        self.scratch = scratch;
        result
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Group { generation, rank, size, broken, .. } = self;
        write!(f, "Group({generation:?} {rank:?}/{size:?}, broken: {broken:?})")
    }
}

/// Whether an operation is done in a wider type, because the sum of a mean may not fit.
fn needs_wide<T: Element>(op: ReduceOp) -> bool {
    op == ReduceOp::Mean && size_of::<T>() != size_of::<T::Wide>()
}
