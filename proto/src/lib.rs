//! reknit's gRPC contract, version 1, and its conversions to the core's words.
//!
//! ```text
//!   the network                      this crate                        the core
//!   v1::MemberMessage      ──►  rendezvous::event            ──►  membership::Event
//!   v1::CoordinatorMessage ◄──  rendezvous::to_member        ◄──  membership::Message
//!   v1::JobStatus          ◄──► inspect                      ◄──► membership::Status
//!   v1::JobRecord          ◄──► record                       ◄──► membership::JobRecord
//! ```
//!
//! The core's types know nothing of encodings: compatibility is this crate's business alone. Everything that comes from
//! the network is checked here, once: what leaves this crate as a core type has names of the allowed characters, digests
//! of the right length, enums that exist.
//!
//! # Invariants
//! | rule | what is always true |
//! |---|---|
//! | P-1 | What is encoded decodes to the same value (tested for every message). |
//! | P-2 | Bytes from outside never panic: they decode or give a [`BadMessage`] that names the field. |
//! | P-3 | A field number is never used for something else; a record of an older format stays readable. |

#![forbid(unsafe_code)]

/// The generated types, clients and servers of the package `reknit.v1`.
#[allow(missing_docs, unreachable_pub, clippy::doc_markdown, clippy::wildcard_imports)]
pub mod v1 {
    tonic::include_proto!("reknit.v1");
}

/// The compiled description of the contract, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reknit.v1.bin"));

/// The version of the protocol between members and coordinators. A join with another one is refused.
pub const PROTOCOL: u32 = 1;

/// The gRPC metadata in which a coordinator that does not lead names the URL of the one that does: with an error, the call
/// is to be put there; with an answer, a fresher one is to be had there. Empty with an answer from a coordinator that does not
/// lead and does not know who does.
pub const LEADER_KEY: &str = "reknit-leader";

/// Whether a client that was sent on goes there: never from a coordinator that has proved who it is to one that does not.
pub fn may_be_sent(from: &str, to: &str) -> bool {
    let is_secure = |url: &str| url.starts_with("https://");
    is_secure(to) || to.starts_with("http://") && !is_secure(from)
}

pub mod inspect;
pub mod record;
pub mod rendezvous;
pub mod token;
mod words;

pub use token::Token;
pub use words::BadMessage;
