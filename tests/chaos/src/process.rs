//! Processes that do not outlive the thread that started them, however it ends: the kernel sees to it.

use std::process::Command;

pub use reknit_e2e::Process;

/// A command that runs a program after a prefix, such as one that enters a network; the program gets its arguments from
/// the caller. It is killed when the calling thread is gone.
pub fn command(prefix: &[String], program: impl AsRef<std::ffi::OsStr>) -> Command {
    // The signal is asked for last: what changes a process's rights takes it back.
    let mut words = prefix.iter().map(String::as_str).chain(["setpriv", "--pdeathsig", "KILL", "--"]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words).arg(program);
    command
}
