//! reknit's server as a library.
//!
//! ```text
//!  member ══stream══► rendezvous ──event──► job task ──step──► membership::Job        (pure)
//!                                             │  ▲
//!                                        save │  │ saved
//!                                             ▼  │
//!                                            store                                     (memory, embedded)
//!  member ◄══stream══ ◄──────── tell ──── job task           and only then is anybody told
//!
//!  operator ──unary──► inspect, operate ──query, operation──► job task
//! ```
//!
//! # Reading order
//! [`config`] what can be set · [`clock`] · [`store`] where records live · `job` the task that owns one job · `jobs` the
//! table of them · `rendezvous`, `inspect`, `operate` the services · `listen` connections before they are HTTP ·
//! [`server`] putting it together.
//!
//! # Invariants
//! | rule | what is always true |
//! |---|---|
//! | D-1 | One task owns one job; everybody else holds a handle. No lock is held over an await. |
//! | D-2 | Effects of a transition are performed after its record is saved, in order; if the save fails, none is. |
//! | D-3 | A job whose record was changed by somebody else is dropped and read anew, never merged. |
//! | D-4 | A reader that does not read is cut off; nothing is buffered for it beyond [`config::Limits`]. |
//! | D-5 | The server is not on a step's path: members send nothing per step (see `counters`). |
//! | D-6 | The coordinator never dials a member. |
//! | D-7 | Whatever a peer can open, send or keep waiting has a limit in [`config::Limits`], and what is beyond it is told so. |
//! | D-8 | A coordinator that does not hold the leader's key changes nothing: every write to a shared store compares it. |

#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod counters;
pub mod etcd;
mod inspect;
pub mod job;
mod jobs;
mod listen;
mod office;
mod operate;
mod peers;
mod records;
mod rendezvous;
pub mod secret;
pub mod server;
pub mod store;

pub use config::{Config, Limits};
pub use server::{ServeError, Server};
