//! The CUDA driver: the functions of it that are used, loaded at run time, and the devices behind it.
//!
//! The table is our own, as NCCL's is. The crate cudarc was looked at for it (0.19): it panics when the library or a function
//! is missing, can be told no file to take, and waits for streams without a deadline; what would be left of it
//! are types.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::library::{Loaded, Missing, Wanted, function_table};

const DRIVER: Wanted = Wanted {
    name: "the CUDA driver",
    files: &["libcuda.so.1"],
    variable: None,
    wheel: &[],
    hint: "install the driver of the GPU; in a container, start it with the NVIDIA runtime",
};

pub(crate) type RawStream = *mut c_void;
pub(crate) type RawEvent = *mut c_void;
pub(crate) type RawContext = *mut c_void;
pub(crate) type RawModule = *mut c_void;
pub(crate) type RawFunction = *mut c_void;
/// An address in a device's memory.
pub(crate) type RawAddress = u64;
type RawResult = c_int;

/// `CUDA_ERROR_NOT_READY`: the stream or the event has not got there yet.
const NOT_READY: RawResult = 600;
/// `CU_STREAM_NON_BLOCKING`: it does not wait for the default stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: c_uint = 2;

function_table! {
    /// The functions, as in `cuda.h`.
    Functions {
        init: "cuInit" (c_uint) -> RawResult;
        version: "cuDriverGetVersion" (*mut c_int) -> RawResult;
        device_count: "cuDeviceGetCount" (*mut c_int) -> RawResult;
        device_get: "cuDeviceGet" (*mut c_int, c_int) -> RawResult;
        device_name: "cuDeviceGetName" (*mut c_char, c_int, c_int) -> RawResult;
        context_retain: "cuDevicePrimaryCtxRetain" (*mut RawContext, c_int) -> RawResult;
        context_release: "cuDevicePrimaryCtxRelease_v2" (c_int) -> RawResult;
        context_enter: "cuCtxSetCurrent" (RawContext) -> RawResult;
        allocate: "cuMemAlloc_v2" (*mut RawAddress, usize) -> RawResult;
        free: "cuMemFree_v2" (RawAddress) -> RawResult;
        host_allocate: "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint) -> RawResult;
        host_free: "cuMemFreeHost" (*mut c_void) -> RawResult;
        copy_in: "cuMemcpyHtoDAsync_v2" (RawAddress, *const c_void, usize, RawStream) -> RawResult;
        copy_out: "cuMemcpyDtoHAsync_v2" (*mut c_void, RawAddress, usize, RawStream) -> RawResult;
        stream_create: "cuStreamCreate" (*mut RawStream, c_uint) -> RawResult;
        stream_destroy: "cuStreamDestroy_v2" (RawStream) -> RawResult;
        stream_query: "cuStreamQuery" (RawStream) -> RawResult;
        stream_wait: "cuStreamWaitEvent" (RawStream, RawEvent, c_uint) -> RawResult;
        event_create: "cuEventCreate" (*mut RawEvent, c_uint) -> RawResult;
        event_record: "cuEventRecord" (RawEvent, RawStream) -> RawResult;
        event_query: "cuEventQuery" (RawEvent) -> RawResult;
        event_destroy: "cuEventDestroy_v2" (RawEvent) -> RawResult;
        module_load: "cuModuleLoadData" (*mut RawModule, *const c_void) -> RawResult;
        module_unload: "cuModuleUnload" (RawModule) -> RawResult;
        module_function: "cuModuleGetFunction" (*mut RawFunction, RawModule, *const c_char) -> RawResult;
        launch: "cuLaunchKernel" (
            RawFunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, RawStream, *mut *mut c_void,
            *mut *mut c_void
        ) -> RawResult;
        error_name: "cuGetErrorName" (RawResult, *mut *const c_char) -> RawResult;
        => optional {}
    }
}

/// An answer of the driver other than success.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {name} ({code})")]
#[non_exhaustive]
pub struct DriverError {
    /// Which function.
    pub call: &'static str,
    /// What it answered.
    pub code: i32,
    /// The name of that.
    pub name: String,
}

/// The driver, found and started.
#[derive(Clone)]
pub struct Driver {
    shared: Arc<Shared>,
}

struct Shared {
    functions: Functions,
    version: i32,
    loaded: Loaded,
}

impl Driver {
    /// The driver of this machine.
    pub fn load() -> Result<Driver, Missing> {
        Driver::open(None)
    }

    /// The driver from this file and no other.
    pub fn load_from(path: &Path) -> Result<Driver, Missing> {
        Driver::open(Some(path))
    }

    fn open(path: Option<&Path>) -> Result<Driver, Missing> {
        let loaded = DRIVER.load(path)?;
        let functions = Functions::resolve(|symbol| loaded.address(symbol))
            .map_err(|symbol| DRIVER.lacks(&loaded, symbol))?;
        let mut driver = Shared { functions, version: 0, loaded };
        let unusable =
            |error: DriverError| Missing::Unusable { library: DRIVER.name, why: error.to_string() };
        // SAFETY: it is the first call that there has to be, and may be made again.
        driver.check("cuInit", unsafe { (functions.init)(0) }).map_err(unusable)?;
        let mut version = 0;
        // SAFETY: it writes one integer.
        driver.check("cuDriverGetVersion", unsafe { (functions.version)(&mut version) }).map_err(unusable)?;
        driver.version = version;
        Ok(Driver { shared: Arc::new(driver) })
    }

    /// The newest CUDA that it serves, as a major and a minor number.
    pub fn version(&self) -> (i32, i32) {
        (self.shared.version / 1000, self.shared.version % 1000 / 10)
    }

    /// Which file it is.
    pub fn path(&self) -> &str {
        &self.shared.loaded.path
    }

    /// How many devices there are.
    pub fn devices(&self) -> Result<u32, DriverError> {
        let mut count = 0;
        // SAFETY: it writes one integer.
        self.check("cuDeviceGetCount", unsafe { (self.functions().device_count)(&mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The device of this number, ready to be used.
    pub fn gpu(&self, index: u32) -> Result<Gpu, DriverError> {
        let functions = self.functions();
        let (mut device, mut context) = (0, std::ptr::null_mut());
        let index = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: it writes one integer, and says so if there is no such device.
        self.check("cuDeviceGet", unsafe { (functions.device_get)(&mut device, index) })?;
        let mut name = [0; 128];
        // SAFETY: it writes at most so many bytes, the zero at the end among them.
        let named = unsafe { (functions.device_name)(name.as_mut_ptr(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", named)?;
        // SAFETY: it has just been written, with a zero within.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        // SAFETY: it writes one handle, which is released when the last of who uses the device is dropped.
        let retained = unsafe { (functions.context_retain)(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", retained)?;
        let context = Context { driver: self.clone(), device, context, name };
        let context = Arc::new(context);
        let copies = Stream::new(&context)?;
        Ok(Gpu { context, copies: Arc::new(copies) })
    }

    pub(crate) fn functions(&self) -> &Functions {
        &self.shared.functions
    }

    pub(crate) fn check(&self, call: &'static str, result: RawResult) -> Result<(), DriverError> {
        self.shared.check(call, result)
    }
}

impl Shared {
    fn check(&self, call: &'static str, result: RawResult) -> Result<(), DriverError> {
        if result == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: it writes one pointer to a text that lives as long as the library, or null.
        let known = unsafe { (self.functions.error_name)(result, &mut name) };
        let name = if known == 0 && !name.is_null() {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            "unknown error".to_owned()
        };
        Err(DriverError { call, code: result, name })
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.version();
        write!(f, "Driver(CUDA {major}.{minor}, {})", self.path())
    }
}

/// A device, and a stream of it for copies. Clones are the same device.
#[derive(Clone)]
pub struct Gpu {
    pub(crate) context: Arc<Context>,
    pub(crate) copies: Arc<Stream>,
}

impl Gpu {
    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.context.name
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({} {})", self.context.device, self.context.name)
    }
}

/// A device's primary context, which NCCL uses too.
pub(crate) struct Context {
    pub(crate) driver: Driver,
    device: c_int,
    context: RawContext,
    name: String,
}

// SAFETY: the driver's functions may be called from any thread, and the handle is only ever given to them.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Makes it the calling thread's: what most functions act upon.
    pub(crate) fn enter(&self) -> Result<&Functions, DriverError> {
        // SAFETY: the context is retained for as long as `self` lives.
        let entered = unsafe { (self.driver.functions().context_enter)(self.context) };
        self.driver.check("cuCtxSetCurrent", entered)?;
        Ok(self.driver.functions())
    }

    pub(crate) fn check(&self, call: &'static str, result: RawResult) -> Result<(), DriverError> {
        self.driver.check(call, result)
    }

    /// Whether something has been reached, by the answer of a query.
    fn reached(&self, call: &'static str, result: RawResult) -> Result<bool, DriverError> {
        if result == NOT_READY { Ok(false) } else { self.check(call, result).map(|()| true) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, and everything that uses it holds it alive.
        // A device that cannot be released is the driver's to clean up, when the process ends.
        let _ = unsafe { (self.driver.functions().context_release)(self.device) };
    }
}

/// Work of a device that is done in order. Streams of this crate never wait for the device's default one.
pub struct Stream {
    pub(crate) context: Arc<Context>,
    raw: RawStream,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}
// SAFETY: as for `Context`.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Stream, DriverError> {
        let functions = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes one handle, of the context that was just entered.
        context.check("cuStreamCreate", unsafe { (functions.stream_create)(&mut raw, NON_BLOCKING) })?;
        Ok(Stream { context: context.clone(), raw })
    }

    /// A stream of `gpu`'s.
    pub fn on(gpu: &Gpu) -> Result<Stream, DriverError> {
        Stream::new(&gpu.context)
    }

    pub(crate) fn raw(&self) -> RawStream {
        self.raw
    }

    /// Whether all that was given to it is done.
    pub fn is_done(&self) -> Result<bool, DriverError> {
        let functions = self.context.enter()?;
        // SAFETY: the handle lives as long as `self`.
        self.context.reached("cuStreamQuery", unsafe { (functions.stream_query)(self.raw) })
    }

    /// The point that the stream reaches when all is done that it has been given so far.
    pub fn record(&self) -> Result<Event, DriverError> {
        let functions = self.context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: it writes one handle.
        self.context.check("cuEventCreate", unsafe { (functions.event_create)(&mut raw, NO_TIMING) })?;
        let event = Event { context: self.context.clone(), raw };
        // SAFETY: both handles are alive, and of one context.
        let recorded = unsafe { (functions.event_record)(event.raw, self.raw) };
        self.context.check("cuEventRecord", recorded)?;
        Ok(event)
    }

    /// Has what is given to this stream from now on wait for `event`, which may be another stream's.
    pub fn wait_for(&self, event: &Event) -> Result<(), DriverError> {
        let functions = self.context.enter()?;
        // SAFETY: both handles are alive; the driver keeps what it needs of the event.
        let waits = unsafe { (functions.stream_wait)(self.raw, event.raw, 0) };
        self.context.check("cuStreamWaitEvent", waits)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: the handle is given up here. What is still under way goes on without it.
            let _ = unsafe { (functions.stream_destroy)(self.raw) };
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.raw)
    }
}

/// A point in a stream's work.
pub struct Event {
    context: Arc<Context>,
    raw: RawEvent,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    /// Whether the stream has got there.
    pub fn is_done(&self) -> Result<bool, DriverError> {
        let functions = self.context.enter()?;
        // SAFETY: the handle lives as long as `self`.
        self.context.reached("cuEventQuery", unsafe { (functions.event_query)(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: the handle is given up here; the driver frees it when the stream is past it.
            let _ = unsafe { (functions.event_destroy)(self.raw) };
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:?})", self.raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_from_one_with() {
        let missing = Driver::load_from(Path::new("/nowhere/libcuda.so.1")).unwrap_err();
        assert!(missing.to_string().contains("the CUDA driver could not be loaded"), "{missing}");
        let missing = Driver::load_from(Path::new("libc.so.6")).unwrap_err();
        assert!(matches!(missing, Missing::Symbol { symbol: "cuInit", .. }), "{missing}");
    }

    #[test]
    fn a_function_that_is_absent_is_named() {
        for symbol in Functions::SYMBOLS.0 {
            let without =
                Functions::resolve(|asked| (asked != *symbol).then(|| asked.as_ptr().cast_mut().cast()));
            assert_eq!(without.err(), Some(*symbol));
        }
    }
}
