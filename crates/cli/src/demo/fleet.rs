//! The processes: a coordinator and workers, each on its own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How often a process or a file is looked at.
pub(super) const POLL: Duration = Duration::from_millis(2);

/// How long a coordinator may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(20);

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

/// Ends a process for good when it is dropped, whatever state it is in.
struct Process {
    child: Child,
    name: String,
}

impl Process {
    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id that is none")?;
        kill_process(pid, signal).with_context(|| format!("cannot send {signal:?} to {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_file(dir: &Path, name: &str) -> Result<File> {
    let path = dir.join(format!("{name}.log"));
    let file = File::options().create(true).append(true).open(&path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

/// A coordinator on its embedded store.
pub(super) struct Coordinator {
    process: Process,
    dir: PathBuf,
    address: SocketAddr,
}

impl Coordinator {
    /// Starts one on a free port, with a fresh store.
    pub(super) fn start(dir: &Path) -> Result<Coordinator> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (process, address) = serve(dir, SocketAddr::from(([127, 0, 0, 1], 0)))?;
        Ok(Coordinator { process, dir: dir.to_owned(), address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.child.wait()?;
        Ok(())
    }

    /// Starts it again on the same store and port.
    pub(super) fn restart(&mut self) -> Result<()> {
        (self.process, self.address) = serve(&self.dir, self.address)?;
        Ok(())
    }
}

fn serve(dir: &Path, listen: SocketAddr) -> Result<(Process, SocketAddr)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", "--announce", "--listen", &listen.to_string(), "--store"])
        .arg(dir.join("store"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file(dir, "coordinator")?)
        .spawn()
        .context("cannot start the coordinator")?;
    let stdout = child.stdout.take().context("the coordinator has no output")?;
    let process = Process { child, name: "the coordinator".to_owned() };
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        if BufReader::new(stdout).read_line(&mut line).is_ok() {
            // The other end may have given up.
            let _ = sender.send(line);
        }
    });
    let line = receiver.recv_timeout(START_PATIENCE).unwrap_or_default();
    let address = line.trim().parse().with_context(|| {
        format!("the coordinator does not listen; see {}", dir.join("coordinator.log").display())
    })?;
    Ok((process, address))
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
        Ok(Worker { process: Process { child, name: name.to_owned() }, log })
    }

    pub(super) fn name(&self) -> &str {
        &self.process.name
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
        Ok(self.process.child.try_wait()?.is_some())
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
        match self.process.child.try_wait()? {
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
