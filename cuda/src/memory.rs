//! Numbers in a device's memory.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::Element;

use crate::driver::{Context, DriverError, Event, Gpu, RawAddress, Stream};
use crate::wait::{Waited, wait};

/// Why memory could not be had, or not be copied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The driver refused.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The device did not do it in time. It hangs, or is busy with something very long.
    #[error("the device has not copied for {waited:?}")]
    Stalled {
        /// How long was waited.
        waited: Duration,
    },
}

/// So many numbers in a device's memory.
///
/// A collective that did not end keeps the memory: it is not freed under what may still write to it.
pub struct DeviceBuffer<T> {
    allocation: Arc<Allocation>,
    gpu: Gpu,
    len: usize,
    numbers: PhantomData<fn() -> T>,
}

/// What is freed when nobody uses it any more: neither a buffer nor an operation on it.
pub(crate) struct Allocation {
    context: Arc<Context>,
    address: RawAddress,
}

impl<T: Element> DeviceBuffer<T> {
    /// The numbers of `host`, copied to `gpu`.
    pub fn from_host(gpu: &Gpu, host: &[T], patience: Duration) -> Result<DeviceBuffer<T>, MemoryError> {
        let buffer = DeviceBuffer::undefined(gpu, host.len())?;
        buffer.copy_from(host, patience)?;
        Ok(buffer)
    }

    /// Room for `len` numbers, of whatever value.
    pub fn undefined(gpu: &Gpu, len: usize) -> Result<DeviceBuffer<T>, MemoryError> {
        let functions = gpu.context.enter()?;
        let mut address = 0;
        // The driver gives no empty memory.
        let bytes = size_of::<T>().saturating_mul(len).max(1);
        // SAFETY: it writes one address.
        let allocated = unsafe { (functions.allocate)(&mut address, bytes) };
        gpu.context.check("cuMemAlloc", allocated)?;
        let allocation = Arc::new(Allocation { context: gpu.context.clone(), address });
        Ok(DeviceBuffer { allocation, gpu: gpu.clone(), len, numbers: PhantomData })
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device's address of the first one, for other libraries.
    pub fn address(&self) -> u64 {
        self.allocation.address
    }

    /// Copies `host` into it.
    ///
    /// # Panics
    /// If `host` is longer or shorter.
    pub fn copy_from(&self, host: &[T], patience: Duration) -> Result<(), MemoryError> {
        assert_eq!(host.len(), self.len, "a buffer is filled as a whole");
        let bytes = size_of_val(host);
        if bytes == 0 {
            return Ok(());
        }
        let staging = Staging::new(&self.gpu, bytes)?;
        // SAFETY: both are so many bytes, and do not overlap; numbers have no padding.
        unsafe {
            std::ptr::copy_nonoverlapping(host.as_ptr().cast::<u8>(), staging.host.cast::<u8>(), bytes)
        };
        let functions = self.gpu.context.enter()?;
        let stream = &self.gpu.copies;
        // SAFETY: both are so many bytes. `finish` sees to it that neither is freed before the copy is over.
        let copied =
            unsafe { (functions.copy_in)(self.allocation.address, staging.host, bytes, stream.raw()) };
        self.gpu.context.check("cuMemcpyHtoDAsync", copied)?;
        self.finish(staging, stream, patience).map(drop)
    }

    /// A copy of the numbers.
    pub fn to_host(&self, patience: Duration) -> Result<Vec<T>, MemoryError> {
        let mut host = vec![T::zeroed(); self.len];
        let bytes = size_of_val(&host[..]);
        if bytes == 0 {
            return Ok(host);
        }
        let staging = Staging::new(&self.gpu, bytes)?;
        let functions = self.gpu.context.enter()?;
        let stream = &self.gpu.copies;
        // SAFETY: both are so many bytes. `finish` sees to it that neither is freed before the copy is over.
        let copied =
            unsafe { (functions.copy_out)(staging.host, self.allocation.address, bytes, stream.raw()) };
        self.gpu.context.check("cuMemcpyDtoHAsync", copied)?;
        let staging = self.finish(staging, stream, patience)?;
        // SAFETY: both are so many bytes, and do not overlap; any bits are a number.
        unsafe {
            std::ptr::copy_nonoverlapping(staging.host.cast::<u8>(), host.as_mut_ptr().cast::<u8>(), bytes)
        };
        Ok(host)
    }

    /// Waits for the copy, and gives the staging back. If the copy does not end, what it uses is leaked.
    fn finish(&self, staging: Staging, stream: &Stream, patience: Duration) -> Result<Staging, MemoryError> {
        let reached = stream.record().and_then(|event| match wait(patience, || false, || look(&event)) {
            Waited::Came(result) => result.map(|()| true),
            Waited::Missed | Waited::GivenUp => Ok(false),
        });
        if let Ok(true) = reached {
            return Ok(staging);
        }
        std::mem::forget(staging);
        std::mem::forget(self.allocation.clone());
        reached?;
        Err(MemoryError::Stalled { waited: patience })
    }

    /// What keeps the memory alive.
    pub(crate) fn allocation(&self) -> Arc<Allocation> {
        self.allocation.clone()
    }
}

/// An event's answer, once it has one.
pub(crate) fn look(event: &Event) -> Option<Result<(), DriverError>> {
    match event.is_done() {
        Ok(false) => None,
        Ok(true) => Some(Ok(())),
        Err(error) => Some(Err(error)),
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceBuffer({} at {:#x})", self.len, self.allocation.address)
    }
}

impl fmt::Debug for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Allocation({:#x})", self.address)
    }
}

impl Allocation {
    pub(crate) fn address(&self) -> RawAddress {
        self.address
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: the memory is given up here. Nothing uses it any more: every operation holds it alive.
            let _ = unsafe { (functions.free)(self.address) };
        }
    }
}

/// Memory of the host that the device can copy by itself, so that the call returns at once.
struct Staging {
    context: Arc<Context>,
    host: *mut c_void,
}

impl Staging {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Staging, DriverError> {
        let functions = gpu.context.enter()?;
        let mut host = std::ptr::null_mut();
        // SAFETY: it writes one address.
        gpu.context.check("cuMemHostAlloc", unsafe { (functions.host_allocate)(&mut host, bytes, 0) })?;
        Ok(Staging { context: gpu.context.clone(), host })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.enter() {
            // SAFETY: the memory is given up here, and no copy of it is under way.
            let _ = unsafe { (functions.host_free)(self.host) };
        }
    }
}
