//! One contract over every store, and what only a store on disk can get wrong.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use reknit_coordinator::store::{Embedded, Memory, OpenError, Revision, Store, StoreError, contract};
use reknit_membership::JobId;

#[tokio::test]
async fn the_memory_store_keeps_the_contract() {
    contract::check(&Memory::new()).await;
}

#[tokio::test]
async fn the_embedded_store_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    contract::check(&Embedded::open(dir.path()).unwrap()).await;
}

#[tokio::test]
async fn what_was_saved_is_there_when_the_store_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let job = JobId::new("kept").unwrap();
    let revision = {
        let store = Embedded::open(dir.path()).unwrap();
        store.save(&job, Revision(0), b"value".to_vec()).await.unwrap()
    };
    let store = Embedded::open(dir.path()).unwrap();
    let saved = store.load(&job).await.unwrap().unwrap();
    assert_eq!((saved.revision, saved.value.as_slice()), (revision, b"value".as_slice()));
    assert!(store.save(&job, revision, b"next".to_vec()).await.unwrap() > revision);
}

#[test]
fn a_second_server_on_one_store_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Embedded::open(dir.path()).unwrap();
    let second = Embedded::open(dir.path());
    assert!(matches!(second, Err(OpenError::InUse { .. })), "{second:?}");
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("reknit.redb");
    let garbage = b"this is no store".repeat(1000);
    std::fs::write(&file, &garbage).unwrap();
    let opened = Embedded::open(dir.path());
    assert!(matches!(opened, Err(OpenError::Damaged { .. })), "{opened:?}");
    assert_eq!(std::fs::read(&file).unwrap(), garbage);
}

#[test]
fn a_store_whose_directory_cannot_be_made_is_refused() {
    let opened = Embedded::open(Path::new("/proc/no-such-place/store"));
    assert!(matches!(opened, Err(OpenError::Directory { .. })), "{opened:?}");
}

#[tokio::test]
async fn a_file_that_was_damaged_after_it_was_closed_is_refused_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let job = JobId::new("job").unwrap();
    {
        let store = Embedded::open(dir.path()).unwrap();
        store.save(&job, Revision(0), vec![7; 10_000]).await.unwrap();
    }
    let file = dir.path().join("reknit.redb");
    let whole = std::fs::read(&file).unwrap();
    let mut refused = 0;
    // All over the file, a few bytes at a time: it opens with what was saved, or it is refused.
    for at in (0..whole.len() - 16).step_by(whole.len() / 200) {
        let mut damaged = whole.clone();
        damaged[at..at + 16].iter_mut().for_each(|byte| *byte ^= 0xA5);
        std::fs::write(&file, &damaged).unwrap();
        match Embedded::open(dir.path()) {
            Ok(store) => match store.load(&job).await {
                Ok(saved) => assert!(saved.is_none_or(|saved| saved.value == [7; 10_000]), "damage at {at}"),
                Err(_) => refused += 1,
            },
            Err(OpenError::Damaged { .. } | OpenError::Newer { .. }) => refused += 1,
            Err(other) => panic!("damage at {at}: {other:?}"),
        }
    }
    assert!(refused > 0, "no damage was found");
}

/// Where the test finds its small disk when it runs itself anew.
const DISK: &str = "REKNIT_TEST_SMALL_DISK";

#[test]
fn a_disk_that_was_full_is_written_again_once_there_is_room() {
    // The test runs itself once more in a name space of its own, in which it may mount a disk of 16 MiB.
    if let Some(disk) = std::env::var_os(DISK) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(fill_and_free(Path::new(&disk)));
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = dir.path().join("mounted");
    let script = "mount -t tmpfs -o size=16m tmpfs \"$1\" && touch \"$2\" && shift 2 && exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([&disk, &mounted])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_disk_that_was_full_is_written_again_once_there_is_room", "--nocapture"])
        .env(DISK, &disk)
        .output()
        .unwrap();
    assert!(mounted.exists(), "this test needs `unshare` (util-linux, and user namespaces): {output:?}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

async fn fill_and_free(disk: &Path) {
    let job = JobId::new("job").unwrap();
    let store = Embedded::open(disk).unwrap();
    let mut revision = store.save(&job, Revision(0), vec![1; 1000]).await.unwrap();
    let ballast = disk.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while std::io::Write::write(&mut file, &[0; 65_536]).is_ok_and(|written| written > 0) {}
    let full = store.save(&job, revision, vec![2; 4 << 20]).await;
    assert!(matches!(full, Err(StoreError::Unavailable(_))), "{full:?}");
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    // It opens again by itself: readers do not depend on somebody writing.
    let opened = async {
        while store.load(&job).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), opened).await.expect("it stays closed");
    // What was there is still there, and there is room again.
    revision = store.save(&job, revision, vec![3; 4 << 20]).await.unwrap();
    let saved = store.load(&job).await.unwrap().unwrap();
    assert_eq!((saved.revision, saved.value.len(), saved.value[0]), (revision, 4 << 20, 3));
}
