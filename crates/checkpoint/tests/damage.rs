//! Whatever happens to a file, it is told, with the file's name, and never loaded (rule K-7).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Rng, assert_same, commit, files_of, filled, layout, odd_specs, save_all, zeros_like};
use reknit_checkpoint::{
    ByteRange, CommitRef, Dtype, LoadError, NamedTensors, Part, TensorSpec, load_into, open, verify,
};
use reknit_membership::{Digest, Generation, Step};

fn small() -> NamedTensors {
    filled(&[TensorSpec::new("w", Dtype::F32, [30]), TensorSpec::new("b", Dtype::U8, [13])], 1)
}

fn load(dir: &Path, commit: &CommitRef, like: &NamedTensors) -> Result<NamedTensors, LoadError> {
    let mut state = zeros_like(like);
    let manifest = open(dir, commit.step, commit.generation, commit.manifest)?;
    assert_eq!(
        verify(dir, &manifest).is_ok(),
        load_into(dir, &manifest, Part::All, &mut zeros_like(like)).is_ok()
    );
    load_into(dir, &manifest, Part::All, &mut state)?;
    Ok(state)
}

/// Panics unless loading fails and blames `file`.
fn check_blamed(
    dir: &Path,
    commit: &CommitRef,
    like: &NamedTensors,
    file: &Path,
    context: &str,
) -> LoadError {
    // The manifest itself is compared with the commit, not with what it says.
    if let Ok(manifest) = open(dir, commit.step, commit.generation, commit.manifest) {
        let error = verify(dir, &manifest).expect_err(context);
        assert_eq!(error.file(), file, "{context}: {error}");
    }
    match load(dir, commit, like) {
        Ok(_) => panic!("{context}: loads all the same"),
        Err(error) => {
            assert_eq!(error.file(), file, "{context}: {error}");
            assert!(error.to_string().contains(&file.display().to_string()), "{context}: {error}");
            assert!(!error.hint().is_empty());
            error
        }
    }
}

struct Flipper(File);

impl Flipper {
    fn open(file: &Path) -> Flipper {
        Flipper(OpenOptions::new().read(true).write(true).open(file).unwrap())
    }

    fn flip(&self, bit: u64) {
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, bit / 8).unwrap();
        self.0.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8).unwrap();
    }
}

#[test]
fn k_7_every_single_flipped_bit_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let state = small();
    let commit = save_all(dir.path(), &state, 1, 10, 1);
    for file in files_of(dir.path(), &commit) {
        let flipper = Flipper::open(&file);
        for bit in 0..fs::metadata(&file).unwrap().len() * 8 {
            flipper.flip(bit);
            check_blamed(dir.path(), &commit, &state, &file, &format!("bit {bit}"));
            flipper.flip(bit);
        }
    }
    assert_same(&load(dir.path(), &commit, &state).unwrap(), &state, "all bits back");
}

#[test]
fn k_7_random_flipped_bits_are_found_in_files_of_any_layout() {
    let mut rng = Rng::from_env("random_flipped_bits");
    for (name, specs) in odd_specs() {
        let dir = tempfile::tempdir().unwrap();
        let state = filled(&specs, 2);
        let commit = save_all(dir.path(), &state, 4, 10, 1);
        for file in files_of(dir.path(), &commit) {
            let flipper = Flipper::open(&file);
            let len = fs::metadata(&file).unwrap().len();
            for _ in 0..100 {
                // Half of them beyond the header, where there is data.
                let from = if len > 4096 { 4096 * rng.below(2) } else { 0 };
                let bit = from * 8 + rng.below((len - from) * 8);
                flipper.flip(bit);
                check_blamed(dir.path(), &commit, &state, &file, &format!("{name}: bit {bit}"));
                flipper.flip(bit);
            }
        }
        assert_same(&load(dir.path(), &commit, &state).unwrap(), &state, name);
    }
}

#[test]
fn k_7_no_unverified_byte_reaches_the_state() {
    let dir = tempfile::tempdir().unwrap();
    let state = small();
    let commit = save_all(dir.path(), &state, 2, 10, 1);
    let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
    let file = dir.path().join(manifest.dir_name()).join(&manifest.shards()[1].file);
    Flipper::open(&file).flip(manifest.shards()[1].data_at() * 8);
    let mut loaded = zeros_like(&state);
    let error = load_into(dir.path(), &manifest, Part::All, &mut loaded).unwrap_err();
    assert!(matches!(error, LoadError::DigestMismatch { .. }), "{error}");
    // The first shard's bytes may be there; of the bad chunk, the tensor's last bytes, none is.
    assert_eq!(loaded.f32("w")[16..], [0.0; 14]);
    assert_eq!(loaded.u8("b"), [0; 13]);
    assert_eq!(loaded.value("step"), None);
}

#[test]
fn k_7_a_range_is_verified_alone() {
    let dir = tempfile::tempdir().unwrap();
    let state = filled(&[TensorSpec::new("w", Dtype::U8, [1000])], 3);
    let commit = save_all(dir.path(), &state, 2, 10, 1);
    let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
    let shard = &manifest.shards()[0];
    let file = dir.path().join(manifest.dir_name()).join(&shard.file);
    let flipper = Flipper::open(&file);
    let load = |start, end| {
        let range = Part::Range(ByteRange::new(start, end));
        load_into(dir.path(), &manifest, range, &mut zeros_like(&state))
    };
    // A bit in the third chunk of 64 bytes.
    flipper.flip((shard.data_at() + 130) * 8);
    for (start, end) in [(0, 128), (192, 1000), (0, 0)] {
        assert!(load(start, end).is_ok(), "{start}..{end} is not touched");
    }
    for (start, end) in [(0, 1000), (130, 131), (128, 129), (191, 192), (0, 129)] {
        let error = load(start, end).unwrap_err();
        let at = shard.data_at();
        match error {
            LoadError::DigestMismatch { file: blamed, range, .. } => {
                assert_eq!((blamed, range), (file.clone(), ByteRange::new(at + 128, at + 192)));
            }
            other => panic!("{start}..{end}: {other}"),
        }
    }
    flipper.flip((shard.data_at() + 130) * 8);
    // The header is verified with any range of its file.
    flipper.flip(3000 * 8);
    assert!(matches!(load(0, 1), Err(LoadError::Garbled { file: blamed, .. }) if blamed == file));
    assert!(load(999, 1000).is_ok());
    flipper.flip(3000 * 8);
    // So is its length.
    flipper.0.set_len(shard.file_bytes - 1).unwrap();
    assert!(matches!(load(0, 1), Err(LoadError::Truncated { file: blamed, .. }) if blamed == file));
}

#[test]
fn k_7_a_file_of_any_other_length_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let state = small();
    let commit = save_all(dir.path(), &state, 2, 10, 1);
    for file in files_of(dir.path(), &commit) {
        let content = fs::read(&file).unwrap();
        let len = content.len() as u64;
        let is_manifest = file.ends_with("manifest.json");
        let truncated = OpenOptions::new().write(true).open(&file).unwrap();
        for cut in (0..len).rev() {
            truncated.set_len(cut).unwrap();
            let error = check_blamed(dir.path(), &commit, &state, &file, &format!("cut to {cut}"));
            match error {
                LoadError::Truncated { expected, found, .. } => {
                    assert_eq!((expected, found, is_manifest), (len, cut, false));
                }
                LoadError::DigestMismatch { .. } => assert!(is_manifest, "cut to {cut}"),
                other => panic!("cut to {cut}: {other}"),
            }
        }
        // As after a crash of a file system that keeps lengths: zeros where data was.
        for from in [0, 8, len / 2, len - 1] {
            fs::write(&file, &content[..from as usize]).unwrap();
            truncated.set_len(len).unwrap();
            if fs::read(&file).unwrap() != content {
                check_blamed(dir.path(), &commit, &state, &file, &format!("zeros from {from}"));
            }
        }
        for more in [&b"\0"[..], b"\n", &content] {
            fs::write(&file, [&content, more].concat()).unwrap();
            check_blamed(dir.path(), &commit, &state, &file, "longer");
        }
        fs::write(&file, &content).unwrap();
    }
    assert_same(&load(dir.path(), &commit, &state).unwrap(), &state, "all files back");
}

#[test]
fn k_7_a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // More ranks than chunks: the files of ranks that wrote nothing are missed too.
    for n in [1, 2, 8] {
        let state = small();
        let commit = save_all(dir.path(), &state, n, u64::from(n), 1);
        for file in files_of(dir.path(), &commit) {
            let aside = file.with_extension("aside");
            fs::rename(&file, &aside).unwrap();
            let error = check_blamed(dir.path(), &commit, &state, &file, "missing");
            assert!(matches!(error, LoadError::Missing { .. }), "{error}");
            fs::create_dir(&file).unwrap();
            let error = check_blamed(dir.path(), &commit, &state, &file, "a directory instead");
            assert!(matches!(error, LoadError::Garbled { .. }), "{error}");
            fs::remove_dir(&file).unwrap();
            fs::rename(&aside, &file).unwrap();
        }
    }
    let nowhere = commit(5, 5, Digest(0));
    let error = load(dir.path(), &nowhere, &small()).unwrap_err();
    let file = dir.path().join("step-00000005-g5/manifest.json");
    assert!(matches!(error, LoadError::Missing { file: missing } if missing == file));
}

#[test]
fn k_7_files_that_were_swapped_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let state = filled(&[TensorSpec::new("w", Dtype::U8, [512])], 4);
    let other = filled(&[TensorSpec::new("w", Dtype::U8, [512])], 5);
    let first = save_all(dir.path(), &state, 4, 10, 1);
    let second = save_all(dir.path(), &state, 4, 20, 1);
    let third = save_all(dir.path(), &other, 4, 10, 2);
    let files = [&first, &second, &third].map(|commit| files_of(dir.path(), commit));

    // Between ranks, between steps of one state, between states: sizes are the same everywhere.
    let foreign = [&files[0][2], &files[1][1], &files[2][1]];
    let own = fs::read(&files[0][1]).unwrap();
    for file in foreign {
        fs::write(&files[0][1], fs::read(file).unwrap()).unwrap();
        assert_eq!(fs::metadata(&files[0][1]).unwrap().len(), own.len() as u64);
        check_blamed(dir.path(), &first, &state, &files[0][1], &format!("{} instead", file.display()));
    }
    // Chunks within one file.
    let mut mixed = own.clone();
    mixed.copy_within(4096 + 64..4096 + 128, 4096);
    mixed[4096 + 64..4096 + 128].copy_from_slice(&own[4096..4096 + 64]);
    fs::write(&files[0][1], mixed).unwrap();
    let error = check_blamed(dir.path(), &first, &state, &files[0][1], "chunks swapped");
    assert!(matches!(error, LoadError::DigestMismatch { .. }), "{error}");
    fs::write(&files[0][1], own).unwrap();

    // Manifests: of another step, of another state.
    for other in [1, 2] {
        let own = fs::read(&files[0][0]).unwrap();
        fs::write(&files[0][0], fs::read(&files[other][0]).unwrap()).unwrap();
        let error = check_blamed(dir.path(), &first, &state, &files[0][0], "another manifest");
        assert!(matches!(error, LoadError::DigestMismatch { .. }), "{error}");
        fs::write(&files[0][0], own).unwrap();
    }
    assert_same(&load(dir.path(), &first, &state).unwrap(), &state, "all files back");
}

#[test]
fn k_5_a_manifest_counts_only_where_and_as_it_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (mine, theirs) = (small(), filled(&small_specs(), 9));
    let commit = save_all(dir.path(), &mine, 2, 10, 1);
    // Another job's checkpoint, whole and consistent, in the place of ours.
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = save_all(elsewhere.path(), &theirs, 2, 10, 1);
    for (from, to) in files_of(elsewhere.path(), &foreign).iter().zip(files_of(dir.path(), &commit)) {
        fs::copy(from, to).unwrap();
    }
    let manifest = dir.path().join("step-00000010-g1/manifest.json");
    let error = check_blamed(dir.path(), &commit, &mine, &manifest, "another job's");
    assert!(matches!(error, LoadError::DigestMismatch { expected, .. } if expected == commit.manifest));

    // The right digest in the wrong place.
    fs::rename(dir.path().join("step-00000010-g1"), dir.path().join("step-00000011-g1")).unwrap();
    let error = open(dir.path(), Step(11), Generation(1), foreign.manifest).unwrap_err();
    assert!(matches!(error, LoadError::OtherCheckpoint { step: Step(10), .. }), "{error}");
}

fn small_specs() -> Vec<TensorSpec> {
    use reknit_checkpoint::State;
    small().tensors()
}

#[test]
fn a_program_with_other_tensors_is_told_the_first_that_differs() {
    let dir = tempfile::tempdir().unwrap();
    let state = small();
    let commit = save_all(dir.path(), &state, 2, 10, 1);
    let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
    let load = |mut state: NamedTensors| {
        let before = state.clone();
        match load_into(dir.path(), &manifest, Part::All, &mut state).unwrap_err() {
            LoadError::WrongShapes { difference, .. } => {
                assert_same(&state, &before, "nothing is loaded");
                difference.to_string()
            }
            other => panic!("{other}"),
        }
    };
    let w = || NamedTensors::new().with_f32("w", [30], vec![0.0; 30]);
    assert_eq!(load(w()), "tensor 1 is \"b\" U8[13] there and nothing in the program");
    assert_eq!(
        load(w().with_u8("b", [12], vec![0; 12])),
        "tensor 1 is \"b\" U8[13] there and \"b\" U8[12] in the program"
    );
    assert_eq!(
        load(NamedTensors::new().with_f32("w", [5, 6], vec![0.0; 30]).with_u8("b", [13], vec![0; 13])),
        "tensor 0 is \"w\" F32[30] there and \"w\" F32[5, 6] in the program"
    );
    assert_eq!(
        load(w().with_u8("b", [13], vec![0; 13]).with_u8("c", [], vec![0])),
        "tensor 2 is nothing there and \"c\" U8[] in the program"
    );
}

#[test]
fn a_range_beyond_the_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = small();
    let commit = save_all(dir.path(), &state, 2, 10, 1);
    let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
    let total = layout(&state).total_bytes();
    for (start, end) in [(0, total + 1), (total + 1, total + 1), (5, 4), (u64::MAX, u64::MAX)] {
        let range = ByteRange { start, end };
        let error =
            load_into(dir.path(), &manifest, Part::Range(range), &mut zeros_like(&state)).unwrap_err();
        assert!(matches!(error, LoadError::NoSuchRange { .. }), "{range}: {error}");
    }
}
