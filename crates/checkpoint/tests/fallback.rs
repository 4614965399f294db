//! Loading the newest checkpoint, and what happens when it is damaged.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;

use common::{assert_same, files_of, filled, save_all, zeros_like};
use reknit_checkpoint::{CommitRef, Dtype, LoadNewestError, NamedTensors, State, TensorSpec, load_newest};

fn state(seed: u64) -> NamedTensors {
    filled(&[TensorSpec::new("w", Dtype::F32, [300]), TensorSpec::new("b", Dtype::U8, [13])], seed)
}

/// Three checkpoints, oldest first: of each, the commit and the state.
fn three(dir: &Path) -> Vec<(CommitRef, NamedTensors)> {
    [(10, 1), (20, 1), (15, 2)]
        .into_iter()
        .map(|(step, generation)| {
            let state = state(step);
            (save_all(dir, &state, 3, step, generation), state)
        })
        .collect()
}

#[test]
fn the_newest_is_the_one_committed_last_not_the_one_of_the_highest_step() {
    let dir = tempfile::tempdir().unwrap();
    let saved = three(dir.path());
    let mut loaded = zeros_like(&saved[0].1);
    // In any order: generation 2 went back to step 10 and on to 15.
    let commits = [saved[1].0, saved[2].0, saved[0].0];
    let result = load_newest(dir.path(), &commits, &mut loaded).unwrap();
    assert_eq!((result.commit, result.warnings.len()), (saved[2].0, 0));
    assert_eq!(
        result.manifest.state_digest(),
        reknit_checkpoint::state_digest(&loaded, result.manifest.layout()).unwrap()
    );
    assert_same(&loaded, &saved[2].1, "newest");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_the_file() {
    let files = files_of_newest();
    for index in 0..files {
        let dir = tempfile::tempdir().unwrap();
        let saved = three(dir.path());
        let commits: Vec<_> = saved.iter().map(|(commit, _)| *commit).collect();
        let bad = files_of(dir.path(), &saved[2].0)[index].clone();
        let mut content = fs::read(&bad).unwrap();
        *content.last_mut().unwrap() ^= 0x10;
        fs::write(&bad, content).unwrap();

        let mut loaded = zeros_like(&saved[0].1);
        let result = load_newest(dir.path(), &commits, &mut loaded).unwrap();
        assert_eq!(result.commit, saved[1].0);
        assert_same(&loaded, &saved[1].1, "the one before");
        assert_eq!(result.warnings.len(), 1);
        let warning = &result.warnings[0];
        assert_eq!((warning.commit, warning.error.file()), (saved[2].0, bad.as_path()));
        let text = warning.to_string();
        assert!(text.contains("step 15 in generation 2"), "{text}");
        assert!(text.contains(&bad.display().to_string()), "{text}");

        // And further back, if that one is gone too.
        fs::remove_dir_all(dir.path().join("step-00000020-g1")).unwrap();
        let result = load_newest(dir.path(), &commits, &mut loaded).unwrap();
        assert_eq!((result.commit, result.warnings.len()), (saved[0].0, 2));
        assert_same(&loaded, &saved[0].1, "the first");

        fs::remove_dir_all(dir.path().join("step-00000010-g1")).unwrap();
        match load_newest(dir.path(), &commits, &mut loaded).unwrap_err() {
            LoadNewestError::NoneLoads { tried } => {
                let tried: Vec<_> = tried.iter().map(|warning| warning.commit).collect();
                assert_eq!(tried, [saved[2].0, saved[1].0, saved[0].0]);
            }
            other => panic!("{other}"),
        }
    }
}

fn files_of_newest() -> usize {
    let dir = tempfile::tempdir().unwrap();
    let saved = three(dir.path());
    files_of(dir.path(), &saved[2].0).len()
}

#[test]
fn k_5_what_was_not_committed_is_not_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let saved = three(dir.path());
    let mut loaded = zeros_like(&saved[0].1);
    let result = load_newest(dir.path(), &[saved[0].0], &mut loaded).unwrap();
    assert_eq!(result.commit, saved[0].0);
    assert_same(&loaded, &saved[0].1, "the only one that counts");
    let before = loaded.clone();
    let error = load_newest(dir.path(), &[], &mut loaded).unwrap_err();
    assert!(matches!(error, LoadNewestError::NoCommit));
    assert_same(&loaded, &before, "nothing is loaded");
}

#[test]
fn a_checkpoint_of_another_program_is_no_reason_to_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let old = state(1);
    let new = filled(&[TensorSpec::new("w", Dtype::F32, [301])], 2);
    let commits = [save_all(dir.path(), &old, 2, 10, 1), save_all(dir.path(), &new, 2, 20, 1)];
    let mut program = zeros_like(&old);
    match load_newest(dir.path(), &commits, &mut program).unwrap_err() {
        LoadNewestError::OtherProgram { commit, .. } => assert_eq!(commit, commits[1]),
        other => panic!("{other}"),
    }
    assert_eq!(program.tensors(), old.tensors());
}
