//! The workers, each a process on its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::processes::{Process, log_file};

/// How often a process or a file is looked at.
pub(super) const POLL: Duration = Duration::from_millis(2);

/// What every worker is told.
#[derive(Debug, Clone)]
pub(super) struct Training {
    pub(super) program: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) job: String,
    pub(super) steps: u64,
    pub(super) step_ms: u64,
    pub(super) min: u32,
    pub(super) max: u32,
}

/// One worker.
pub(super) struct Worker {
    process: Process,
    log: PathBuf,
}

impl Worker {
    pub(super) fn start(training: &Training, coordinator: SocketAddr, name: &str) -> Result<Worker> {
        let dir = &training.dir;
        let child = Command::new(&training.program)
            .args(["--coordinator", &format!("http://{coordinator}")])
            .args(["--job", &training.job, "--name", name])
            .args(["--min", &training.min.to_string(), "--max", &training.max.to_string()])
            .args(["--steps", &training.steps.to_string(), "--step-ms", &training.step_ms.to_string()])
            .arg("--checkpoints")
            .arg(dir.join("checkpoints"))
            .arg("--evidence")
            .arg(dir.join(format!("{name}.{}.evidence", unique())))
            // Four workers share the machine: none of them is to use all of it.
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(log_file(dir, name)?)
            .stderr(log_file(dir, name)?)
            .spawn()
            .with_context(|| format!("cannot start {}", training.program.display()))?;
        let log = dir.join(format!("{name}.log"));
        Ok(Worker { process: Process::new(child, name), log })
    }

    pub(super) fn name(&self) -> &str {
        self.process.name()
    }

    /// SIGKILL, without waiting for what follows from it.
    pub(super) fn kill(&self) -> Result<()> {
        self.process.signal(Signal::KILL)
    }

    /// SIGSTOP.
    pub(super) fn stop(&self) -> Result<()> {
        self.process.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub(super) fn resume(&self) -> Result<()> {
        self.process.signal(Signal::CONT)
    }

    pub(super) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.ended()?.is_some())
    }

    /// Waits for its end, which must be a good one.
    pub(super) fn wait_end(&mut self, patience: Duration) -> Result<()> {
        let began = Instant::now();
        while !self.has_ended()? {
            if began.elapsed() > patience {
                bail!("{} has not ended within {patience:?}; see {}", self.name(), self.log.display());
            }
            std::thread::sleep(POLL);
        }
        self.check_end()
    }

    /// An error if it ended badly.
    pub(super) fn check_end(&mut self) -> Result<()> {
        match self.process.ended()? {
            Some(status) if !status.success() => {
                bail!("{} ended with {status}; see {}", self.name(), self.log.display())
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Tells files of processes with one name apart.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
