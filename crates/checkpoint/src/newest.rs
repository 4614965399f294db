//! Loading the newest checkpoint that is whole.

use std::path::Path;

use reknit_membership::{Digest, Generation, Step};

use crate::load::{LoadError, LoadReport, Part, load_into, open};
use crate::manifest::Manifest;
use crate::state::State;

/// A checkpoint that the coordinator has committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommitRef {
    /// The state's step.
    pub step: Step,
    /// The world that made it; step and generation name its files.
    pub generation: Generation,
    /// Digest of its manifest.
    pub manifest: Digest,
}

impl CommitRef {
    /// Sorts checkpoints by age, oldest first. Generations never repeat and steps rise within one; over generations
    /// the step may go back, when an older checkpoint was loaded.
    pub fn age(&self) -> (Generation, Step) {
        (self.generation, self.step)
    }
}

impl std::fmt::Display for CommitRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the checkpoint of step {} in generation {}", self.step, self.generation)
    }
}

/// A committed checkpoint that was passed over.
#[derive(Debug, thiserror::Error)]
#[error("{commit} does not load: {error}")]
pub struct Warning {
    /// The checkpoint.
    pub commit: CommitRef,
    /// What is wrong with it; names the file.
    #[source]
    pub error: LoadError,
}

/// A checkpoint that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Which one.
    pub commit: CommitRef,
    /// What it consists of.
    pub manifest: Manifest,
    /// What loading it took.
    pub report: LoadReport,
    /// The newer ones that were passed over, newest first: steps are lost by each.
    pub warnings: Vec<Warning>,
}

/// Why no checkpoint was loaded. The state may be partly overwritten; see [`LoadError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadNewestError {
    /// There was none to load. The state is as it was.
    #[error("no checkpoint was ever committed")]
    NoCommit,
    /// The newest one is of another program. Older ones were not tried: passing it over would throw away training that
    /// nothing is wrong with.
    #[error("{commit} is of another program")]
    OtherProgram {
        /// The checkpoint.
        commit: CommitRef,
        /// The difference.
        source: LoadError,
    },
    /// None of them loads.
    #[error("none of {} committed checkpoints loads; the newest: {}", tried.len(), tried[0])]
    NoneLoads {
        /// What is wrong with each, newest first; at least one.
        tried: Vec<Warning>,
    },
}

/// Loads the newest of `commits` (given in any order) from the job's directory `dir` into `state`. If a file of it is
/// damaged or missing, goes back to the one before, with a warning that names the file.
pub fn load_newest(
    dir: &Path,
    commits: &[CommitRef],
    state: &mut dyn State,
) -> Result<Loaded, LoadNewestError> {
    let mut newest_first = commits.to_vec();
    newest_first.sort_by_key(|commit| std::cmp::Reverse(commit.age()));
    let mut warnings = Vec::new();
    for commit in newest_first {
        let loaded = open(dir, commit.step, commit.generation, commit.manifest)
            .and_then(|manifest| Ok((load_into(dir, &manifest, Part::All, state)?, manifest)));
        match loaded {
            Ok((report, manifest)) => return Ok(Loaded { commit, manifest, report, warnings }),
            Err(source @ LoadError::WrongShapes { .. }) => {
                return Err(LoadNewestError::OtherProgram { commit, source });
            }
            Err(error) => warnings.push(Warning { commit, error }),
        }
    }
    Err(if warnings.is_empty() {
        LoadNewestError::NoCommit
    } else {
        LoadNewestError::NoneLoads { tried: warnings }
    })
}
