//! Real processes for whole-system tests: a coordinator, workers, and the command line as a user types it.
//!
//! Nothing here waits for a fixed time: [`eventually`] looks again and again until what it waits for is so, and fails
//! with a description of what it last saw when its patience ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How the variables begin that cargo sets for a test.
const TOLD_BY_CARGO: [&str; 5] =
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];

/// The directory of the workspace's programs, built if need be with the profile of this test.
pub fn programs() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let dir = test.parent().and_then(Path::parent).unwrap().to_owned();
        let mut build = Command::new(env!("CARGO"));
        // All of the workspace, as `cargo build` does: with the same features, so that what is there already is used.
        build.args(["build", "--quiet", "--workspace", "--bins"]);
        build.args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml")]);
        // What cargo tells a test of its package, it must not hear itself: build scripts of dependencies look at that, and all
        // that rests on them would be compiled once more for every package that has tests.
        for (name, _) in std::env::vars_os() {
            if TOLD_BY_CARGO.iter().any(|told| name.to_string_lossy().starts_with(told)) {
                build.env_remove(name);
            }
        }
        if dir.file_name() == Some(OsStr::new("release")) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the programs under test do not build");
        dir
    })
}

/// Looks again and again until `look` gives something. Fails with what `look` last saw.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match look() {
            Ok(seen) => return seen,
            Err(last) if began.elapsed() > PATIENCE => {
                panic!("waited {PATIENCE:?} for {what}; last saw: {last}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// A process with a log, which does not outlive the test.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it, with all that it says in `DIR/NAME.log`.
    pub fn start(mut command: Command, dir: &Path, name: &str) -> Process {
        let log = log_path(dir, name);
        command.stdin(Stdio::null()).stdout(log_file(&log)).stderr(log_file(&log));
        let child = command.spawn().unwrap_or_else(|why| panic!("{name} does not start: {why}"));
        Process { name: name.to_owned(), child, log }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap_or_else(|why| panic!("{}: {why}; {}", self.name, self.log()));
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Waits until it has become this program: what its command line puts before that is done then.
    pub fn becomes(&self, program: &str) {
        let comm = format!("/proc/{}/comm", self.id());
        eventually(&format!("{} to be set up", self.name), || match std::fs::read_to_string(&comm) {
            Ok(name) if name.trim() == program => Ok(()),
            other => Err(format!("{other:?}; {}", self.log())),
        });
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        eventually(&format!("{} to end", self.name), || {
            self.child.try_wait().unwrap().ok_or_else(|| format!("it runs; its log: {}", self.log()))
        })
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.log"))
}

fn log_file(log: &Path) -> std::fs::File {
    std::fs::File::options().create(true).append(true).open(log).unwrap()
}

/// A coordinator on its embedded store, in a directory of its own.
#[derive(Debug)]
pub struct Coordinator {
    process: Process,
    dir: tempfile::TempDir,
    address: SocketAddr,
    silence: &'static str,
    protection: Protection,
}

/// What keeps strangers from a coordinator.
#[derive(Debug, Clone, Default)]
pub struct Protection {
    /// More flags of `reknit serve`.
    pub serve: Vec<String>,
    /// What its clients have in their environment, unless a test says otherwise.
    pub shown: Vec<(&'static str, String)>,
}

impl Coordinator {
    /// Starts one on a free port.
    pub fn start() -> Coordinator {
        Coordinator::start_with_silence("3s")
    }

    /// Starts one that lets a silent member live for this long.
    pub fn start_with_silence(silence: &'static str) -> Coordinator {
        Coordinator::start_protected(tempfile::tempdir().unwrap(), silence, Protection::default())
    }

    /// Starts one that is protected by what lies in `dir`.
    pub fn start_protected(
        dir: tempfile::TempDir,
        silence: &'static str,
        protection: Protection,
    ) -> Coordinator {
        let (process, address) = serve(dir.path(), "127.0.0.1:0", silence, &protection.serve);
        Coordinator { process, dir, address, silence, protection }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        let speaks_tls = self.protection.serve.iter().any(|flag| flag == "--tls-cert");
        format!("{}://{}", if speaks_tls { "https" } else { "http" }, self.address)
    }

    /// A directory that lives as long as it does.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its store's directory.
    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again, on the same store and port.
    pub fn restart(&mut self) {
        let listen = self.address.to_string();
        (self.process, self.address) = serve(self.dir.path(), &listen, self.silence, &self.protection.serve);
    }

    /// Runs a command line against it.
    pub fn reknit(&self, args: &[&str]) -> Ran {
        self.reknit_showing(args, &self.protection.shown)
    }

    /// Runs one with this in its environment.
    pub fn reknit_showing(&self, args: &[&str], shown: &[(&'static str, String)]) -> Ran {
        let mut all = args.to_vec();
        let url = self.url();
        all.extend(["--coordinator", &url]);
        reknit_showing(&all, shown)
    }

    /// What `reknit status JOB --json` says.
    pub fn status(&self, job: &str) -> Result<Value, String> {
        let ran = self.reknit(&["status", job, "--json"]);
        if ran.code == 0 { Ok(serde_json::from_str(&ran.stdout).unwrap()) } else { Err(ran.stderr) }
    }

    /// Waits until a job runs with so many ranks, and returns its status.
    pub fn runs_with(&self, job: &str, ranks: u64) -> Value {
        eventually(&format!("{job} to run with {ranks} ranks"), || {
            let status = self.status(job)?;
            let is_so = status["phase"] == "running" && status["ranks"] == ranks;
            if is_so { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Waits until a job has committed a checkpoint of at least this step, and returns its step.
    pub fn has_checkpoint(&self, job: &str, step: u64) -> u64 {
        eventually(&format!("a checkpoint of {job}"), || {
            let status = self.status(job)?;
            let newest = status["checkpoints"].as_array().and_then(|all| all.last()?["step"].as_u64());
            newest.filter(|newest| *newest >= step).ok_or_else(|| status.to_string())
        })
    }

    /// What `reknit history JOB --json` says.
    pub fn history(&self, job: &str) -> Vec<Value> {
        let ran = self.reknit(&["history", job, "--json"]);
        serde_json::from_str(&ran.stdout).unwrap()
    }

    /// Starts the example program as a worker of a job.
    pub fn worker(&self, job: &str, name: &str, args: &[&str]) -> Process {
        self.worker_showing(job, name, args, &self.protection.shown)
    }

    /// Starts one with this in its environment.
    pub fn worker_showing(
        &self,
        job: &str,
        name: &str,
        args: &[&str],
        shown: &[(&'static str, String)],
    ) -> Process {
        let mut command = Command::new(programs().join("reknit-digits"));
        command.args(["--coordinator", &self.url(), "--job", job, "--name", name]).args(args);
        command.envs(shown.iter().map(|(name, value)| (name, value)));
        self.spawn_worker(command, name)
    }

    /// Starts a worker by a command line of the caller's.
    pub fn spawn_worker(&self, mut command: Command, name: &str) -> Process {
        command.env("RAYON_NUM_THREADS", "1");
        Process::start(command, self.dir.path(), name)
    }
}

fn serve(dir: &Path, listen: &str, silence: &str, more: &[String]) -> (Process, SocketAddr) {
    let name = "coordinator";
    let log = log_path(dir, name);
    let mut child = Command::new(programs().join("reknit"))
        .args(["serve", "--announce", "--listen", listen, "--silence", silence, "--store"])
        .arg(dir.join("store"))
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file(&log))
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let process = Process { name: name.to_owned(), child, log };
    let address = line.trim().parse().unwrap_or_else(|_| panic!("it does not listen: {}", process.log()));
    (process, address)
}

/// What a command line came to.
#[derive(Debug)]
pub struct Ran {
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Runs `reknit` to its end.
pub fn reknit(args: &[&str]) -> Ran {
    reknit_showing(args, &[])
}

/// Runs `reknit` with this in its environment.
pub fn reknit_showing(args: &[&str], shown: &[(&'static str, String)]) -> Ran {
    reknit_within(PATIENCE, args, shown)
}

/// Runs `reknit` with this in its environment, for at most so long.
pub fn reknit_within(patience: Duration, args: &[&str], shown: &[(&'static str, String)]) -> Ran {
    let child = Command::new(programs().join("reknit"))
        .args(args)
        .env_remove("REKNIT_COORDINATOR")
        .envs(shown.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Read while it runs: what it says may be more than a pipe holds.
    let pid = child.id();
    let (tell, told) = std::sync::mpsc::channel();
    let reads = std::thread::spawn(move || {
        let output = child.wait_with_output().unwrap();
        let _ = tell.send(());
        output
    });
    if told.recv_timeout(patience).is_err() {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
        let said = String::from_utf8_lossy(&reads.join().unwrap().stderr).into_owned();
        panic!("`reknit {}` takes more than {patience:?} ({killed:?}); it said: {said}", args.join(" "));
    }
    reads.join().unwrap().into()
}
