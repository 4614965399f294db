//! Connections that are encrypted, and those that try to be and are not.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Authority, Running, ends, eventually};
use reknit_coordinator::config::{Limits, StoreConfig, TlsFiles};
use reknit_coordinator::server::{Exposure, ServeError};
use reknit_coordinator::{Config, Server};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio_rustls::TlsConnector;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

async fn secured(files: &TlsFiles, limits: Limits) -> Running {
    Running::start(Config { tls: Some(files.clone()), limits, ..Config::default() }).await
}

/// Whether a client that trusts `authority`, and shows `identity`, is answered.
async fn is_served(
    server: &Running,
    authority: &Authority,
    identity: Option<[String; 2]>,
) -> Result<(), String> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem));
    if let Some([cert, key]) = identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let endpoint =
        Endpoint::from_shared(format!("https://{}", server.address)).unwrap().tls_config(tls).unwrap();
    let channel = endpoint.connect().await.map_err(|why| format!("{why:?}"))?;
    let asked = InspectClient::new(channel).server(v1::ServerRequest {}).await;
    asked.map(drop).map_err(|why| format!("{why:?}"))
}

/// A client's handshake, and nothing after it.
async fn shake_hands(
    server: &Running,
    authority: &Authority,
    version: &'static SupportedProtocolVersion,
) -> std::io::Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn d11_with_an_authority_for_clients_nobody_is_heard_without_a_certificate_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, other) = (Authority::new(), Authority::new());
    let server = secured(&authority.files(dir.path(), true), Limits::default()).await;
    assert_eq!(is_served(&server, &authority, Some(authority.leaf())).await, Ok(()));
    // If the verdict arrives before the first call is made, that call hears only that there is no connection any more.
    let hears = async |identity: Option<[String; 2]>, alert: &str| {
        eventually(alert, async || {
            let why = is_served(&server, &authority, identity.clone()).await.unwrap_err();
            why.contains(alert).then_some(())
        })
        .await;
    };
    hears(None, "CertificateRequired").await;
    hears(Some(other.leaf()), "UnknownCA").await;
    let distrusted = is_served(&server, &other, Some(authority.leaf())).await.unwrap_err();
    assert!(distrusted.contains("UnknownIssuer"), "{distrusted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn d11_what_is_not_tls_gets_no_answer_on_a_port_that_is() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let server = secured(&authority.files(dir.path(), false), Limits::default()).await;
    let address = server.address;
    let answers = tokio::task::spawn_blocking(move || {
        [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64]]
            .map(|garbage| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(common::BOUND)).unwrap();
                stream.write_all(garbage).unwrap();
                let mut answer = Vec::new();
                // It may be reset instead.
                let _ = stream.read_to_end(&mut answer);
                answer
            })
    });
    for answer in answers.await.unwrap() {
        // At the most an alert of TLS: 0x15.
        assert!(answer.first().is_none_or(|first| *first == 0x15), "{answer:?}");
    }
    let asked =
        async { InspectClient::connect(server.url()).await.ok()?.server(v1::ServerRequest {}).await.ok() };
    assert!(asked.await.is_none(), "nor does our own client");
    assert_eq!(is_served(&server, &authority, None).await, Ok(()), "and the loop goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn d11_an_older_tls_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let server = secured(&authority.files(dir.path(), false), Limits::default()).await;
    assert!(shake_hands(&server, &authority, &rustls::version::TLS13).await.is_ok());
    assert!(shake_hands(&server, &authority, &rustls::version::TLS12).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_handshake_that_dawdles_is_closed_after_its_limit_and_others_are_served_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let first_bytes = Duration::from_millis(1500);
    let server =
        secured(&authority.files(dir.path(), false), Limits { first_bytes, ..Limits::default() }).await;
    let address = server.address;
    // One says nothing, one begins a handshake, and one ends it and then says nothing.
    let mute = TcpStream::connect(address).unwrap();
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).unwrap();
    let whole = shake_hands(&server, &authority, &rustls::version::TLS13).await.unwrap();
    let whole = whole.into_inner().0.into_std().unwrap();
    whole.set_nonblocking(false).unwrap();
    assert_eq!(is_served(&server, &authority, None).await, Ok(()));
    let ended = tokio::task::spawn_blocking(move || [mute, half, whole].iter().map(ends).collect::<Vec<_>>());
    assert_eq!(ended.await.unwrap(), [true; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn d10_new_certificates_are_served_without_a_restart_and_bad_ones_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let files = old.files(dir.path(), false);
    let server = secured(&files, Limits::default()).await;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&old.pem));
    let endpoint =
        Endpoint::from_shared(format!("https://{}", server.address)).unwrap().tls_config(tls).unwrap();
    let mut open = InspectClient::new(endpoint.connect().await.unwrap());

    let [cert, key] = new.leaf();
    std::fs::write(&files.cert, &cert).unwrap();
    std::fs::write(&files.key, &key).unwrap();
    eventually("the new certificate", async || is_served(&server, &new, None).await.ok()).await;
    assert!(is_served(&server, &old, None).await.is_err());
    assert!(open.server(v1::ServerRequest {}).await.is_ok(), "connections that are open go on");

    std::fs::write(&files.cert, "garbage").unwrap();
    // Longer than it takes to look at the file twice.
    for _ in 0..50 {
        assert_eq!(is_served(&server, &new, None).await, Ok(()));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a server on an address that other machines can reach is told.
async fn exposed(
    tls: Option<TlsFiles>,
    tokens: Option<PathBuf>,
    exposure: Exposure,
) -> Result<(), ServeError> {
    let listen = "0.0.0.0:0".parse().unwrap();
    let config = Config { listen, store: StoreConfig::Memory, tls, tokens, ..Config::default() };
    Server::bind(config, exposure).await.map(drop)
}

fn tokens(dir: &Path) -> PathBuf {
    let path = dir.join("tokens");
    std::fs::write(&path, format!("@operator {}", "0".repeat(64))).unwrap();
    path
}

#[tokio::test]
async fn d12_an_address_that_others_can_reach_needs_both_tls_and_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let tls = || Some(Authority::new().files(dir.path(), true));
    let tokens = || Some(tokens(dir.path()));
    let missing = |bound: Result<(), ServeError>| match bound {
        Err(ServeError::NotLoopback { missing, .. }) => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(exposed(None, None, Exposure::Loopback).await), "TLS and no tokens");
    assert_eq!(missing(exposed(tls(), None, Exposure::Loopback).await), "tokens");
    assert_eq!(missing(exposed(None, tokens(), Exposure::Loopback).await), "TLS");
    assert!(exposed(tls(), tokens(), Exposure::Loopback).await.is_ok());
    assert!(exposed(None, None, Exposure::Insecure).await.is_ok());
}
