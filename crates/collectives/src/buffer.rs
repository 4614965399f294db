//! Memory of the library's own, from which an all-reduce takes what it adds without copying it first.
//!
//! Where all ranks share a host it is one segment: every rank's elements, and one result for all of them.
//! ```text
//! ┌─────────────┬─────────────┬─────┬──────────────┐
//! │ rank 0's    │ rank 1's    │ ... │ the result   │     rank r reads its share of every rank's elements and writes
//! └─────────────┴─────────────┴─────┴──────────────┘     its share of the result: no byte is moved twice
//! ```
//! A rank's elements are never written to by anybody else, so they are whole after a break (C-2), and also after a success:
//! they can be added once more, in another world too.

#![allow(unsafe_code, reason = "reads and writes memory that other processes map")]

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use crate::element::Element;
use crate::inputs::{Inputs, elements, elements_mut};
use crate::reduce::ReduceOp;
use crate::segment::{PAGE, Segment};

/// Elements that [`Group::all_reduce_buffer`](crate::Group::all_reduce_buffer) combines where they lie.
///
/// It dereferences to this rank's own elements, zeros at first. What has come of all ranks' elements is in
/// [`result`](Buffer::result).
///
/// It belongs to the group that made it, and outlives it: another group combines it as it does any memory.
pub struct Buffer<T> {
    memory: Memory<T>,
    /// How many elements there are in its memory, and how many of them are in use.
    room: usize,
    len: usize,
    /// Whether the result is one.
    has_result: bool,
}

enum Memory<T> {
    Shared(Shared),
    Private { own: Vec<T>, result: Vec<T> },
}

struct Shared {
    segment: Arc<Segment>,
    /// The segment of the group that it belongs to.
    home: Arc<Segment>,
    halls: Halls,
    own: usize,
    id: u32,
}

/// Where each rank's elements are, and the result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Halls {
    ranks: usize,
    each: usize,
}

impl Halls {
    /// Nothing if there is no such memory.
    pub(crate) fn new(ranks: usize, bytes: usize) -> Option<Halls> {
        // A buffer of nothing is memory too.
        let each = bytes.max(1).checked_next_multiple_of(PAGE)?;
        each.checked_mul(ranks + 1).map(|_| Halls { ranks, each })
    }

    pub(crate) fn bytes(self) -> usize {
        self.each * (self.ranks + 1)
    }

    fn of(self, rank: usize) -> usize {
        rank * self.each
    }

    fn result(self) -> usize {
        self.ranks * self.each
    }
}

impl<T: Element> Buffer<T> {
    pub(crate) fn shared(
        segment: Arc<Segment>,
        home: Arc<Segment>,
        halls: Halls,
        own: usize,
        len: usize,
        id: u32,
    ) -> Buffer<T> {
        Buffer {
            memory: Memory::Shared(Shared { segment, home, halls, own, id }),
            room: len,
            len,
            has_result: false,
        }
    }

    /// One that no other process sees; nothing if there is no memory for it.
    pub(crate) fn private(len: usize) -> Option<Buffer<T>> {
        let memory = Memory::Private { own: zeros(len)?, result: zeros(len)? };
        Some(Buffer { memory, room: len, len, has_result: false })
    }

    /// How many elements each rank has in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many it was made for.
    pub fn room(&self) -> usize {
        self.room
    }

    /// Takes only the first `len` of the elements that it was made for into use, so that collectives over fewer elements
    /// need no buffer of their own. All ranks must have as many. There is no result then.
    ///
    /// # Panics
    /// If it was made for fewer.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.room, "a buffer of {} elements has no {len}", self.room);
        self.len = len;
        self.has_result = false;
    }

    /// What the last collective made of all ranks' elements; nothing before the first, and after one that failed.
    ///
    /// Where ranks share memory it is one result for all of them, which is why it cannot be written to.
    pub fn result(&self) -> &[T] {
        match &self.memory {
            _ if !self.has_result => &[],
            Memory::Private { result, .. } => &result[..self.len],
            // SAFETY: the others write to it only when this rank has entered the next collective over this buffer, which
            // needs it whole; and then it is a result again only if that collective succeeds.
            Memory::Shared(Shared { segment, halls, .. }) => unsafe {
                elements(segment, halls.result(), self.len)
            },
        }
    }

    /// Which of the buffers it is that belong to the group of that segment, if it is one.
    pub(crate) fn id_at(&self, home: &Arc<Segment>) -> Option<u32> {
        match &self.memory {
            Memory::Shared(shared) if Arc::ptr_eq(&shared.home, home) => Some(shared.id),
            Memory::Shared(_) | Memory::Private { .. } => None,
        }
    }

    /// Says whether the result is one.
    pub(crate) fn set_has_result(&mut self, has_result: bool) {
        self.has_result = has_result;
    }

    /// This rank's elements, and where their result goes, in memory that no other process sees. What was shared is from
    /// now on not.
    ///
    /// After a break this is a must: others may still be reading this rank's elements, and the caller may write to them.
    pub(crate) fn detach(&mut self) -> (&mut [T], &mut [T]) {
        if let Memory::Shared(_) = self.memory {
            let len = std::mem::replace(&mut self.len, self.room);
            let own = self.to_vec();
            self.memory = Memory::Private { own, result: vec![T::zeroed(); self.room] };
            self.set_len(len);
        }
        let len = self.len;
        match &mut self.memory {
            Memory::Private { own, result } => (&mut own[..len], &mut result[..len]),
            Memory::Shared(_) => unreachable!("it has just been made private"),
        }
    }

    /// Makes a part of the result from all ranks' elements.
    ///
    /// # Safety
    /// All ranks have written their elements and none writes to them. Nobody reads the result, nor writes this part of it.
    pub(crate) unsafe fn combine(&mut self, op: ReduceOp, part: Range<usize>) {
        let Memory::Shared(Shared { segment, halls, .. }) = &self.memory else {
            unreachable!("only shared memory is combined where it lies")
        };
        let offset = |start: usize| start + part.start * size_of::<T>();
        // SAFETY: the caller's.
        let result = unsafe { elements_mut::<T>(segment, offset(halls.result()), part.len()) };
        // SAFETY: the caller's.
        let of = |rank| unsafe { elements::<T>(segment, offset(halls.of(rank)), part.len()) };
        Inputs::new(0..halls.ranks, of).combine(op, result);
    }
}

fn zeros<T: Element>(len: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).ok()
}

impl<T: Element> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Private { own, .. } => &own[..self.len],
            // SAFETY: only this rank writes to its own elements, and only through `deref_mut`.
            Memory::Shared(Shared { segment, halls, own, .. }) => unsafe {
                elements(segment, halls.of(*own), self.len)
            },
        }
    }
}

impl<T: Element> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Private { own, .. } => &mut own[..self.len],
            // SAFETY: the others read them only in a collective over this buffer, which needs it whole; and once that
            // has failed on this rank the buffer is shared no more.
            Memory::Shared(Shared { segment, halls, own, .. }) => unsafe {
                elements_mut(segment, halls.of(*own), self.len)
            },
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = match &self.memory {
            Memory::Shared(_) => "shared",
            Memory::Private { .. } => "private",
        };
        write!(f, "Buffer({} elements, {memory}, has a result: {})", self.len, self.has_result)
    }
}
