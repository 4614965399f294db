//! What the tests over real sockets share: worlds on loopback, a bound on everything, chance that a seed replays, and a
//! relay that cuts a connection after so many bytes.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]
#![allow(clippy::print_stdout, reason = "a failed test's output says how to replay it")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use reknit_collectives::{
    AbortHandle, Group, GroupOptions, Listener, ListenerOptions, Place, Secret, SharedMemory,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

/// Longer than anything here takes on a busy machine. What is not over by then hangs.
pub(crate) const BOUND: Duration = Duration::from_secs(30);

pub(crate) const SECRET: [u8; 32] = *b"the secret of the tests' worlds!";

pub(crate) fn secret() -> Secret {
    Secret::new(SECRET)
}

pub(crate) fn soon() -> Instant {
    Instant::now() + BOUND
}

pub(crate) fn listener() -> Listener {
    listener_with(ListenerOptions::default())
}

pub(crate) fn listener_with(options: ListenerOptions) -> Listener {
    Listener::bind("127.0.0.1:0".parse().unwrap(), options).unwrap()
}

/// The ways in which ranks of one host can be joined.
pub(crate) const WAYS: [SharedMemory; 2] = [SharedMemory::Unasked, SharedMemory::Offered];

pub(crate) fn over_tcp(options: GroupOptions) -> GroupOptions {
    GroupOptions { shared_memory: SharedMemory::Unasked, ..options }
}

/// So many ranks, each with its listener, that form one group after another.
pub(crate) struct World {
    listeners: Vec<Arc<Listener>>,
    generation: u64,
    options: GroupOptions,
}

impl World {
    pub(crate) fn new(size: usize) -> World {
        World::with(size, over_tcp(GroupOptions::default()))
    }

    pub(crate) fn with(size: usize, options: GroupOptions) -> World {
        let listeners = (0..size).map(|_| Arc::new(listener())).collect();
        World { listeners, generation: 0, options }
    }

    pub(crate) fn addr(&self, rank: usize) -> SocketAddr {
        self.listeners[rank].local_addr()
    }

    /// The next generation's groups, by rank.
    pub(crate) fn form(&mut self) -> Vec<Group> {
        self.form_via(|_, next| next)
    }

    /// The next generation's groups, with options of their own.
    pub(crate) fn form_each(&mut self, change: impl Fn(usize, &mut GroupOptions)) -> Vec<Group> {
        self.form_with(|_, next| next, change)
    }

    /// The next generation's groups; `via` may put another address in place of that of a rank's next.
    pub(crate) fn form_via(&mut self, via: impl Fn(usize, SocketAddr) -> SocketAddr) -> Vec<Group> {
        self.form_with(via, |_, _| {})
    }

    fn form_with(
        &mut self,
        via: impl Fn(usize, SocketAddr) -> SocketAddr,
        change: impl Fn(usize, &mut GroupOptions),
    ) -> Vec<Group> {
        self.generation += 1;
        let generation = Generation(self.generation);
        let size = self.listeners.len();
        let forming = (0..size).map(|rank| {
            let listener = self.listeners[rank].clone();
            let mut options = self.options.clone();
            change(rank, &mut options);
            let place = Place {
                generation,
                rank: Rank(rank as u32),
                size: WorldSize(size as u32),
                secret: secret(),
                next: via(rank, self.addr((rank + 1) % size)),
            };
            move || {
                let door = listener.open_ring(&place);
                Group::form(&door, &place, &options, AbortHandle::new()).unwrap()
            }
        });
        together(forming.collect())
    }
}

/// Runs all of `works` at once, each in its thread, and fails the test if one takes longer than [`BOUND`].
pub(crate) fn together<R: Send + 'static>(works: Vec<impl FnOnce() -> R + Send + 'static>) -> Vec<R> {
    let (tell, told) = mpsc::channel();
    let threads: Vec<_> = works
        .into_iter()
        .enumerate()
        .map(|(at, work)| {
            let tell = tell.clone();
            thread::spawn(move || {
                let result = work();
                let _ = tell.send(at);
                result
            })
        })
        .collect();
    drop(tell);
    let deadline = soon();
    for _ in &threads {
        // An error that is no timeout is a thread that panicked, which joining it will say.
        let left = deadline.saturating_duration_since(Instant::now());
        let hangs = told.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout);
        assert!(!hangs, "something hangs for more than {BOUND:?}");
    }
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Runs `work` on every rank's group at once; gives back the groups and what came of it, by rank.
pub(crate) fn each<R: Send + 'static>(
    groups: Vec<Group>,
    work: impl Fn(&mut Group) -> R + Send + Sync + 'static,
) -> (Vec<Group>, Vec<R>) {
    let work = Arc::new(work);
    let works = groups.into_iter().map(|mut group| {
        let work = work.clone();
        move || {
            let result = work(&mut group);
            (group, result)
        }
    });
    together(works.collect()).into_iter().unzip()
}

/// The rank as an index.
pub(crate) fn index(group: &Group) -> usize {
    group.rank().0 as usize
}

/// A source of numbers that a seed replays.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// This run's seed: `REKNIT_SEED` if it is set, else another one every time. Printed with the way to replay it.
pub(crate) fn seed(test: &str) -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    let seed = *SEED.get_or_init(|| match std::env::var("REKNIT_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into()
        }
    });
    println!("replay with: REKNIT_SEED={seed} cargo test -p reknit-collectives {test}");
    seed
}

/// How the relay ends the connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// In good order: what was passed on still arrives.
    Close,
    /// By a reset, which may overtake what was passed on.
    Reset,
}

/// Which version of the protocol this is.
pub(crate) const VERSION: u16 = 3;

/// A hello of the right shape, byte by byte as the format says.
pub(crate) fn hello(version: u16, kind: u8, generation: u64, claim: u64) -> [u8; 40] {
    let mut bytes = [7; 40];
    bytes[..4].copy_from_slice(b"rkD1");
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes[6..8].copy_from_slice(&[kind, 0]);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&claim.to_le_bytes());
    bytes
}

/// How many bytes a dialler and a listener say in a handshake.
pub(crate) const DIALLER_BYTES: usize = 40 + 32;
pub(crate) const LISTENER_BYTES: usize = 24 + 40;

/// Passes one connection on to `target`, and cuts it when the handshake and then `bytes` more have passed towards the
/// target.
pub(crate) fn relay(target: SocketAddr, bytes: usize, cut: Cut) -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap();
    thread::spawn(move || {
        let (client, _) = socket.accept().unwrap();
        let server = TcpStream::connect(target).unwrap();
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        pass(&client, &server, DIALLER_BYTES - 32);
        pass(&server, &client, 24);
        pass(&client, &server, 32);
        pass(&server, &client, 40);
        pass(&client, &server, bytes);
        if cut == Cut::Reset {
            for stream in [&client, &server] {
                rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
            }
        } else {
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
        }
    });
    addr
}

/// Passes exactly so many bytes on, or fewer if the connection ends.
fn pass(mut from: &TcpStream, mut to: &TcpStream, bytes: usize) {
    let mut buffer = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let limit = left.min(buffer.len());
        match from.read(&mut buffer[..limit]) {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    return;
                }
                left -= count;
            }
        }
    }
}
