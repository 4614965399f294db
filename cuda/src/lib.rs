//! Collectives of one world after another on GPUs, over NCCL: a call returns its result or says that the world is broken,
//! within a bound, and the next world is formed without restarting anybody.
//!
//! ```text
//!    World: generation, ranks, way                        a training program
//!              │                                                 │ all_reduce
//!              ▼                                                 ▼
//!        Communicator ── events ──► Life (pure) ── actions ──► Owner: the one thread with the handles
//!              ▲                                                 │ asks, and never waits without a deadline
//!              └────────────── answers, by a deadline ───────────┤
//!                                                                ├──► Nccl: our table of libnccl.so.2
//!                                                                └──► Driver: our table of libcuda.so.1
//! ```
//! Both libraries are loaded at run time. The crate builds and starts on a machine that has never seen CUDA, and
//! [`probe`] says in words what is missing.
//!
//! Read in this order: `way` (what a world is made of), `life` (what follows what: pure), `communicator` (what callers use), `owner` and
//! `hands` (every call that is made), `nccl` and `driver` (what is called); then `buckets` (a step's gradients).
//!
//! # Invariants
//! The tests cite these numbers.
//!
//! - **G-1** No peer and no device is waited for without a deadline: NCCL's calls are those that return at once and are then asked
//!   about, and who asked for one waits by a deadline too, for the case that it does not return. What a caller asks of the
//!   driver alone (memory, a stream) takes as long as the driver takes.
//! - **G-2** A handle is used by nobody after its abort: it is out of reach before the abort is called. One thread holds all
//!   of them.
//! - **G-3** A communicator is never shrunk by what one rank saw: the list of who is gone is the committed one, and it has
//!   to fit the communicator that it is for.
//! - **G-4** What was done for a generation counts only while it is the committed one: what was formed for an older one is
//!   not used, and answers that come late change nothing.
//! - **G-5** A second missed deadline with no world in between ends in the process's exit, and so does an abort that hangs: a
//!   process of which nobody knows what it holds is not worth keeping.
//! - **G-6** The parent of a shrink or a grow is aborted and never destroyed: its flags look healthy, and a destroy would meet ranks
//!   that are gone.
//!
//! The crate never decides who is dead and never chooses the way to a world by itself, starts no process and ends none, and
//! knows nothing of a coordinator. It has not yet run on hardware: its tests run it over stand-ins for both libraries.

#![warn(clippy::undocumented_unsafe_blocks)]

mod version;
mod way;

mod life;

mod broken;
mod communicator;
mod hands;
mod owner;
mod wait;

mod config;
mod driver;
mod library;
mod memory;
mod nccl;
mod unique_id;

mod buckets;
mod kernels;
mod nvrtc;

mod probe;

pub use broken::{Broken, FormError, Left, ReduceError, Trouble};
pub use buckets::{BucketError, Buckets};
pub use communicator::{Communicator, OpenError, Options, SeedError};
pub use driver::{Driver, DriverError, Event, Gpu, Stream};
pub use kernels::{DIGEST_CHUNK_MIN, Kernels, Packed, Work};
pub use library::Missing;
pub use life::{ExitReason, Held, Refusal};
pub use memory::{DeviceBuffer, MemoryError};
pub use nccl::{Nccl, NcclCode, NcclError};
pub use nvrtc::{CompileError, Image, Nvrtc, Target};
pub use probe::{Probe, probe};
pub use unique_id::UniqueId;
pub use version::{Feature, Version};
pub use way::{Kind, Offer, Parent, Way, World, shortest};
