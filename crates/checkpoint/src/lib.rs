//! Checkpoints of a replicated training state: written in equal parts by all ranks, loaded by any number of them.
//!
//! ```text
//!  rank 0   rank 1   rank 2        each holds the whole state, equal bit for bit
//!    │ begin  │        │           digest all of it, copy 1/3 of it: the only time that training waits
//!    ▼        ▼        ▼
//!  part 0   part 1   part 2        written aside, synced, renamed: safetensors files
//!    └────────┼────────┘
//!         reports                  ranks whose digests differ are found here
//!             ▼
//!         manifest  ──digest──►  the coordinator saves it: only now does the checkpoint count
//!
//!  any world size, later:  commits ──► manifest ──► the chunks of any range, each verified ──► state
//! ```
//!
//! # Reading order
//! [`dtype`] and [`layout`] what a state's bytes are and where they lie · [`state`] what a program offers, [`tensors`]
//! one that owns them, [`values`] the small things beside them · [`stream`] ranges of bytes in and out of a state ·
//! [`digest`](mod@digest) and [`fingerprint`] how equal states are known · [`plan`] who writes, sends and reads what ·
//! [`files`] how a file comes to be at once and for good, `names` and `header` what it is called and starts with ·
//! [`manifest`] what makes files a checkpoint · [`saver`] writing · [`load`] and [`newest`] reading · [`directory`]
//! listing and cleaning.
//!
//! # Invariants
//! Tests name the rule they prove.
//!
//! | rule | what is always true |
//! |---|---|
//! | K-1 | Nothing is overwritten: each file has a name of its own and is made once. |
//! | K-2 | Under its final name a file is whole and survives a crash, before anybody is told of it. |
//! | K-3 | A file whose sync failed is given up; no file is synced twice. |
//! | K-4 | A save that fails touches nothing that was published, removes what it wrote, and a later one works. |
//! | K-5 | Nothing in the directory commits a checkpoint: what counts is the manifest's digest that the coordinator saved. |
//! | K-6 | For any number of ranks the parts cover the state, each byte once, and cut no element. |
//! | K-7 | No byte reaches a state before its chunk is verified; any changed bit of any file is an error that names the file. |
//! | K-8 | A state saved by any number of ranks loads into any number, whole or by ranges, bit for bit. |
//! | K-9 | A manifest lists one report of each rank, all of the same state. |
//! | K-10 | What is newer than the newest kept checkpoint is not removed, but by the rank that wrote it and knows it given up; what is not ours never is. |
//! | K-11 | What is read is not trusted: sizes and counts have limits, and no content of a file makes the reader panic. |
//! | K-12 | A state is copied before `begin` returns: what the program changes later is not in the checkpoint. |
//! | K-13 | Equal states have equal digests on every machine and in every version; unequal ones do not. |
//! | K-14 | A shard's file is a valid safetensors file. |

#![forbid(unsafe_code)]

// States are little-endian and larger than 32 bits can count: elsewhere the bytes would silently be others.
#[cfg(not(all(target_endian = "little", target_pointer_width = "64", unix)))]
compile_error!("reknit-checkpoint needs a little-endian 64-bit Unix");

pub mod dtype;
pub mod layout;

pub mod state;
pub mod tensors;
pub mod values;

pub mod stream;

pub mod digest;
pub mod fingerprint;

pub mod plan;

pub mod files;
mod header;
mod names;

pub mod manifest;

pub mod saver;
mod staging;

pub mod load;
pub mod newest;
mod shard_file;

pub mod directory;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
#[cfg(test)]
mod faults;

// The helpers of the tests, inside and outside of the crate, call it by one name.
#[cfg(test)]
extern crate self as reknit_checkpoint;

pub use digest::{Digester, digest};
pub use directory::{Condition, Listed, Retained, list, remove_part, retain};
pub use dtype::{Dtype, TensorSpec};
pub use files::{FileError, prepare_dir};
pub use fingerprint::{Fingerprint, state_digest};
pub use layout::{ByteRange, Layout, LayoutError, Piece};
pub use load::{LoadError, LoadReport, Part, ShapeDifference, load_into, open, verify};
pub use manifest::{
    AssembleError, BadManifest, Manifest, ManifestMeta, PublishError, ShardEntry, ShardReport,
    publish_manifest,
};
pub use newest::{CommitRef, LoadNewestError, Loaded, Warning, load_newest};
pub use plan::{FileRead, reads, shards, stripes};
pub use saver::{SaveError, SaveMeta, Saved, Saver, SaverOptions, Stall};
pub use state::State;
pub use stream::{
    digest_range, read_range, split_mut, try_read_range, try_write_range, write_at, write_range,
};
pub use tensors::NamedTensors;
pub use values::{Values, ValuesError};

/// A size of something that is in memory, or in a buffer that is.
fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("memory has 64-bit addresses")
}
