//! Why a request is refused.

use crate::kv::KvError;
use crate::state::StateError;

/// Why a request is not carried out: the connection is cut off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The store cannot do it.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// What was to be stored as the state of a run is none.
    #[error("run {run:?}: {why}")]
    State {
        /// Which run.
        run: String,
        /// Why not.
        why: StateError,
    },
    /// The state of a run is changed by compare-and-set alone.
    #[error("run {run:?}: its state is changed by compare-and-set alone")]
    NotLikeThis {
        /// Which run.
        run: String,
    },
    /// A worker of PyTorch 2.5 does not say of which run it is, and it cannot be told.
    #[error(
        "a worker of PyTorch 2.5 comes from an address at which {runs} runs have agents; use a newer release, or an endpoint for each"
    )]
    WhoseWorker {
        /// How many.
        runs: usize,
    },
    /// A key of a run that there is not.
    #[error("there is no run {run:?} that this key could be of")]
    NoRun {
        /// Its id.
        run: String,
    },
    /// A connection of one run's agent turns to another run.
    #[error("an agent is of one run, and this one is of another than {run:?}")]
    OtherRun {
        /// The other one.
        run: String,
    },
    /// There are as many runs as there may be.
    #[error("there are {limit} runs, and no more may be")]
    TooManyRuns {
        /// The limit.
        limit: usize,
    },
}
