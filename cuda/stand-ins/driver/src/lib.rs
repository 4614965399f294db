//! A stand-in for libcuda.so.1, for tests on machines without a GPU: the memory of its devices is the host's, a stream is a
//! thread that does what it is given in order, and an event is a point in that order.
//!
//! It has the functions that `reknit-cuda` uses, and no more. It says nothing about how a real driver behaves; what it proves
//! is how the code above it does. [`reknit_stand_in_alive`] tells what has not been given back, so that a test can
//! look for leaks.
//!
//! A stream's handle is the address of a [`StreamHandle`], of which the first word is [`STREAM_MAGIC`] and the second a
//! function that gives the stream work: so the stand-in for NCCL can use a stream without knowing who made it.

#![allow(non_snake_case, reason = "the names are NVIDIA's")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "the functions are those that they stand in for")]

pub mod kernels;

use std::collections::HashSet;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Result = c_int;

const SUCCESS: Result = 0;
const INVALID_VALUE: Result = 1;
const OUT_OF_MEMORY: Result = 2;
const INVALID_DEVICE: Result = 101;
const INVALID_CONTEXT: Result = 201;
const INVALID_HANDLE: Result = 400;
const NOT_FOUND: Result = 500;
const NOT_READY: Result = 600;

/// How many devices there are.
const DEVICES: c_int = 4;

/// What a stream's handle begins with.
pub const STREAM_MAGIC: u64 = 0x7265_6b6e_6974_5354;

/// What lies behind a stream's handle.
#[repr(C)]
pub struct StreamHandle {
    /// Always [`STREAM_MAGIC`].
    pub magic: u64,
    /// Gives the stream work: the function is called with the argument, in the stream's order.
    pub give: extern "C" fn(*const StreamHandle, extern "C" fn(*mut c_void), *mut c_void),
    work: Mutex<Option<Sender<Work>>>,
    /// How much it was given, and how much of that it has done.
    given: AtomicU64,
    done: Arc<AtomicU64>,
}

type Work = Box<dyn FnOnce() + Send>;

struct EventHandle {
    reached: Mutex<Arc<AtomicBool>>,
}

/// What was given out and not given back.
#[derive(Default)]
struct Alive {
    contexts: i64,
    memory: HashSet<usize>,
    host_memory: HashSet<usize>,
    streams: HashSet<usize>,
    events: HashSet<usize>,
    sizes: Vec<(usize, usize)>,
}

static ALIVE: Mutex<Option<Alive>> = Mutex::new(None);

thread_local! {
    static CURRENT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

fn with_alive<R>(work: impl FnOnce(&mut Alive) -> R) -> R {
    let mut alive: MutexGuard<'_, Option<Alive>> = ALIVE.lock().unwrap_or_else(PoisonError::into_inner);
    work(alive.get_or_insert_with(Alive::default))
}

fn is_entered() -> bool {
    CURRENT.get() != 0
}

/// How many contexts, pieces of memory, pieces of host memory, streams and events have not been given back, in this order.
///
/// # Safety
/// There is room for five numbers at `counts`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reknit_stand_in_alive(counts: *mut i64) {
    let now = with_alive(|alive| {
        let len = |set: &HashSet<usize>| set.len() as i64;
        let Alive { contexts, memory, host_memory, streams, events, .. } = alive;
        [*contexts, len(memory), len(host_memory), len(streams), len(events)]
    });
    // SAFETY: as the caller says.
    unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), counts, now.len()) };
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Result {
    if flags == 0 { SUCCESS } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Result {
    // SAFETY: the caller gives room for it, as with NVIDIA's.
    unsafe { version.write(13000) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Result {
    // SAFETY: as above.
    unsafe { count.write(DEVICES) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, index: c_int) -> Result {
    if !(0..DEVICES).contains(&index) {
        return INVALID_DEVICE;
    }
    // SAFETY: as above.
    unsafe { device.write(index) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Result {
    let text = format!("stand-in {device}\0");
    if usize::try_from(len).unwrap_or(0) < text.len() {
        return INVALID_VALUE;
    }
    // SAFETY: there is room for `len` bytes, and it is no more.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> Result {
    with_alive(|alive| alive.contexts += 1);
    // SAFETY: as above. A device's context is its number, one up, so that it is not null.
    unsafe { context.write((device as usize + 1) as *mut c_void) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Result {
    with_alive(|alive| alive.contexts -= 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> Result {
    CURRENT.set(context as usize);
    SUCCESS
}

/// Memory of the host, remembered in `set`.
fn allocate(
    bytes: usize,
    set: impl FnOnce(&mut Alive) -> &mut HashSet<usize>,
) -> std::result::Result<usize, Result> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    let Ok(layout) = std::alloc::Layout::from_size_align(bytes, 256) else { return Err(OUT_OF_MEMORY) };
    // SAFETY: the layout is not empty.
    let address = unsafe { std::alloc::alloc(layout) } as usize;
    if address == 0 {
        return Err(OUT_OF_MEMORY);
    }
    with_alive(|alive| {
        alive.sizes.push((address, bytes));
        set(alive).insert(address);
    });
    Ok(address)
}

fn free(address: usize, set: impl FnOnce(&mut Alive) -> &mut HashSet<usize>) -> Result {
    let bytes = with_alive(|alive| {
        if !set(alive).remove(&address) {
            return None;
        }
        let at = alive.sizes.iter().position(|(known, _)| *known == address)?;
        Some(alive.sizes.swap_remove(at).1)
    });
    let Some(layout) = bytes.and_then(|bytes| std::alloc::Layout::from_size_align(bytes, 256).ok()) else {
        return INVALID_VALUE;
    };
    // SAFETY: it was allocated with this layout, and was in the set until now.
    unsafe { std::alloc::dealloc(address as *mut u8, layout) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Result {
    if !is_entered() {
        return INVALID_CONTEXT;
    }
    match allocate(bytes, |alive| &mut alive.memory) {
        // SAFETY: as above.
        Ok(got) => unsafe { address.write(got as u64) },
        Err(error) => return error,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Result {
    free(address as usize, |alive| &mut alive.memory)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> Result {
    match allocate(bytes, |alive| &mut alive.host_memory) {
        // SAFETY: as above.
        Ok(got) => unsafe { address.write(got as *mut c_void) },
        Err(error) => return error,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: *mut c_void) -> Result {
    free(address as usize, |alive| &mut alive.host_memory)
}

fn copy(to: usize, from: usize, bytes: usize, stream: *mut c_void) -> Result {
    give(stream, move || {
        // SAFETY: who asks for a copy keeps both pieces until it is over, as with NVIDIA's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Result {
    copy(to as usize, from as usize, bytes, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> Result {
    copy(to as usize, from as usize, bytes, stream)
}

extern "C" fn give_call(
    stream: *const StreamHandle,
    call: extern "C" fn(*mut c_void),
    argument: *mut c_void,
) {
    let argument = argument as usize;
    give(stream.cast_mut().cast(), move || call(argument as *mut c_void));
}

/// Has the stream do `work` after all that it was given before.
fn give(stream: *mut c_void, work: impl FnOnce() + Send + 'static) -> Result {
    if !with_alive(|alive| alive.streams.contains(&(stream as usize))) {
        return INVALID_HANDLE;
    }
    // SAFETY: it is one of the streams that are alive; destroying one that is being used is an error with NVIDIA's too.
    let handle = unsafe { &*stream.cast::<StreamHandle>() };
    let sender = handle.work.lock().unwrap_or_else(PoisonError::into_inner);
    handle.given.fetch_add(1, Ordering::AcqRel);
    match sender.as_ref().map(|sender| sender.send(Box::new(work))) {
        Some(Ok(())) => SUCCESS,
        Some(Err(_)) | None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> Result {
    if !is_entered() {
        return INVALID_CONTEXT;
    }
    if flags > 1 {
        return INVALID_VALUE;
    }
    let (sender, works) = channel::<Work>();
    let done = Arc::new(AtomicU64::new(0));
    let count = done.clone();
    let spawned = std::thread::Builder::new().name("stand-in-stream".to_owned()).spawn(move || {
        for work in works {
            work();
            count.fetch_add(1, Ordering::AcqRel);
        }
    });
    if spawned.is_err() {
        return OUT_OF_MEMORY;
    }
    let (work, given) = (Mutex::new(Some(sender)), AtomicU64::new(0));
    let handle = StreamHandle { magic: STREAM_MAGIC, give: give_call, work, given, done };
    let raw = Box::into_raw(Box::new(handle));
    with_alive(|alive| alive.streams.insert(raw as usize));
    // SAFETY: as above.
    unsafe { stream.write(raw.cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Result {
    if !with_alive(|alive| alive.streams.remove(&(stream as usize))) {
        return INVALID_HANDLE;
    }
    // SAFETY: it was made by `cuStreamCreate`, and was alive until now. Its thread ends after what it was given.
    drop(unsafe { Box::from_raw(stream.cast::<StreamHandle>()) });
    SUCCESS
}

/// A flag that is raised when the stream gets there.
fn mark(stream: *mut c_void) -> std::result::Result<Arc<AtomicBool>, Result> {
    let reached = Arc::new(AtomicBool::new(false));
    let flag = reached.clone();
    match give(stream, move || flag.store(true, Ordering::Release)) {
        SUCCESS => Ok(reached),
        error => Err(error),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: *mut c_void) -> Result {
    if !with_alive(|alive| alive.streams.contains(&(stream as usize))) {
        return INVALID_HANDLE;
    }
    // SAFETY: it is one of the streams that are alive.
    let handle = unsafe { &*stream.cast::<StreamHandle>() };
    let all_done = handle.done.load(Ordering::Acquire) == handle.given.load(Ordering::Acquire);
    if all_done { SUCCESS } else { NOT_READY }
}

fn event_of<'a>(event: *mut c_void) -> std::result::Result<&'a EventHandle, Result> {
    if !with_alive(|alive| alive.events.contains(&(event as usize))) {
        return Err(INVALID_HANDLE);
    }
    // SAFETY: it is one of the events that are alive; who uses one while destroying it is in the wrong with NVIDIA's too.
    Ok(unsafe { &*event.cast::<EventHandle>() })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) -> Result {
    let reached = match event_of(event) {
        Ok(event) => event.reached.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        Err(error) => return error,
    };
    give(stream, move || {
        while !reached.load(Ordering::Acquire) {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Result {
    if !is_entered() {
        return INVALID_CONTEXT;
    }
    // Before it was recorded an event counts as reached.
    let reached = Mutex::new(Arc::new(AtomicBool::new(true)));
    let raw = Box::into_raw(Box::new(EventHandle { reached }));
    with_alive(|alive| alive.events.insert(raw as usize));
    // SAFETY: as above.
    unsafe { event.write(raw.cast()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> Result {
    let event = match event_of(event) {
        Ok(event) => event,
        Err(error) => return error,
    };
    match mark(stream) {
        Ok(reached) => *event.reached.lock().unwrap_or_else(PoisonError::into_inner) = reached,
        Err(error) => return error,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: *mut c_void) -> Result {
    match event_of(event) {
        Ok(event) => {
            let reached = event.reached.lock().unwrap_or_else(PoisonError::into_inner);
            if reached.load(Ordering::Acquire) { SUCCESS } else { NOT_READY }
        }
        Err(error) => error,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Result {
    if !with_alive(|alive| alive.events.remove(&(event as usize))) {
        return INVALID_HANDLE;
    }
    // SAFETY: it was made by `cuEventCreate`, and was alive until now.
    drop(unsafe { Box::from_raw(event.cast::<EventHandle>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: Result, name: *mut *const c_char) -> Result {
    let text = match error {
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        _ => return INVALID_VALUE,
    };
    // SAFETY: as above.
    unsafe { name.write(text.as_ptr()) };
    SUCCESS
}
