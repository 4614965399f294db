//! A store in etcd, for several coordinators.
//!
//! A job's record is one key, `PREFIX/jobs/JOB`, and its revision is the key's modification revision, which etcd never
//! gives twice. Every write is one transaction with two comparisons: that the record has the revision which the caller
//! expects, and that the leader's key still is the one that this coordinator made (see [`crate::etcd`]).
//!
//! The value is one byte that says how the rest is written, and the rest: `1` the record's bytes as they are, `2` the same
//! in LZ4's block format after their length (four bytes, little endian). Ten thousand members with long names fit.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use reknit_membership::JobId;

use super::{Epoch, Pending, Revision, Saved, Store, StoreError};
use crate::etcd::cluster::{Cluster, first_read};
use crate::etcd::election::Candidate;
use crate::etcd::{EtcdAddress, EtcdCredentials, EtcdError};

/// Records shorter than this are kept as they are.
const COMPRESS_FROM: usize = 4096;
/// No record is larger, whatever a value says of itself.
const RECORD_BYTES_MAX: usize = 64 << 20;

const PLAIN: u8 = 1;
const LZ4: u8 = 2;

/// How many keys are listed in one call.
const PAGE: i64 = 1000;

/// Keeps records in etcd, for as long as this coordinator leads.
#[derive(Clone)]
pub struct Etcd {
    cluster: Arc<Cluster>,
    /// None for one that only reads.
    epoch: Option<Epoch>,
}

impl Etcd {
    pub(crate) fn new(cluster: Arc<Cluster>, epoch: Option<Epoch>) -> Etcd {
        Etcd { cluster, epoch }
    }

    /// Takes the lead once nobody has it, for as long as one lease lasts: for tests and tools. A server renews its own.
    ///
    /// # Errors
    /// [`EtcdError`] if this etcd will not do, or does not answer.
    pub async fn lead(
        address: EtcdAddress,
        credentials: EtcdCredentials,
        lease: Duration,
    ) -> Result<Etcd, EtcdError> {
        let cluster = Arc::new(Cluster::new(address, credentials));
        cluster.open().await?;
        let candidate = Candidate::new(Arc::clone(&cluster), "http://nobody:1".to_owned(), lease);
        loop {
            match candidate.campaign().await? {
                Ok(reign) => return Ok(Etcd::new(cluster, Some(reign.epoch))),
                Err(leader) => {
                    let seen = i64::try_from(leader.epoch.0).unwrap_or(i64::MAX);
                    candidate.changed(seen).await;
                }
            }
        }
    }

    /// Which reign its writes are for; none if it only reads.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    fn key(&self, job: &JobId) -> String {
        self.cluster.key(&format!("jobs/{job}"))
    }

    /// Changes a job's key if nobody else did and if this coordinator leads. Returns the revision of the change.
    async fn write(
        &self,
        job: &JobId,
        expected: Revision,
        change: TxnOp,
        bytes: usize,
    ) -> Result<u64, StoreError> {
        let Some(epoch) = self.epoch else { return Err(StoreError::NotLeader) };
        let (key, leader) = (self.key(job), self.cluster.key("leader"));
        let leads = Compare::create_revision(leader.clone(), CompareOp::Equal, signed(epoch.0));
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, signed(expected.0));
        let txn = Txn::new().when([leads, unchanged]).and_then([change]).or_else([TxnOp::get(leader, None)]);
        let done = self.cluster.transact(txn).await.map_err(|why| unwritten(why, bytes))?;
        if done.succeeded() {
            return Ok(done.header().map_or(0, |header| header.revision().unsigned_abs()));
        }
        let leads = first_read(&done).is_some_and(|kv| kv.create_revision() == signed(epoch.0));
        Err(if leads { StoreError::Conflict } else { StoreError::NotLeader })
    }

    async fn list(&self) -> Result<Vec<JobId>, StoreError> {
        let prefix = self.cluster.key("jobs/");
        let end = after_all(&prefix);
        let mut from = prefix.clone();
        let mut jobs = Vec::new();
        loop {
            let page = self
                .cluster
                .call(|mut client| {
                    let options = GetOptions::new().with_range(end.clone()).with_keys_only().with_limit(PAGE);
                    let from = from.clone();
                    async move { client.get(from, Some(options)).await }
                })
                .await
                .map_err(|why| unwritten(why, 0))?;
            for kv in page.kvs() {
                let key = String::from_utf8_lossy(kv.key());
                let job = key.strip_prefix(&prefix).unwrap_or(&key);
                match JobId::new(job) {
                    Ok(job) => jobs.push(job),
                    Err(why) => tracing::warn!(%key, error = %why, "this key is no job's; it is passed over"),
                }
            }
            match page.kvs().last() {
                // The next page begins just behind the last key.
                Some(last) if page.more() => from = format!("{}\0", String::from_utf8_lossy(last.key())),
                _ => return Ok(jobs),
            }
        }
    }

    async fn read(&self, job: &JobId) -> Result<Option<Saved>, StoreError> {
        let key = self.key(job);
        // Not a transaction: an etcd that is full takes none, not even one that only reads.
        let found = self.cluster.call(|mut client| {
            let key = key.clone();
            async move { client.get(key, None).await }
        });
        let found = found.await.map_err(|why| unwritten(why, 0))?;
        let Some(kv) = found.kvs().first() else { return Ok(None) };
        let value = unwrap(kv.value()).map_err(|why| StoreError::Corrupt(why.into()))?;
        Ok(Some(Saved { revision: Revision(kv.mod_revision().unsigned_abs()), value }))
    }
}

impl Store for Etcd {
    fn describe(&self) -> String {
        self.cluster.address().to_string()
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        Box::pin(self.list())
    }

    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>> {
        let job = job.clone();
        Box::pin(async move { self.read(&job).await })
    }

    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        let job = job.clone();
        Box::pin(async move {
            let value = wrap(&value);
            let bytes = value.len();
            self.write(&job, expected, TxnOp::put(self.key(&job), value, None), bytes).await.map(Revision)
        })
    }

    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()> {
        let job = job.clone();
        Box::pin(async move {
            if expected == Revision::default() {
                return Err(StoreError::Conflict);
            }
            self.write(&job, expected, TxnOp::delete(self.key(&job), None), 0).await.map(|_| ())
        })
    }

    fn transactions(&self) -> u64 {
        self.cluster.transactions()
    }
}

fn unwritten(why: EtcdError, bytes: usize) -> StoreError {
    let why = match why {
        EtcdError::TooLarge { why, .. } => EtcdError::TooLarge { bytes, why },
        other => other,
    };
    StoreError::Unavailable(Box::new(why))
}

/// etcd counts in signed numbers; it takes nine quintillion writes to get beyond them.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The first key that does not begin with `prefix`, which ends in a slash.
fn after_all(prefix: &str) -> String {
    let mut end = prefix.trim_end_matches('/').to_owned();
    end.push(char::from(b'/' + 1));
    end
}

fn wrap(record: &[u8]) -> Vec<u8> {
    if record.len() >= COMPRESS_FROM {
        let packed = lz4_flex::compress_prepend_size(record);
        if packed.len() < record.len() {
            return [&[LZ4], packed.as_slice()].concat();
        }
    }
    [&[PLAIN], record].concat()
}

fn unwrap(value: &[u8]) -> Result<Vec<u8>, String> {
    match value.split_first() {
        Some((&PLAIN, record)) => Ok(record.to_vec()),
        Some((&LZ4, packed)) => {
            let (bytes, block) = lz4_flex::block::uncompressed_size(packed).map_err(|why| why.to_string())?;
            if bytes > RECORD_BYTES_MAX {
                return Err(format!(
                    "it says that it has {bytes} bytes; a record has at most {RECORD_BYTES_MAX}"
                ));
            }
            lz4_flex::decompress(block, bytes).map_err(|why| why.to_string())
        }
        Some((way, _)) => {
            Err(format!("it is written in a way ({way}) that this server does not know; use a newer one"))
        }
        None => Err("it is empty".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_written_whatever_its_length() {
        for length in [0, 1, COMPRESS_FROM - 1, COMPRESS_FROM, 1 << 20] {
            let even: Vec<u8> = (0..length).map(|i| (i % 7) as u8).collect();
            assert_eq!(unwrap(&wrap(&even)), Ok(even.clone()));
            let mut state = 1u64;
            let noise: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            assert_eq!(unwrap(&wrap(&noise)), Ok(noise.clone()));
            assert!(wrap(&noise).len() <= noise.len() + 1);
        }
        assert!(wrap(&[7; 1 << 20]).len() < 8192);
    }

    #[test]
    fn a_value_that_makes_no_sense_is_an_error_and_takes_no_memory() {
        let huge = [&[LZ4][..], &u32::MAX.to_le_bytes(), &[0; 16]].concat();
        for value in [&b""[..], b"\x03abc", b"\x02", b"\x02\x10\0\0\0\xff\xff\xff", &huge] {
            assert!(unwrap(value).is_err(), "{value:?}");
        }
    }

    #[test]
    fn a_list_ends_before_the_keys_of_others() {
        assert_eq!(after_all("/reknit/jobs/"), "/reknit/jobs0");
    }
}
