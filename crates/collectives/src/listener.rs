//! The one TCP listener of a process, for the data-plane connections of all generations.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use reknit_membership::ids::Generation;

use crate::acceptor::Acceptor;
use crate::door::Door;
use crate::doors::Doors;
use crate::form::Place;
use crate::lock;
use crate::secret::Secret;

/// The limits on what strangers can make a [`Listener`] do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerOptions {
    /// How long a connection may take to say and prove what it is.
    pub handshake: Duration,
    /// How long a connection of a generation that is not open yet is held.
    pub hold: Duration,
    /// How many such connections are held at once; more are asked to come back.
    pub held_max: usize,
    /// How many connections may be unproven at once, the held ones among them; for one more, the one is closed that has
    /// been silent for longest.
    pub unproven_max: usize,
    /// How many proven connections of each kind may wait in a door at once; more are asked to come back.
    pub waiting_max: usize,
}

impl Default for ListenerOptions {
    fn default() -> ListenerOptions {
        ListenerOptions {
            handshake: Duration::from_secs(5),
            hold: Duration::from_secs(5),
            held_max: 64,
            unproven_max: 256,
            waiting_max: 64,
        }
    }
}

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}")]
    Bind {
        /// Which address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The process is out of descriptors or threads.
    #[error("cannot start to accept connections")]
    System {
        /// What was refused.
        source: io::Error,
    },
}

/// Accepts the data-plane connections of a process: one address and one thread, over all generations.
///
/// A connection gets in only through the [`Door`] of a generation whose secret it proves. Dropping the listener closes
/// all its doors.
#[derive(Debug)]
pub struct Listener {
    addr: SocketAddr,
    doors: Arc<Doors>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Listener {
    /// Listens on `addr`; port 0 stands for any free port.
    pub fn bind(addr: SocketAddr, options: ListenerOptions) -> Result<Listener, ListenError> {
        let bind = |source| ListenError::Bind { addr, source };
        let system = |source| ListenError::System { source };
        let socket = TcpListener::bind(addr).map_err(bind)?;
        let local = socket.local_addr().map_err(bind)?;
        socket.set_nonblocking(true).map_err(bind)?;
        let doors = Arc::new(Doors::new(options.waiting_max).map_err(system)?);
        let acceptor = Acceptor::new(socket, doors.clone(), options);
        let thread = std::thread::Builder::new()
            .name("reknit-accept".to_owned())
            .spawn(move || acceptor.run())
            .map_err(system)?;
        Ok(Listener { addr: local, doors, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens, with the port it was given.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on members that want state and prove the `secret` of `generation` are let in, those that came before
    /// included.
    ///
    /// Opening a generation again replaces, and closes, its first door. Eight generations may be open at once: the
    /// ninth closes the oldest.
    pub fn open(&self, generation: Generation, secret: Secret) -> Door {
        Door::new(self.doors.open(generation, secret, None), self.doors.clone())
    }

    /// As [`Listener::open`], and the previous rank of `place` is let in as well.
    pub fn open_ring(&self, place: &Place) -> Door {
        let Place { generation, ref secret, rank, size, .. } = *place;
        Door::new(self.doors.open(generation, secret.clone(), Some((rank, size))), self.doors.clone())
    }

    /// Closes all doors before it is dropped, and frees the port.
    pub fn close(&self) {
        self.doors.stop();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // It can only have panicked, and has said so on its own.
            let _ = thread.join();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}
