//! A communicator: one rank's end of a ring, the operations that run on it, and what NCCL says about both.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use half::{bf16, f16};
use reknit_collectives::{
    AbortHandle, BreakReason, ControlWord, Element, Group, GroupOptions, Listener, ListenerOptions, Place,
    ReduceOp, Secret,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::faults;
use crate::root::{self, Id};

pub(crate) const SUCCESS: i32 = 0;
pub(crate) const SYSTEM_ERROR: i32 = 2;
pub(crate) const INVALID_ARGUMENT: i32 = 4;
pub(crate) const INVALID_USAGE: i32 = 5;
pub(crate) const REMOTE_ERROR: i32 = 6;
pub(crate) const IN_PROGRESS: i32 = 7;

/// NCCL has no time limits, so nor has this.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

pub(crate) struct Comm {
    pub(crate) rank: u32,
    pub(crate) size: u32,
    inner: Mutex<Inner>,
    changed: Condvar,
    group: Mutex<Option<Group>>,
    /// Ends operations.
    stop: AbortHandle,
    /// Ends what is made of this, while it is being formed.
    bootstrap: AbortHandle,
    /// Ends the forming of this: its own, or its parent's, over whose connections it is formed.
    formed_over: AbortHandle,
    /// What an operation that cannot go on waits for.
    ended: AtomicBool,
}

#[derive(Default)]
struct Inner {
    result: i32,
    revoked: bool,
    running: usize,
    forming: bool,
    /// What the ring was made of, so that others can be made of it.
    net: Option<Net>,
}

/// What ranks need to reach each other, also when one of them is gone.
#[derive(Clone)]
struct Net {
    seed: u64,
    listener: Arc<Listener>,
    roster: Vec<SocketAddr>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Comm {
    fn new(rank: u32, size: u32, parent: Option<&Comm>) -> Arc<Comm> {
        let bootstrap = AbortHandle::new();
        let formed_over = parent.map_or(&bootstrap, |parent| &parent.bootstrap).clone();
        Arc::new(Comm {
            rank,
            size,
            inner: Mutex::new(Inner { result: IN_PROGRESS, forming: true, ..Inner::default() }),
            changed: Condvar::new(),
            group: Mutex::new(None),
            stop: AbortHandle::new(),
            bootstrap,
            formed_over,
            ended: AtomicBool::new(false),
        })
    }

    /// Begins to form a communicator from nothing.
    pub(crate) fn init(id: Id, size: u32, rank: u32) -> Arc<Comm> {
        let comm = Comm::new(rank, size, None);
        comm.form(None, move |comm| comm.meet(id));
        comm
    }

    /// Begins to form one of who is left.
    pub(crate) fn shrink(self: &Arc<Comm>, exclude: &[u32], abort: bool) -> Option<Arc<Comm>> {
        let left: Vec<u32> = (0..self.size).filter(|rank| !exclude.contains(rank)).collect();
        let rank = left.iter().position(|rank| *rank == self.rank)? as u32;
        let net = lock(&self.inner).net.clone()?;
        // What is being formed waits on its parent's connections, so it is the parent's abort that frees it.
        let child = Comm::new(rank, left.len() as u32, Some(self));
        let roster: Vec<SocketAddr> = left.iter().map(|rank| net.roster[*rank as usize]).collect();
        let seed = exclude.iter().fold(net.seed, |seed, rank| mix(seed ^ u64::from(*rank + 1)));
        let parent = self.clone();
        child.form(Some(self.clone()), move |child| {
            if abort {
                parent.end_operations();
            }
            child.ring(Net { seed, listener: net.listener, roster })
        });
        Some(child)
    }

    /// Begins to add newcomers.
    pub(crate) fn grow(self: &Arc<Comm>, size: u32, id: Option<Id>) -> Arc<Comm> {
        let child = Comm::new(self.rank, size, Some(self));
        let parent = self.clone();
        child.form(Some(self.clone()), move |child| {
            let mut bytes = id.map_or([0; 128], Id::bytes);
            let told = match lock(&parent.group).as_mut() {
                Some(group) => group.broadcast(&mut bytes[..], Rank(0), ControlWord::NONE).is_ok(),
                None => false,
            };
            let id = if told { Id::read(&bytes) } else { None };
            id.is_some_and(|id| child.meet(id))
        });
        child
    }

    /// Runs `work` in the background: while it does, this, and what it is made of, are in progress.
    fn form(
        self: &Arc<Comm>,
        parent: Option<Arc<Comm>>,
        work: impl FnOnce(&Arc<Comm>) -> bool + Send + 'static,
    ) {
        let comm = self.clone();
        if let Some(parent) = &parent {
            lock(&parent.inner).result = IN_PROGRESS;
        }
        thread::spawn(move || {
            while faults::is("init", "hang") && !comm.formed_over.is_aborted() {
                thread::sleep(Duration::from_millis(1));
            }
            let formed = !faults::is("init", "error") && work(&comm);
            let result = if formed { SUCCESS } else { SYSTEM_ERROR };
            if let Some(parent) = parent {
                lock(&parent.inner).result = SUCCESS;
            }
            let mut inner = lock(&comm.inner);
            (inner.result, inner.forming) = (result, false);
            comm.changed.notify_all();
        });
    }

    /// Meets the others at a root.
    fn meet(self: &Arc<Comm>, id: Id) -> bool {
        let options = ListenerOptions { hold: FOR_EVER, ..ListenerOptions::default() };
        let Ok(listener) = Listener::bind((Ipv4Addr::LOCALHOST, 0).into(), options) else { return false };
        let listens = listener.local_addr();
        match root::join(id, self.size, self.rank, listens, &self.formed_over) {
            Some(roster) => self.ring(Net { seed: id.seed, listener: Arc::new(listener), roster }),
            None => false,
        }
    }

    fn ring(self: &Arc<Comm>, net: Net) -> bool {
        let mut secret = [0; 32];
        secret.chunks_mut(8).for_each(|part| part.copy_from_slice(&net.seed.to_le_bytes()));
        let place = Place {
            generation: Generation(net.seed),
            rank: Rank(self.rank),
            size: WorldSize(self.size),
            secret: Secret::new(secret),
            next: net.roster[(self.rank as usize + 1) % net.roster.len()],
        };
        let door = net.listener.open_ring(&place);
        let options = GroupOptions { form: FOR_EVER, stall: FOR_EVER, ..GroupOptions::default() };
        // A ring that stands must outlive the bootstrap of what is made of it, so it is not formed with that handle.
        let both = self.stop.clone();
        let watched = self.formed_over.clone();
        let formed = Arc::new(AtomicBool::new(false));
        let seen = formed.clone();
        let watcher = thread::spawn(move || {
            while !seen.load(Ordering::Acquire) {
                if watched.is_aborted() {
                    both.abort(BreakReason::Aborted);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let group = Group::form(&door, &place, &options, self.stop.clone());
        formed.store(true, Ordering::Release);
        let _ = watcher.join();
        let Ok(group) = group else { return false };
        *lock(&self.group) = Some(group);
        lock(&self.inner).net = Some(net);
        true
    }

    pub(crate) fn result(&self) -> i32 {
        lock(&self.inner).result
    }

    pub(crate) fn is_revoked(&self) -> bool {
        lock(&self.inner).revoked
    }

    /// Says that an operation has been given to a stream.
    pub(crate) fn begin(&self) {
        lock(&self.inner).running += 1;
    }

    /// Runs an operation, on its stream. If it fails it does not end by itself, as on a GPU.
    pub(crate) fn reduce(&self, input: usize, output: usize, count: usize, dtype: i32, op: ReduceOp) {
        let (from, to) = (input, output);
        let done = !self.ended.load(Ordering::Acquire)
            && !faults::is("reduce", "hang")
            && match lock(&self.group).as_mut() {
                None => false,
                Some(group) => match dtype {
                    1 => run::<u8>(group, from, to, count, op),
                    2 => run::<i32>(group, from, to, count, op),
                    4 => run::<i64>(group, from, to, count, op),
                    6 => run::<f16>(group, from, to, count, op),
                    7 => run::<f32>(group, from, to, count, op),
                    8 => run::<f64>(group, from, to, count, op),
                    9 => run::<bf16>(group, from, to, count, op),
                    _ => false,
                },
            };
        let mut inner = lock(&self.inner);
        if !done {
            if !faults::is("reduce", "hang") && inner.result == SUCCESS && !self.ended.load(Ordering::Acquire)
            {
                inner.result = REMOTE_ERROR;
            }
            while !self.ended.load(Ordering::Acquire) {
                inner = self
                    .changed
                    .wait_timeout(inner, Duration::from_millis(5))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        inner.running -= 1;
        self.changed.notify_all();
    }

    /// Ends what runs on streams, and waits until it has.
    fn end_operations(&self) {
        self.stop.abort(BreakReason::Aborted);
        self.ended.store(true, Ordering::Release);
        self.changed.notify_all();
        let mut inner = lock(&self.inner);
        while inner.running > 0 {
            inner = self
                .changed
                .wait_timeout(inner, Duration::from_millis(5))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(inner);
        *lock(&self.group) = None;
    }

    pub(crate) fn revoke(self: &Arc<Comm>) -> i32 {
        if faults::is("revoke", "error") {
            return SYSTEM_ERROR;
        }
        {
            let mut inner = lock(&self.inner);
            if inner.revoked {
                return INVALID_ARGUMENT;
            }
            (inner.revoked, inner.result) = (true, IN_PROGRESS);
        }
        let comm = self.clone();
        thread::spawn(move || {
            faults::hang_while("revoke");
            comm.end_operations();
            lock(&comm.inner).result = SUCCESS;
        });
        IN_PROGRESS
    }

    /// Meets all ranks for the last time.
    pub(crate) fn finalize(self: &Arc<Comm>) -> i32 {
        lock(&self.inner).result = IN_PROGRESS;
        let comm = self.clone();
        thread::spawn(move || {
            faults::hang_while("finalize");
            let met =
                lock(&comm.group).as_mut().is_some_and(|group| group.barrier(ControlWord::NONE).is_ok());
            lock(&comm.inner).result = if met { SUCCESS } else { REMOTE_ERROR };
        });
        IN_PROGRESS
    }

    /// Ends all of it, and waits for its forming to end: which hangs if it is formed over a parent that was not aborted before.
    pub(crate) fn abort(&self) {
        faults::hang_while("abort");
        self.bootstrap.abort(BreakReason::Aborted);
        let mut inner = lock(&self.inner);
        while inner.forming {
            inner = self
                .changed
                .wait_timeout(inner, Duration::from_millis(5))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(inner);
        self.end_operations();
    }
}

/// An all-reduce over the ring.
fn run<T: Element>(group: &mut Group, input: usize, output: usize, count: usize, op: ReduceOp) -> bool {
    // SAFETY: who gives an operation to a stream keeps its memory until the stream is past it, as with NVIDIA's; both are
    // allocated with an alignment of 256 bytes, and any bits are a number.
    let output_numbers = unsafe { std::slice::from_raw_parts_mut(output as *mut T, count) };
    if input == output {
        return group.all_reduce(output_numbers, op, ControlWord::NONE).is_ok();
    }
    // SAFETY: as above; the two do not overlap.
    let input_numbers = unsafe { std::slice::from_raw_parts(input as *const T, count) };
    group.all_reduce_into(input_numbers, output_numbers, op, ControlWord::NONE).is_ok()
}

/// Another number for every number, far from it.
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (number ^ (number >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53)
}
