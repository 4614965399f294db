//! The store in etcd, over a real one: what it keeps, whom it lets write, and what it says when etcd will not do.
//!
//! These tests need the program `etcd` (or the one that REKNIT_ETCD names). Without it they say so and do nothing, unless
//! REKNIT_NEED_ETCD is set.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]
#![allow(clippy::print_stderr, reason = "a test that is passed over says so")]

mod common;

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Authority;
use etcd_client::{
    Certificate, Client, CompactionOptions, ConnectOptions, Identity, Permission, PermissionType, TlsOptions,
};
use reknit_coordinator::etcd::{EtcdAddress, EtcdCredentials, EtcdError};
use reknit_coordinator::store::{Etcd, Revision, Store, StoreError, contract};
use reknit_membership::JobId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a test takes: nobody renews it.
const LEASE: Duration = Duration::from_secs(60);

/// An etcd of one node, which ends with the test.
struct Real {
    child: Child,
    dir: tempfile::TempDir,
    node: String,
    /// How it is talked to, if it speaks TLS.
    tls: Option<TlsOptions>,
}

impl Real {
    /// Starts one, if there is a program to start.
    async fn start(args: &[&str]) -> Option<Real> {
        Real::start_with(args, None).await
    }

    async fn start_with(args: &[&str], tls: Option<TlsOptions>) -> Option<Real> {
        let program = std::env::var_os("REKNIT_ETCD").map_or_else(|| PathBuf::from("etcd"), PathBuf::from);
        let there = Command::new(&program).arg("--version").stdout(Stdio::null()).status().is_ok();
        if !there {
            assert!(std::env::var_os("REKNIT_NEED_ETCD").is_none(), "{} cannot be run", program.display());
            eprintln!("passed over: this test needs etcd (Debian's etcd-server), or REKNIT_ETCD to name one");
            return None;
        }
        // Ports that are free now; somebody else may take one before etcd does.
        for _ in 0..10 {
            let dir = tempfile::tempdir().unwrap();
            let [client, peer] = [free_port(), free_port()].map(|port| format!("127.0.0.1:{port}"));
            let node = client.clone();
            let client = format!("{}://{client}", if tls.is_some() { "https" } else { "http" });
            let peer = format!("http://{peer}");
            let child = Command::new(&program)
                .args(["--data-dir", dir.path().join("etcd").to_str().unwrap()])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
                .args(args)
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(dir.path().join("etcd.log")).unwrap())
                .spawn()
                .unwrap();
            let mut real = Real { child, dir, node, tls: tls.clone() };
            if real.serves().await {
                return Some(real);
            }
        }
        panic!("etcd does not start");
    }

    async fn serves(&mut self) -> bool {
        let began = std::time::Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < PATIENCE, "etcd does not serve: {}", self.log());
            if let Ok(mut client) = self.client().await
                && let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), client.get("x", None)).await
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    fn log(&self) -> String {
        let mut text = String::new();
        std::fs::File::open(self.dir.path().join("etcd.log")).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    async fn client(&self) -> Result<Client, etcd_client::Error> {
        let options = self.tls.clone().map(|tls| ConnectOptions::new().with_tls(tls));
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Client::connect([format!("{scheme}://{}", self.node)], options).await
    }

    fn address(&self) -> EtcdAddress {
        address(&self.node)
    }

    async fn lead(&self) -> Etcd {
        Etcd::lead(self.address(), EtcdCredentials::default(), LEASE).await.unwrap()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn address(node: &str) -> EtcdAddress {
    EtcdAddress::parse(&format!("etcd://{node}/test")).unwrap().unwrap()
}

fn job(id: &str) -> JobId {
    JobId::new(id).unwrap()
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn the_store_in_etcd_keeps_the_contract() {
    let Some(etcd) = Real::start(&[]).await else { return };
    contract::check(&etcd.lead().await).await;
}

/// Passes bytes on between a client and an etcd, until it is told to keep etcd's answers to itself.
async fn proxy(node: String, mute: Arc<AtomicBool>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = tokio::net::TcpStream::connect(&node).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            let mute = Arc::clone(&mute);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(n) = from_server.read(&mut buffer).await
                    && n > 0
                    // The answer is lost, and the connection with it.
                    && !mute.load(Ordering::Relaxed)
                {
                    to_client.write_all(&buffer[..n]).await.unwrap();
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_save_whose_answer_was_lost_on_the_way_is_found_by_reading_and_not_made_twice() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let mute = Arc::new(AtomicBool::new(false));
    let proxied = proxy(etcd.node.clone(), Arc::clone(&mute)).await;
    let store = Etcd::lead(address(&proxied.to_string()), EtcdCredentials::default(), LEASE).await.unwrap();
    let first = store.save(&job("a"), Revision(0), b"one".to_vec()).await.unwrap();
    mute.store(true, Ordering::Relaxed);
    let lost = store.save(&job("a"), first, b"two".to_vec()).await;
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "nobody knows: {lost:?}");
    mute.store(false, Ordering::Relaxed);
    let again = store.save(&job("a"), first, b"two".to_vec()).await;
    assert!(matches!(again, Err(StoreError::Conflict)), "it was carried out: {again:?}");
    let saved = store.load(&job("a")).await.unwrap().unwrap();
    assert_eq!(saved.value, b"two");
    assert!(store.save(&job("a"), saved.revision, b"three".to_vec()).await.unwrap() > saved.revision);
}

#[tokio::test]
async fn d13_a_coordinator_that_has_lost_its_lease_changes_nothing() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let short = Duration::from_secs(1);
    let old = Etcd::lead(etcd.address(), EtcdCredentials::default(), short).await.unwrap();
    let revision = old.save(&job("a"), Revision(0), b"old".to_vec()).await.unwrap();
    // Nobody renews the first one's lease: it runs out.
    let new = tokio::time::timeout(PATIENCE, etcd.lead()).await.unwrap();
    assert!(new.epoch() > old.epoch());
    let late = old.save(&job("a"), revision, b"late".to_vec()).await;
    assert!(matches!(late, Err(StoreError::NotLeader)), "{late:?}");
    let made = old.save(&job("b"), Revision(0), b"late".to_vec()).await;
    assert!(matches!(made, Err(StoreError::NotLeader)), "{made:?}");
    let removed = old.remove(&job("a"), revision).await;
    assert!(matches!(removed, Err(StoreError::NotLeader)), "{removed:?}");
    assert_eq!(new.load(&job("a")).await.unwrap().unwrap().value, b"old");
    assert_eq!(new.jobs().await.unwrap(), [job("a")]);
    new.save(&job("a"), revision, b"new".to_vec()).await.unwrap();
}

#[tokio::test]
async fn a_leader_s_key_that_somebody_else_has_made_anew_is_not_ours() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let store = etcd.lead().await;
    let mut client = etcd.client().await.unwrap();
    client.delete("/test/leader", None).await.unwrap();
    // The same value, and even no lease: what counts is the revision at which it was made.
    client.put("/test/leader", "http://nobody:1", None).await.unwrap();
    let late = store.save(&job("a"), Revision(0), b"late".to_vec()).await;
    assert!(matches!(late, Err(StoreError::NotLeader)), "{late:?}");
}

#[tokio::test]
async fn keys_of_a_newer_coordinator_are_refused_and_left_as_they_are() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let mut client = etcd.client().await.unwrap();
    client.put("/test/layout", "2", None).await.unwrap();
    client.put("/test/jobs/a", "something new", None).await.unwrap();
    let before = client.get("", Some(etcd_client::GetOptions::new().with_all_keys())).await.unwrap();
    let opened = Etcd::lead(etcd.address(), EtcdCredentials::default(), LEASE).await.map(|_| ());
    assert!(matches!(&opened, Err(EtcdError::Newer { found, .. }) if found == "2"), "{opened:?}");
    let after = client.get("", Some(etcd_client::GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!(format!("{:?}", before.kvs()), format!("{:?}", after.kvs()));
}

#[tokio::test]
async fn a_record_written_in_a_newer_way_is_an_error_that_says_so() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let store = etcd.lead().await;
    etcd.client().await.unwrap().put("/test/jobs/a", b"\x09abc".to_vec(), None).await.unwrap();
    let read = store.load(&job("a")).await;
    let Err(StoreError::Corrupt(why)) = read else { panic!("{read:?}") };
    assert!(why.to_string().contains("use a newer one"), "{why}");
}

#[tokio::test]
async fn an_etcd_that_cannot_be_reached_is_said_to_be() {
    let began = std::time::Instant::now();
    let nowhere = address(&format!("127.0.0.1:{}", free_port()));
    let opened = Etcd::lead(nowhere, EtcdCredentials::default(), LEASE).await.map(|_| ());
    assert!(matches!(opened, Err(EtcdError::Unreachable { .. })), "{opened:?}");
    assert!(began.elapsed() < PATIENCE);
}

#[tokio::test]
async fn an_etcd_that_is_full_takes_no_saves_and_loses_none() {
    let Some(etcd) = Real::start(&["--quota-backend-bytes", "4000000"]).await else { return };
    let store = etcd.lead().await;
    let revision = store.save(&job("a"), Revision(0), b"kept".to_vec()).await.unwrap();
    let mut client = etcd.client().await.unwrap();
    while client.put("ballast", noise(500_000), None).await.is_ok() {}
    let full = store.save(&job("a"), revision, b"more".to_vec()).await;
    let Err(StoreError::Unavailable(why)) = full else { panic!("{full:?}") };
    assert!(matches!(why.downcast_ref(), Some(EtcdError::Full(_))), "{why}");
    let another = Etcd::lead(etcd.address(), EtcdCredentials::default(), LEASE).await.map(|_| ());
    assert!(matches!(another, Err(EtcdError::Full(_))), "{another:?}");
    assert_eq!(store.load(&job("a")).await.unwrap().unwrap().value, b"kept");
}

#[tokio::test]
async fn a_record_that_is_too_large_for_etcd_is_said_to_be_with_its_size() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let store = etcd.lead().await;
    for bytes in [2_000_000, 5_000_000] {
        let saved = store.save(&job("a"), Revision(0), noise(bytes)).await;
        let Err(StoreError::Unavailable(why)) = saved else { panic!("{saved:?}") };
        let found = why.downcast_ref();
        assert!(matches!(found, Some(EtcdError::TooLarge { bytes: n, .. }) if *n > bytes), "{why}");
    }
    // Twenty thousand members with long names fit: see `store::etcd`.
    let even: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 97) as u8).collect();
    store.save(&job("a"), Revision(0), even.clone()).await.unwrap();
    assert_eq!(store.load(&job("a")).await.unwrap().unwrap().value, even);
}

#[tokio::test]
async fn a_user_is_who_the_password_says_and_may_do_what_etcd_allows() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let mut admin = etcd.client().await.unwrap();
    admin.user_add("root", "root", None).await.unwrap();
    admin.user_grant_role("root", "root").await.ok();
    admin.role_add("root").await.ok();
    admin.user_grant_role("root", "root").await.unwrap();
    for (name, kind) in [("writer", PermissionType::Readwrite), ("reader", PermissionType::Read)] {
        admin.user_add(name, "secret", None).await.unwrap();
        admin.role_add(name).await.unwrap();
        let permission = Permission::new(kind, "/test/").with_prefix();
        admin.role_grant_permission(name, permission).await.unwrap();
        admin.user_grant_role(name, name).await.unwrap();
    }
    admin.auth_enable().await.unwrap();
    let password_file = etcd.dir.path().join("password");
    let lead = async |user: Option<&str>, password: &str| {
        std::fs::write(&password_file, format!("{password}\n")).unwrap();
        let credentials = EtcdCredentials {
            user: user.map(str::to_owned),
            password_file: Some(password_file.clone()),
            ..EtcdCredentials::default()
        };
        Etcd::lead(etcd.address(), credentials, LEASE).await
    };
    let store = lead(Some("writer"), "secret").await.unwrap();
    store.save(&job("a"), Revision(0), b"x".to_vec()).await.unwrap();
    for (user, password) in
        [(Some("writer"), "wrong"), (Some("nobody"), "secret"), (Some("reader"), "secret"), (None, "")]
    {
        let opened = lead(user, password).await.map(|_| ());
        assert!(matches!(opened, Err(EtcdError::Denied(_))), "{user:?}: {opened:?}");
    }
}

#[tokio::test]
async fn an_etcd_that_speaks_tls_is_checked_and_shown_a_certificate() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let files = authority.files(dir.path(), true);
    let ca = files.client_ca.clone().unwrap();
    let text = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(&authority.pem))
        .identity(Identity::from_pem(text(&files.cert), text(&files.key)));
    let [cert, key, trusted] = [&files.cert, &files.key, &ca].map(|path| path.to_str().unwrap());
    let args = ["--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", trusted];
    let Some(etcd) = Real::start_with(&args, Some(tls)).await else { return };

    let at = EtcdAddress::parse(&format!("etcds://{}/test", etcd.node)).unwrap().unwrap();
    let credentials = EtcdCredentials {
        ca: Some(ca.clone()),
        cert: Some(files.cert.clone()),
        key: Some(files.key.clone()),
        ..EtcdCredentials::default()
    };
    contract::check(&Etcd::lead(at.clone(), credentials.clone(), LEASE).await.unwrap()).await;

    let refused = async |address: EtcdAddress, credentials: EtcdCredentials| {
        let why = Etcd::lead(address, credentials, LEASE).await.map(drop).unwrap_err();
        assert!(matches!(why, EtcdError::Unreachable { .. } | EtcdError::File { .. }), "{why}");
        why.to_string()
    };
    // Without a certificate to show, with another authority to check by, in the clear, and with a file that is not there.
    let bare = EtcdCredentials { cert: None, key: None, ..credentials.clone() };
    refused(at.clone(), bare).await;
    let other = dir.path().join("other.pem");
    std::fs::write(&other, Authority::new().pem).unwrap();
    let why = refused(at.clone(), EtcdCredentials { ca: Some(other), ..credentials.clone() }).await;
    assert!(why.contains("certificate"), "{why}");
    refused(address(&etcd.node), EtcdCredentials::default()).await;
    let why = refused(at, EtcdCredentials { ca: Some("/no/such/file".into()), ..credentials }).await;
    assert!(why.contains("/no/such/file"), "{why}");
}

#[tokio::test]
async fn a_watch_that_is_compacted_away_is_only_a_hint() {
    let Some(etcd) = Real::start(&[]).await else { return };
    let short = Duration::from_secs(1);
    let old = Etcd::lead(etcd.address(), EtcdCredentials::default(), short).await.unwrap();
    let mut client = etcd.client().await.unwrap();
    let compacting = tokio::spawn(async move {
        loop {
            let now = client.put("busy", "busy", None).await.unwrap().header().unwrap().revision();
            let _ = client.compact(now, Some(CompactionOptions::new().with_physical())).await;
        }
    });
    // It waits for the leader's key by watching from a revision that is gone, and by looking.
    let new = tokio::time::timeout(PATIENCE, etcd.lead()).await.unwrap();
    compacting.abort();
    assert!(new.epoch() > old.epoch());
    new.save(&job("a"), Revision(0), b"x".to_vec()).await.unwrap();
}
