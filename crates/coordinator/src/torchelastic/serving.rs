//! The thread that serves: it waits for what the operating system says of its sockets, and does it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use reknit_membership::Timestamp;
use reknit_torchelastic::kv::{ConnectionId, KvStore, Total};
use reknit_torchelastic::rendezvous::{Caller, Effect, Rendezvous};
use reknit_torchelastic::wire::{self, Parsed, Request};

use super::complaints::Complaints;
use super::connection::{Connection, Greeting, Received, Side, greeting, listen};
use super::view::Runs;
use super::{Command, TorchElastic};
use crate::clock::Clock;
use crate::listen::PerPeer;

/// What a socket's events are known by. Connections count up from the first number that is free for them.
const WAKE: Token = Token(0);
const RENDEZVOUS: Token = Token(1);
const FIRST_STORE: usize = 2;
const FIRST_CONNECTION: u64 = 1 << 20;

/// How much is read at once, and how often in a row from one connection while others wait.
const READ_BYTES: usize = 64 << 10;
const READS_IN_A_ROW: usize = 16;
/// How often connections that are waited for are looked through.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How many events are taken at once.
const EVENTS: usize = 1024;

pub(super) struct Serving {
    settings: TorchElastic,
    silence: Duration,
    clock: Clock,
    poll: Poll,
    waker: Arc<Waker>,
    inbox: mpsc::Receiver<Command>,
    listener: TcpListener,
    address: SocketAddr,
    leads: bool,
    peers: PerPeer,
    connections: HashMap<Token, Connection>,
    next: u64,
    rendezvous: Rendezvous,
    /// What all stores hold.
    stored: Total,
    stores: BTreeMap<usize, WorkerStore>,
    store_of: HashMap<String, usize>,
    runs: Arc<Runs>,
    /// Connections of which there is more to read, although the system will not say so again.
    again: VecDeque<(Token, bool)>,
    /// Where connections wait that could not be accepted.
    crowded: BTreeSet<Token>,
    /// Bytes of requests that are not all there.
    pending: usize,
    /// Bytes of replies that have not been read.
    unread: usize,
    /// When connections that are waited for were looked through last.
    last_look: Instant,
    complaints: Complaints,
}

/// Where the workers of one run meet.
struct WorkerStore {
    run: String,
    listener: TcpListener,
    kv: KvStore,
}

/// What is filled anew for every request, kept for its memory.
#[derive(Default)]
struct Scratch {
    reply: Vec<u8>,
    woken: Vec<ConnectionId>,
    effects: Vec<Effect>,
}

impl Serving {
    pub(super) fn new(
        settings: TorchElastic,
        silence: Duration,
        clock: Clock,
        runs: Arc<Runs>,
        inbox: mpsc::Receiver<Command>,
    ) -> io::Result<Serving> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let mut listener = listen(settings.listen)?;
        poll.registry().register(&mut listener, RENDEZVOUS, Interest::READABLE)?;
        let address = listener.local_addr()?;
        let limits = settings.limits;
        let (stored, advertise) = (Total::new(limits.stored_bytes), settings.advertise.clone());
        let rendezvous = Rendezvous::new(settings.repairs, limits.kv, stored.clone(), limits.runs, advertise);
        Ok(Serving {
            silence,
            clock,
            poll,
            waker,
            inbox,
            listener,
            address,
            leads: false,
            peers: PerPeer::new(limits.connections_per_peer),
            connections: HashMap::new(),
            next: FIRST_CONNECTION,
            rendezvous,
            stored,
            stores: BTreeMap::new(),
            store_of: HashMap::new(),
            runs,
            again: VecDeque::new(),
            crowded: BTreeSet::new(),
            unread: 0,
            pending: 0,
            last_look: Instant::now(),
            complaints: Complaints::new(Instant::now()),
            settings,
        })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS);
        let mut buffer = vec![0; READ_BYTES];
        let mut scratch = Scratch::default();
        loop {
            let patience = if self.again.is_empty() { self.patience() } else { Some(Duration::ZERO) };
            match self.poll.poll(&mut events, patience) {
                Ok(()) => {}
                Err(why) if why.kind() == io::ErrorKind::Interrupted => continue,
                Err(why) => {
                    tracing::error!(error = %why, "the endpoint for torchrun ends");
                    return;
                }
            }
            for event in &events {
                match event.token() {
                    WAKE => {
                        if !self.obey(&mut scratch) {
                            return;
                        }
                    }
                    RENDEZVOUS => self.accept(Side::Rendezvous),
                    Token(store) if (store as u64) < FIRST_CONNECTION => self.accept(Side::Workers(store)),
                    token => {
                        let ends = event.is_read_closed() || event.is_error();
                        self.serve(token, ends, &mut buffer, &mut scratch);
                    }
                }
            }
            for _ in 0..self.again.len() {
                if let Some((token, ends)) = self.again.pop_front() {
                    self.serve(token, ends, &mut buffer, &mut scratch);
                }
            }
            if self.last_look.elapsed() >= LOOK_EVERY {
                self.look_through(&mut scratch);
            }
        }
    }

    /// How long nothing needs to be done without an event.
    fn patience(&self) -> Option<Duration> {
        (!self.connections.is_empty() || !self.crowded.is_empty()).then_some(LOOK_EVERY)
    }

    /// False if that was the end.
    fn obey(&mut self, scratch: &mut Scratch) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Leads(leads)) => {
                    if self.leads && !leads {
                        self.forget_all(scratch);
                    }
                    self.leads = leads;
                }
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    /// Another coordinator leads: what agents agree on here would be a second truth.
    fn forget_all(&mut self, scratch: &mut Scratch) {
        let tokens: Vec<Token> = self.connections.keys().copied().collect();
        for token in tokens {
            self.close(token, scratch);
        }
        self.runs.clear();
    }

    fn accept(&mut self, side: Side) {
        loop {
            let listener = match side {
                Side::Rendezvous => &self.listener,
                Side::Workers(store) => match self.stores.get(&store) {
                    Some(store) => &store.listener,
                    None => return,
                },
            };
            match listener.accept() {
                Ok((stream, peer)) => self.admit(stream, peer.ip().to_canonical(), side),
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return,
                Err(why) => {
                    // Out of descriptors, most likely. The system says once that somebody waits: it is tried again.
                    tracing::warn!(error = %why, "a connection of torchrun could not be accepted");
                    self.crowded.insert(match side {
                        Side::Rendezvous => RENDEZVOUS,
                        Side::Workers(store) => Token(store),
                    });
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: TcpStream, peer: IpAddr, side: Side) {
        // A client tries again for minutes: another coordinator leads then, or this one.
        if !self.leads {
            return;
        }
        if !self.settings.allows(peer) {
            let why = "its address is not in a network that may connect (--torchelastic-allow)";
            return self.complaints.refused(peer, why);
        }
        if self.connections.len() >= self.settings.limits.connections {
            return self.complaints.refused(peer, "there are as many connections as may be");
        }
        let Some(seat) = self.peers.take(peer) else { return };
        let token = Token(self.next as usize);
        let admitted = Connection::new(stream, side, self.silence, seat).and_then(|mut connection| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut connection.stream, token, interest)?;
            Ok(connection)
        });
        // It may have gone meanwhile.
        if let Ok(connection) = admitted {
            self.next += 1;
            self.connections.insert(token, connection);
        }
    }

    /// Sends what is left to be sent, reads what there is to read, and answers it.
    fn serve(&mut self, token: Token, ends: bool, buffer: &mut [u8], scratch: &mut Scratch) {
        for _ in 0..READS_IN_A_ROW {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            if counted(&mut self.unread, connection, Connection::flush).is_err() {
                return self.close(token, scratch);
            }
            if !connection.is_flushed() {
                return;
            }
            // What came while the client did not read was not answered.
            if connection.is_worth_a_look() && !self.answer(token, &[], scratch) {
                return;
            }
            let Some(connection) = self.connections.get_mut(&token) else { return };
            if !connection.is_flushed() {
                return;
            }
            let (length, is_all) = match connection.receive(buffer) {
                Ok(Received::All(length)) => (length, true),
                Ok(Received::Some(length)) => (length, false),
                Ok(Received::Ended) | Err(_) => return self.close(token, scratch),
            };
            if length > 0 && !self.answer(token, &buffer[..length], scratch) {
                return;
            }
            if is_all && (!ends || length == 0) {
                return;
            }
        }
        self.again.push_back((token, ends));
    }

    /// Answers the requests that are whole now that `received` has come. False if the connection is closed.
    fn answer(&mut self, token: Token, received: &[u8], scratch: &mut Scratch) -> bool {
        let Some(connection) = self.connections.get_mut(&token) else { return false };
        // What is kept is seldom more than a part of one request.
        let mut kept = std::mem::take(&mut connection.pending);
        self.pending -= kept.len();
        if !kept.is_empty() {
            kept.extend_from_slice(received);
        }
        let bytes = if kept.is_empty() { received } else { &kept };
        let (mut at, needs) = (0, connection.needs);
        let looked =
            if bytes.len() < needs { Ok(needs) } else { self.requests(token, bytes, &mut at, scratch) };
        let needs = match looked {
            Ok(needs) => needs,
            Err(CutOff { peer, text }) => {
                self.complaints.cut_off(peer, &text);
                self.close(token, scratch);
                return false;
            }
        };
        let Some(connection) = self.connections.get_mut(&token) else { return false };
        if kept.is_empty() {
            kept.extend_from_slice(&received[at..]);
        } else {
            kept.drain(..at);
        }
        self.pending += kept.len();
        connection.keep(kept, needs, at > 0);
        self.keep_within_limits(scratch);
        self.connections.contains_key(&token)
    }

    /// If clients have left too much half sent or unread, whoever has left the most is cut off.
    fn keep_within_limits(&mut self, scratch: &mut Scratch) {
        let limit = self.settings.limits.pending_bytes;
        while self.pending > limit || self.unread > limit {
            let is_sending = self.pending > limit;
            let left = |connection: &Connection| {
                if is_sending { connection.pending.len() } else { connection.unread() }
            };
            let most = self.connections.iter().max_by_key(|(_, connection)| left(connection));
            let Some((token, peer)) = most.map(|(token, connection)| (*token, connection.peer)) else {
                return;
            };
            self.complaints.cut_off(peer, &format!("more than {limit} bytes are half sent or unread"));
            self.close(token, scratch);
        }
    }

    /// Carries out one request after the other, as long as the client reads the answers. Returns how long what is left must
    /// be before it is worth looking at.
    fn requests(
        &mut self,
        token: Token,
        bytes: &[u8],
        at: &mut usize,
        scratch: &mut Scratch,
    ) -> Result<usize, CutOff> {
        let limits = self.settings.limits.wire;
        loop {
            let Some(connection) = self.connections.get_mut(&token) else { return Ok(0) };
            let rest = &bytes[*at..];
            let cut_off = |text: String| CutOff { peer: connection.peer, text };
            if rest.is_empty() || !connection.is_flushed() {
                return Ok(0);
            }
            if !connection.is_greeted {
                match greeting(rest, &limits) {
                    Greeting::Needs(needs) => return Ok(needs),
                    Greeting::Stranger(what) => return Err(cut_off(format!("it is {what}"))),
                    Greeting::Torch(length) => {
                        connection.is_greeted = true;
                        *at += length;
                        continue;
                    }
                }
            }
            let (request, length) = match wire::parse(rest, &limits) {
                Ok(Parsed::Whole(request, length)) => (request, length),
                Ok(Parsed::Needs(needs)) => return Ok(needs),
                Err(why) => return Err(cut_off(why.to_string())),
            };
            *at += length;
            if matches!(request, Request::Ping { .. }) {
                connection.pings = true;
            }
            let id = ConnectionId(token.0 as u64);
            let caller = Caller {
                connection: id,
                peer: connection.peer,
                reached: connection.reached,
                pings: connection.pings,
            };
            let (peer, side) = (connection.peer, connection.side);
            scratch.reply.clear();
            let carried_out = match side {
                Side::Rendezvous => {
                    let now = since_epoch(self.clock.now());
                    let Scratch { reply, woken, effects } = scratch;
                    let done = self.rendezvous.request(now, caller, request, reply, woken, effects);
                    done.map_err(|why| why.to_string())
                }
                Side::Workers(store) => match self.stores.get_mut(&store) {
                    Some(store) => {
                        let Scratch { reply, woken, .. } = scratch;
                        store.kv.request(id, request, reply, woken).map_err(|why| why.to_string())
                    }
                    None => Err("its run is over".to_owned()),
                },
            };
            if let Err(text) = carried_out {
                return Err(CutOff { peer, text });
            }
            if !scratch.effects.is_empty() {
                self.perform(Some(caller), scratch);
            }
            if !scratch.reply.is_empty()
                && let Some(connection) = self.connections.get_mut(&token)
            {
                let sent = counted(&mut self.unread, connection, |it| it.send(&scratch.reply));
                sent.map_err(|why| CutOff { peer, text: why.to_string() })?;
            }
            if !scratch.woken.is_empty() {
                self.wake(scratch);
            }
        }
    }

    /// Ends the waits that have ended.
    fn wake(&mut self, scratch: &mut Scratch) {
        for woken in scratch.woken.drain(..) {
            if let Some(connection) = self.connections.get_mut(&Token(woken.0 as usize)) {
                // Whatever is wrong with it, its own event will tell.
                let _ = counted(&mut self.unread, connection, |it| it.send(&[wire::STOP_WAITING]));
            }
        }
    }

    fn perform(&mut self, caller: Option<Caller>, scratch: &mut Scratch) {
        let mut effects = std::mem::take(&mut scratch.effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::OpenStore(run) => {
                    let Some(caller) = caller else { continue };
                    let port = self.open_store(&run);
                    if let Err(why) = self.rendezvous.opened(&run, port, caller, &mut scratch.woken) {
                        tracing::error!(run, error = %why, "workers cannot be told where they meet");
                    }
                }
                Effect::EmptyStore(run) => {
                    let Some(store) = self.store_of.get(&run).copied() else { continue };
                    self.close_workers(store, scratch);
                    if let Some(store) = self.stores.get_mut(&store) {
                        store.kv = KvStore::for_workers(self.settings.limits.kv, &self.stored);
                    }
                }
                Effect::CloseStore(run) => {
                    let Some(store) = self.store_of.remove(&run) else { continue };
                    self.close_workers(store, scratch);
                    if let Some(mut store) = self.stores.remove(&store) {
                        let _ = self.poll.registry().deregister(&mut store.listener);
                        tracing::debug!(run = store.run, "the store of a run's workers is closed");
                    }
                }
                Effect::Close(connections) => {
                    for connection in connections {
                        self.close(Token(connection.0 as usize), scratch);
                    }
                }
                Effect::Changed(run) => {
                    if let Some((known, has_ended)) = self.rendezvous.run(&run) {
                        self.runs.changed(&run, known, has_ended);
                    }
                }
                Effect::Forgotten(run) => self.runs.forget(&run),
            }
        }
        // For its memory.
        if scratch.effects.is_empty() {
            scratch.effects = effects;
        }
    }

    /// Opens a store for the workers of a run, and returns its port.
    fn open_store(&mut self, run: &str) -> Option<u16> {
        let store =
            (FIRST_STORE..FIRST_CONNECTION as usize).find(|store| !self.stores.contains_key(store))?;
        let ports = self.settings.worker_ports.clone().unwrap_or(0..=0);
        let ip = self.address.ip();
        let opened = ports.into_iter().find_map(|port| listen(SocketAddr::new(ip, port)).ok()).and_then(
            |mut listener| {
                let port = listener.local_addr().ok()?.port();
                let token = Token(store);
                self.poll.registry().register(&mut listener, token, Interest::READABLE).ok()?;
                Some((listener, port))
            },
        );
        let Some((listener, port)) = opened else {
            tracing::error!(
                run,
                "no port is free for the store of this run's workers: they meet in their own"
            );
            return None;
        };
        let kv = KvStore::for_workers(self.settings.limits.kv, &self.stored);
        self.stores.insert(store, WorkerStore { run: run.to_owned(), listener, kv });
        self.store_of.insert(run.to_owned(), store);
        Some(port)
    }

    fn close_workers(&mut self, store: usize, scratch: &mut Scratch) {
        let side = Side::Workers(store);
        let theirs = self.connections.iter().filter(|(_, connection)| connection.side == side);
        let tokens: Vec<Token> = theirs.map(|(token, _)| *token).collect();
        for token in tokens {
            self.close(token, scratch);
        }
    }

    fn close(&mut self, token: Token, scratch: &mut Scratch) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        self.pending -= connection.pending.len();
        self.unread -= connection.unread();
        let _ = self.poll.registry().deregister(&mut connection.stream);
        let id = ConnectionId(token.0 as u64);
        match connection.side {
            Side::Workers(store) => {
                if let Some(store) = self.stores.get_mut(&store) {
                    store.kv.forget(id);
                }
            }
            Side::Rendezvous => {
                let now = since_epoch(self.clock.now());
                let Scratch { woken, effects, .. } = scratch;
                self.rendezvous.disconnected(now, id, woken, effects);
                drop(connection);
                self.perform(None, scratch);
            }
        }
        // By its going, or by what came first in a list that could not all be carried out.
        self.wake(scratch);
    }

    /// Ends connections that have been waited for too long.
    fn look_through(&mut self, scratch: &mut Scratch) {
        self.last_look = Instant::now();
        for token in std::mem::take(&mut self.crowded) {
            self.accept(if token == RENDEZVOUS { Side::Rendezvous } else { Side::Workers(token.0) });
        }
        let limits = self.settings.limits;
        let late = |connection: &Connection| {
            let allowed = if connection.is_greeted { limits.reading } else { limits.first_bytes };
            let is_waited_for =
                !connection.is_greeted || !connection.is_flushed() || !connection.pending.is_empty();
            is_waited_for && connection.since.elapsed() > allowed
        };
        let late = self.connections.iter().filter(|(_, connection)| late(connection));
        let late: Vec<Token> = late.map(|(token, _)| *token).collect();
        for token in late {
            self.close(token, scratch);
        }
    }
}

/// Why a connection is cut off.
struct CutOff {
    peer: IpAddr,
    text: String,
}

fn since_epoch(now: Timestamp) -> Duration {
    Duration::from_micros(now.0)
}

/// Writes to a connection, and keeps count of what all of them have not read.
fn counted(
    unread: &mut usize,
    connection: &mut Connection,
    write: impl FnOnce(&mut Connection) -> io::Result<()>,
) -> io::Result<()> {
    *unread -= connection.unread();
    let written = write(connection);
    *unread += connection.unread();
    written
}
