//! One agent's connection: what is of its rendezvous is answered here, everything else by the store of its world.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reknit_torchelastic::rendezvous::{MASTER_ADDR, MASTER_PORT, PREFIX, TERMINAL};
use reknit_torchelastic::seat::{Seat, Wish};
use reknit_torchelastic::state::Agent;
use reknit_torchelastic::wire::{self, Request};
use reknit_trainer::Launcher;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use super::client::{accept, greet, greeted};
use super::place::{News, Order, Place, options};
use super::{Shared, store};

/// How long the store of a world may take to answer a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How much of the store's answers is taken at once.
const READ_BYTES: usize = 64 << 10;
/// How many connections the workers of one agent may have open.
const WORKERS_MAX: usize = 4096;

/// What is to be done with a request.
enum Then {
    /// Answer with this, which may be nothing.
    Answer(Vec<u8>),
    /// Pass it on as it is.
    PassOn,
    /// The connection makes no sense.
    Refuse(String),
}

/// One agent.
struct Relayed<'s> {
    shared: &'s Shared,
    number: u64,
    seat: Seat,
    /// The name of its run, once it has said so.
    run: Option<String>,
    orders: Option<Sender<Order>>,
    news: mpsc::UnboundedReceiver<News>,
    to_news: mpsc::UnboundedSender<News>,
    /// Where its workers meet, as they are told it: the same for as long as it lives.
    workers: u16,
    /// Where that is at present.
    store: watch::Sender<Option<SocketAddr>>,
    /// The connection to the store of its world.
    upstream: Option<OwnedWriteHalf>,
    answers: Option<OwnedReadHalf>,
    /// The store of its world, if it is here.
    own: Option<JoinHandle<()>>,
    /// Whether its workers have all ended well.
    at_the_end: bool,
    /// Whether the wait that it began last is the store's to answer.
    waits_upstream: bool,
}

/// Serves an agent until it has gone.
pub(super) async fn serve(stream: TcpStream, shared: &Shared, number: u64) -> io::Result<()> {
    let (mut requests, mut writer) = greeted(stream, shared.limits).await?;
    let workers = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = workers.local_addr()?.port();
    let (store, at) = watch::channel(None);
    let passing = tokio::spawn(pass_workers_on(workers, at));
    let (to_news, news) = mpsc::unbounded_channel();
    let mut relayed = Relayed {
        shared,
        number,
        seat: Seat::new(shared.max),
        run: None,
        orders: None,
        news,
        to_news,
        workers: port,
        store,
        upstream: None,
        answers: None,
        own: None,
        at_the_end: false,
        waits_upstream: false,
    };
    let done = relayed.run(&mut requests, &mut writer).await;
    passing.abort();
    if let Some(own) = relayed.own.take() {
        own.abort();
    }
    done
}

impl Relayed<'_> {
    async fn run(
        &mut self,
        requests: &mut super::client::Requests,
        writer: &mut OwnedWriteHalf,
    ) -> io::Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            // Each of these can be dropped half way without losing anything.
            tokio::select! {
                asked = requests.next(|_, bytes| bytes.to_vec()) => {
                    let Some(bytes) = asked? else { return Ok(()) };
                    self.asked(&bytes, writer).await?;
                }
                read = answer(&mut self.answers, &mut buffer) => match read {
                    Ok(bytes @ 1..) => writer.write_all(&buffer[..bytes]).await?,
                    Ok(0) | Err(_) => {
                        // The world is over, and it will be told. What it asks of that store is never answered.
                        tracing::debug!(agent = self.number, "the store of the world has gone");
                        (self.upstream, self.answers) = (None, None);
                    }
                },
                news = self.news.recv() => if let Some(news) = news {
                    self.hears(news).await?;
                },
            }
        }
    }

    async fn asked(&mut self, bytes: &[u8], writer: &mut OwnedWriteHalf) -> io::Result<()> {
        let parsed = wire::parse(bytes, &self.shared.limits).map_err(io::Error::other)?;
        let wire::Parsed::Whole(request, _) = parsed else { return Ok(()) };
        match self.decide(request) {
            Then::Answer(reply) => writer.write_all(&reply).await,
            Then::PassOn => match &mut self.upstream {
                Some(upstream) => upstream.write_all(bytes).await,
                None => {
                    let why = "it asks for what other agents say, and is in no world";
                    Err(io::Error::other(why))
                }
            },
            Then::Refuse(why) => Err(io::Error::other(why)),
        }
    }

    fn decide(&mut self, request: Request<'_>) -> Then {
        match request {
            Request::Ping { nonce } => return Then::Answer(nonce.to_le_bytes().to_vec()),
            Request::CancelWait if !self.waits_upstream => return Then::Answer(vec![wire::WAIT_CANCELED]),
            _ => {}
        }
        let key = request.first_key().unwrap_or_default();
        let is_wait = matches!(request, Request::Wait { .. } | Request::Barrier { .. });
        match key.strip_prefix(PREFIX.as_bytes()) {
            Some(run) if !run.contains(&b'/') => {
                self.waits_upstream &= !is_wait;
                self.of_the_state(request, run)
            }
            Some(name) if is_of(name, MASTER_ADDR) || is_of(name, MASTER_PORT) => {
                self.waits_upstream &= !is_wait;
                Then::Answer(self.where_workers_meet(request, name))
            }
            _ => {
                if is_wait {
                    self.waits_upstream = true;
                }
                // An agent whose workers have all ended well enters torchrun's last barrier with this key.
                self.at_the_end |= is_of(key, TERMINAL);
                Then::PassOn
            }
        }
    }

    /// What is asked of the key of the rendezvous state.
    fn of_the_state(&mut self, request: Request<'_>, run: &[u8]) -> Then {
        let Ok(run) = std::str::from_utf8(run) else {
            return Then::Refuse("the name of its run is no text".to_owned());
        };
        match &self.run {
            Some(known) if known != run => {
                return Then::Refuse(format!("it is of run {known:?}, not of {run:?}"));
            }
            Some(_) => {}
            None => self.run = Some(run.to_owned()),
        }
        let mut reply = Vec::new();
        match request {
            Request::Wait { .. } => reply.push(wire::STOP_WAITING),
            Request::Check { .. } => reply.push(wire::READY),
            Request::Get { .. } => wire::put_text(&mut reply, &self.seat.shown(now_us())),
            Request::CompareSet { desired, .. } => {
                match self.seat.compare_set(desired) {
                    Ok(Some(wish)) => {
                        if let Err(why) = self.order(wish) {
                            return Then::Refuse(why);
                        }
                    }
                    Ok(None) => {}
                    Err(why) => return Then::Refuse(why.to_string()),
                }
                wire::put_text(&mut reply, &self.seat.shown(now_us()));
            }
            _ => return Then::Refuse("torchrun's agents do nothing but compare and set there".to_owned()),
        }
        Then::Answer(reply)
    }

    /// Every agent and worker is told the same place on its own machine, whatever an agent says.
    fn where_workers_meet(&self, request: Request<'_>, name: &[u8]) -> Vec<u8> {
        let mut reply = Vec::new();
        match request {
            Request::Get { .. } if is_of(name, MASTER_ADDR) => wire::put_text(&mut reply, b"127.0.0.1"),
            Request::Get { .. } => wire::put_text(&mut reply, self.workers.to_string().as_bytes()),
            Request::Wait { .. } => reply.push(wire::STOP_WAITING),
            Request::Check { .. } => reply.push(wire::READY),
            // Said by the agent of rank 0, of a store that it opens and nobody needs.
            _ => {}
        }
        reply
    }

    fn order(&mut self, wish: Wish) -> Result<(), String> {
        let order = match wish {
            Wish::Close if self.at_the_end => Order::Finished,
            wish => Order::Wish(wish),
        };
        let orders = match &self.orders {
            Some(orders) => orders,
            None if wish != Wish::Join => return Ok(()),
            None => {
                let run = self.run.clone().unwrap_or_default();
                let orders = self.join(&run)?;
                self.orders.insert(orders)
            }
        };
        // Whose membership is over has been told so.
        let _ = orders.send(order);
        Ok(())
    }

    /// Makes the agent a member.
    fn join(&self, run: &str) -> Result<Sender<Order>, String> {
        let name = name(self.seat.agent(), self.number);
        let options = options(self.shared, run, &name).map_err(|why| why.to_string())?;
        let launcher = Launcher::join(options).map_err(|why| why.to_string())?;
        let (orders, inbox) = channel();
        let place = Place::new(launcher, self.shared.advertise, inbox, self.to_news.clone());
        let thread = std::thread::Builder::new().name("reknit-place".to_owned());
        thread.spawn(|| place.run()).map_err(|why| format!("no thread for it: {why}"))?;
        tracing::info!(agent = self.number, %run, %name, "an agent joins");
        Ok(orders)
    }

    async fn hears(&mut self, news: News) -> io::Result<()> {
        match news {
            News::Begins { world, store, own } => {
                if let Some(old) = self.own.take() {
                    old.abort();
                }
                self.own = own.map(|listener| {
                    let limits = self.shared.limits;
                    tokio::spawn(async move {
                        if let Err(why) = store::serve(listener, limits).await {
                            tracing::error!(error = %why, "the store of a world cannot be served");
                        }
                    })
                });
                (self.upstream, self.answers) = (None, None);
                match connect(store).await {
                    Ok(stream) => {
                        let (answers, upstream) = stream.into_split();
                        (self.upstream, self.answers) = (Some(upstream), Some(answers));
                    }
                    // The relay of rank 0 has just gone, and this world with it.
                    Err(why) => {
                        tracing::warn!(%store, error = %why, "the store of the world is out of reach")
                    }
                }
                self.store.send_replace(Some(store));
                tracing::info!(
                    agent = self.number,
                    generation = world.generation,
                    rank = world.rank,
                    size = world.size,
                    "a world"
                );
                self.seat.begins(world.generation, world.rank, world.size);
            }
            News::Spare => self.seat.is_spare(),
            News::Ends => self.seat.ends(),
            News::Closed => self.seat.closes(),
            News::Failed(why) => return Err(io::Error::other(why)),
        }
        Ok(())
    }
}

/// Whether a key of a round ends with that name.
fn is_of(key: &[u8], name: &str) -> bool {
    key.strip_suffix(name.as_bytes()).is_some_and(|round| round.ends_with(b"/"))
}

/// What the store says next; never, if there is none.
async fn answer(answers: &mut Option<OwnedReadHalf>, buffer: &mut [u8]) -> io::Result<usize> {
    match answers {
        Some(answers) => answers.read(buffer).await,
        None => std::future::pending().await,
    }
}

async fn connect(store: SocketAddr) -> io::Result<TcpStream> {
    let connecting = async {
        let mut stream = TcpStream::connect(store).await?;
        greet(&mut stream).await?;
        Ok(stream)
    };
    tokio::time::timeout(CONNECT, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Passes the connections of an agent's workers on to the store of its world, byte by byte.
async fn pass_workers_on(listener: TcpListener, store: watch::Receiver<Option<SocketAddr>>) {
    let places = Arc::new(Semaphore::new(WORKERS_MAX));
    loop {
        let (mut worker, Some(place)) = accept(&listener, &places).await else { continue };
        // Workers are only started in a world.
        let Some(store) = *store.borrow() else { continue };
        tokio::spawn(async move {
            let passing = async {
                worker.set_nodelay(true)?;
                let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(store));
                let mut upstream =
                    connecting.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                upstream.set_nodelay(true)?;
                copy_bidirectional(&mut worker, &mut upstream).await
            };
            if let Err(why) = passing.await {
                // As if it had been connected to that store itself.
                tracing::debug!(%store, error = %why, "a worker's connection has ended");
            }
            drop(place);
        });
    }
}

/// What people call the agent: its host and process, as it says them.
fn name(agent: Option<&Agent>, number: u64) -> String {
    let (host, pid) = agent.map_or(("agent", 0), |agent| (agent.addr.as_str(), agent.pid));
    let host: String =
        host.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')).collect();
    let host: String = host.chars().take(64).collect();
    format!("{host}-{pid}-{number}")
}

fn now_us() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}
