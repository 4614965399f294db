//! Collectives for one world of ranks that may die at any moment: a call returns its result or says that the world is
//! broken, within a bound, and never hangs. Over TCP it is a ring; ranks that are all on one host share memory.
//!
//! ```text
//!              ┌──────── Listener, one per process ────────┐
//!   a peer ───►│ hello, challenge, proof, verdict          │     a world message: generation, secret, rank, size, next
//!              │   Door of generation 7 ── ring, state ────┼──┐            │
//!              │   Door of generation 8 ── ring, state     │  │            ▼
//!              └───────────────────────────────────────────┘  └──► Group::form ──► Group ── all_reduce, barrier, ...
//!                                                          dial ──► next rank        │
//!                                                                                    ├─ its caller: one stream of bytes
//!                                       rank r-1 ══ bytes, one way ══► rank r ═══════╪══════════════► rank r+1
//!                                                                                    └─ its watcher: has one ended?
//! ```
//! Read in this order: `schedule` (who sends what when: pure), `ring` (a collective as one byte stream), `table` (a small
//! one in half the steps), `group` (what
//! callers use), `watcher` (how a loss is noticed), `handshake` and `acceptor` (who is let in); then `meeting` (who shares
//! memory), `progress` (how ranks wait for each other in it), `host` (a collective in it) and `buffer`.
//!
//! # Invariants
//! The tests cite these numbers.
//!
//! - **C-1** A call returns within a bound: a collective within [`GroupOptions::stall`] of the last byte that moved,
//!   forming within [`GroupOptions::form`], a dial by its deadline; and all of them at once after an abort.
//! - **C-2** A collective that fails leaves its input bit for bit as it was. It holds by construction: nothing writes
//!   to an input until the last byte is in.
//! - **C-3** After a reduction that succeeds all ranks hold the same bits, not just nearly the same numbers.
//! - **C-4** Nobody finishes a collective before everybody has entered it, and then all hold the same control word: the
//!   union of all words, each sampled once on entry. It costs no message of its own.
//! - **C-5** A broken group stays broken, and its connections are shut down at once: so its neighbours wake, and the
//!   break travels around the ring.
//! - **C-6** A rank that finishes a collective and then dies or leaves does not make another one fail it.
//! - **C-7** Ranks that call different things find out before any element is combined.
//! - **C-8** No connection passes a door unproven, and the secret travels on none. Both sides prove.
//! - **C-9** No peer can delay another's connection, and everything a peer can send, hold or wait for has a limit.
//! - **C-10** Threads and descriptors end with the [`Group`], [`Door`] or [`Listener`] they belong to.
//! - **C-11** Who sends what when is decided without IO, clock or chance.
//! - **C-12** A rank that has given up writes to no memory that others read, but to say so; and the kernel has shared memory
//!   back when the last rank that maps it has let go of it or has died.
//!
//! The crate never retries a collective, never decides who is dead (its suspects are hints), never logs, and knows
//! nothing of a coordinator. A proof keeps strangers and stale generations out, but the bytes after it are neither
//! encrypted nor signed.

#![deny(unsafe_code)]

mod schedule;
mod word;

mod element;
mod reduce;

mod buffer;
mod call;
mod further;
mod host;
mod inputs;
mod meeting;
mod progress;
mod ring;
mod scratch;
mod segment;
mod table;
mod transport;
mod windows;
mod words;

mod abort;
mod broken;
mod group;
mod links;

mod form;
mod neighbours;
mod watcher;

mod handshake;
mod secret;

mod acceptor;
mod door;
mod doors;
mod listener;

mod dial;
mod patience;
mod wake;

pub use abort::AbortHandle;
pub use broken::{BreakReason, Broken};
pub use buffer::Buffer;
pub use call::{Call, CallKind};
pub use dial::{DialError, dial};
pub use door::{ArrivalError, Door, StateConnection};
pub use element::{DType, Element};
pub use form::{FormError, GroupOptions, Place};
pub use group::Group;
pub use handshake::{Purpose, RefuseReason};
pub use listener::{ListenError, Listener, ListenerOptions};
pub use meeting::SharedMemory;
pub use reduce::ReduceOp;
pub use schedule::part;
pub use secret::Secret;
pub use word::ControlWord;

/// Locks, also if a thread panicked while it held the lock: what is under this crate's locks is whole between any two
/// statements, and one caller's panic is not to become everybody's.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
