//! Processes that a command starts, sends signals to, and ends for good when it is done with them, or is told to end.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

/// How often a process that is waited for is looked at.
const REAP_EVERY: Duration = Duration::from_micros(200);

/// How long a coordinator may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// What would protect a coordinator that is this machine's alone.
const PROTECTION: [&str; 5] =
    ["REKNIT_TLS_CERT", "REKNIT_TLS_KEY", "REKNIT_TLS_CLIENT_CA", "REKNIT_TLS_CA", "REKNIT_TOKENS"];

/// The ids of all processes that are there. One is taken out while the lock is held under which it is reaped: an id in
/// here is nobody else's.
static LIVE: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn live() -> MutexGuard<'static, BTreeSet<i32>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has an interrupt end this command's processes, too: one that is stopped would not even hear it.
pub(crate) fn end_on_interrupt() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupted, mut terminated) = {
        let _guard = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("reknit-signals".to_owned()).spawn(move || {
        let code = runtime.block_on(async {
            tokio::select! {
                _ = interrupted.recv() => 130,
                _ = terminated.recv() => 143,
            }
        });
        let live = live();
        for pid in live.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            // It may be on its way out already.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::process::exit(code);
    })?;
    Ok(())
}

/// Ends a process for good when it is dropped, whatever state it is in.
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    pub(crate) fn new(child: Child, name: &str) -> Process {
        live().extend(i32::try_from(child.id()));
        Process { child, name: name.to_owned() }
    }

    /// Looks whether it has ended, and if so forgets its id with it.
    fn reap(&mut self) -> Result<Option<ExitStatus>> {
        let mut live = live();
        let ended = self.child.try_wait()?;
        if let (Some(_), Ok(pid)) = (ended, i32::try_from(self.child.id())) {
            live.remove(&pid);
        }
        Ok(ended)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid =
            i32::try_from(self.id()).ok().and_then(Pid::from_raw).context("a process id that is none")?;
        kill_process(pid, signal).with_context(|| format!("cannot send {signal:?} to {}", self.name))
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.reap()
    }

    /// Waits for its end, however long that takes.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.reap()? {
                return Ok(status);
            }
            std::thread::sleep(REAP_EVERY);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.wait();
    }
}

/// Where a process's output goes.
pub(crate) fn log_file(dir: &Path, name: &str) -> Result<File> {
    let path = dir.join(format!("{name}.log"));
    let file = File::options().create(true).append(true).open(&path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

/// A coordinator, on a store of its own or one that it shares with others.
pub(crate) struct Coordinator {
    process: Process,
    address: SocketAddr,
    make: Make,
}

/// How a coordinator is started.
#[derive(Debug, Clone)]
struct Make {
    dir: PathBuf,
    name: String,
    store: OsString,
    /// What else is said on its command line.
    more: Vec<String>,
}

impl Coordinator {
    /// Starts one on a free port, with a fresh embedded store.
    pub(crate) fn start(dir: &Path) -> Result<Coordinator> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (dir, name, store) = (dir.to_owned(), "coordinator".to_owned(), dir.join("store").into());
        Coordinator::launch(Make { dir, name, store, more: Vec::new() }, LOOPBACK)
    }

    /// Starts one on a store that is elsewhere, under a name of its own. It may be one of several there.
    pub(crate) fn start_on(dir: &Path, name: &str, store: &str, more: &[&str]) -> Result<Coordinator> {
        // The others must know where it is before it listens.
        let address = free_address()?;
        let mut more: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
        more.extend(["--advertise".to_owned(), format!("http://{address}")]);
        let make = Make { dir: dir.to_owned(), name: name.to_owned(), store: store.into(), more };
        Coordinator::launch(make, address)
    }

    fn launch(make: Make, listen: SocketAddr) -> Result<Coordinator> {
        let (process, address) = serve(&make, listen)?;
        Ok(Coordinator { process, address, make })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.wait()?;
        Ok(())
    }

    /// Starts it again on the same store and port.
    pub(crate) fn restart(&mut self) -> Result<()> {
        (self.process, self.address) = serve(&self.make, self.address)?;
        Ok(())
    }
}

/// Any port of this machine that is free.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// An address at which nobody listens; somebody else may take it before it is used.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind(LOOPBACK)?.local_addr()?)
}

fn serve(make: &Make, listen: SocketAddr) -> Result<(Process, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    for variable in PROTECTION {
        command.env_remove(variable);
    }
    let mut child = command
        .args(["serve", "--announce", "--listen", &listen.to_string(), "--store"])
        .arg(&make.store)
        .args(&make.more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file(&make.dir, &make.name)?)
        .spawn()
        .context("cannot start the coordinator")?;
    let stdout = child.stdout.take().context("the coordinator has no output")?;
    let process = Process::new(child, &make.name);
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
        let log = make.dir.join(format!("{}.log", make.name));
        format!("the coordinator does not listen; see {}", log.display())
    })?;
    Ok((process, address))
}
