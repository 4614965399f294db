//! A disk that is really full: a small one, mounted where only this test sees it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{PATIENCE, assemble, assert_same, filled, layout, meta, save_all, zeros_like};
use reknit_checkpoint::{
    Dtype, FileError, SaveError, Saver, SaverOptions, TensorSpec, load_newest, publish_manifest, retain,
};

const DISK: &str = "REKNIT_TEST_SMALL_DISK";

#[test]
fn k_4_a_full_disk_is_told_and_once_there_is_room_the_next_save_works() {
    // The test runs itself once more in a name space of its own, in which it may mount a disk of 1 MiB.
    if let Some(disk) = std::env::var_os(DISK) {
        return save_until_full(Path::new(&disk));
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = dir.path().join("mounted");
    let script = "mount -t tmpfs -o size=1m tmpfs \"$1\" && touch \"$2\" && shift 2 && exec \"$@\"";
    let this = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([disk.as_path(), mounted.as_path(), this.as_path()])
        .args([
            "--exact",
            "--nocapture",
            "k_4_a_full_disk_is_told_and_once_there_is_room_the_next_save_works",
        ])
        .env(DISK, &disk)
        .output();
    if !mounted.exists() {
        let why = output.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).into_owned());
        println!("SKIPPED: a small disk cannot be mounted here: {}", why.trim());
        return;
    }
    let output = output.unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "on the small disk:\n{text}");
}

fn save_until_full(disk: &Path) {
    for direct_io in [false, true] {
        let dir = disk.join(if direct_io { "direct" } else { "buffered" });
        let state = |seed| filled(&[TensorSpec::new("w", Dtype::F32, [60_000])], seed);
        let first = save_all(&dir, &state(1), 1, 1, 1);
        let mut keep = vec![first];
        let options = SaverOptions { direct_io, ..SaverOptions::default() };
        let mut saver = Saver::new(dir.clone(), layout(&state(1)), options).unwrap();
        let mut save = |step| {
            saver.begin(meta(step, 1, 0, 1), &state(step)).unwrap();
            saver.wait(PATIENCE).unwrap()
        };
        // A quarter of the disk each.
        let failure = (2..10).find_map(|step| {
            let saved = match save(step) {
                Ok(saved) => saved,
                Err(failure) => return Some((step, failure)),
            };
            let manifest = assemble(&layout(&state(step)), step, 1, &[saved]);
            keep.push(common::commit(step, 1, publish_manifest(&dir, &manifest).unwrap()));
            None
        });
        let (step, failure) = failure.expect("the disk is small");
        match &failure {
            SaveError::File(FileError::NoSpace { file, .. }) => assert!(file.starts_with(&dir)),
            other => panic!("{other:?}"),
        }
        assert_eq!(failure.hint(), "free space or keep fewer checkpoints; the next save tries again");
        let place = dir.join(format!("step-{step:08}-g1"));
        assert_eq!(std::fs::read_dir(place).unwrap().count(), 0, "what was written is removed");
        let newest = *keep.last().unwrap();
        let mut loaded = zeros_like(&state(1));
        assert_eq!(load_newest(&dir, &keep, &mut loaded).unwrap().commit, newest);
        assert_same(&loaded, &state(newest.step.0), "before the disk was full");

        retain(&dir, &[newest]).unwrap();
        let saved = save(step).unwrap();
        let manifest = assemble(&layout(&state(step)), step, 1, &[saved]);
        let commit = common::commit(step, 1, publish_manifest(&dir, &manifest).unwrap());
        load_newest(&dir, &[commit], &mut loaded).unwrap();
        assert_same(&loaded, &state(step), "with room again");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
