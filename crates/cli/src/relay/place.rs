//! One agent's membership: the thread that waits for worlds on its behalf.

use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use reknit_torchelastic::seat::Wish;
use reknit_trainer::launcher::{Next, World};
use reknit_trainer::{BadOptions, End, Launcher, LauncherOptions};
use tokio::sync::mpsc::UnboundedSender;

use super::Shared;

/// How long one wait lasts before it is looked whether the agent wants something else.
const SLICE: Duration = Duration::from_millis(50);
/// How long an agent waits for a place before it is asked whether there is room at all.
const ROOM_AFTER: Duration = Duration::from_secs(2);
/// How long an agent that is done waits for the others.
const FINISH: Duration = Duration::from_secs(30);

/// What the agent wants of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// What the agent's own writes say.
    Wish(Wish),
    /// The end of the run, after the agent's workers have all ended well.
    Finished,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum News {
    /// A place in a world, and where its store is.
    Begins { world: World, store: SocketAddr, own: Option<TcpListener> },
    /// There is no room for the agent.
    Spare,
    /// The world is over, or is to end.
    Ends,
    /// The run is over.
    Closed,
    /// Nothing more will come, for this reason.
    Failed(String),
}

/// How an agent joins.
pub(super) fn options(shared: &Shared, run: &str, name: &str) -> Result<LauncherOptions, BadOptions> {
    let listen = SocketAddr::new(shared.advertise, 0);
    Ok(LauncherOptions::new(&shared.coordinator, run)?
        .name(name)?
        .members(shared.min, shared.max)?
        .listen(listen, None)
        .credentials(shared.credentials.clone()))
}

pub(super) struct Place {
    launcher: Launcher,
    advertise: std::net::IpAddr,
    orders: Receiver<Order>,
    news: UnboundedSender<News>,
}

/// Why the thread is done.
struct Done;

impl Place {
    pub(super) fn new(
        launcher: Launcher,
        advertise: std::net::IpAddr,
        orders: Receiver<Order>,
        news: UnboundedSender<News>,
    ) -> Place {
        Place { launcher, advertise, orders, news }
    }

    /// Until the agent has gone, or the membership is over. Dropping the launcher leaves the job.
    pub(super) fn run(self) {
        let mut order = self.orders.recv().ok();
        while let Some(what) = order.take() {
            let next = match what {
                Order::Wish(Wish::Join) => self.joins(),
                // It has left its round; the others go on when it joins again, or goes.
                Order::Wish(Wish::Leave) => self.orders.recv().map_err(|_| Done),
                Order::Wish(Wish::Close) => {
                    self.launcher.close_job();
                    Err(Done)
                }
                Order::Finished => {
                    self.finishes();
                    Err(Done)
                }
            };
            order = next.ok();
        }
    }

    fn tell(&self, news: News) -> Result<(), Done> {
        self.news.send(news).map_err(|_| Done)
    }

    fn finishes(&self) {
        let until = Instant::now() + FINISH;
        while self.launcher.finish(SLICE).is_none() && Instant::now() < until {}
    }

    /// Waits for a world, and then for its end. Returns what the agent wants next.
    fn joins(&self) -> Result<Order, Done> {
        let (mut began, mut is_spare) = (Instant::now(), false);
        loop {
            match self.launcher.next_world(SLICE) {
                Ok(Next::World(world)) => {
                    if let Some(order) = self.begins(world)? {
                        return Ok(order);
                    }
                    began = Instant::now();
                }
                Ok(Next::NotYet) => {
                    if !is_spare && began.elapsed() > ROOM_AFTER {
                        is_spare = self.launcher.job_has_a_world() == Some(true);
                        if is_spare {
                            self.tell(News::Spare)?;
                        }
                        began = Instant::now();
                    }
                }
                Ok(Next::End(End::Closed(_))) => {
                    self.tell(News::Closed)?;
                    return Err(Done);
                }
                Ok(Next::End(_)) => {
                    self.tell(News::Failed(
                        "the agent was told to leave: a planned leave is over".to_owned(),
                    ))?;
                    return Err(Done);
                }
                Err(why) => {
                    self.tell(News::Failed(why.to_string()))?;
                    return Err(Done);
                }
            }
            match self.orders.try_recv() {
                Ok(order) => return Ok(order),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(Done),
            }
        }
    }

    /// A world begins. Returns what the agent wants next, or nothing if the world was over before the agent could know.
    fn begins(&self, world: World) -> Result<Option<Order>, Done> {
        let own = match world.rank {
            0 => match TcpListener::bind((self.advertise, 0)) {
                Ok(listener) => Some(listener),
                Err(why) => {
                    self.tell(News::Failed(format!("no store for the world: {why}")))?;
                    return Err(Done);
                }
            },
            _ => None,
        };
        let address = own.as_ref().and_then(|listener| listener.local_addr().ok());
        let address = address.map(|address| address.to_string()).unwrap_or_default();
        let shared = loop {
            match self.launcher.share(address.as_bytes(), SLICE) {
                Ok(Some(shared)) => break shared,
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
        };
        let Some(store) = String::from_utf8(shared).ok().and_then(|address| address.parse().ok()) else {
            self.tell(News::Failed("the relay of rank 0 says nowhere where the store is".to_owned()))?;
            return Err(Done);
        };
        self.tell(News::Begins { world, store, own })?;
        let mut over = false;
        loop {
            if !over && self.launcher.wait_until_over(SLICE) {
                over = true;
                self.tell(News::Ends)?;
            }
            let order = match over {
                // Nothing more happens by itself.
                true => self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => self.orders.recv_timeout(SLICE),
            };
            match order {
                Ok(order) => return Ok(Some(order)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Done),
            }
        }
    }
}
