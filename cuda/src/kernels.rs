//! This crate's kernels on a device: gradients into buckets and out of them, the search for what is not finite, and digests.

use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};
use reknit_collectives::Element;
use reknit_membership::Digest;

use crate::driver::{Context, DriverError, Event, Gpu, RawFunction, RawModule, Stream};
use crate::memory::{Allocation, DeviceBuffer, MemoryError, look};
use crate::nvrtc::Image;
use crate::wait::{Waited, wait};

/// How many threads a block has, and how many blocks there are at most: each thread goes on to further elements.
const THREADS: u32 = 256;
const BLOCKS_MAX: u64 = 4096;

/// The smallest chunk that a device digests, and what all are a multiple of: a block of XXH3.
pub const DIGEST_CHUNK_MIN: u64 = 1024;
/// XXH3 digests this many bytes or fewer in another way, which the host does.
const DIGEST_SHORT: u64 = 240;

/// The types in which a bucket can be.
pub trait Packed: Element {
    /// How the kernels for it are called.
    #[doc(hidden)]
    const NAME: &'static str;
}

impl Packed for f32 {
    const NAME: &'static str = "f32";
}

impl Packed for bf16 {
    const NAME: &'static str = "bf16";
}

impl Packed for f16 {
    const NAME: &'static str = "f16";
}

/// The kernels, loaded to one device.
pub struct Kernels {
    gpu: Gpu,
    module: RawModule,
}

// SAFETY: the driver's functions may be called from any thread, and the handle is only ever given to them.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

/// Work that a device was given, and the memory that it uses. What is dropped before it is done keeps the memory for ever.
#[derive(Debug)]
#[must_use = "the memory of work that is not waited for is leaked"]
pub struct Work {
    event: Event,
    uses: Vec<Arc<Allocation>>,
}

impl Kernels {
    /// Loads the kernels of `image` to `gpu`.
    pub fn load(gpu: &Gpu, image: &Image) -> Result<Kernels, DriverError> {
        let functions = gpu.context.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: it writes one handle; the image ends with a zero.
        let loaded = unsafe { (functions.module_load)(&mut module, image.as_bytes().as_ptr().cast()) };
        gpu.context.check("cuModuleLoadData", loaded)?;
        Ok(Kernels { gpu: gpu.clone(), module })
    }

    /// Has `from`, times `weight`, written to `to` from its number `at` on, in the bucket's type.
    ///
    /// # Panics
    /// If there is not enough room.
    pub fn pack<T: Packed>(
        &self,
        stream: &Stream,
        from: &DeviceBuffer<f32>,
        to: &DeviceBuffer<T>,
        at: usize,
        weight: f64,
    ) -> Result<Work, DriverError> {
        assert!(
            at.checked_add(from.len()).is_some_and(|end| end <= to.len()),
            "a bucket has room for what is packed"
        );
        let to_address = to.address() + (at * size_of::<T>()) as u64;
        let arguments = [from.address(), to_address, from.len() as u64, weight.to_bits()];
        self.launch(stream, &format!("pack_{}", T::NAME), &arguments, from.len() as u64)?;
        self.work(stream, vec![from.allocation(), to.allocation()])
    }

    /// Has the numbers of `from`, from `at` on, times `weight`, written to `to`.
    ///
    /// # Panics
    /// If there are not enough.
    pub fn unpack<T: Packed>(
        &self,
        stream: &Stream,
        from: &DeviceBuffer<T>,
        at: usize,
        to: &DeviceBuffer<f32>,
        weight: f64,
    ) -> Result<Work, DriverError> {
        assert!(
            at.checked_add(to.len()).is_some_and(|end| end <= from.len()),
            "a bucket holds what is unpacked"
        );
        let from_address = from.address() + (at * size_of::<T>()) as u64;
        let arguments = [from_address, to.address(), to.len() as u64, weight.to_bits()];
        // Of f32 there and back are the same.
        let name = if T::NAME == "f32" { "pack_f32".to_owned() } else { format!("unpack_{}", T::NAME) };
        self.launch(stream, &name, &arguments, to.len() as u64)?;
        self.work(stream, vec![from.allocation(), to.allocation()])
    }

    /// Whether every number is finite.
    pub fn are_finite<T: Packed>(
        &self,
        stream: &Stream,
        numbers: &DeviceBuffer<T>,
        patience: Duration,
    ) -> Result<bool, MemoryError> {
        let found = DeviceBuffer::from_host(&self.gpu, &[0i64], patience)?;
        let arguments = [numbers.address(), found.address(), numbers.len() as u64];
        self.launch(stream, &format!("find_infinite_{}", T::NAME), &arguments, numbers.len() as u64)?;
        self.work(stream, vec![numbers.allocation(), found.allocation()])?.wait(patience)?;
        Ok(found.to_host(patience)? == [0])
    }

    /// The digests of the chunks of `chunk` bytes that `bytes` consists of, the same as the host's `xxh3-128`. The last one may be
    /// shorter; if it has 240 bytes or fewer it is not there, for the host to be digested.
    ///
    /// # Panics
    /// If `chunk` is not a multiple of [`DIGEST_CHUNK_MIN`].
    pub fn digests(
        &self,
        stream: &Stream,
        bytes: &DeviceBuffer<u8>,
        chunk: u64,
        patience: Duration,
    ) -> Result<Vec<Digest>, MemoryError> {
        assert!(chunk > 0 && chunk.is_multiple_of(DIGEST_CHUNK_MIN), "a chunk is a multiple of a block");
        let len = bytes.len() as u64;
        let chunks = len.div_ceil(chunk);
        if chunks == 0 {
            return Ok(Vec::new());
        }
        let of_chunk = chunk / DIGEST_CHUNK_MIN * 8;
        let sums: DeviceBuffer<i64> = DeviceBuffer::undefined(&self.gpu, (chunks * of_chunk) as usize)?;
        let arguments = |count: u64| [bytes.address(), len, chunk, sums.address(), count];
        self.launch(stream, "digest_blocks", &arguments(chunks * of_chunk), chunks * of_chunk)?;
        self.launch(stream, "digest_chunks", &arguments(chunks), chunks)?;
        self.work(stream, vec![bytes.allocation(), sums.allocation()])?.wait(patience)?;
        let words = sums.to_host(patience)?;
        let digest = |at: u64| {
            let at = (at * of_chunk) as usize;
            Digest((u128::from(words[at + 1] as u64) << 64) | u128::from(words[at] as u64))
        };
        let last_is_short = len - (chunks - 1) * chunk <= DIGEST_SHORT;
        Ok((0..chunks - u64::from(last_is_short)).map(digest).collect())
    }

    fn launch(&self, stream: &Stream, name: &str, arguments: &[u64], count: u64) -> Result<(), DriverError> {
        if count == 0 {
            return Ok(());
        }
        let context = &self.gpu.context;
        let functions = context.enter()?;
        let mut function: RawFunction = std::ptr::null_mut();
        let name = CString::new(name).expect("kernels are called by names of letters");
        // SAFETY: it writes one handle, which lives as long as the module; the name ends with a zero.
        let found = unsafe { (functions.module_function)(&mut function, self.module, name.as_ptr()) };
        context.check("cuModuleGetFunction", found)?;
        let mut words = arguments.to_vec();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let blocks = u32::try_from(count.div_ceil(u64::from(THREADS)).min(BLOCKS_MAX)).unwrap_or(1);
        // SAFETY: every kernel takes as many arguments of eight bytes as its callers here give, and the driver takes them during
        // the call. The memory that they name is kept by the `Work` that the caller makes of it.
        let launched = unsafe {
            (functions.launch)(
                function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.raw(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        context.check("cuLaunchKernel", launched)
    }

    fn work(&self, stream: &Stream, uses: Vec<Arc<Allocation>>) -> Result<Work, DriverError> {
        match stream.record() {
            Ok(event) => Ok(Work { event, uses }),
            Err(error) => {
                // Nobody will ever know when it is done.
                std::mem::forget(uses);
                Err(error)
            }
        }
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kernels(on {:?})", self.gpu)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        let context: &Arc<Context> = &self.gpu.context;
        if let Ok(functions) = context.enter() {
            // SAFETY: the handle is given up here. The driver waits for kernels that run.
            let _ = unsafe { (functions.module_unload)(self.module) };
        }
    }
}

impl Work {
    /// The point at which it is done: for another stream, or [`Communicator::after`](crate::Communicator::after).
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Waits until it is done.
    pub fn wait(mut self, patience: Duration) -> Result<(), MemoryError> {
        match wait(patience, || false, || look(&self.event)) {
            Waited::Came(Ok(())) => {
                self.uses.clear();
                Ok(())
            }
            Waited::Came(Err(error)) => Err(error.into()),
            Waited::Missed | Waited::GivenUp => Err(MemoryError::Stalled { waited: patience }),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.uses.is_empty() && !matches!(self.event.is_done(), Ok(true)) {
            std::mem::forget(std::mem::take(&mut self.uses));
        }
    }
}
