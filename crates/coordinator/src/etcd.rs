//! What the coordinators of a cluster have in common: an etcd, in which one of them leads.
//!
//! ```text
//!   PREFIX/layout       the layout of the keys below: "1"
//!   PREFIX/leader       who leads: its URL. Under a lease; its create revision is the leader's *epoch*
//!   PREFIX/jobs/JOB     the job's record (see `store::etcd`)
//! ```
//! A leader writes a job only in a transaction that also compares the create revision of `PREFIX/leader` with its own
//! epoch: whoever has lost the lease – paused, cut off, or taken for dead – cannot write any more, whatever it believes
//! (rule D-13). That is what makes it safe to end a leader's lease for it as soon as it looks dead.
//!
//! Nothing here trusts a watch or a clock: a watch only says when to look again, and the leader's own clock only makes it
//! stop sooner than etcd would have it.

pub mod address;
pub(crate) mod cluster;
pub(crate) mod election;
pub(crate) mod link;

pub use address::{BadAddress, EtcdAddress, EtcdCredentials};
pub use cluster::EtcdError;
