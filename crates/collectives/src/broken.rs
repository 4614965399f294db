//! Why a collective gave no result.

use std::io;
use std::time::Duration;

use reknit_membership::ids::{Generation, Rank};

use crate::call::Call;

/// The collective gave no result, and its group will give none any more: the world has to be formed anew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the ring of generation {generation} is broken: {reason}")]
#[non_exhaustive]
pub struct Broken {
    /// Of which world.
    pub generation: Generation,
    /// Who may have caused it, as seen from here. It is a hint and no more: a break travels around the ring, so a
    /// neighbour whose connection ended may only have passed on what happened farther away.
    pub suspects: Vec<Rank>,
    /// What happened, as seen from here.
    pub reason: BreakReason,
}

/// What broke a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BreakReason {
    /// The connection with a neighbour ended.
    #[error("the connection with rank {rank} ended ({kind})")]
    NeighbourLost {
        /// Which neighbour.
        rank: Rank,
        /// How it ended; `UnexpectedEof` if the neighbour closed it in good order.
        kind: io::ErrorKind,
    },
    /// No byte has moved for too long.
    #[error("no byte has moved for {waited:?}: a rank hangs, or has not called this collective")]
    Stalled {
        /// For how long.
        waited: Duration,
    },
    /// The caller gave up through the [`AbortHandle`](crate::AbortHandle).
    #[error("it was aborted")]
    Aborted,
    /// Two neighbours did not call the same collective.
    #[error("this rank called {ours}, another one called {theirs}")]
    Mismatch {
        /// What this rank called.
        ours: Call,
        /// What the first suspect called: the previous rank, or another one of this host.
        theirs: Call,
    },
    /// A rank said what no rank says.
    #[error("the suspect broke the protocol: {what}")]
    Protocol {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The operating system refused what never fails on a healthy system.
    #[error("the operating system refused what a collective needs ({kind})")]
    System {
        /// How it refused.
        kind: io::ErrorKind,
    },
}
