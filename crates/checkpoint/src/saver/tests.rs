use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::common::{self, PATIENCE, assemble, assert_same, filled, layout, meta, zeros_like};
use crate::dtype::{Dtype, TensorSpec};
use crate::faults::{FailingFiles, Luck, ModelDisk};
use crate::manifest::publish_manifest_with;
use crate::names::Entry;
use crate::tensors::NamedTensors;
use crate::{CommitRef, load_newest};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
const EDQUOT: i32 = 122;

/// A state whose parts, for two ranks, take more than one write each.
fn state(seed: u64) -> NamedTensors {
    filled(&[TensorSpec::new("w", Dtype::F32, [2300, 1000]), TensorSpec::new("b", Dtype::U8, [77])], seed)
}

fn small_state(seed: u64) -> NamedTensors {
    filled(&[TensorSpec::new("w", Dtype::F32, [100]), TensorSpec::new("b", Dtype::U8, [77])], seed)
}

fn saver_over(files: impl Files + 'static, dir: &Path, state: &dyn State) -> Saver {
    Saver::with_files(Box::new(files), dir.to_owned(), layout(state), None).unwrap()
}

fn save(saver: &mut Saver, meta: SaveMeta, state: &dyn State) -> Result<Saved, SaveError> {
    saver.begin(meta, state).unwrap();
    saver.wait(PATIENCE).expect("a save ends")
}

fn check_loads(dir: &Path, commits: &[CommitRef], expected: &NamedTensors, context: &str) {
    let mut loaded = zeros_like(expected);
    let result = load_newest(dir, commits, &mut loaded).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert!(result.warnings.is_empty(), "{context}: {:?}", result.warnings);
    assert_same(&loaded, expected, context);
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn a_save_is_made_of_these_operations() {
    let dir = tempfile::tempdir().unwrap();
    let (files, state) = (FailingFiles::none(), state(1));
    save(&mut saver_over(files.clone(), dir.path(), &state), meta(20, 1, 0, 2), &state).unwrap();
    let shard = "rank-00000-of-00002.safetensors";
    let base = dir.path().file_name().unwrap().to_string_lossy().into_owned();
    assert_eq!(
        files.log(),
        [
            "create_dir step-00000020-g1".to_owned(),
            format!("create {shard}"),
            format!("write {shard}"),
            format!("write {shard}"),
            format!("sync {shard}"),
            format!("rename {shard}"),
            "sync_dir step-00000020-g1".to_owned(),
            format!("sync_dir {base}"),
        ]
    );
}

#[test]
fn k_3_k_4_whatever_fails_is_told_and_leaves_what_was_published_and_a_later_save_works() {
    let (old, new) = (small_state(1), state(2));
    for error in [ENOSPC, EIO, EDQUOT] {
        for fail_at in 0..8 {
            let context = format!("operation {fail_at} fails with {error}");
            let dir = tempfile::tempdir().unwrap();
            let before = common::save_all(dir.path(), &old, 2, 10, 1);
            let files = FailingFiles::new(fail_at, error);
            let mut saver = saver_over(files.clone(), dir.path(), &new);
            let failure = save(&mut saver, meta(20, 1, 0, 2), &new).unwrap_err();
            let log = files.log();
            assert!(log.len() > fail_at, "{context}");

            let file = match &failure {
                SaveError::File(FileError::NoSpace { file, source }) if error != EIO => {
                    assert_eq!(source.raw_os_error(), Some(error), "{context}");
                    file
                }
                SaveError::File(FileError::Io { file, source, .. }) if error == EIO => {
                    assert_eq!(source.raw_os_error(), Some(error), "{context}");
                    file
                }
                other => panic!("{context}: {other:?}"),
            };
            let blamed = file.file_name().unwrap().to_string_lossy().into_owned();
            assert!(
                log[fail_at].ends_with(blamed.split(".tmp-").next().unwrap()),
                "{context}: {} is blamed for {:?}",
                file.display(),
                log[fail_at]
            );
            assert!(failure.is_retryable() && !failure.hint().is_empty(), "{context}");

            // Only after the last operation but one, its own name's sync, does the file stay.
            let left = names(&dir.path().join("step-00000020-g1"));
            let expected: &[&str] = if fail_at == 7 { &["rank-00000-of-00002.safetensors"] } else { &[] };
            assert_eq!(left, expected, "{context}");
            check_loads(dir.path(), &[before], &old, &context);

            // The same again, with the same saver and the disk mended.
            let parts: Vec<_> =
                (0..2).map(|rank| save(&mut saver, meta(20, 1, rank, 2), &new).unwrap()).collect();
            let manifest = assemble(&layout(&new), 20, 1, &parts);
            let digest = crate::publish_manifest(dir.path(), &manifest).unwrap();
            check_loads(dir.path(), &[before, common::commit(20, 1, digest)], &new, &context);
        }
    }
}

#[test]
fn k_4_a_manifest_that_fails_to_be_published_leaves_nothing() {
    let state = small_state(2);
    for fail_at in 0..7 {
        let context = format!("operation {fail_at} fails");
        let dir = tempfile::tempdir().unwrap();
        let parts = common::save_parts(dir.path(), &state, 2, 20, 1);
        let manifest = assemble(&layout(&state), 20, 1, &parts);
        let files = FailingFiles::new(fail_at, EIO);
        let error = publish_manifest_with(&files, dir.path(), &manifest).unwrap_err();
        assert!(matches!(error, crate::PublishError::File(FileError::Io { .. })), "{context}: {error:?}");
        assert!(files.log().len() > fail_at, "{context}");
        let shards = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"];
        assert_eq!(names(&dir.path().join("step-00000020-g1")), shards, "{context}");
        let digest = crate::publish_manifest(dir.path(), &manifest).unwrap();
        check_loads(dir.path(), &[common::commit(20, 1, digest)], &state, &context);
    }
}

/// Two ranks save on a disk that crashes; gives the commit if it came to one, and the parts that were reported.
fn save_on(
    disk: &ModelDisk,
    root: &Path,
    state: &NamedTensors,
    step: u64,
) -> (Option<CommitRef>, Vec<Saved>) {
    let mut saver = saver_over(disk.clone(), root, state);
    let parts: Vec<_> =
        (0..2).filter_map(|rank| save(&mut saver, meta(step, 1, rank, 2), state).ok()).collect();
    if parts.len() < 2 {
        return (None, parts);
    }
    let manifest = assemble(&layout(state), step, 1, &parts);
    let digest = publish_manifest_with(disk, root, &manifest).ok();
    (digest.map(|digest| common::commit(step, 1, digest)), parts)
}

#[test]
fn k_2_k_5_a_crash_at_any_operation_loses_nothing_that_was_committed() {
    let root = Path::new("/job");
    let (old, new) = (small_state(1), small_state(2));
    let whole = ModelDisk::new(root);
    let (first, _) = save_on(&whole, root, &old, 10);
    let first = first.expect("nothing crashed");
    let from = whole.operations();
    assert!(save_on(&whole, root, &new, 20).0.is_some());
    let to = whole.operations();
    assert_eq!(to - from, 2 * 7 + 7, "each operation of two parts and a manifest is a place to crash at");
    let dir = tempfile::tempdir().unwrap();
    whole.restart(root, dir.path(), Luck::All);
    let reference = contents(&dir.path().join("step-00000020-g1"));

    for crash_at in from..=to {
        let disk = ModelDisk::new(root);
        save_on(&disk, root, &old, 10);
        disk.crash_at(crash_at);
        let (second, reported) = save_on(&disk, root, &new, 20);
        assert_eq!(second.is_some(), crash_at == to, "a commit needs every operation");
        let lucks = [Luck::None, Luck::NamesOnly, Luck::All].into_iter().chain((0..8).map(Luck::Mixed));
        for luck in lucks {
            let context = format!("crash before operation {} with luck {luck:?}", crash_at - from);
            let dir = tempfile::tempdir().unwrap();
            disk.restart(root, dir.path(), luck);
            let commits: Vec<_> = [Some(first), second].into_iter().flatten().collect();
            check_loads(dir.path(), &commits, if second.is_some() { &new } else { &old }, &context);
            let after = contents(&dir.path().join("step-00000020-g1"));
            for part in &reported {
                let name = names::shard(part.report.rank, WorldSize(2));
                assert!(after.contains_key(&name), "{context}: {name} was reported");
            }
            for (name, content) in after.iter().filter(|(name, _)| names::entry(name) != Entry::Temporary) {
                assert!(content == &reference[name], "{context}: {name} is not what was to be written");
            }
            if let Luck::Mixed(1..) = luck {
                continue;
            }
            // And the next life goes on from there.
            let mut saver = Saver::new(dir.path().to_owned(), layout(&new), SaverOptions::default()).unwrap();
            save(&mut saver, meta(30, 2, 0, 1), &new).unwrap();
        }
    }
}

/// A saver whose writer waits before it makes a file, until told to go on.
fn gated(dir: &Path, state: &dyn State) -> (Saver, mpsc::Sender<()>) {
    let (open, gate) = mpsc::channel();
    let gate = Mutex::new(gate);
    let files = FailingFiles::none().watched_by(move |operation| {
        if operation.starts_with("create ") {
            // An error means that the test is over.
            let _ = gate.lock().unwrap().recv();
        }
    });
    (saver_over(files, dir, state), open)
}

#[test]
fn k_12_what_changes_after_begin_is_not_in_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let before = small_state(1);
    let mut state = before.clone();
    let (mut saver, open) = gated(dir.path(), &state);
    let stall = saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    assert_eq!((stall.copied_bytes, stall.digested_bytes), (477, 477));
    assert_eq!(Ok(stall.state_digest), crate::state_digest(&state, saver.layout()));
    for name in ["w", "b"] {
        state.raw_mut(name).fill(0);
    }
    state.set_value("step", "another");
    open.send(()).unwrap();
    let saved = saver.wait(PATIENCE).unwrap().unwrap();
    assert_eq!(saved.report.state_digest, stall.state_digest);
    let manifest = assemble(&layout(&state), 20, 1, &[saved]);
    let digest = crate::publish_manifest(dir.path(), &manifest).unwrap();
    check_loads(dir.path(), &[common::commit(20, 1, digest)], &before, "after begin");
}

#[test]
fn a_saver_is_busy_until_its_outcome_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let (mut saver, open) = gated(dir.path(), &state);
    assert!(saver.poll().is_none());
    saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    assert!(saver.poll().is_none());
    assert!(matches!(saver.begin(meta(30, 1, 0, 1), &state), Err(SaveError::Busy)));
    open.send(()).unwrap();
    let saved = saver.wait(PATIENCE).unwrap().unwrap();
    assert_eq!(saved.meta, meta(20, 1, 0, 1));
    assert!(saver.poll().is_none());
    saver.begin(meta(30, 1, 0, 1), &state).unwrap();
    open.send(()).unwrap();
    while saver.is_busy() {
        assert!(matches!(saver.begin(meta(40, 1, 0, 1), &state), Err(SaveError::Busy)));
        if let Some(outcome) = saver.poll() {
            assert_eq!(outcome.unwrap().meta, meta(30, 1, 0, 1));
        }
        thread::yield_now();
    }
}

#[test]
fn somebody_is_told_when_there_is_something_to_poll() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let (told, is_told) = mpsc::channel();
    let notify: Box<dyn Fn() + Send> = Box::new(move || told.send(()).unwrap());
    let options = SaverOptions { notify: Some(notify), ..SaverOptions::default() };
    let mut saver = Saver::new(dir.path().to_owned(), layout(&state), options).unwrap();
    for step in [20, 30] {
        saver.begin(meta(step, 1, 0, 1), &state).unwrap();
        is_told.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(saver.poll(), Some(Ok(_))));
    }
}

#[test]
fn k_4_an_abandoned_save_stops_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let (mut saver, open) = gated(dir.path(), &state);
    saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    saver.abandon();
    open.send(()).unwrap();
    assert!(matches!(saver.wait(PATIENCE), Some(Err(SaveError::Abandoned))));
    assert_eq!(names(&dir.path().join("step-00000020-g1")), [""; 0]);
    // What was said of one save is not held against the next.
    open.send(()).unwrap();
    save(&mut saver, meta(20, 2, 0, 1), &state).unwrap();
}

#[test]
fn an_abandoned_save_stops_at_the_next_write() {
    let dir = tempfile::tempdir().unwrap();
    let state = state(1);
    let under_way: Arc<Mutex<Option<Arc<AtomicBool>>>> = Arc::default();
    let flag = Arc::clone(&under_way);
    let (open, gate) = mpsc::channel();
    let gate = Mutex::new(gate);
    let files = FailingFiles::none().watched_by(move |operation| {
        if operation.starts_with("create ") {
            let _ = gate.lock().unwrap().recv();
        }
        if operation.starts_with("write ") {
            flag.lock().unwrap().as_ref().unwrap().store(true, Ordering::Relaxed);
        }
    });
    let mut saver = saver_over(files.clone(), dir.path(), &state);
    saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    *under_way.lock().unwrap() = Some(Arc::clone(&saver.abandoned));
    open.send(()).unwrap();
    assert!(matches!(saver.wait(PATIENCE), Some(Err(SaveError::Abandoned))));
    let shard = "rank-00000-of-00001.safetensors";
    let log = ["create_dir step-00000020-g1".to_owned(), format!("create {shard}"), format!("write {shard}")];
    assert_eq!(files.log()[..3], log);
    assert_eq!(files.log()[3..], [format!("remove {shard}")]);
}

#[test]
fn a_saver_that_is_dropped_gives_up_what_it_was_writing() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let (is_gone, gone) = mpsc::channel::<()>();
    let (open, gate) = mpsc::channel::<()>();
    let gate = Mutex::new((gate, is_gone));
    let files = FailingFiles::none().watched_by(move |operation| {
        if operation.starts_with("create ") {
            let _ = gate.lock().unwrap().0.recv();
        }
    });
    let mut saver = saver_over(files, dir.path(), &state);
    saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    drop(saver);
    drop(open);
    // The writer's end of this channel goes when its thread has ended.
    assert_eq!(gone.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    assert_eq!(names(&dir.path().join("step-00000020-g1")), [""; 0]);
}

#[test]
fn a_writer_that_panics_is_reported_and_nothing_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let files = Box::new(FailingFiles::none().watched_by(|_| panic!("on purpose")));
    let (told, is_told) = mpsc::channel();
    let notify: Box<dyn Fn() + Send> = Box::new(move || told.send(()).unwrap());
    let mut saver = Saver::with_files(files, dir.path().to_owned(), layout(&state), Some(notify)).unwrap();
    saver.begin(meta(20, 1, 0, 1), &state).unwrap();
    is_told.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(saver.poll(), Some(Err(SaveError::WriterGone))));
    assert!(matches!(saver.wait(PATIENCE), Some(Err(SaveError::WriterGone))));
    assert!(matches!(saver.begin(meta(30, 1, 0, 1), &state), Err(SaveError::WriterGone)));
}

#[test]
fn what_cannot_be_saved_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = small_state(1);
    let mut saver = saver_over(FailingFiles::none(), dir.path(), &state);
    for (rank, n) in [(0, 0), (1, 1), (7, 7), (0, RANKS_MAX + 1)] {
        let error = saver.begin(meta(20, 1, rank, n), &state).unwrap_err();
        assert!(matches!(error, SaveError::NoSuchRank { .. }), "rank {rank} of {n}");
    }
    let other = small_state(1).with_f32("more", [1], vec![0.0]);
    let error = saver.begin(meta(20, 1, 0, 1), &other).unwrap_err();
    assert!(matches!(error, SaveError::OtherLayout { tensor: 2 }));
    state.set_value("large", "x".repeat(2 << 20));
    let error = saver.begin(meta(20, 1, 0, 1), &state).unwrap_err();
    assert!(matches!(error, SaveError::Values(ValuesError::TooLarge)));
    assert!(!saver.is_busy());
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn a_directory_that_cannot_be_written_to_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let layout = layout(&small_state(1));
    let error = Saver::new(file.join("job"), layout.clone(), SaverOptions::default()).unwrap_err();
    assert!(
        matches!(&error, SaveError::File(FileError::Io { file: named, .. }) if *named == file),
        "{error:?}"
    );
    let new = dir.path().join("a/b/c");
    Saver::new(new.clone(), layout, SaverOptions::default()).unwrap();
    assert_eq!(names(&new), [""; 0]);
}

#[test]
fn the_buffer_is_kept_from_save_to_save() {
    let dir = tempfile::tempdir().unwrap();
    let state = small_state(1);
    let mut saver = Saver::new(dir.path().to_owned(), layout(&state), SaverOptions::default()).unwrap();
    saver.prepare(WorldSize(1));
    let at = |saver: &mut Saver| saver.staging.as_mut().unwrap().image(1).as_ptr().addr();
    let first = at(&mut saver);
    for step in 1..4 {
        save(&mut saver, meta(step, 1, 0, 1), &state).unwrap();
        assert_eq!(at(&mut saver), first);
    }
}

#[test]
fn ranks_that_save_at_once_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let state = state(3);
    let parts: Vec<_> = thread::scope(|scope| {
        let rank = |rank| {
            let (dir, state) = (dir.path().to_owned(), &state);
            scope.spawn(move || {
                let mut saver = Saver::new(dir, layout(state), SaverOptions::default()).unwrap();
                save(&mut saver, meta(20, 1, rank, 4), state).unwrap()
            })
        };
        let threads: Vec<_> = (0..4).map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let manifest = assemble(&layout(&state), 20, 1, &parts);
    let digest = crate::publish_manifest(dir.path(), &manifest).unwrap();
    check_loads(dir.path(), &[common::commit(20, 1, digest)], &state, "at once");
}
