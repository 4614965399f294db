//! The whole system under virtual time and seeds.
//!
//! ```text
//!                       ┌──────────────────── one seed ────────────────────┐
//!   faults ──strike──►  │  store ◄─save─ driver + core ◄══ streams ══► session  │  ──shown to──► invariants
//!   operator ──asks──►  │  (real records)  (real)          (real bytes)  (real)  │
//!                       │                       rings, transfers, checkpoints    │
//!                       └────────────────────────────────────────────────────────┘
//! ```
//! Real are: the core (`reknit-membership`), the coordinator's driver task (`reknit_coordinator::job`), the member's
//! session (`reknit_trainer::session`), and every message and record as the bytes that would travel or be stored. A model
//! are: the network, which delays, reorders between streams, breaks, partitions and loses; the store with its faults; the
//! threads around a session; the ring, at the grain of connections and collectives; a member's memory, as one number that
//! follows from every step applied to it, so that a lost, doubled or mixed-up step shows.
//!
//! A run has a stage of faults, then one in which nothing fails and all must become well within a bounded time, then
//! trials of what must not disturb a healthy job, then the way to the job's last step ([`run`]). What must always hold
//! stands in `invariants/`, one property to a file. [`options`] says what a seed decides, [`mutants`] which rules can be
//! broken on purpose, [`coverage`] what must have happened for the seeds to mean anything.
//!
//! ```sh
//! cargo run --release -p reknit-sim -- --seeds 0..10000        # look for a seed that breaks a rule
//! cargo run --release -p reknit-sim -- --seed 4711 --trace     # replay one, with all that happens
//! cargo run --release -p reknit-sim -- --mutant swaps-ranks    # see a broken rule be caught
//! ```

mod calm;
mod collective;
pub mod coverage;
pub mod disk;
mod faults;
mod happening;
mod invariants;
mod lifecycle;
mod link;
pub mod mutants;
mod operator;
pub mod options;
pub mod process;
mod program;
pub mod queue;
mod restore;
mod ring;
pub mod rng;
pub mod run;
mod saves;
pub mod seeds;
mod server;
pub mod sim;
mod store;
mod stream;
pub mod trace;
pub mod truth;
