//! Dependencies point one way (ARCHITECTURE.md): `cli → {coordinator, trainer} → proto → membership`, and the pure core
//! depends on nothing at all.

#![allow(clippy::unwrap_used, reason = "a check that cannot look fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// What each crate may use of the others. Tests may use anything.
const MAY_USE: [(&str, &[&str]); 10] = [
    ("reknit-membership", &[]),
    ("reknit-proto", &["reknit-membership"]),
    ("reknit-torchelastic", &[]),
    ("reknit-coordinator", &["reknit-proto", "reknit-membership", "reknit-torchelastic"]),
    ("reknit-collectives", &["reknit-membership"]),
    ("reknit-cuda", &["reknit-collectives", "reknit-membership"]),
    ("reknit-checkpoint", &["reknit-membership"]),
    ("reknit-trainer", &["reknit-proto", "reknit-collectives", "reknit-checkpoint", "reknit-membership"]),
    (
        "reknit-cli",
        &[
            "reknit-coordinator",
            "reknit-trainer",
            "reknit-collectives",
            "reknit-checkpoint",
            "reknit-proto",
            "reknit-membership",
            "reknit-torchelastic",
        ],
    ),
    ("reknit-example-digits", &["reknit-trainer"]),
];

/// Crates that the core's purity would end with.
const MAY_NOT_BE_IN_THE_CORE: &str =
    "the core depends on nothing: no clock, no randomness, no encoding, no log";

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Each crate's normal dependencies.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let package = |package: &Value| {
        let normal = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
        let names = normal.map(|d| d["name"].as_str().unwrap().to_owned()).collect();
        (package["name"].as_str().unwrap().to_owned(), names)
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let dependencies = dependencies();
    for (name, allowed) in MAY_USE {
        let used = dependencies.get(name).unwrap_or_else(|| panic!("there is no crate {name}"));
        let wrong: Vec<&String> =
            used.iter().filter(|d| d.starts_with("reknit-") && !allowed.contains(&d.as_str())).collect();
        assert!(wrong.is_empty(), "{name} uses {wrong:?}; it may use {allowed:?} (see ARCHITECTURE.md)");
    }
}

#[test]
fn every_crate_has_its_layer() {
    let known: BTreeSet<&str> = MAY_USE.iter().map(|(name, _)| *name).collect();
    let tests = [
        "reknit-sim",
        "reknit-e2e",
        "reknit-chaos",
        "reknit-tidy",
        "reknit-stand-in-driver",
        "reknit-stand-in-nccl",
    ];
    for name in dependencies().keys().filter(|name| !tests.contains(&name.as_str())) {
        assert!(
            known.contains(name.as_str()),
            "{name} is new: say in MAY_USE and ARCHITECTURE.md where it belongs"
        );
    }
}

#[test]
fn the_core_depends_on_nothing() {
    assert_eq!(dependencies()["reknit-membership"], BTreeSet::new(), "{MAY_NOT_BE_IN_THE_CORE}");
}

#[test]
fn the_training_framework_stays_in_the_example() {
    for (name, used) in dependencies() {
        let frameworks: Vec<&String> =
            used.iter().filter(|d| d.starts_with("candle") || *d == "smartcore").collect();
        assert!(frameworks.is_empty() || name.starts_with("reknit-example-"), "{name} uses {frameworks:?}");
    }
}

/// Rule D-6 of the coordinator: it never dials a member.
#[test]
fn d6_the_coordinator_has_nothing_to_dial_with() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/coordinator/src");
    let mut left = vec![std::path::PathBuf::from(dir)];
    let mut files = 0;
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        files += 1;
        // These reach etcd and the other coordinators, by addresses that an operator names; a member's they never see.
        let reaches_out = ["tls/peers.rs", "store/etcd.rs"].iter().any(|file| path.ends_with(file))
            || path.parent().is_some_and(|dir| dir.ends_with("src/etcd"));
        if reaches_out {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["_client::", "Endpoint", "Channel", ".connect(", "::connect("] {
            assert!(!text.contains(word), "{} has {word}", path.display());
        }
    }
    assert!(files > 10, "only {files} files were looked at");
}
