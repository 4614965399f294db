//! A stand-in for libnccl.so.2, for tests on machines without a GPU: its communicators are rings of `reknit-collectives`, and it
//! goes wrong when a test asks for it.
//!
//! It has the functions that `reknit-cuda` uses, checks what it is given more strictly than NCCL does, and writes down what
//! is called, above all what is called with a handle that was given up. Like NCCL it has no time limits, and an operation
//! that has lost a peer stays on its stream until it is ended. It proves the code above it, not how NCCL behaves.
//!
//! `reknit_stand_in_set` takes what is to go wrong: `version=22703`, `init=hang|error`, `reduce=hang`, `revoke=hang|error`,
//! `abort=hang`, `finalize=hang`, `call=hang` (asking for an error does not return), `seat=wrong`.
//! `reknit_stand_in_report` gives what was called.

#![allow(non_snake_case, reason = "the names are NVIDIA's")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "the functions are those that they stand in for")]

mod comm;
mod faults;
mod root;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use reknit_collectives::ReduceOp;

use comm::{Comm, IN_PROGRESS, INVALID_ARGUMENT, INVALID_USAGE, SUCCESS, SYSTEM_ERROR};
use root::Id;

type Result = c_int;
type Handle = *mut c_void;

/// The handles that are alive.
static ALIVE: Mutex<BTreeMap<usize, Arc<Comm>>> = Mutex::new(BTreeMap::new());

thread_local! {
    static GROUP_DEPTH: Cell<u32> = const { Cell::new(0) };
    static GROUP_RESULT: Cell<Result> = const { Cell::new(SUCCESS) };
}

/// What lies behind a stream's handle: see the stand-in for the driver.
#[repr(C)]
struct StreamHandle {
    magic: u64,
    give: extern "C" fn(*const StreamHandle, extern "C" fn(*mut c_void), *mut c_void),
}

const STREAM_MAGIC: u64 = 0x7265_6b6e_6974_5354;

/// The configuration as NCCL 2.30 reads it.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    numbers: [c_int; 3],
    net_name: *const c_char,
    more_numbers: [c_int; 2],
    name: *const c_char,
    most_numbers: [c_int; 10],
}

fn alive() -> std::sync::MutexGuard<'static, BTreeMap<usize, Arc<Comm>>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The communicator of a handle that is alive.
fn comm_of(call: &str, handle: Handle) -> Option<Arc<Comm>> {
    let found = alive().get(&(handle as usize)).cloned();
    if found.is_none() && !handle.is_null() {
        faults::wrong(format!("{call} with a handle that was given up"));
    }
    found
}

fn register(comm: Arc<Comm>) -> Handle {
    let handle = Arc::as_ptr(&comm).cast_mut().cast::<c_void>();
    alive().insert(handle as usize, comm);
    handle
}

/// What a call returns that goes on in the background.
fn in_progress() -> Result {
    GROUP_RESULT.set(IN_PROGRESS);
    IN_PROGRESS
}

/// Whether a configuration is what the header's initialiser gives, but for being non-blocking.
unsafe fn is_non_blocking(config: *const Config) -> bool {
    if config.is_null() {
        return false;
    }
    // SAFETY: the caller gives a whole one, as with NVIDIA's; a shorter one is told by its size.
    let config = unsafe { &*config };
    let unset = |numbers: &[c_int]| numbers.iter().all(|number| *number == c_int::MIN);
    let right = config.size == size_of::<Config>()
        && config.magic == 0xcafe_beef
        && config.version >= 21403
        && config.blocking == 0
        && unset(&config.numbers)
        && config.net_name.is_null()
        && unset(&config.more_numbers)
        && config.name.is_null()
        && unset(&config.most_numbers);
    if !right {
        faults::wrong("a configuration that is not one".to_owned());
    }
    right
}

/// Takes what is to go wrong, in place of all before.
///
/// # Safety
/// `text` ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reknit_stand_in_set(text: *const c_char) {
    // SAFETY: as the caller says.
    faults::set(&unsafe { CStr::from_ptr(text) }.to_string_lossy());
}

/// Writes what was called to `text`, cut off after `len` bytes, and returns how many bytes it is.
///
/// # Safety
/// There is room for `len` bytes at `text`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reknit_stand_in_report(text: *mut c_char, len: usize) -> usize {
    let report = faults::report();
    // SAFETY: as the caller says.
    unsafe { std::ptr::copy_nonoverlapping(report.as_ptr().cast(), text, report.len().min(len)) };
    report.len()
}

/// How many handles have not been given up.
#[unsafe(no_mangle)]
pub extern "C" fn reknit_stand_in_handles() -> usize {
    alive().len()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> Result {
    let code = faults::get("version").and_then(|text| text.parse().ok()).unwrap_or(23007);
    // SAFETY: the caller gives room for it, as with NVIDIA's.
    unsafe { version.write(code) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: Handle) -> *const c_char {
    c"the stand-in has nothing to add".as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut [u8; 128]) -> Result {
    faults::note("ncclGetUniqueId");
    match root::open() {
        // SAFETY: as above.
        Some(made) => unsafe { id.write(made.bytes()) },
        None => return SYSTEM_ERROR,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> Result {
    faults::note("ncclGroupStart");
    GROUP_DEPTH.set(GROUP_DEPTH.get() + 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> Result {
    faults::note("ncclGroupEnd");
    match GROUP_DEPTH.get() {
        0 => INVALID_USAGE,
        depth => {
            GROUP_DEPTH.set(depth - 1);
            GROUP_RESULT.replace(SUCCESS)
        }
    }
}

/// An id that is passed by value, as NCCL's is.
#[repr(C)]
pub struct IdBytes([u8; 128]);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut Handle,
    size: c_int,
    id: IdBytes,
    rank: c_int,
    config: *mut c_void,
) -> Result {
    faults::note("ncclCommInitRankConfig");
    // SAFETY: as with NVIDIA's.
    let non_blocking = unsafe { is_non_blocking(config.cast()) };
    let Some(id) = Id::read(&id.0).filter(|_| non_blocking && rank >= 0 && rank < size) else {
        return INVALID_ARGUMENT;
    };
    let made = register(Comm::init(id, size as u32, rank as u32));
    // SAFETY: as with NVIDIA's.
    unsafe { comm.write(made) };
    in_progress()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: Handle, error: *mut Result) -> Result {
    faults::hang_while("call");
    let Some(comm) = comm_of("ncclCommGetAsyncError", comm) else { return INVALID_ARGUMENT };
    // SAFETY: as with NVIDIA's.
    unsafe { error.write(comm.result()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(comm: Handle, count: *mut c_int) -> Result {
    let Some(comm) = comm_of("ncclCommCount", comm) else { return INVALID_ARGUMENT };
    // SAFETY: as with NVIDIA's.
    unsafe { count.write(comm.size as c_int) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(comm: Handle, rank: *mut c_int) -> Result {
    let Some(comm) = comm_of("ncclCommUserRank", comm) else { return INVALID_ARGUMENT };
    let wrong = c_int::from(faults::is("seat", "wrong"));
    // SAFETY: as with NVIDIA's.
    unsafe { rank.write(comm.rank as c_int + wrong) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(comm: Handle) -> Result {
    faults::note("ncclCommAbort");
    if comm.is_null() {
        return SUCCESS;
    }
    if GROUP_DEPTH.get() == 0 {
        faults::wrong("an abort outside of a group".to_owned());
    }
    let Some(comm) = alive().remove(&(comm as usize)) else {
        faults::wrong("ncclCommAbort with a handle that was given up".to_owned());
        return INVALID_ARGUMENT;
    };
    comm.abort();
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommRevoke(comm: Handle, flags: c_int) -> Result {
    faults::note("ncclCommRevoke");
    let Some(comm) = comm_of("ncclCommRevoke", comm).filter(|_| flags == 0) else { return INVALID_ARGUMENT };
    match comm.revoke() {
        IN_PROGRESS => in_progress(),
        result => result,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommShrink(
    comm: Handle,
    exclude: *mut c_int,
    count: c_int,
    child: *mut Handle,
    config: *mut c_void,
    flags: c_int,
) -> Result {
    faults::note("ncclCommShrink");
    // SAFETY: as with NVIDIA's.
    let non_blocking = unsafe { is_non_blocking(config.cast()) };
    let Some(comm) = comm_of("ncclCommShrink", comm).filter(|_| non_blocking && count > 0) else {
        return INVALID_ARGUMENT;
    };
    // SAFETY: the caller gives so many numbers.
    let exclude = unsafe { std::slice::from_raw_parts(exclude.cast::<u32>(), count as usize) };
    let Some(made) = comm.shrink(exclude, flags == 1) else { return INVALID_ARGUMENT };
    // SAFETY: as with NVIDIA's.
    unsafe { child.write(register(made)) };
    in_progress()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetUniqueId(comm: Handle, id: *mut [u8; 128]) -> Result {
    faults::note("ncclCommGetUniqueId");
    match comm_of("ncclCommGetUniqueId", comm) {
        Some(comm) if comm.rank == 0 && comm.size > 1 && !comm.is_revoked() => {}
        Some(_) | None => return INVALID_ARGUMENT,
    }
    match root::open() {
        // SAFETY: as with NVIDIA's.
        Some(made) => unsafe { id.write(made.bytes()) },
        None => return SYSTEM_ERROR,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGrow(
    comm: Handle,
    size: c_int,
    id: *const [u8; 128],
    rank: c_int,
    child: *mut Handle,
    config: *mut c_void,
) -> Result {
    faults::note("ncclCommGrow");
    // SAFETY: as with NVIDIA's.
    let non_blocking = unsafe { is_non_blocking(config.cast()) };
    // SAFETY: it is null or an id.
    let id = if id.is_null() { None } else { Id::read(unsafe { &*id }) };
    let made = match (comm_of("ncclCommGrow", comm), id) {
        (None, Some(id)) if comm.is_null() && rank >= 0 => register(Comm::init(id, size as u32, rank as u32)),
        (Some(comm), id)
            if rank == -1
                && size > comm.size as c_int
                && comm.size > 1
                && !comm.is_revoked()
                && id.is_some() == (comm.rank == 0) =>
        {
            register(comm.grow(size as u32, id))
        }
        (Some(_) | None, _) => return INVALID_ARGUMENT,
    };
    if !non_blocking {
        return INVALID_ARGUMENT;
    }
    // SAFETY: as with NVIDIA's.
    unsafe { child.write(made) };
    in_progress()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(comm: Handle) -> Result {
    faults::note("ncclCommFinalize");
    match comm_of("ncclCommFinalize", comm) {
        Some(comm) if !comm.is_revoked() => {
            comm.finalize();
            in_progress()
        }
        Some(_) | None => INVALID_ARGUMENT,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(comm: Handle) -> Result {
    faults::note("ncclCommDestroy");
    match alive().remove(&(comm as usize)) {
        Some(_) => SUCCESS,
        None => {
            faults::wrong("ncclCommDestroy with a handle that was given up".to_owned());
            INVALID_ARGUMENT
        }
    }
}

/// An operation on its way through a stream.
struct Reduce {
    comm: Arc<Comm>,
    input: usize,
    output: usize,
    count: usize,
    dtype: c_int,
    op: ReduceOp,
}

extern "C" fn run(reduce: *mut c_void) {
    // SAFETY: it was made for this one call.
    let Reduce { comm, input, output, count, dtype, op } = *unsafe { Box::from_raw(reduce.cast::<Reduce>()) };
    comm.reduce(input, output, count, dtype, op);
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> Result {
    faults::note("ncclAllReduce");
    let Some(comm) = comm_of("ncclAllReduce", comm) else { return INVALID_ARGUMENT };
    let op = match op {
        0 => ReduceOp::Sum,
        2 => ReduceOp::Max,
        3 => ReduceOp::Min,
        4 => ReduceOp::Mean,
        _ => return INVALID_ARGUMENT,
    };
    if !matches!(dtype, 1 | 2 | 4 | 6 | 7 | 8 | 9) || comm.result() == IN_PROGRESS {
        return INVALID_ARGUMENT;
    }
    if comm.is_revoked() {
        return INVALID_USAGE;
    }
    let stream = stream.cast::<StreamHandle>().cast_const();
    // SAFETY: the caller gives a stream of the driver that stands in, and of no other.
    let handle = unsafe { &*stream };
    if handle.magic != STREAM_MAGIC {
        return INVALID_ARGUMENT;
    }
    comm.begin();
    let reduce = Reduce { comm, input: input as usize, output: output as usize, count, dtype, op };
    (handle.give)(stream, run, Box::into_raw(Box::new(reduce)).cast());
    SUCCESS
}
