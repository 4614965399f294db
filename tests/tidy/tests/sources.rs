//! Checks on the source files: none is dead, none is too long to be read in a sitting without a reason, every
//! environment variable is documented, and every rule of a crate is named by a test.

#![allow(clippy::unwrap_used, reason = "a check that cannot look fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Every file of the tree that is not ignored.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "git lists the files");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| root().join(line)).filter(|path| path.is_file()).collect()
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let is_rust = |path: &PathBuf| path.extension().is_some_and(|e| e == "rs");
    files().into_iter().filter(is_rust).map(|p| (p.clone(), std::fs::read_to_string(&p).unwrap())).collect()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// A file over this many lines has probably been moved into by a second noun.
const LINES_MAX: usize = 600;

#[test]
fn a_file_can_be_read_in_a_sitting() {
    let long: Vec<String> = rust_files()
        .iter()
        .filter(|(_, text)| text.lines().count() > LINES_MAX)
        .map(|(path, text)| format!("{} ({} lines)", shown(path), text.lines().count()))
        .collect();
    assert!(long.is_empty(), "over {LINES_MAX} lines: {long:?}");
}

#[test]
fn no_source_file_is_dead() {
    let files = rust_files();
    let all: String = files.iter().map(|(_, text)| text.as_str()).collect();
    for (path, _) in &files {
        let (Some(stem), Some(parent)) = (path.file_stem().and_then(|s| s.to_str()), path.parent()) else {
            continue;
        };
        let is_root = ["lib", "main", "build"].contains(&stem)
            || parent.ends_with("tests")
            || parent.ends_with("benches")
            || parent.ends_with("bin");
        let module =
            if stem == "mod" { parent.file_name().and_then(|n| n.to_str()).unwrap_or(stem) } else { stem };
        let named = all.contains(&format!("mod {module};")) || all.contains(&format!("{stem}.rs\"]"));
        assert!(is_root || named, "{} belongs to no module", shown(path));
    }
}

#[test]
fn nothing_is_left_unfinished() {
    for (path, text) in rust_files() {
        if path.starts_with(root().join("tests/tidy")) {
            continue;
        }
        for word in ["todo!(", "unimplemented!(", "FIXME", "XXX", "dbg!(", "#[ignore"] {
            assert!(!text.contains(word), "{} has {word}", shown(&path));
        }
    }
}

#[test]
fn every_environment_variable_is_documented() {
    let mut variables = BTreeSet::new();
    for (path, text) in rust_files() {
        if path.starts_with(root().join("tests/tidy")) {
            continue;
        }
        for (at, _) in text.match_indices("\"REKNIT_") {
            let name: String =
                text[at + 1..].chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect();
            variables.insert((name, shown(&path)));
        }
    }
    let documents: String = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]
        .iter()
        .map(|name| std::fs::read_to_string(root().join(name)).unwrap_or_default())
        .collect();
    for (name, path) in variables {
        assert!(documents.contains(&name), "{name} (in {path}) is not documented");
    }
}

/// The rules that a crate's first page lists, as `M-1` and the like.
fn rules(text: &str) -> BTreeSet<String> {
    let is_rule = |cell: &str| {
        let (letter, number) = cell.split_once('-').unwrap_or_default();
        letter.len() == 1 && !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())
    };
    text.lines()
        .filter_map(|line| match line.strip_prefix("//! | ") {
            Some(row) => row.split(" |").next(),
            None => line.strip_prefix("//! - **")?.split("**").next(),
        })
        .filter(|cell| is_rule(cell))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_rule_is_named_by_a_test() {
    let files = rust_files();
    let tests: String = files
        .iter()
        .filter_map(|(path, text)| {
            let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            let is_test = path.components().any(|c| c.as_os_str() == "tests") || stem.ends_with("tests");
            if is_test { Some(text.as_str()) } else { text.find("#[cfg(test)]").map(|at| &text[at..]) }
        })
        .collect();
    let named = |rule: &str| {
        let lower = rule.to_lowercase();
        let names = [lower.replace('-', "") + "_", lower.replace('-', "_") + "_"];
        tests.contains(rule) || names.iter().any(|name| tests.contains(name))
    };
    for (path, text) in &files {
        let unproved: Vec<String> = rules(text).into_iter().filter(|rule| !named(rule)).collect();
        assert!(unproved.is_empty(), "{}: no test names the rules {unproved:?}", shown(path));
    }
}
