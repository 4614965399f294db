//! `reknit relay`: on each machine, between stock torchrun and the coordinator.
//!
//! ```text
//!   torchrun ──TCPStore, loopback──► relay ◄══gRPC, TLS, tokens══► coordinators
//!      │ starts                       ▲  │
//!   workers ──TCPStore, loopback──────┘  └──TCPStore──► the relay of rank 0: the store of this world
//! ```
//! To the coordinators each agent is a member like any other (`reknit_trainer::Launcher`), so it survives their deaths, its ranks
//! stay, and a loss is known at once. To the agent the relay is the store of its rendezvous; what it reads there is
//! `reknit_torchelastic::seat`. What agents and workers tell each other goes to a store that the relay of rank 0 opens for each world,
//! and is passed on as it is.

mod agent;
mod client;
mod place;
mod store;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reknit_torchelastic::wire::WireLimits;
use reknit_trainer::Credentials;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::args::Relay;
use crate::failure::{Failure, Kind};
use crate::print;

/// How many agents one relay takes: there are a few on a machine.
const AGENTS_MAX: usize = 256;

/// What all connections have in common.
struct Shared {
    coordinator: String,
    credentials: Credentials,
    min: u32,
    max: u32,
    /// Where others reach this machine, and where the stores of worlds and the rings listen.
    advertise: IpAddr,
    limits: WireLimits,
    /// Counts agents, to tell them apart in names.
    agents: AtomicU64,
}

/// Runs until it is told to stop.
pub(crate) fn relay(args: &Relay) -> Result<(), Failure> {
    crate::serve::log_to_stderr(&args.log)?;
    if !args.listen.ip().is_loopback() {
        let error = anyhow::anyhow!("a relay listens on loopback alone, not on {}", args.listen);
        let hint = "its protocol has no authentication: start one on each machine that runs torchrun";
        return Err(Failure::new(Kind::Usage, error, hint));
    }
    let shared = Arc::new(Shared {
        coordinator: args.connection.coordinator.clone(),
        credentials: args.connection.credentials()?,
        min: *args.nodes.start(),
        max: *args.nodes.end(),
        advertise: args.advertise,
        limits: WireLimits::default(),
        agents: AtomicU64::new(0),
    });
    // Wrong options are told now, not to the first agent.
    place::options(&shared, "job", "member")
        .map_err(|why| Failure::new(Kind::Usage, why, "`reknit relay --help` says how to name them"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = crate::serve::told_to_stop()?;
        let listener = TcpListener::bind(args.listen).await.map_err(|why| in_use(args.listen, why))?;
        let address = listener.local_addr()?;
        if args.announce {
            print::data(format_args!("{address}"));
        }
        tracing::info!(%address, coordinator = %shared.coordinator, "relays agents of torchrun");
        tokio::select! {
            () = accept(listener, shared) => {}
            () = stop => tracing::info!("told to stop"),
        }
        Ok(())
    })
}

fn in_use(listen: SocketAddr, why: std::io::Error) -> Failure {
    let error = anyhow::Error::new(why).context(format!("cannot listen on {listen}"));
    Failure::new(Kind::InUse, error, "is another relay running here? --listen names another port")
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let places = Arc::new(Semaphore::new(AGENTS_MAX));
    loop {
        let (stream, place) = client::accept(&listener, &places).await;
        let Some(place) = place else {
            tracing::warn!(limit = AGENTS_MAX, "one agent too many is turned away");
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let number = shared.agents.fetch_add(1, Ordering::Relaxed);
            match agent::serve(stream, &shared, number).await {
                Ok(()) => tracing::info!(agent = number, "an agent has gone"),
                Err(why) => tracing::warn!(agent = number, error = %why, "an agent is cut off"),
            }
            drop(place);
        });
    }
}
