//! The two ways out: data and talk.
//!
//! A reader of the data that has gone away (`reknit history | head`) is no error, but there is no point in going on; data
//! that cannot be written for another reason (a full disk) is one. Both are remembered here: who prints much looks now and
//! then, and `main` at the end.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

use serde::Serialize;

/// The first failure to write data.
static FAILED: OnceLock<io::Error> = OnceLock::new();

/// One line of data.
pub(crate) fn data(line: Arguments<'_>) {
    if FAILED.get().is_some() {
        return;
    }
    if let Err(why) = writeln!(io::stdout().lock(), "{line}") {
        // Only the first one counts.
        let _ = FAILED.set(why);
    }
}

/// Whether nobody takes the data any more.
pub(crate) fn is_over() -> bool {
    FAILED.get().is_some()
}

/// Why data could not be written, if that is an error.
pub(crate) fn failure() -> Option<&'static io::Error> {
    FAILED.get().filter(|why| why.kind() != ErrorKind::BrokenPipe)
}

/// One line of talk.
pub(crate) fn talk(line: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Data as JSON, for scripts.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    data(format_args!("{}", serde_json::to_string_pretty(value)?));
    Ok(())
}

/// Rows as a table whose columns are as wide as they need to be.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) {
    let widths: Vec<usize> = (0..head.len())
        .map(|i| {
            rows.iter().map(|row| row[i].chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0)
        })
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        data(format_args!("{}", cells.join("  ").trim_end()));
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}
