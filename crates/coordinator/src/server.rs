//! Putting it together: a listener, the services, the jobs, and an orderly end.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reknit_membership::spec::BadTiming;
use reknit_proto::v1::inspect_server::InspectServer;
use reknit_proto::v1::operate_server::OperateServer;
use reknit_proto::v1::rendezvous_server::RendezvousServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::server::NamedService;
use tonic::service::interceptor::InterceptedService;
use tonic_health::ServingStatus;

use crate::access::Guard;
use crate::clock::Clock;
use crate::config::{Config, StoreConfig};
use crate::etcd::EtcdError;
use crate::etcd::cluster::Cluster;
use crate::inspect::InspectService;
use crate::job::{Surroundings, source_text};
use crate::jobs::Jobs;
use crate::listen::{Acceptance, connections};
use crate::office::{Election, Office};
use crate::operate::OperateService;
use crate::records::Records;
use crate::reload::watched;
use crate::rendezvous::RendezvousService;
use crate::store::recorded::Recorder;
use crate::store::{Embedded, Epoch, Etcd, Memory, OpenError, Store};
use crate::tls::Peers;
use crate::tls::{self, TlsError};
use crate::tokens::{Tokens, TokensError};
use crate::torchelastic::TorchServer;

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Another process listens there.
    #[error("{listen} is in use by another process")]
    PortInUse {
        /// Where it was to listen.
        listen: SocketAddr,
    },
    /// It cannot listen there for another reason.
    #[error("cannot listen on {listen}")]
    Listen {
        /// Where it was to listen.
        listen: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The address is reachable from other machines, and nothing keeps strangers out.
    #[error("{listen} is reachable from other machines, and this coordinator has no {missing}")]
    NotLoopback {
        /// Where it was to listen.
        listen: SocketAddr,
        /// What it would need.
        missing: &'static str,
    },
    /// The endpoint for torchrun cannot listen there.
    #[error("the endpoint for torchrun cannot listen on {listen}")]
    ListenForTorchrun {
        /// Where it was to listen.
        listen: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The endpoint for torchrun is reachable from other machines, and nothing says which may connect.
    #[error(
        "the endpoint for torchrun on {listen} is reachable from other machines, and its protocol has neither tokens nor TLS"
    )]
    OpenToAll {
        /// Where it was to listen.
        listen: SocketAddr,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The list of tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// The silence that members are allowed is out of range.
    #[error(transparent)]
    Timing(#[from] BadTiming),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The etcd that coordinators share cannot be used.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// The file of saves and tells cannot be written.
    #[error("cannot write {}", file.display())]
    Record {
        /// Which.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The store is open, but a job in it cannot be read.
    #[error("a job's record cannot be read: {0}")]
    Records(String),
    /// The gRPC services could not be set up or ended with an error.
    #[error("the gRPC server failed")]
    Grpc(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A server that listens, with its jobs taken up.
pub struct Server {
    address: SocketAddr,
    listener: TcpListener,
    rule: Rule,
    office: Office,
    acceptance: Acceptance,
    guard: Guard,
    endpoint: Option<TorchServer>,
}

/// By what right a server leads.
enum Rule {
    /// Its store is its own.
    Alone(Jobs),
    /// It stands for election.
    Elected(Election),
}

impl Rule {
    /// How often what others have saved is read, if there are others.
    fn reads_every(&self) -> Option<Duration> {
        match self {
            Rule::Alone(_) => None,
            Rule::Elected(election) => Some(election.lease()),
        }
    }

    /// Plays its part until `stop` is ready, and then comes to an orderly end.
    async fn run(self, stop: oneshot::Receiver<()>) {
        match self {
            Rule::Alone(jobs) => {
                let _ = stop.await;
                jobs.stop().await;
            }
            Rule::Elected(election) => election.run(stop).await,
        }
    }
}

/// Whether an address that other machines can reach is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposure {
    /// Only with both TLS and tokens; without them loopback only.
    Loopback,
    /// Whatever was asked for: the user said so.
    Insecure,
}

impl Server {
    /// Opens the store, takes up its jobs and listens. Nothing is served before [`Server::run`].
    ///
    /// # Errors
    /// [`ServeError`] says what stands against it.
    pub async fn bind(config: Config, exposure: Exposure) -> Result<Server, ServeError> {
        let timing = config.timing()?;
        let listen = config.listen;
        check_exposure(&config, exposure)?;
        let (acceptance, guard) = protection(&config)?;
        let endpoint = open_endpoint(&config, exposure)?;
        let listener = TcpListener::bind(listen).await.map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => ServeError::PortInUse { listen },
            _ => ServeError::Listen { listen, source },
        })?;
        let address = listener.local_addr().map_err(|source| ServeError::Listen { listen, source })?;
        let recorder = match &config.record {
            Some((file, clock)) => {
                let cannot = |source| ServeError::Record { file: file.clone(), source };
                Some(Arc::new(Recorder::open(file, *clock).map_err(cannot)?))
            }
            None => None,
        };
        let around = |store| Surroundings { recorder, ..Surroundings::alone(store, timing, config.limits) };
        let alone: Arc<dyn Store> = match config.store {
            StoreConfig::Memory => Arc::new(Memory::new()),
            StoreConfig::Embedded { dir } => Arc::new(Embedded::open(&dir)?),
            StoreConfig::Etcd { address: etcd, credentials, advertise, lease } => {
                let cluster = Arc::new(Cluster::new(etcd, credentials));
                cluster.open().await?;
                let around = around(Arc::new(Etcd::new(Arc::clone(&cluster), None)));
                tracing::info!(%address, store = around.store.describe(), url = advertise, "listening");
                let peers = Peers::new(config.tls);
                let (election, office) = Election::new(cluster, advertise, lease, around, peers);
                let rule = Rule::Elected(election);
                return Ok(Server { address, listener, rule, office, acceptance, guard, endpoint });
            }
        };
        let jobs = Jobs::new(around(Arc::clone(&alone)).reigning(alone, Epoch::default()));
        let known = jobs.load_all().await.map_err(|why| ServeError::Records(source_text(&why)))?;
        tracing::info!(%address, store = jobs.around.store.describe(), jobs = known, "listening");
        let office = Office::for_good(jobs.clone());
        if let Some(endpoint) = &endpoint {
            endpoint.leads(true);
        }
        let rule = Rule::Alone(jobs);
        Ok(Server { address, listener, rule, office, acceptance, guard, endpoint })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the endpoint for torchrun listens, if there is one.
    pub fn torchelastic_address(&self) -> Option<SocketAddr> {
        self.endpoint.as_ref().map(TorchServer::address)
    }

    /// Serves until `stop` is ready; then ends every stream, lets what is being saved be saved, and returns. Members
    /// of running worlds go on and attach to the next coordinator. A peer that does not let go of its connection (it may
    /// be stopped) holds this up for a moment only.
    ///
    /// # Errors
    /// [`ServeError::Grpc`] if the services cannot be set up or fail as a whole.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let limits = self.office.around.limits;
        let grpc = |why: Box<dyn std::error::Error + Send + Sync>| ServeError::Grpc(why);
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(reknit_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|why| grpc(Box::new(why)))?;
        let (health, health_service) = tonic_health::server::health_reporter();
        for service in SERVICES {
            health.set_service_status(service, ServingStatus::Serving).await;
        }

        let records = Arc::new(Records::default());
        let reading = self.rule.reads_every().map(|every| {
            let (records, around) = (Arc::clone(&records), self.office.around.clone());
            tokio::spawn(async move { records.keep_reading(&around, every).await })
        });
        let rendezvous = RendezvousServer::new(RendezvousService::new(self.office.clone()))
            .max_decoding_message_size(limits.message_bytes);
        let rendezvous = InterceptedService::new(rendezvous, self.guard.clone());
        let endpoint = self.endpoint.map(Arc::new);
        let runs = endpoint.as_ref().map(|endpoint| endpoint.runs());
        let telling = endpoint.clone().map(|endpoint| {
            let office = self.office.clone();
            tokio::spawn(async move { office.tell_leads(|leads| endpoint.leads(leads)).await })
        });
        let inspect = InspectServer::new(InspectService::new(self.office.clone(), records, runs))
            .max_decoding_message_size(limits.message_bytes);
        let inspect = InterceptedService::new(inspect, self.guard.clone());
        let operate = OperateServer::new(OperateService::new(self.office.clone()))
            .max_decoding_message_size(limits.message_bytes);
        let operate = InterceptedService::new(operate, self.guard);

        let (end, ending) = oneshot::channel();
        let ruling = tokio::spawn(self.rule.run(ending));
        let unhealthy = health.clone();
        let (ends, ended) = oneshot::channel();
        let stopped = async move {
            stop.await;
            tracing::info!("stopping");
            for service in SERVICES {
                unhealthy.set_service_status(service, ServingStatus::NotServing).await;
            }
            // It ends by itself only if it has failed; whoever serves then has nothing to hand over.
            let _ = end.send(());
            let _ = ruling.await;
            // If nobody waits for it, everything has ended already.
            let _ = ends.send(());
        };
        let serving = tonic::transport::Server::builder()
            .timeout(ANSWER_PATIENCE)
            .max_concurrent_streams(limits.streams_per_connection)
            .http2_max_header_list_size(16 * 1024)
            .http2_max_pending_accept_reset_streams(Some(limits.resets_pending))
            .http2_max_local_error_reset_streams(Some(limits.resets_local))
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_service(health_service)
            .add_service(reflection)
            .add_service(rendezvous)
            .add_service(inspect)
            .add_service(operate)
            .serve_with_incoming_shutdown(connections(self.listener, self.acceptance), stopped);
        let patience_ends = async move {
            match ended.await {
                Ok(()) => tokio::time::sleep(FAREWELL).await,
                Err(_) => std::future::pending().await,
            }
        };
        let served = tokio::select! {
            served = serving => served.map_err(|why| grpc(Box::new(why))),
            () = patience_ends => {
                tracing::warn!("some peers do not let go of their connections; they are cut off");
                Ok(())
            }
        };
        for helper in [reading, telling].into_iter().flatten() {
            helper.abort();
        }
        served
    }
}

/// Whether a server with these settings may listen where it is to.
fn check_exposure(config: &Config, exposure: Exposure) -> Result<(), ServeError> {
    let listen = config.listen;
    if exposure == Exposure::Insecure || listen.ip().is_loopback() {
        return Ok(());
    }
    let missing = match (&config.tls, &config.tokens) {
        (Some(_), Some(_)) => return Ok(()),
        (None, None) => "TLS and no tokens",
        (None, Some(_)) => "TLS",
        (Some(_), None) => "tokens",
    };
    Err(ServeError::NotLoopback { listen, missing })
}

/// The endpoint for torchrun, listening, if there is to be one.
fn open_endpoint(config: &Config, exposure: Exposure) -> Result<Option<TorchServer>, ServeError> {
    let Some(settings) = config.torchelastic.clone() else { return Ok(None) };
    let listen = settings.listen;
    if exposure == Exposure::Loopback && !listen.ip().is_loopback() && settings.allow.is_empty() {
        return Err(ServeError::OpenToAll { listen });
    }
    let endpoint = TorchServer::start(settings, config.silence, Clock::start())
        .map_err(|source| ServeError::ListenForTorchrun { listen, source })?;
    tracing::info!(address = %endpoint.address(), "listening for torchrun");
    Ok(Some(endpoint))
}

/// What keeps strangers out, as the files have it now and whenever they change.
fn protection(config: &Config) -> Result<(Acceptance, Guard), ServeError> {
    let tls = config.tls.as_ref().map(tls::serving).transpose()?;
    let listed = |path: PathBuf| {
        watched("tokens", vec![path.clone()], move |contents| Tokens::parse(&path, &contents[0]))
    };
    let tokens = config.tokens.clone().map(listed).transpose()?;
    Ok((Acceptance { limits: config.limits, silence: config.silence, tls }, Guard::new(tokens)))
}

/// How long a call may take to be answered, or a stream to begin.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);

/// What health is asked of; the empty name stands for the server as a whole.
const SERVICES: [&str; 4] = [
    "",
    <RendezvousServer<RendezvousService> as NamedService>::NAME,
    <InspectServer<InspectService> as NamedService>::NAME,
    <OperateServer<OperateService> as NamedService>::NAME,
];

/// How long a stopping server waits for its peers to let go of their connections, when every stream has ended.
const FAREWELL: Duration = Duration::from_secs(1);

/// How often an idle connection is asked whether it still is one. Members are noticed much sooner, by their leases; this
/// is for those who only look.
const KEEPALIVE: Duration = Duration::from_secs(30);
