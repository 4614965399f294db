//! The store of one world: where its agents and workers tell each other what they need to begin.

use std::collections::HashMap;
use std::io;
use std::net::TcpListener as StdListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reknit_torchelastic::kv::{ConnectionId, KvLimits, KvStore, Total};
use reknit_torchelastic::wire::{self, WireLimits};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::client::{accept, greeted};

/// How many clients one store takes.
const CLIENTS_MAX: usize = 16_384;
/// How many replies may wait for a client to read them. It has one request under way, so a few are all there can be.
const REPLIES_MAX: usize = 16;
/// How long a client may take to read what it has asked for.
const READING: Duration = Duration::from_secs(60);

struct Shared {
    inside: Mutex<Inside>,
    limits: WireLimits,
}

struct Inside {
    kv: KvStore,
    /// The ways to all clients.
    clients: HashMap<ConnectionId, mpsc::Sender<Vec<u8>>>,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a world's store until it is dropped.
pub(super) async fn serve(listener: StdListener, limits: WireLimits) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let kv = KvStore::for_workers(KvLimits::default(), &Total::default());
    let inside = Mutex::new(Inside { kv, clients: HashMap::new() });
    let shared = Arc::new(Shared { inside, limits });
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    // Dropped with this: then all connections end.
    let mut clients = JoinSet::new();
    let mut next = 0;
    loop {
        while clients.try_join_next().is_some() {}
        let (stream, Some(place)) = accept(&listener, &places).await else { continue };
        next += 1;
        let (shared, id) = (Arc::clone(&shared), ConnectionId(next));
        clients.spawn(async move {
            if let Err(why) = client(stream, &shared, id).await {
                tracing::debug!(error = %why, "a client of the store of a world is cut off");
            }
            let mut inside = shared.lock();
            inside.kv.forget(id);
            inside.clients.remove(&id);
            drop(place);
        });
    }
}

async fn client(stream: TcpStream, shared: &Shared, id: ConnectionId) -> io::Result<()> {
    let (mut requests, mut writer) = greeted(stream, shared.limits).await?;
    let (replies, mut to_write) = mpsc::channel::<Vec<u8>>(REPLIES_MAX);
    shared.lock().clients.insert(id, replies.clone());
    let reads = async {
        loop {
            let asked = requests.next(|request, _| {
                let mut inside = shared.lock();
                let (mut reply, mut woken) = (Vec::new(), Vec::new());
                let asked = inside.kv.request(id, request, &mut reply, &mut woken);
                for other in woken {
                    let way = inside.clients.get(&other).filter(|_| other != id);
                    if other == id {
                        reply.push(wire::STOP_WAITING);
                    } else if way.is_some_and(|way| way.try_send(vec![wire::STOP_WAITING]).is_err()) {
                        // It reads nothing. What it was to be told is lost, so it must not wait for it.
                        inside.clients.remove(&other);
                    }
                }
                asked.map(|()| reply)
            });
            let Some(asked) = asked.await? else { return Ok(()) };
            let reply = asked.map_err(io::Error::other)?;
            if !reply.is_empty() && replies.send(reply).await.is_err() {
                return Ok(());
            }
        }
    };
    let writes = async {
        while let Some(bytes) = to_write.recv().await {
            let written = tokio::time::timeout(READING, writer.write_all(&bytes)).await;
            written.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        }
        Ok(())
    };
    tokio::select! {
        done = reads => done,
        done = writes => done,
    }
}
