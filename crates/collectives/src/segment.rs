//! Memory that the ranks of one host share: a memfd that one of them makes and the others open by its place in `/proc`.
//!
//! It has no name that could be left behind: the kernel frees it when the last process that maps it has ended, also if
//! that one was killed. Its size is sealed before anybody else can open it, so that no rank can make another one fault by
//! cutting it short.

#![allow(unsafe_code, reason = "maps memory that other processes write to")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Every part of a segment that one rank writes begins at a multiple of this, so that no two write to one page: on machines
/// with several memories each page lies where it was first written.
pub(crate) const PAGE: usize = 4096;

/// No more is asked of the kernel at once; what is asked for is only taken when it is written to.
pub(crate) const BYTES_MAX: usize = 1 << 42;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A shared mapping. It is plain memory at an address: what is a race and what is not is up to who asks for a part of it.
#[derive(Debug)]
pub(crate) struct Segment {
    memory: NonNull<u8>,
    bytes: usize,
    /// Kept open by who made it, for as long as others may come to open it.
    file: Option<OwnedFd>,
}

// SAFETY: it is memory shared with other processes; that threads share it too makes no difference.
unsafe impl Send for Segment {}
// SAFETY: as above. All access goes through atomics or through the raw pointers of `at`, whose users say why it is no race.
unsafe impl Sync for Segment {}

/// Where another process finds a segment: a process and a descriptor in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Whereabouts {
    pub(crate) pid: u32,
    pub(crate) fd: u32,
}

impl Segment {
    /// A new one of so many zeros.
    pub(crate) fn create(bytes: usize) -> io::Result<Segment> {
        check_bytes(bytes)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Newer kernels want to be told; older ones do not know the flag.
        let file = rustix::fs::memfd_create(c"reknit", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(c"reknit", flags))?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        let memory = map(&file, bytes)?;
        Ok(Segment { memory, bytes, file: Some(file) })
    }

    /// The one that another process has made, if it is one of so many bytes and cannot become shorter.
    pub(crate) fn open(place: Whereabouts, bytes: usize) -> io::Result<Segment> {
        check_bytes(bytes)?;
        let Whereabouts { pid, fd } = place;
        let file = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/fd/{fd}"))?;
        let is_sealed = rustix::fs::fcntl_get_seals(&file)?.contains(SEALS);
        if !is_sealed || file.metadata()?.len() != bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no segment of that size"));
        }
        Ok(Segment { memory: map(&file, bytes)?, bytes, file: None })
    }

    /// Where others find it; nothing if another process has made it, or once it is closed.
    pub(crate) fn whereabouts(&self) -> Option<Whereabouts> {
        let fd = self.file.as_ref()?.as_fd().as_raw_fd();
        Some(Whereabouts { pid: std::process::id(), fd: fd.unsigned_abs() })
    }

    /// Says that nobody else will open it. It stays mapped.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of the byte at `offset`, which together with `bytes` more lies in it.
    ///
    /// # Panics
    /// If it does not.
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{bytes} bytes at {offset} are not in a segment of {}", self.bytes);
        // SAFETY: it stays within the mapping.
        unsafe { self.memory.add(offset) }
    }

    /// The word of four bytes at `offset`, which all who map this change as an atomic only.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        let at = self.at(offset, 4).cast();
        assert!(at.is_aligned(), "{offset} is no place for a word");
        // SAFETY: it is mapped for as long as `self` lives, aligned, and used as an atomic by all.
        unsafe { at.as_ref() }
    }

    /// The word of eight bytes at `offset`, as above.
    pub(crate) fn long_word(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8).cast();
        assert!(at.is_aligned(), "{offset} is no place for a long word");
        // SAFETY: as above.
        unsafe { at.as_ref() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `map`, and nothing borrowed from `self` is left. It fails only for what is no mapping.
        let _ = unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), self.bytes) };
    }
}

fn check_bytes(bytes: usize) -> io::Result<()> {
    let is_fine = (1..=BYTES_MAX).contains(&bytes);
    if is_fine { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "too large a segment")) }
}

fn map(file: &impl AsFd, bytes: usize) -> io::Result<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // Most of a segment is never touched, and what is not touched shall not count.
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: it is a new mapping at an address of the kernel's choice.
    let memory = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, file, 0)? };
    // A child that a rank forks, to load data say, shall not keep it.
    // SAFETY: it is the mapping that was just made, of which nobody knows yet; it changes nothing in this process.
    let _ = unsafe { rustix::mm::madvise(memory, bytes, Advice::LinuxDontFork) };
    NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let made = Segment::create(3 * PAGE).unwrap();
        let opened = Segment::open(made.whereabouts().unwrap(), 3 * PAGE).unwrap();
        made.word(PAGE).store(7, Ordering::Release);
        assert_eq!(opened.word(PAGE).load(Ordering::Acquire), 7);
        assert_eq!(opened.whereabouts(), None);
        drop(made);
        assert_eq!(opened.word(PAGE).load(Ordering::Acquire), 7, "it lives as long as one of them");
    }

    #[test]
    fn what_is_no_segment_of_that_size_is_refused() {
        let mut made = Segment::create(PAGE).unwrap();
        let place = made.whereabouts().unwrap();
        assert_eq!(Segment::open(place, 2 * PAGE).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let cut = rustix::fs::ftruncate(made.file.as_ref().unwrap(), 0);
        assert!(cut.is_err(), "nobody can cut it short under another one's feet");
        made.close();
        assert!(Segment::open(place, PAGE).is_err());
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let fd = file.as_raw_fd().unsigned_abs();
        assert!(Segment::open(Whereabouts { pid: std::process::id(), fd }, PAGE).is_err());
        assert_eq!(Segment::create(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Segment::create(usize::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
