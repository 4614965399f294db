//! Listing a job's directory and keeping it small (rule K-10).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Rng, assert_same, commit, files_of, filled, save_all, save_parts, zeros_like};
use reknit_checkpoint::{
    CommitRef, Condition, Dtype, LoadError, NamedTensors, TensorSpec, list, load_newest, retain,
};
use reknit_membership::{Digest, Generation, Step};

fn state(seed: u64) -> NamedTensors {
    filled(&[TensorSpec::new("w", Dtype::F32, [30])], seed)
}

/// All paths below `dir`.
fn tree(dir: &Path) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            paths.insert(entry.path().strip_prefix(dir).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    paths
}

#[test]
fn the_list_tells_what_is_complete_unpublished_and_damaged() {
    let dir = tempfile::tempdir().unwrap();
    assert!(list(&dir.path().join("nothing")).unwrap().is_empty());
    let first = save_all(dir.path(), &state(1), 2, 10, 1);
    save_parts(dir.path(), &state(2), 2, 30, 1);
    let third = save_all(dir.path(), &state(3), 3, 20, 2);
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    fs::create_dir(dir.path().join("step-by-step")).unwrap();

    let listed = list(dir.path()).unwrap();
    let ages: Vec<_> = listed.iter().map(|l| (l.step.0, l.generation.0)).collect();
    assert_eq!(ages, [(10, 1), (30, 1), (20, 2)], "oldest first");
    match &listed[0].condition {
        Condition::Complete { manifest, digest } => {
            assert_eq!((manifest.shards().len(), *digest), (2, first.manifest));
            let bytes: u64 =
                files_of(dir.path(), &first).iter().map(|f| fs::metadata(f).unwrap().len()).sum();
            assert_eq!(listed[0].bytes, bytes);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(listed[1].condition, Condition::Unpublished { shards: 2 }));

    let shard = &files_of(dir.path(), &third)[2];
    fs::OpenOptions::new().write(true).open(shard).unwrap().set_len(100).unwrap();
    match &list(dir.path()).unwrap()[2].condition {
        Condition::Damaged { error: LoadError::Truncated { file, .. } } => assert_eq!(file, shard),
        other => panic!("{other:?}"),
    }
    fs::remove_file(shard).unwrap();
    match &list(dir.path()).unwrap()[2].condition {
        Condition::Damaged { error: LoadError::Missing { file } } => assert_eq!(file, shard),
        other => panic!("{other:?}"),
    }
}

#[test]
fn k_10_what_is_old_and_not_kept_goes_and_all_else_stays() {
    let dir = tempfile::tempdir().unwrap();
    let save = |step, generation| save_all(dir.path(), &state(step), 2, step, generation);
    let tmp = ".tmp-0123456789abcdef";
    save(10, 1);
    let kept = save(20, 1);
    save(30, 1);
    save_parts(dir.path(), &state(4), 2, 35, 1);
    let newest = save(15, 2);
    // A later step of an older world is old; a later step of this world, and any of a later world, is new.
    save(40, 1);
    save(16, 2);
    save(5, 3);
    for place in ["step-00000020-g1", "step-00000015-g2", "step-00000016-g2", "step-00000035-g1"] {
        fs::write(dir.path().join(place).join(format!("manifest.json{tmp}")), "left").unwrap();
    }
    fs::write(dir.path().join(format!("probe{tmp}")), "").unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    fs::create_dir(dir.path().join("step-00000001-g01")).unwrap();
    fs::write(dir.path().join("step-00000030-g1/notes.txt"), "mine").unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("step-00000001-g1")).unwrap();
    std::os::unix::fs::symlink(
        "/etc/hostname",
        dir.path().join("step-00000030-g1/manifest.json.tmp-0000000000000000"),
    )
    .unwrap();

    let before = tree(dir.path());
    let retained = retain(dir.path(), &[kept, newest]).unwrap();
    let removed: Vec<_> = retained.removed.iter().map(|(step, generation)| (step.0, generation.0)).collect();
    assert_eq!(removed, [(10, 1), (35, 1), (40, 1)]);
    assert!(retained.failed.is_empty(), "{:?}", retained.failed);
    assert_eq!(
        retained.foreign,
        ["manifest.json.tmp-0000000000000000", "notes.txt"]
            .map(|f| dir.path().join("step-00000030-g1").join(f))
    );
    let gone: Vec<_> = before.difference(&tree(dir.path())).cloned().collect();
    let shards = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
    let mut expected = vec![format!("probe{tmp}")];
    for (place, is_published, is_left) in [
        ("step-00000010-g1", true, false),
        ("step-00000030-g1", true, true),
        ("step-00000035-g1", false, false),
        ("step-00000040-g1", true, false),
    ] {
        expected.extend(shards.map(|shard| format!("{place}/{shard}")));
        expected.extend(is_published.then(|| format!("{place}/manifest.json")));
        expected.extend((!is_left).then(|| place.to_owned()));
    }
    for place in ["step-00000020-g1", "step-00000015-g2", "step-00000035-g1"] {
        expected.push(format!("{place}/manifest.json{tmp}"));
    }
    expected.sort();
    assert_eq!(gone, expected);

    let mut loaded = zeros_like(&state(1));
    load_newest(dir.path(), &[newest], &mut loaded).unwrap();
    assert_same(&loaded, &state(15), "newest kept");
    load_newest(dir.path(), &[kept], &mut loaded).unwrap();
    assert_same(&loaded, &state(20), "older kept");
    // Again, there is nothing left to do.
    let again = retain(dir.path(), &[kept, newest]).unwrap();
    assert_eq!((again.removed.len(), again.freed_bytes, again.failed.len()), (0, 0, 0));
}

#[test]
fn k_10_with_nothing_to_keep_nothing_goes() {
    let dir = tempfile::tempdir().unwrap();
    save_all(dir.path(), &state(1), 2, 10, 1);
    fs::write(dir.path().join("probe.tmp-0123456789abcdef"), "").unwrap();
    let before = tree(dir.path());
    let retained = retain(dir.path(), &[]).unwrap();
    assert_eq!((retained.removed.len(), retained.freed_bytes), (0, 0));
    assert_eq!(tree(dir.path()), before);
    retain(&dir.path().join("nothing"), &[commit(1, 1, Digest(0))]).unwrap();
}

#[test]
fn what_was_freed_is_told_in_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let old = save_all(dir.path(), &state(1), 3, 10, 1);
    let keep = save_all(dir.path(), &state(2), 3, 20, 1);
    let bytes: u64 = files_of(dir.path(), &old).iter().map(|file| fs::metadata(file).unwrap().len()).sum();
    let retained = retain(dir.path(), &[keep]).unwrap();
    assert_eq!((retained.removed, retained.freed_bytes), (vec![(Step(10), Generation(1))], bytes));
}

/// Tells the cleaners to stop, also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn k_10_cleaning_while_others_save_loses_nothing_that_is_kept_or_under_way() {
    let mut rng = Rng::from_env("cleaning_while_others_save");
    let rounds = 60;
    let dir = tempfile::tempdir().unwrap();
    let commits: Mutex<Vec<CommitRef>> = Mutex::default();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = End(&is_over);
        // Two cleaners, as when a world changes and the old cleaner has not noticed.
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let keep: Vec<_> = commits.lock().unwrap().iter().rev().take(2).copied().collect();
                    let retained = retain(dir.path(), &keep).unwrap();
                    assert!(retained.failed.is_empty(), "{:?}", retained.failed);
                    std::thread::yield_now();
                }
            });
        }
        let mut generation = 1;
        for round in 1..=rounds {
            let (step, n) = (round * 10, 1 + rng.below(3) as u32);
            if rng.below(4) == 0 {
                // This world breaks before it publishes.
                save_parts(dir.path(), &state(step), n, step, generation);
                generation += 1;
            }
            let saved = save_all(dir.path(), &state(step), n, step, generation);
            let kept = {
                let mut commits = commits.lock().unwrap();
                commits.push(saved);
                commits.iter().rev().take(2).copied().collect::<Vec<_>>()
            };
            for kept in kept {
                let mut loaded = zeros_like(&state(1));
                let result = load_newest(dir.path(), &[kept], &mut loaded).unwrap();
                assert!(result.warnings.is_empty());
                assert_same(&loaded, &state(kept.step.0), "kept");
            }
        }
    });
    let keep: Vec<_> = commits.lock().unwrap().iter().rev().take(2).copied().collect();
    retain(dir.path(), &keep).unwrap();
    let left: Vec<_> = list(dir.path()).unwrap().iter().map(|l| (l.step, l.generation)).collect();
    let expected: Vec<_> = keep.iter().rev().map(|commit| (commit.step, commit.generation)).collect();
    assert_eq!(left, expected);
}
