//! Segments that the ranks of a host need besides the first: for results in place, and for buffers. The first rank makes one
//! before it counts, and says where in a word; the others open it once all have counted.

#![allow(unsafe_code, reason = "reads and writes memory that other processes map")]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use reknit_membership::ids::Rank;
use rustix::io::Errno;

use crate::host::HostFault;
use crate::progress::Stuck;
use crate::secret::Nonce;
use crate::segment::{BYTES_MAX, PAGE, Segment, Whereabouts};

/// Which segment it is, in a page behind what it is for: of which world, and made in which step.
pub(crate) type Label = (Nonce, u64);

/// How large a segment is that has room for so many bytes, if there can be one.
fn with_label(bytes: usize) -> Result<usize, HostFault> {
    let bytes = bytes.checked_next_multiple_of(PAGE).and_then(|bytes| bytes.checked_add(PAGE));
    bytes.filter(|bytes| *bytes <= BYTES_MAX).ok_or(HostFault::System(io::ErrorKind::InvalidInput))
}

fn label_of(segment: &Segment) -> NonNull<Label> {
    segment.at(segment.bytes() - PAGE, size_of::<Label>()).cast()
}

/// Makes one for so many bytes if this is the rank to do so, and says in `word` where it is. It is an error on every rank if
/// there can be none so large.
pub(crate) fn make(
    word: &AtomicU64,
    bytes: usize,
    label: Label,
    is_maker: bool,
) -> Result<Option<Segment>, HostFault> {
    let bytes = with_label(bytes)?;
    if !is_maker {
        return Ok(None);
    }
    let segment = Segment::create(bytes).map_err(|why| HostFault::System(why.kind()))?;
    // SAFETY: it is in the segment, at the start of a page, and nobody else knows of that segment yet.
    unsafe { label_of(&segment).write(label) };
    let Whereabouts { pid, fd } = segment.whereabouts().expect("it was just made");
    word.store(u64::from(pid) << 32 | u64::from(fd), Ordering::Relaxed);
    Ok(Some(segment))
}

/// The one that `word` speaks of, with that label.
///
/// A rank that comes late may find that the first one has given up meanwhile, and has another file by that number: then the
/// first is as good as gone. Only what this rank itself is short of is its own fault.
pub(crate) fn find(word: &AtomicU64, bytes: usize, label: Label) -> Result<Segment, HostFault> {
    let gone = HostFault::Stuck(Stuck::GivenUp(Rank(0)));
    let word = word.load(Ordering::Relaxed);
    let place = Whereabouts { pid: (word >> 32) as u32, fd: word as u32 };
    let segment = Segment::open(place, with_label(bytes)?).map_err(|why| {
        match why.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => HostFault::System(why.kind()),
            _ => gone.clone(),
        }
    })?;
    // SAFETY: it is in the segment, at the start of a page. If this is the segment that it should be, it was written before
    // anybody was told of it; if it is another one, nothing depends on what is read.
    let found = unsafe { label_of(&segment).read() };
    if found == label { Ok(segment) } else { Err(gone) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_segment_that_was_made_in_this_step_of_this_world_is_taken() {
        let (word, label) = (AtomicU64::new(0), ([7; 16], 3));
        let made = make(&word, 5000, label, true).unwrap();
        assert!(make(&word, 5000, label, false).unwrap().is_none());
        assert!(find(&word, 5000, label).is_ok());
        let gone = HostFault::Stuck(Stuck::GivenUp(Rank(0)));
        for other in [([7; 16], 2), ([8; 16], 3)] {
            assert_eq!(find(&word, 5000, other).unwrap_err(), gone, "another world's, or an earlier one");
        }
        assert_eq!(find(&word, 50_000, label).unwrap_err(), gone);
        drop(made);
        assert_eq!(find(&word, 5000, label).unwrap_err(), gone);
        let too_large = HostFault::System(io::ErrorKind::InvalidInput);
        assert_eq!(make(&word, usize::MAX, label, false).unwrap_err(), too_large);
    }
}
