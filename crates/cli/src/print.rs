//! The two ways out: data and talk. A reader that has gone away (`reknit history | head`) is no error.

use std::fmt::Arguments;
use std::io::{self, Write};

use serde::Serialize;

/// Standard output, for those who write to it themselves.
pub(crate) fn stdout() -> io::Stdout {
    io::stdout()
}

/// One line of data.
pub(crate) fn data(line: Arguments<'_>) {
    let _ = writeln!(io::stdout().lock(), "{line}");
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
