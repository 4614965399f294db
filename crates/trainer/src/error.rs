//! What can go wrong for a program, and what it can do about it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reknit_checkpoint::FileError;
use reknit_checkpoint::layout::LayoutError;
use reknit_checkpoint::values::ValuesError;
use reknit_collectives::ListenError;
use reknit_membership::reason::Refusal;

use crate::options::BadOptions;
use crate::session::End;

/// Why a program could not join, or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The options make no sense.
    #[error(transparent)]
    Options(#[from] BadOptions),
    /// The state's tensors make no sense.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The state's values are too large.
    #[error(transparent)]
    Values(#[from] ValuesError),
    /// Other workers could not reach this one: its data plane cannot listen.
    #[error("the data plane cannot listen on {listen}")]
    Listen {
        /// Where it was to listen.
        listen: SocketAddr,
        /// Why not.
        source: ListenError,
    },
    /// Checkpoints cannot be written where they should.
    #[error("checkpoints cannot be written to {}", dir.display())]
    CheckpointsDir {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        source: FileError,
    },
    /// No coordinator can be reached, and there is nothing to do without one.
    #[error("no coordinator at {coordinators} for {waited:?} ({last}); is `reknit serve` running there?")]
    Unreachable {
        /// Where it was looked for.
        coordinators: String,
        /// For how long.
        waited: Duration,
        /// What came of the last attempt.
        last: String,
    },
    /// The coordinator does not let this worker in, or not any more.
    #[error("the coordinator refuses this worker: {0}")]
    Refused(Box<Refusal>),
    /// The coordinator cannot be talked to: it does not let this worker in, or one of the two does not trust the other.
    #[error("this worker and the coordinator do not come together: {0}")]
    Rejected(String),
    /// Workers of one job called different collectives in the same step: a mistake in the program.
    #[error("workers do not do the same in this step: {0}")]
    Mismatch(String),
    /// The operating system gives no thread or no randomness.
    #[error("the operating system refuses: {0}")]
    System(#[from] std::io::Error),
}

impl End {
    /// The end itself, if it is a good one.
    pub(crate) fn into_result(self) -> Result<End, TrainError> {
        match self {
            End::Closed(_) | End::Released | End::Left => Ok(self),
            End::Refused(refusal) => Err(TrainError::Refused(Box::new(refusal))),
            End::Rejected { why } => Err(TrainError::Rejected(why)),
            End::MachineFailed { why } => Err(TrainError::System(std::io::Error::other(why))),
        }
    }
}

/// The world broke while this step was on its way, or a worker could not do its part of it. Nothing is lost: ask for the
/// next step, which will be this one again, in the next world if this one is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the step was interrupted; it will be done again")]
pub struct Interrupted;
