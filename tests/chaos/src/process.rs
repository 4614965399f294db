//! Processes that do not outlive the thread that started them, however it ends: the kernel sees to it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use reknit_e2e::eventually;
use rustix::process::{Pid, Signal, kill_process};

/// A process with a log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A command that runs a program after a prefix, such as one that enters a network; the program gets its arguments from
/// the caller. It is killed when the calling thread is gone.
pub fn command(prefix: &[String], program: impl AsRef<std::ffi::OsStr>) -> Command {
    // The signal is asked for last: what changes a process's rights takes it back.
    let mut words = prefix.iter().map(String::as_str).chain(["setpriv", "--pdeathsig", "KILL", "--"]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg(program);
    command
}

impl Process {
    /// Starts it, with all that it says in `DIR/NAME.log`.
    pub fn start(command: Command, dir: &Path, name: &str) -> Process {
        let log = dir.join(format!("{name}.log"));
        let file = |path: &Path| File::options().create(true).append(true).open(path).unwrap();
        let mut command = command;
        command.stdin(Stdio::null()).stdout(file(&log)).stderr(file(&log));
        let child = command.spawn().unwrap_or_else(|why| panic!("{name} does not start: {why}"));
        Process { name: name.to_owned(), child, log }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id, also where it runs: no process id is hidden by what it is put into.
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
        let Process { name, child, log } = self;
        eventually(&format!("{name} to end"), || {
            child.try_wait().unwrap().ok_or_else(|| std::fs::read_to_string(&log).unwrap_or_default())
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
