//! Open MPI, as Debian brings it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::super::numbers::NumberType;
use super::{Lines, Missing, PATIENCE, Task};
use crate::processes::{Process, log_file};

const PROGRAM: &str = include_str!("mpi.c");
/// How often an mpirun that is on its way out is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// By which way its bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(in super::super) enum Wire {
    Tcp,
    Shm,
}

impl Wire {
    fn words(self) -> &'static [&'static str] {
        match self {
            Wire::Tcp => &["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"],
            Wire::Shm => &["--mca", "btl", "self,vader"],
        }
    }
}

/// How it sums: as it decides itself, or as it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) enum Algorithm {
    Default,
    RecursiveDoubling,
    Ring,
    SegmentedRing,
    Rabenseifner,
}

impl Algorithm {
    /// Those among which its best one is.
    pub(in super::super) const ALL: [Algorithm; 5] = [
        Algorithm::Default,
        Algorithm::RecursiveDoubling,
        Algorithm::Ring,
        Algorithm::SegmentedRing,
        Algorithm::Rabenseifner,
    ];

    pub(in super::super) fn name(self) -> &'static str {
        match self {
            Algorithm::Default => "its own choice",
            Algorithm::RecursiveDoubling => "recursive doubling",
            Algorithm::Ring => "ring",
            Algorithm::SegmentedRing => "segmented ring",
            Algorithm::Rabenseifner => "Rabenseifner",
        }
    }

    /// Its number in `coll_tuned_allreduce_algorithm`.
    fn number(self) -> Option<&'static str> {
        match self {
            Algorithm::Default => None,
            Algorithm::RecursiveDoubling => Some("3"),
            Algorithm::Ring => Some("4"),
            Algorithm::SegmentedRing => Some("5"),
            Algorithm::Rabenseifner => Some("6"),
        }
    }
}

/// An Open MPI that compiles and runs programs.
pub(in super::super) struct Mpi {
    pub(in super::super) version: String,
}

impl Mpi {
    pub(super) fn find() -> Result<Mpi, Missing> {
        let missing = |what: &str| Missing {
            what: format!("Open MPI ({what})"),
            hint: "install Open MPI (Debian: `apt-get install libopenmpi-dev openmpi-bin gcc`)".to_owned(),
        };
        let said = |program: &str| {
            let ran = Command::new(program).arg("--version").stdin(Stdio::null()).output();
            let ran = ran.map_err(|why| missing(&format!("{program}: {why}")))?;
            Ok(String::from_utf8_lossy(&ran.stdout).lines().next().unwrap_or_default().to_owned())
        };
        said("mpicc")?;
        let version = said("mpirun")?;
        match version.split_once("(Open MPI) ") {
            Some((_, version)) => Ok(Mpi { version: version.to_owned() }),
            None => Err(missing(&format!("mpirun is another one: {version}"))),
        }
    }

    /// Whether it has the type: half floats it has not.
    pub(in super::super) fn has(number: NumberType) -> bool {
        match number {
            NumberType::F16 | NumberType::Bf16 => false,
            NumberType::F32 | NumberType::F64 | NumberType::I32 | NumberType::I64 | NumberType::U8 => true,
        }
    }

    /// Makes the program that [`Mpi::time`] runs.
    pub(in super::super) fn compile(&self, dir: &Path) -> Result<()> {
        let source = dir.join("mpi.c");
        std::fs::write(&source, PROGRAM).with_context(|| format!("cannot write {}", source.display()))?;
        let compiled = Command::new("mpicc").arg("-O2").arg("-o").arg(program(dir)).arg(&source).output()?;
        let said = String::from_utf8_lossy(&compiled.stderr);
        ensure!(compiled.status.success(), "mpicc does not compile the program: {said}");
        Ok(())
    }

    /// How long each sum takes, in microseconds. Each rank is a process, which gives its core away while it waits if there
    /// are more ranks than cores.
    pub(in super::super) fn time(
        &self,
        task: &Task<'_>,
        wire: Wire,
        algorithm: Algorithm,
    ) -> Result<Vec<f64>> {
        let cores = std::thread::available_parallelism()?.get();
        let yields = if task.world as usize > cores { "1" } else { "0" };
        let mut command = Command::new("mpirun");
        command
            .args(["--oversubscribe", "--allow-run-as-root", "-n", &task.world.to_string()])
            .args(["--mca", "mpi_yield_when_idle", yields, "--mca", "pml", "ob1"])
            .args(wire.words());
        if let Some(number) = algorithm.number() {
            command.args(["--mca", "coll_tuned_use_dynamic_rules", "1"]);
            command.args(["--mca", "coll_tuned_allreduce_algorithm", number]);
        }
        let mut child = command
            .arg(program(task.dir))
            .args(task.words())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file(task.dir, "mpi")?)
            .spawn()
            .context("cannot start mpirun")?;
        let output = child.stdout.take().context("mpirun without output")?;
        let mut process = Process::new(child, "mpirun");
        let times = Lines::of(output, task.dir.join("mpi.log")).times("Open MPI", task.sums)?;
        // It takes its own files away on its way out.
        let until = Instant::now() + PATIENCE;
        loop {
            match process.ended()? {
                Some(ended) if ended.success() => return Ok(times),
                Some(ended) => bail!("mpirun ended with {ended}"),
                None if Instant::now() < until => std::thread::sleep(LOOK_EVERY),
                None => bail!("mpirun does not end"),
            }
        }
    }
}

fn program(dir: &Path) -> PathBuf {
    dir.join("mpi")
}
