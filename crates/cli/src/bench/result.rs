//! What a measurement gives: a table for people, or JSON with the same figures.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Common;
use super::machine::{Machine, Watch};
use crate::print;

/// One line of the table.
pub(super) struct Row {
    what: String,
    measured: String,
    /// What it is compared with.
    beside: String,
    targets: Vec<Target>,
}

/// What was promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    AtMost { limit: f64, measured: f64 },
    AtLeast { limit: f64, measured: f64 },
}

impl Target {
    pub(super) fn is_met(self) -> bool {
        match self {
            Target::AtMost { limit, measured } => measured <= limit,
            Target::AtLeast { limit, measured } => measured >= limit,
        }
    }

    fn text(self) -> String {
        let bound = match self {
            Target::AtMost { limit, .. } => format!("≤ {limit}"),
            Target::AtLeast { limit, .. } => format!("≥ {limit}"),
        };
        format!("{bound} {}", if self.is_met() { "met" } else { "MISSED" })
    }
}

impl Row {
    pub(super) fn new(what: impl Into<String>, measured: impl Into<String>) -> Row {
        Row { what: what.into(), measured: measured.into(), beside: String::new(), targets: Vec::new() }
    }

    pub(super) fn beside(self, beside: impl Into<String>) -> Row {
        Row { beside: beside.into(), ..self }
    }

    /// There may be several.
    pub(super) fn target(mut self, target: Target) -> Row {
        self.targets.push(target);
        self
    }
}

/// Figures that can be shown.
pub(super) trait Figures: Serialize {
    /// The measurement's name.
    const NAME: &'static str;

    fn rows(&self) -> Vec<Row>;
}

/// The figures with what they were measured on.
#[derive(Serialize)]
struct Outcome<'a, F> {
    bench: &'static str,
    version: &'static str,
    command: String,
    /// Figures of a quick run mean little.
    quick: bool,
    machine: Machine,
    #[serde(flatten)]
    figures: &'a F,
}

/// Runs a measurement and shows what it came to.
pub(super) fn show<F: Figures>(common: &Common, measure: impl FnOnce() -> Result<F>) -> Result<()> {
    let file = common.json.iter().flatten().next().map(|path| Output::open(path)).transpose()?;
    let watch = Watch::begin()?;
    let figures = measure().with_context(|| format!("{} could not be measured", F::NAME))?;
    let machine = watch.end()?;
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    let (bench, version, quick) = (F::NAME, env!("CARGO_PKG_VERSION"), common.quick);
    let outcome = Outcome { bench, version, command, quick, machine, figures: &figures };
    match file {
        Some(file) => file.write(&format!("{}\n", serde_json::to_string_pretty(&outcome)?))?,
        None if common.json.is_some() => return print::json(&outcome),
        None => {}
    }
    let rows = figures.rows();
    let cells = |row: &Row| {
        let targets: Vec<String> = row.targets.iter().copied().map(Target::text).collect();
        vec![row.what.clone(), row.measured.clone(), row.beside.clone(), targets.join("; ")]
    };
    print::table(&["", "MEASURED", "BESIDE", "TARGET"], &rows.iter().map(cells).collect::<Vec<_>>());
    if common.quick {
        print::talk(format_args!("a quick run: these figures mean little"));
    }
    print::talk(format_args!("{}", outcome.machine));
    Ok(())
}

/// A file for the results: who cannot write it hears so before anything is measured, and what was in it stays until there
/// is something else.
pub(super) struct Output<'a> {
    path: &'a Path,
    file: File,
}

impl Output<'_> {
    pub(super) fn open(path: &Path) -> Result<Output<'_>> {
        let file = File::options().create(true).truncate(false).write(true).open(path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Output { path, file })
    }

    pub(super) fn write(mut self, text: &str) -> Result<()> {
        let mut write = || {
            // A pipe has nothing in it that could be left.
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
            }
            self.file.write_all(text.as_bytes())
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_from_its_limit_on() {
        let at_most = |measured| Target::AtMost { limit: 25.0, measured };
        let at_least = |measured| Target::AtLeast { limit: 0.7, measured };
        assert_eq!([at_most(25.0), at_most(25.1)].map(Target::is_met), [true, false]);
        assert_eq!([at_least(0.7), at_least(0.69)].map(Target::is_met), [true, false]);
        assert_eq!(at_most(30.0).text(), "≤ 25 MISSED");
        assert_eq!(at_least(1.0).text(), "≥ 0.7 met");
    }
}
