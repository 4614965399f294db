//! Several coordinators on a real etcd, training workers, and what may befall them: deaths, stopped processes, cut
//! networks, full disks, clocks that jump. And the checkers of what all of them wrote down meanwhile.
//!
//! ```text
//!   tests/*.rs ── faults ──► fleet: etcd ×3, coordinators ×3, workers ×4      each a process, each in a
//!                              │ record files        │ evidence files         network of its own (net)
//!                              ▼                     ▼
//!                            history             invariants
//!                            ├─ linear: the store was one register per job
//!                            └─ told: nobody heard of what was not saved
//! ```
//! Read `history`, `linear`, `told` and `invariants` first: they are pure, and say what is promised. Then `fleet`, and
//! below it `net` (who reaches whom), `etcd`, `probe` (questions asked from inside a network) and `process`.
//!
//! Nothing waits for a fixed time, except where the time is the fault: a network that is cut for so long. Nothing
//! outlives a test, however it ends: every process is killed by the kernel when the thread that started it is gone, and
//! the networks consist of nothing but processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

pub mod history;
pub mod invariants;
pub mod linear;
pub mod told;

pub mod etcd;
pub mod fleet;
pub mod net;
pub mod probe;
pub mod process;
