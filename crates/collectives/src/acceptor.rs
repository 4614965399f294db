//! The thread that accepts: one poll loop over all connections that have not proved anything yet, so that a slow one
//! delays nobody.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::doors::{Doors, Found};
use crate::handshake::{Answer, BadHello, HELLO_BYTES, Hello, RefuseReason, Verdict, starts_like_ours};
use crate::listener::ListenerOptions;
use crate::secret::{Nonce, Proof, Side, fresh_nonce};
use crate::wake::poll;

/// How long nothing is accepted after the system refused to: it is out of descriptors, and would refuse again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How many connections are accepted before those that are here get their turn again.
const ACCEPT_BURST: usize = 64;

pub(crate) struct Acceptor {
    listener: TcpListener,
    doors: Arc<Doors>,
    options: ListenerOptions,
    guests: Vec<Guest>,
    /// Set while accepting is paused.
    resume_at: Option<Instant>,
}

/// A connection that has not proved anything yet.
struct Guest {
    stream: TcpStream,
    stage: Stage,
    deadline: Instant,
}

enum Stage {
    /// It is saying what it wants.
    Greeting { hello: Inbox<HELLO_BYTES> },
    /// It waits for its generation to be opened.
    Held { hello: Hello },
    /// It was challenged.
    Proving { hello: Hello, nonce: Nonce, proof: Inbox<{ Proof::BYTES }> },
}

impl Acceptor {
    pub(crate) fn new(listener: TcpListener, doors: Arc<Doors>, options: ListenerOptions) -> Acceptor {
        Acceptor { listener, doors, options, guests: Vec::new(), resume_at: None }
    }

    pub(crate) fn run(mut self) {
        loop {
            let ready = self.wait();
            if self.doors.is_stopped() {
                return;
            }
            let now = Instant::now();
            // From the back, so that taking one out moves none that is still to come.
            for at in (0..ready.guests.len()).rev() {
                let guest = self.guests.swap_remove(at);
                self.serve(guest, ready.guests[at], now);
            }
            if ready.listener {
                self.accept(now);
            }
        }
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPT_BURST {
            match self.listener.accept() {
                Ok(_) if self.guests.len() >= self.options.unproven_max => {}
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    let stage = Stage::Greeting { hello: Inbox::new() };
                    let guest = Guest { stream, stage, deadline: now + self.options.handshake };
                    self.serve(guest, true, now);
                }
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    // It was gone before it was accepted: somebody else may be behind it.
                    ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted => {}
                    _ => {
                        self.resume_at = Some(now + ACCEPT_PAUSE);
                        return;
                    }
                },
            }
        }
    }

    /// Moves one guest on as far as it gets, and keeps it if it has farther to go.
    fn serve(&mut self, guest: Guest, readable: bool, now: Instant) {
        let Guest { stream, stage, deadline } = guest;
        let stage = match stage {
            Stage::Greeting { hello } if readable => self.greet(&stream, hello),
            // Nothing is due from who waits: it has left, or is none of ours.
            Stage::Held { .. } if readable => None,
            Stage::Held { hello } => self.place(&stream, hello, true),
            Stage::Proving { hello, nonce, proof } if readable => return self.judge(stream, hello, nonce, proof, deadline),
            waiting @ (Stage::Greeting { .. } | Stage::Proving { .. }) => Some(waiting),
        };
        let Some(stage) = stage else { return };
        self.keep(Guest { stream, stage, deadline }, now);
    }
}
