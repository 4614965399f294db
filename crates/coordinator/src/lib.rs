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
//! [`tls`] their certificates · [`tokens`] whose tokens are let in · `access` who asks, and what they may touch · `rate`
//! how often · `reload` files that are replaced meanwhile · [`torchelastic`] the endpoint for stock torchrun · [`server`] putting it
//! together.
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
//! | D-8 | Who may touch a job is decided by the token shown, before it is looked whether there is such a job: to everybody else it does not exist. |
//! | D-9 | A token is kept as a hash, compared in constant time, and appears in no log, no error and no file of this server's. |
//! | D-10 | Files that are replaced while the server runs count for what comes after; what makes no sense is logged and changes nothing. |
//! | D-11 | With TLS, nothing is answered in the clear; with an authority for clients, nobody is heard without a certificate of it. |
//! | D-12 | Without both TLS and tokens a server listens on loopback only, unless it is told `--insecure`. |
//! | D-13 | A coordinator that does not hold the leader's key changes nothing: every write to a shared store compares it. |

#![forbid(unsafe_code)]

mod access;
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
mod rate;
mod records;
pub mod reload;
mod rendezvous;
pub mod secret;
pub mod server;
pub mod store;
pub mod tls;
pub mod tokens;
pub mod torchelastic;

pub use config::{Config, Limits};
pub use server::{ServeError, Server};
