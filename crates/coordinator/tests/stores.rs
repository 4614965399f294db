//! One contract over every store, and what only a store on disk can get wrong.

use std::path::Path;

use reknit_coordinator::store::{Embedded, Memory, OpenError, Revision, Store, contract};
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
