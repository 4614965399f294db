//! Why there is no world, or no result.

use std::time::Duration;

use reknit_collectives::{DType, ReduceOp};
use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::driver::DriverError;
use crate::life::{ExitReason, Refusal};
use crate::nccl::NcclError;

/// What went wrong in a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Trouble {
    /// NCCL said so: a peer is gone, or the machine failed it.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The driver said so.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// It did not end in time. Either a peer is gone without a word, or somebody is very late.
    #[error("it has not ended for {waited:?}")]
    Late {
        /// How long was waited.
        waited: Duration,
    },
    /// The caller gave up, through the abort handle.
    #[error("it was given up: {0}")]
    GivenUp(reknit_collectives::BreakReason),
    /// What was formed is not what was told.
    #[error("NCCL gave rank {rank} of {size}, the world was told as rank {told_rank} of {told_size}")]
    WrongSeat {
        /// Which rank it gave.
        rank: Rank,
        /// Of how many.
        size: WorldSize,
        /// Which rank was told.
        told_rank: Rank,
        /// Of how many.
        told_size: WorldSize,
    },
    /// The thread that makes the calls is inside one that does not end.
    #[error("a call into NCCL or the driver has not returned for {waited:?}")]
    Hangs {
        /// How long was waited.
        waited: Duration,
    },
}

/// What is left after a failure, and so what can follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The handle: the next world may be shrunk out of it, or formed afresh.
    Handle,
    /// Nothing: the next world has to be formed afresh.
    Nothing,
    /// Not even the process: it has to end, and be started again.
    Exit(ExitReason),
}

/// The collective gave no result, and its world will give none any more. What is in its output is undefined; its input
/// is what it was, unless it was reduced in place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the communicator of generation {generation} is broken: {trouble}")]
pub struct Broken {
    /// Of which world.
    pub generation: Generation,
    /// What happened, as seen from here. It says nothing of who caused it: NCCL does not know.
    pub trouble: Trouble,
    /// What is left.
    pub left: Left,
}

/// Why a reduction gave no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReduceError {
    /// The world is broken.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// There is no world, or another one was committed meanwhile.
    #[error("no communicator of the committed generation has been formed")]
    NotFormed,
    /// Not with these numbers. Nothing has happened.
    #[error("{op} of {dtype} is not offered: NCCL's own would overflow or be cut in the middle")]
    Unsupported {
        /// The operation.
        op: ReduceOp,
        /// The type.
        dtype: DType,
    },
    /// There must be a buffer for each device, all of one length. Nothing has happened.
    #[error("there must be one buffer for each of the {devices} devices, all of one length")]
    Buffers {
        /// How many devices there are.
        devices: usize,
    },
}

/// Why no world was formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormError {
    /// It cannot be entered from here. What was there is still there.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There must be a rank for each device.
    #[error("the world has {ranks} ranks for the {devices} devices of this process")]
    Devices {
        /// How many ranks of it are this process's.
        ranks: usize,
        /// How many devices it has.
        devices: usize,
    },
    /// It was tried, and failed.
    #[error("generation {generation} was not formed: {trouble}")]
    Failed {
        /// Which world.
        generation: Generation,
        /// What happened, as seen from here.
        trouble: Trouble,
        /// What is left.
        left: Left,
    },
}
