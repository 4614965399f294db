//! What every store must keep, as a test that is run over each of them.

use reknit_membership::JobId;

use super::{Revision, Store, StoreError};

/// Runs the contract over an empty store.
///
/// # Panics
/// If the store breaks it.
pub async fn check(store: &dyn Store) {
    let (a, b) = (job("a"), job("b"));
    nothing_is_there_at_first(store, &a).await;
    of_two_saves_with_one_revision_one_succeeds(store, &a).await;
    jobs_do_not_touch_each_other(store, &a, &b).await;
    revisions_are_not_used_again(store, &b).await;
    a_save_whose_answer_was_lost_is_found_by_reading(store, &b).await;
    many_saves_at_once_all_count(store).await;
}

fn job(id: &str) -> JobId {
    JobId::new(id).expect("a plain name")
}

fn is_conflict<T: std::fmt::Debug>(result: &Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::Conflict))
}

async fn revision(store: &dyn Store, job: &JobId) -> Revision {
    store.load(job).await.expect("the store can be read").map(|saved| saved.revision).unwrap_or_default()
}

async fn nothing_is_there_at_first(store: &dyn Store, a: &JobId) {
    assert_eq!(store.jobs().await.expect("the store can be read"), []);
    assert_eq!(store.load(a).await.expect("the store can be read"), None);
    let removed = store.remove(a, Revision(1)).await;
    assert!(is_conflict(&removed), "removing what is not there: {removed:?}");
}

async fn of_two_saves_with_one_revision_one_succeeds(store: &dyn Store, a: &JobId) {
    let first = store.save(a, Revision(0), b"one".to_vec()).await.expect("a first save");
    let late = store.save(a, Revision(0), b"late".to_vec()).await;
    assert!(is_conflict(&late), "a second first save: {late:?}");
    let (x, y) = tokio::join!(store.save(a, first, b"x".to_vec()), store.save(a, first, b"y".to_vec()));
    assert!(is_conflict(&x) != is_conflict(&y), "exactly one of two must win: {x:?} {y:?}");
    let saved = store.load(a).await.expect("the store can be read").expect("it was saved");
    assert_eq!(saved.value, if x.is_ok() { b"x" } else { b"y" });
    assert!(saved.revision > first);
}

async fn jobs_do_not_touch_each_other(store: &dyn Store, a: &JobId, b: &JobId) {
    let before = store.load(a).await.expect("the store can be read");
    store.save(b, Revision(0), b"b".to_vec()).await.expect("a first save");
    assert_eq!(store.load(a).await.expect("the store can be read"), before);
    assert_eq!(store.jobs().await.expect("the store can be read"), [a.clone(), b.clone()]);
}

async fn revisions_are_not_used_again(store: &dyn Store, b: &JobId) {
    let last = revision(store, b).await;
    let stale = store.remove(b, Revision(last.0 + 1)).await;
    assert!(is_conflict(&stale), "removing another revision: {stale:?}");
    store.remove(b, last).await.expect("removing what is there");
    assert_eq!(store.load(b).await.expect("the store can be read"), None);
    let again = store.save(b, Revision(0), b"again".to_vec()).await.expect("making it anew");
    assert!(again > last, "{again:?} must be above {last:?}: an old writer must not pass for a new one");
}

async fn a_save_whose_answer_was_lost_is_found_by_reading(store: &dyn Store, b: &JobId) {
    let before = revision(store, b).await;
    // The caller gives up before the answer comes; whether the save was carried out, only reading tells.
    drop(store.save(b, before, b"unanswered".to_vec()));
    let next = store.save(b, before, b"next".to_vec()).await;
    let saved = store.load(b).await.expect("the store can be read").expect("it is there");
    match next {
        Ok(revision) => assert_eq!((saved.revision, saved.value.as_slice()), (revision, b"next".as_slice())),
        Err(StoreError::Conflict) => assert_eq!(saved.value, b"unanswered"),
        Err(other) => panic!("neither saved nor a conflict: {other:?}"),
    }
}

async fn many_saves_at_once_all_count(store: &dyn Store) {
    let jobs: Vec<JobId> = (0..100).map(|i| job(&format!("many-{i}"))).collect();
    let pending: Vec<_> = jobs.iter().map(|job| store.save(job, Revision(0), job.as_str().into())).collect();
    for save in pending {
        save.await.expect("a first save");
    }
    for job in &jobs {
        let saved = store.load(job).await.expect("the store can be read").expect("it was saved");
        assert_eq!(saved.value, job.as_str().as_bytes());
    }
}
