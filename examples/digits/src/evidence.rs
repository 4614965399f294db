//! Writes down what each step used, so that somebody else can check that every image was used exactly once per pass.
//!
//! One line each, written by one call, so that a process that is killed leaves whole lines:
//! ```text
//! dataset LENGTH                                              at the beginning
//! try   STEP GENERATION RANK SIZE UNIX_US SAMPLE,SAMPLE,…     before the step's all-reduce
//! done  STEP GENERATION UNIX_US LOSS                          after its commit
//! accuracy VALUE                                              at the end
//! ```

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

pub(crate) struct Evidence {
    file: Option<File>,
}

impl Evidence {
    pub(crate) fn new(path: Option<&Path>, dataset: u64) -> Result<Evidence> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("cannot write {}", path.display()))
        };
        let mut evidence = Evidence { file: path.map(open).transpose()? };
        evidence.line(&format!("dataset {dataset}\n"))?;
        Ok(evidence)
    }

    pub(crate) fn tried(
        &mut self,
        step: u64,
        generation: u64,
        rank: u32,
        size: u32,
        samples: &[u64],
    ) -> Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let samples: Vec<String> = samples.iter().map(u64::to_string).collect();
        self.line(&format!("try {step} {generation} {rank} {size} {} {}\n", now_us(), samples.join(",")))
    }

    pub(crate) fn committed(&mut self, step: u64, generation: u64, loss: f32) -> Result<()> {
        self.line(&format!("done {step} {generation} {} {loss}\n", now_us()))
    }

    pub(crate) fn accuracy(&mut self, accuracy: f64) -> Result<()> {
        self.line(&format!("accuracy {accuracy}\n"))
    }

    fn line(&mut self, line: &str) -> Result<()> {
        match &mut self.file {
            Some(file) => Ok(file.write_all(line.as_bytes())?),
            None => Ok(()),
        }
    }
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros())
}
