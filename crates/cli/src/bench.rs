//! `reknit bench`: figures, each beside what the same machine allows in the same run.
//!
//! ```text
//!   a measurement (recovery, failover, swarm, steady, restore, allreduce, collectives, checkpoint)
//!     │ starts                                    │ measures                   │ gives
//!     ├─ processes: serve (a coordinator)         ├─ limits of the machine     └─ result: a table, or JSON
//!     └─ company: this program in a role          └─ stats, by the machine's clock
//! ```
//! Nothing here is timed by guess: instants come from the processes themselves, by the one clock that they share, and
//! every wait is for something that one of them says. Where time passes on purpose (between two kills, while nothing is
//! to happen), it is the thing that is measured.

pub(crate) mod args;

mod allreduce;
mod checkpoint;
mod collectives;
mod failover;
mod recovery;
mod restore;
mod steady;
mod swarm;

mod company;
mod etcd;
mod fleet;
mod peers;
mod rank;
mod replicas;
mod transport;
mod worker;

mod clock;
mod limits;
mod machine;
mod numbers;
mod random;
mod result;
mod stats;
mod word;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::failure::{Failure, Kind};
use crate::processes;
use args::{Bench, Common, What};
use result::{Figures, show};

pub(crate) fn bench(bench: Bench) -> Result<(), Failure> {
    match bench.what {
        What::Recovery(args) => measure(&args.common, |dir| recovery::recovery(&args, dir)),
        What::Failover(args) => measure(&args.common, |dir| failover::failover(&args, dir)),
        What::Swarm(args) => measure(&args.common, |dir| swarm::swarm(&args, dir)),
        What::Steady(args) => measure(&args.common, |dir| steady::steady(&args, dir)),
        What::Restore(args) => measure(&args.common, |dir| restore::restore(&args, dir)),
        What::Allreduce(args) => measure(&args.common, |dir| allreduce::allreduce(&args, dir)),
        What::Collectives(args) => {
            let peers = args.peers.then(|| peers::Peers::find(&args.python)).transpose()?;
            measure(&args.common, |dir| collectives::collectives(&args, peers.as_ref(), dir))
        }
        What::Checkpoint(args) => measure(&args.common, |dir| checkpoint::checkpoint(&args, dir)),
        What::Role(play) => play.role.play(),
    }
}

/// Runs a measurement in a directory of its own, and shows what it came to.
fn measure<F: Figures>(common: &Common, measure: impl FnOnce(&Path) -> Result<F>) -> Result<(), Failure> {
    processes::end_on_interrupt()?;
    let dir = Directory::make(common, F::NAME)?;
    if let Err(why) = show(common, || measure(&dir.path)) {
        let hint = format!("the logs are in {}", dir.path.display());
        return Err(Failure::new(Kind::Failed, why, hint));
    }
    dir.remove();
    Ok(())
}

/// Where stores and logs go.
struct Directory {
    path: PathBuf,
    is_ours: bool,
}

impl Directory {
    fn make(common: &Common, name: &str) -> Result<Directory> {
        let (path, is_ours) = match &common.dir {
            Some(dir) => (dir.clone(), false),
            None => (std::env::temp_dir().join(format!("reknit-bench-{name}-{}", std::process::id())), true),
        };
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Directory { path, is_ours })
    }

    fn remove(self) {
        if self.is_ours {
            // What is left behind in a temporary directory harms nobody.
            let _ = std::fs::remove_dir_all(self.path);
        }
    }
}
