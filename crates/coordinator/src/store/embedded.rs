//! A store in one file (redb), for one coordinator with no other service.
//!
//! One thread writes. It takes all saves that have come in while the last commit was on its way to the disk and commits
//! them together: many jobs that change at once share one `fsync`. After a write that failed (a full disk, say) nobody
//! knows what of it is in the file, so the file is opened anew, which also brings it in order, before the next one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
};
use reknit_membership::JobId;
use tokio::sync::oneshot;

use super::{Pending, Revision, Saved, Store, StoreError};

/// Job id to revision and encoded record.
const JOBS: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("jobs");
/// One number by name: the last revision given out.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
const LAST_REVISION: &str = "last_revision";
const LAYOUT: &str = "layout";

/// The layout of the file that this server writes and reads.
const LAYOUT_VERSION: u64 = 1;

/// The most writes that share one commit.
const BATCH_MAX: usize = 256;

/// How many writes may wait for the disk. A job has one at a time, so this is more than there are jobs.
const WAITING_MAX: usize = 4096;

/// The file's name within its directory.
const FILE_NAME: &str = "reknit.redb";

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The directory cannot be made or written.
    #[error("cannot use {} as the store's directory", dir.display())]
    Directory {
        /// Which.
        dir: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process has it open.
    #[error("the store {} is in use by another coordinator", file.display())]
    InUse {
        /// Which.
        file: PathBuf,
    },
    /// It was written by a newer server.
    #[error("the store {} has layout {found}, this server reads layout {LAYOUT_VERSION}", file.display())]
    Newer {
        /// Which.
        file: PathBuf,
        /// Its layout.
        found: u64,
    },
    /// It is no store, or a damaged one.
    #[error("the store {} is damaged or no store at all", file.display())]
    Damaged {
        /// Which.
        file: PathBuf,
        /// What was found.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Keeps records in one file.
#[derive(Debug)]
pub struct Embedded {
    open: Arc<Open>,
    writes: Option<mpsc::SyncSender<Write>>,
    writer: Option<JoinHandle<()>>,
}

/// The file, and what is open of it: nothing after a failed write, until it can be opened anew.
#[derive(Debug)]
struct Open {
    file: PathBuf,
    database: RwLock<Option<Arc<Database>>>,
}

impl Open {
    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner).clone();
        database.ok_or_else(|| StoreError::Unavailable("a write has failed; it is being opened anew".into()))
    }

    fn set(&self, database: Option<Database>) {
        *self.database.write().unwrap_or_else(PoisonError::into_inner) = database.map(Arc::new);
    }

    /// For the writer: what is open, or else opened now.
    fn reopened(&self) -> Result<Arc<Database>, Boxed> {
        if self.database().is_err() {
            self.set(Some(open_file(&self.file)?));
            tracing::info!(file = %self.file.display(), "the store is open again");
        }
        Ok(self.database()?)
    }
}

/// Opens the file, and finds what is damaged in it rather than stumble over that later.
fn open_file(file: &Path) -> Result<Database, DatabaseError> {
    Builder::new().set_check_integrity_on_open(true).create(file)
}

#[derive(Debug)]
enum Change {
    Save(Vec<u8>),
    Remove,
}

#[derive(Debug)]
struct Write {
    job: JobId,
    expected: Revision,
    change: Change,
    answer: oneshot::Sender<Result<Revision, StoreError>>,
}

impl Embedded {
    /// Opens the store in `dir`, making both if they are not there.
    ///
    /// # Errors
    /// [`OpenError`] says which file, and whether it is in use, damaged, or cannot be written.
    pub fn open(dir: &Path) -> Result<Embedded, OpenError> {
        let unusable = |source| OpenError::Directory { dir: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(unusable)?;
        let file = dir.join(FILE_NAME);
        let database = open_file(&file).map_err(|why| match why {
            DatabaseError::DatabaseAlreadyOpen => OpenError::InUse { file: file.clone() },
            DatabaseError::Storage(StorageError::Io(source))
                if source.kind() != std::io::ErrorKind::InvalidData =>
            {
                OpenError::Directory { dir: dir.to_owned(), source }
            }
            other => OpenError::Damaged { file: file.clone(), source: Box::new(other) },
        })?;
        let layout =
            prepare(&database).map_err(|source| OpenError::Damaged { file: file.clone(), source })?;
        if layout != LAYOUT_VERSION {
            return Err(OpenError::Newer { file, found: layout });
        }
        let open = Arc::new(Open { file, database: RwLock::new(Some(Arc::new(database))) });
        let (writes, queue) = mpsc::sync_channel::<Write>(WAITING_MAX);
        let writer = std::thread::Builder::new()
            .name("reknit-store".to_owned())
            .spawn({
                let open = Arc::clone(&open);
                move || write_all(&open, &queue)
            })
            .map_err(unusable)?;
        Ok(Embedded { open, writes: Some(writes), writer: Some(writer) })
    }

    fn write(&self, job: &JobId, expected: Revision, change: Change) -> Pending<'_, Revision> {
        let (answer, answered) = oneshot::channel();
        let write = Write { job: job.clone(), expected, change, answer };
        let sent = match self.writes.as_ref().map(|writes| writes.try_send(write)) {
            Some(Ok(())) => Ok(()),
            Some(Err(mpsc::TrySendError::Full(_))) => Err("too many writes are waiting for the disk"),
            Some(Err(mpsc::TrySendError::Disconnected(_))) | None => Err("the store's writer has ended"),
        };
        Box::pin(async move {
            let ended = "the store's writer has ended";
            match sent {
                Ok(()) => answered.await.unwrap_or_else(|_| Err(StoreError::Unavailable(ended.into()))),
                Err(why) => Err(StoreError::Unavailable(why.into())),
            }
        })
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // The writer ends when nobody can send to it any more; what was sent is written first.
        self.writes.take();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Makes the tables, so that reading never finds them missing, and returns the file's layout.
fn prepare(database: &Database) -> Result<u64, Boxed> {
    let txn = database.begin_write()?;
    let layout = {
        txn.open_table(JOBS)?;
        let mut numbers = txn.open_table(NUMBERS)?;
        let layout = numbers.get(LAYOUT)?.map(|value| value.value());
        match layout {
            Some(layout) => layout,
            None => {
                numbers.insert(LAYOUT, LAYOUT_VERSION)?;
                LAYOUT_VERSION
            }
        }
    };
    txn.commit()?;
    Ok(layout)
}

/// How often a file that a failed write has closed is tried, while there is nothing to write.
const REOPEN_EVERY: Duration = Duration::from_secs(1);

/// The writer's life: one commit after another, each with all that has come in.
fn write_all(open: &Open, queue: &mpsc::Receiver<Write>) {
    loop {
        // Only this thread closes it, so there is nothing to look after while it is open.
        let next = match open.database() {
            Ok(_) => queue.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            Err(_) => queue.recv_timeout(REOPEN_EVERY),
        };
        let first = match next {
            Ok(first) => first,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // Readers wait for it, too, and there may be nothing to write for days. If it fails, it is tried again.
                let _ = open.reopened();
                continue;
            }
        };
        let mut batch = vec![first];
        batch.extend(queue.try_iter().take(BATCH_MAX - 1));
        match open.reopened().and_then(|database| commit(&database, &batch)) {
            Ok(results) => {
                for (write, result) in batch.into_iter().zip(results) {
                    // Whoever asked may be gone; the write stands.
                    let _ = write.answer.send(result);
                }
            }
            Err(why) => {
                let text = why.to_string();
                tracing::error!(error = %text, "the store could not be written");
                open.set(None);
                for write in batch {
                    let _ = write.answer.send(Err(StoreError::Unavailable(text.clone().into())));
                }
            }
        }
    }
}

/// Carries out a batch in one transaction. A write that expects another revision fails alone.
fn commit(database: &Database, batch: &[Write]) -> Result<Vec<Result<Revision, StoreError>>, Boxed> {
    let txn = database.begin_write()?;
    let mut results = Vec::with_capacity(batch.len());
    {
        let mut jobs = txn.open_table(JOBS)?;
        let mut numbers = txn.open_table(NUMBERS)?;
        let mut last = numbers.get(LAST_REVISION)?.map_or(0, |value| value.value());
        for write in batch {
            let key = write.job.as_str();
            let found = jobs.get(key)?.map_or(0, |value| value.value().0);
            if found != write.expected.0 {
                results.push(Err(StoreError::Conflict));
                continue;
            }
            match &write.change {
                Change::Save(value) => {
                    last += 1;
                    jobs.insert(key, (last, value.as_slice()))?;
                    results.push(Ok(Revision(last)));
                }
                Change::Remove => {
                    jobs.remove(key)?;
                    results.push(Ok(Revision::default()));
                }
            }
        }
        numbers.insert(LAST_REVISION, last)?;
    }
    txn.commit()?;
    Ok(results)
}

/// Only what is damaged for sure is said to be: anything else may pass.
fn unread(why: impl Into<redb::Error>) -> StoreError {
    match why.into() {
        why @ redb::Error::Corrupted(_) => StoreError::Corrupt(Box::new(why)),
        why => StoreError::Unavailable(Box::new(why)),
    }
}

fn list(database: &Database) -> Result<Vec<JobId>, StoreError> {
    let txn = database.begin_read().map_err(unread)?;
    let table = txn.open_table(JOBS).map_err(unread)?;
    let mut jobs = Vec::new();
    for entry in table.iter().map_err(unread)? {
        let (key, _) = entry.map_err(unread)?;
        jobs.push(JobId::new(key.value()).map_err(|why| StoreError::Corrupt(Box::new(why)))?);
    }
    Ok(jobs)
}

fn read(database: &Database, job: &JobId) -> Result<Option<Saved>, StoreError> {
    let txn = database.begin_read().map_err(unread)?;
    let table = txn.open_table(JOBS).map_err(unread)?;
    let value = table.get(job.as_str()).map_err(unread)?;
    Ok(value.map(|value| {
        let (revision, bytes) = value.value();
        Saved { revision: Revision(revision), value: bytes.to_vec() }
    }))
}

impl Store for Embedded {
    fn describe(&self) -> String {
        format!("embedded, {}", self.open.file.display())
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        Box::pin(std::future::ready(self.open.database().and_then(|database| list(&database))))
    }

    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>> {
        Box::pin(std::future::ready(self.open.database().and_then(|database| read(&database, job))))
    }

    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        self.write(job, expected, Change::Save(value))
    }

    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()> {
        let written = self.write(job, expected, Change::Remove);
        Box::pin(async move { written.await.map(|_| ()) })
    }
}
