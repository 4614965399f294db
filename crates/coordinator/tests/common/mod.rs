//! A server in this process, on its own port, and peers of every kind.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use reknit_coordinator::config::{Limits, StoreConfig, TlsFiles};
use reknit_coordinator::server::Exposure;
use reknit_coordinator::{Config, Server};
use reknit_membership::event::Join;
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{Digest, Generation, JobId, MemberId, MemberName, Spec};
use reknit_proto::rendezvous::{Introduction, from_introduction};
use reknit_proto::v1;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Longer than anything here takes on a busy machine.
pub(crate) const BOUND: Duration = Duration::from_secs(30);

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    /// The endpoint for torchrun, if there is one.
    pub(crate) torchelastic: Option<SocketAddr>,
    _stop: oneshot::Sender<()>,
}

impl Running {
    pub(crate) async fn with(limits: Limits) -> Running {
        Running::start(Config { limits, ..Config::default() }).await
    }

    /// With these settings, but in memory and on a free port.
    pub(crate) async fn start(config: Config) -> Running {
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config { listen, store: StoreConfig::Memory, ..config };
        let server = Server::bind(config, Exposure::Loopback).await.unwrap();
        let (address, torchelastic) = (server.address(), server.torchelastic_address());
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(server.run(async {
            let _ = stopped.await;
        }));
        Running { address, torchelastic, _stop: stop }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Attends with nothing to say but this, if anything.
    pub(crate) async fn attend(
        &self,
        first: Option<v1::MemberMessage>,
    ) -> (mpsc::Sender<v1::MemberMessage>, Result<Streaming<v1::CoordinatorMessage>, Status>) {
        let mut client = RendezvousClient::connect(self.url()).await.unwrap();
        let (said, outgoing) = mpsc::channel(4);
        if let Some(first) = first {
            said.send(first).await.unwrap();
        }
        let answer = tokio::time::timeout(BOUND, client.attend(ReceiverStream::new(outgoing))).await.unwrap();
        (said, answer.map(tonic::Response::into_inner))
    }
}

pub(crate) fn introduction(job: &str, member: u64) -> v1::MemberMessage {
    let shape =
        Shape { tensors: Digest(1), count: 1, bytes: 4, recipe: Digest(1), sharding: Sharding::Replicated };
    let join = Join {
        name: MemberName::new(&format!("member-{member}")).unwrap(),
        slots: 1,
        address: "127.0.0.1:1".to_owned(),
        spec: Spec { min: 1, max: 8, unit: 1, keep: 1 },
        shape,
        history: None,
        generation: Generation(0),
        running: false,
        available: true,
    };
    from_introduction(&Introduction { job: JobId::new(job).unwrap(), member: MemberId(member), join })
}

/// Whether the other side closes the connection, by itself.
pub(crate) fn ends(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(why) => why.kind() != ErrorKind::WouldBlock,
    }
}

/// Looks again and again until `look` gives something.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(began.elapsed() < BOUND, "waited {BOUND:?} for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An authority of a test's own.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let name = format!("authority {:?}", &key.public_key_raw()[..8]);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for this machine, and its key.
    pub(crate) fn leaf(&self) -> [String; 2] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        [cert.pem(), key.serialize_pem()]
    }

    /// Files to serve with, in `dir`; with clients that must show a certificate of this authority, if `mutual`.
    pub(crate) fn files(&self, dir: &Path, mutual: bool) -> TlsFiles {
        let [cert, key] = self.leaf();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.join(name), text).unwrap();
            dir.join(name)
        };
        let ca = file("ca.pem", &self.pem);
        TlsFiles {
            cert: file("cert.pem", &cert),
            key: file("key.pem", &key),
            client_ca: mutual.then_some(ca),
            ca: None,
        }
    }
}
