//! The nodes of an etcd, asked one after the other until one answers.
//!
//! Calls go to the node that answered last. One that does not answer in time, or has no leader, is passed over: the same
//! call is then put to the next one. A call that was carried out although its answer was lost is thereby made twice, so
//! only such calls come through here as do no harm the second time (a transaction that compares a revision, a read, the
//! end of a lease).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{
    AlarmAction, AlarmType, Certificate, Client, Compare, CompareOp, ConnectOptions, Error, Identity,
    KeyValue, TlsOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
};
use tonic::Code;

use super::address::{EtcdAddress, EtcdCredentials};
use crate::job::source_text;

/// How long one node may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_millis(1500);
/// How long a connection to a node may take.
const CONNECT_PATIENCE: Duration = Duration::from_millis(700);
/// How often a silent connection is asked whether it still is one, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(1);

/// The layout of the keys that this server writes and reads.
const LAYOUT: &str = "1";

/// Why etcd did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// No node answers, or those that do have no leader. Trying again may help.
    #[error("no node of etcd answers at {endpoints}: {why}")]
    Unreachable {
        /// Where it was looked for.
        endpoints: String,
        /// What came of the last attempt.
        why: String,
    },
    /// The user may not do this, or the user or the certificate is not accepted.
    #[error("etcd does not allow it: {0}")]
    Denied(String),
    /// Its database is full: it takes no writes until somebody makes room and disarms the alarm.
    #[error("etcd's database is full: it takes no writes ({0})")]
    Full(String),
    /// The value is larger than etcd takes.
    #[error("the record has {bytes} bytes, which is more than this etcd takes ({why})")]
    TooLarge {
        /// How many bytes were to be written.
        bytes: usize,
        /// What etcd says.
        why: String,
    },
    /// Its version lacks what we need.
    #[error("etcd {0} is too old: 3.4 is the oldest that will do")]
    TooOld(String),
    /// The keys were written by a newer coordinator. Nothing is changed.
    #[error("the keys below {prefix} have layout {found}, this server reads layout {LAYOUT}")]
    Newer {
        /// Below which key.
        prefix: String,
        /// Their layout.
        found: String,
    },
    /// A file of ours cannot be read, or makes no sense.
    #[error("{} cannot be used for etcd: {why}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// Why not.
        why: String,
    },
}

impl EtcdError {
    /// Whether another node may do better.
    fn is_passing(&self) -> bool {
        matches!(self, EtcdError::Unreachable { .. })
    }
}

/// A connection to each node, made when it is needed.
pub(crate) struct Cluster {
    address: EtcdAddress,
    credentials: EtcdCredentials,
    nodes: Vec<Mutex<Option<Client>>>,
    /// The node that answered last.
    current: AtomicUsize,
    transactions: AtomicU64,
}

impl Cluster {
    /// A cluster that was not spoken to yet.
    pub(crate) fn new(address: EtcdAddress, credentials: EtcdCredentials) -> Cluster {
        let nodes = address.endpoints.iter().map(|_| Mutex::default()).collect();
        Cluster { address, credentials, nodes, current: AtomicUsize::new(0), transactions: AtomicU64::new(0) }
    }

    /// Where it is.
    pub(crate) fn address(&self) -> &EtcdAddress {
        &self.address
    }

    /// Transactions put to it since the start, each attempt counted.
    pub(crate) fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }

    /// A key of ours.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.address.prefix)
    }

    /// Looks whether this etcd will do, and whether what is in it is for us to read and write.
    ///
    /// # Errors
    /// [`EtcdError`] says what stands against it. Nothing was changed then.
    pub(crate) async fn open(&self) -> Result<(), EtcdError> {
        let status = self.call(|mut client| async move { client.status().await }).await?;
        let version = status.version().to_owned();
        if !is_new_enough(&version) {
            return Err(EtcdError::TooOld(version));
        }
        // Only an administrator may ask for alarms; the write below finds a full database too.
        let alarms = self
            .call(|mut client| async move { client.alarm(AlarmAction::Get, AlarmType::Nospace, None).await })
            .await;
        if alarms.is_ok_and(|alarms| !alarms.alarms().is_empty()) {
            return Err(EtcdError::Full("the alarm NOSPACE is raised".to_owned()));
        }
        let key = self.key("layout");
        let prepare = Txn::new()
            .when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), LAYOUT, None)])
            .or_else([TxnOp::get(key, None)]);
        match first_read(&self.transact(prepare).await?) {
            Some(found) if found.value() != LAYOUT.as_bytes() => Err(EtcdError::Newer {
                prefix: self.address.prefix.clone(),
                found: String::from_utf8_lossy(found.value()).into_owned(),
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// Carries out a transaction that does no harm the second time.
    pub(crate) async fn transact(&self, txn: Txn) -> Result<TxnResponse, EtcdError> {
        self.call(|mut client| {
            self.transactions.fetch_add(1, Ordering::Relaxed);
            let txn = txn.clone();
            async move { client.txn(txn).await }
        })
        .await
    }

    /// Puts a call to one node after the other until one answers; each is asked once.
    pub(crate) async fn call<T, F>(&self, ask: impl Fn(Client) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut last = None;
        let first = self.current.load(Ordering::Relaxed);
        for at in (0..self.nodes.len()).map(|further| (first + further) % self.nodes.len()) {
            match self.ask(at, &ask).await {
                Ok(answer) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(why) if why.is_passing() => last = Some(why),
                Err(why) => return Err(why),
            }
        }
        Err(last.unwrap_or_else(|| self.unreachable("no node is named")))
    }

    async fn ask<T, F>(&self, at: usize, ask: &impl Fn(Client) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let asking = async {
            let client = self.client(at).await?;
            ask(client).await.map_err(|why| self.trouble(&why))
        };
        let asked = tokio::time::timeout(ANSWER_PATIENCE, asking)
            .await
            .unwrap_or_else(|_| Err(self.unreachable(&format!("no answer within {ANSWER_PATIENCE:?}"))));
        if let Err(EtcdError::Unreachable { .. } | EtcdError::Denied(_)) = &asked {
            self.forget(at);
        }
        asked
    }

    /// The node that answered last.
    pub(crate) fn current_node(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// For a stream, which stays with one node.
    pub(crate) async fn client_of(&self, at: usize) -> Result<Client, EtcdError> {
        tokio::time::timeout(ANSWER_PATIENCE, self.client(at))
            .await
            .unwrap_or_else(|_| Err(self.unreachable(&format!("no connection within {ANSWER_PATIENCE:?}"))))
    }

    /// A stream has ended, or says nothing: the next one goes to another node than this.
    pub(crate) fn pass_over(&self, at: usize) {
        self.forget(at);
        let next = (at + 1) % self.nodes.len();
        // Whoever failed at the same node meanwhile has moved on already.
        let _ = self.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// What the client of a node was made with (certificates, a password) may have been replaced: the next one is made anew.
    fn forget(&self, at: usize) {
        *self.nodes[at].lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    async fn client(&self, at: usize) -> Result<Client, EtcdError> {
        let lock = || self.nodes[at].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = lock().clone() {
            return Ok(client);
        }
        let options = self.options()?;
        let client = Client::connect([&self.address.endpoints[at]], Some(options)).await;
        let client = client.map_err(|why| self.trouble(&why))?;
        Ok(lock().get_or_insert(client).clone())
    }

    fn options(&self) -> Result<ConnectOptions, EtcdError> {
        let EtcdCredentials { ca, cert, key, user, password_file } = &self.credentials;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_keep_alive(KEEPALIVE, KEEPALIVE)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if self.address.is_tls() {
            let mut tls = TlsOptions::new();
            if let Some(ca) = ca {
                tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
            }
            if let (Some(cert), Some(key)) = (cert, key) {
                tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
            }
            options = options.with_tls(tls);
        }
        if let (Some(user), Some(file)) = (user, password_file) {
            let password = String::from_utf8(read(file)?)
                .map_err(|_| EtcdError::File { file: file.clone(), why: "it is no text".to_owned() })?;
            options = options.with_user(user, password.trim_end()).with_auto_token_refresh(true);
        }
        Ok(options)
    }

    pub(crate) fn unreachable(&self, why: &str) -> EtcdError {
        EtcdError::Unreachable { endpoints: self.address.endpoints.join(","), why: why.to_owned() }
    }

    /// What an error of the client means to us. etcd's own errors are told apart by their text, which is part of its
    /// contract (`api/v3rpc/rpctypes`).
    fn trouble(&self, why: &Error) -> EtcdError {
        let Error::GRpcStatus(status) = why else {
            return self.unreachable(&source_text(why));
        };
        let text = status.message().to_owned();
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => EtcdError::Denied(text),
            Code::InvalidArgument if text.contains("request is too large") => {
                EtcdError::TooLarge { bytes: 0, why: text }
            }
            Code::ResourceExhausted if text.contains("larger than max") => {
                EtcdError::TooLarge { bytes: 0, why: text }
            }
            Code::ResourceExhausted if text.contains("space exceeded") => EtcdError::Full(text),
            // "authentication failed", "authentication is not enabled", "user name is empty", and so on.
            Code::InvalidArgument | Code::FailedPrecondition
                if text.contains("authentication") || text.contains("user name") =>
            {
                EtcdError::Denied(text)
            }
            _ if text.is_empty() => self.unreachable(&source_text(status)),
            _ => self.unreachable(&text),
        }
    }
}

/// The first key that a transaction has read, if it has read one.
pub(crate) fn first_read(response: &TxnResponse) -> Option<KeyValue> {
    response.op_responses().iter().find_map(|response| match response {
        TxnOpResponse::Get(get) => get.kvs().first().cloned(),
        _ => None,
    })
}

fn read(file: &Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(file).map_err(|why| EtcdError::File { file: file.to_owned(), why: why.to_string() })
}

/// Whether a version such as `3.4.23` has leases in transactions and everything else that we use.
fn is_new_enough(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (3, 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_before_3_4_are_too_old() {
        let new = |version: &str| is_new_enough(version);
        assert_eq!(["3.4.0", "3.5.16", "3.10.1", "4.0.0-rc"].map(new), [true; 4]);
        assert_eq!(["3.3.27", "2.3", "", "x"].map(new), [false; 4]);
    }
}
