//! Gloo, as PyTorch brings it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::{Lines, Missing, Task};
use crate::processes::{Process, log_file};

const PROGRAM: &str = include_str!("gloo.py");
const LOOK: &str =
    "import torch, torch.distributed as d; assert d.is_gloo_available(); print(torch.__version__)";

/// A Python that has it.
pub(in super::super) struct Gloo {
    python: PathBuf,
    /// PyTorch's version.
    pub(in super::super) version: String,
}

impl Gloo {
    pub(super) fn find(python: &Path) -> Result<Gloo, Missing> {
        let missing = |why: &str| {
            Missing {
            what: format!("PyTorch with Gloo ({}: {why})", python.display()),
            hint: "make a virtual environment (`python3 -m venv DIR`), `DIR/bin/pip install torch`, and name it with \
                   --python DIR/bin/python"
                .to_owned(),
        }
        };
        let looked = Command::new(python).args(["-c", LOOK]).stdin(Stdio::null()).output();
        let looked = looked.map_err(|why| missing(&why.to_string()))?;
        if !looked.status.success() {
            let said = String::from_utf8_lossy(&looked.stderr);
            return Err(missing(said.lines().last().unwrap_or("it says nothing")));
        }
        let version = String::from_utf8_lossy(&looked.stdout).trim().to_owned();
        Ok(Gloo { python: python.to_owned(), version })
    }

    /// How long each sum takes, in microseconds. Each rank is a process.
    pub(in super::super) fn time(&self, task: &Task<'_>) -> Result<Vec<f64>> {
        let program = task.dir.join("gloo.py");
        std::fs::write(&program, PROGRAM).with_context(|| format!("cannot write {}", program.display()))?;
        // The ranks find each other by it; one that is left from before would mislead them.
        let meeting = task.dir.join("gloo-meeting");
        match std::fs::remove_file(&meeting) {
            Err(why) if why.kind() != std::io::ErrorKind::NotFound => return Err(why.into()),
            Ok(()) | Err(_) => {}
        }
        let (mut processes, mut inputs, mut lines) = (Vec::new(), Vec::new(), None);
        for rank in 0..task.world {
            let name = format!("gloo-{rank}");
            let mut child = Command::new(&self.python)
                .arg(&program)
                .args([rank.to_string(), task.world.to_string()])
                .arg(&meeting)
                .args(task.words())
                // Else it looks for an interface by the machine's name, which may lead nowhere.
                .env("GLOO_SOCKET_IFNAME", "lo")
                .stdin(Stdio::piped())
                .stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() })
                .stderr(log_file(task.dir, &name)?)
                .spawn()
                .with_context(|| format!("cannot start {}", self.python.display()))?;
            // They end when it does.
            inputs.extend(child.stdin.take());
            let log = task.dir.join(format!("{name}.log"));
            lines = lines.or(child.stdout.take().map(|output| Lines::of(output, log)));
            processes.push(Process::new(child, &name));
        }
        lines.context("a world without ranks")?.times("Gloo", task.sums)
    }
}
