//! The whole system under virtual time and seeds.

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
mod server;
pub mod sim;
mod store;
mod stream;
pub mod trace;
pub mod truth;
