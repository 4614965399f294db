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
use crate::patience::after;
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
                Ok((stream, _)) if self.has_room() && stream.set_nonblocking(true).is_ok() => {
                    let stage = Stage::Greeting { hello: Inbox::new() };
                    let guest = Guest { stream, stage, deadline: after(now, self.options.handshake) };
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

    /// Whether one more guest may come. Who has not said what it wants makes room for who comes, the first to come first:
    /// members say it at once, so strangers cannot keep them out by being many and silent.
    fn has_room(&mut self) -> bool {
        if self.guests.len() < self.options.unproven_max {
            return true;
        }
        let silent = self.guests.iter().enumerate();
        let silent = silent.filter(|(_, guest)| matches!(guest.stage, Stage::Greeting { .. }));
        match silent.min_by_key(|(_, guest)| guest.deadline).map(|(at, _)| at) {
            Some(oldest) => {
                drop(self.guests.swap_remove(oldest));
                true
            }
            None => false,
        }
    }

    /// Moves one guest on as far as it gets now.
    fn serve(&mut self, guest: Guest, readable: bool, now: Instant) {
        let Guest { stream, stage, deadline } = guest;
        let expired = now >= deadline;
        match stage {
            Stage::Held { .. } if expired => refuse(&stream, RefuseReason::UnknownGeneration),
            Stage::Greeting { .. } | Stage::Proving { .. } if expired => {}
            Stage::Greeting { hello } if readable => match hello.read(&stream) {
                Mail::Whole(hello) => self.greet(stream, &hello, deadline, now),
                Mail::Partial(hello) if starts_like_ours(hello.so_far()) => {
                    self.keep(stream, Stage::Greeting { hello }, deadline);
                }
                Mail::Partial(_) | Mail::Gone => {}
            },
            // Nothing is due from who waits: it has left, or is none of ours.
            Stage::Held { .. } if readable => {}
            Stage::Held { hello } => {
                let prove_by = after(now, self.options.handshake);
                self.place(stream, hello, prove_by, Some(deadline), now);
            }
            Stage::Proving { hello, nonce, proof } if readable => match proof.read(&stream) {
                Mail::Whole(proof) => self.judge(stream, hello, &nonce, proof),
                Mail::Partial(proof) => self.keep(stream, Stage::Proving { hello, nonce, proof }, deadline),
                Mail::Gone => {}
            },
            stage @ (Stage::Greeting { .. } | Stage::Proving { .. }) => self.keep(stream, stage, deadline),
        }
    }

    fn greet(&mut self, stream: TcpStream, hello: &[u8; HELLO_BYTES], prove_by: Instant, now: Instant) {
        match Hello::from_bytes(hello) {
            Ok(hello) => self.place(stream, hello, prove_by, None, now),
            Err(BadHello::WrongVersion) => refuse(&stream, RefuseReason::WrongVersion),
            Err(BadHello::Foreign) => {}
        }
    }

    /// Challenges a guest whose generation is open and holds one whose generation is still to come; `held_until` is
    /// set if it is held already.
    fn place(
        &mut self,
        stream: TcpStream,
        hello: Hello,
        prove_by: Instant,
        held_until: Option<Instant>,
        now: Instant,
    ) {
        match (self.doors.find(hello.generation), held_until) {
            (Found::Open(_), _) => match fresh_nonce() {
                Ok(nonce) => {
                    if say(&stream, &Answer::Challenge(nonce).to_bytes()) {
                        let stage = Stage::Proving { hello, nonce, proof: Inbox::new() };
                        self.keep(stream, stage, prove_by);
                    }
                }
                Err(_) => refuse(&stream, RefuseReason::Busy),
            },
            (Found::NotYet, Some(deadline)) => self.keep(stream, Stage::Held { hello }, deadline),
            (Found::NotYet, None) => {
                let held =
                    self.guests.iter().filter(|guest| matches!(guest.stage, Stage::Held { .. })).count();
                if held < self.options.held_max {
                    self.keep(stream, Stage::Held { hello }, after(now, self.options.hold));
                } else {
                    refuse(&stream, RefuseReason::UnknownGeneration);
                }
            }
            (Found::Over, _) => refuse(&stream, RefuseReason::GenerationOver),
        }
    }

    fn judge(&mut self, stream: TcpStream, hello: Hello, nonce: &Nonce, proof: [u8; Proof::BYTES]) {
        // Looked up again: the door may have been closed or replaced since the challenge.
        let room = match self.doors.find(hello.generation) {
            Found::Open(room) => room,
            Found::NotYet | Found::Over => return convict(&stream, RefuseReason::GenerationOver),
        };
        let said = hello.to_bytes();
        if Proof::from_bytes(proof) != room.secret.proof(Side::Dialler, &said, nonce) {
            return convict(&stream, RefuseReason::BadProof);
        }
        if let Err(reason) = room.admits(hello.purpose) {
            return convict(&stream, reason);
        }
        let own = room.secret.proof(Side::Listener, &said, nonce);
        let ready = stream.set_nodelay(true).is_ok();
        if ready && say(&stream, &Verdict::Accepted(own).to_bytes()) && stream.set_nonblocking(false).is_ok()
        {
            room.let_in(hello.purpose, stream);
        }
    }

    fn keep(&mut self, stream: TcpStream, stage: Stage, deadline: Instant) {
        self.guests.push(Guest { stream, stage, deadline });
    }

    /// Waits until there is something to do, and says for whom: the guests' flags are in the guests' order.
    fn wait(&mut self) -> Ready {
        let now = Instant::now();
        self.resume_at = self.resume_at.filter(|resume_at| now < *resume_at);
        let until = self.guests.iter().map(|guest| guest.deadline).chain(self.resume_at).min();
        let accepting = self.resume_at.is_none();
        let accept = if accepting { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(&self.doors.changed, PollFlags::IN), PollFd::new(&self.listener, accept)];
        fds.extend(self.guests.iter().map(|guest| PollFd::new(&guest.stream, PollFlags::IN)));
        let polled = poll(&mut fds, until.map(|until| until.saturating_duration_since(now)));
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let changed = ready.next().unwrap_or(false);
        let listener = ready.next().unwrap_or(false) && accepting;
        let guests = ready.collect();
        if changed {
            self.doors.changed.clear();
        }
        if polled.is_err() {
            // The system has no memory for a poll over so many. The guests can come back; a listener that spins or
            // ends cannot be got back at all.
            self.guests.clear();
            std::thread::park_timeout(ACCEPT_PAUSE);
            return Ready { listener: false, guests: Vec::new() };
        }
        Ready { listener, guests }
    }
}

struct Ready {
    listener: bool,
    guests: Vec<bool>,
}

/// A message of a fixed size that is coming in.
struct Inbox<const BYTES: usize> {
    bytes: [u8; BYTES],
    filled: usize,
}

/// What reading on made of a message.
enum Mail<const BYTES: usize> {
    Whole([u8; BYTES]),
    Partial(Inbox<BYTES>),
    /// The connection ended or failed.
    Gone,
}

impl<const BYTES: usize> Inbox<BYTES> {
    fn new() -> Inbox<BYTES> {
        Inbox { bytes: [0; BYTES], filled: 0 }
    }

    fn so_far(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    fn read(mut self, mut stream: &TcpStream) -> Mail<BYTES> {
        match stream.read(&mut self.bytes[self.filled..]) {
            Ok(0) => Mail::Gone,
            Ok(more) if self.filled + more == BYTES => Mail::Whole(self.bytes),
            Ok(more) => Mail::Partial(Inbox { filled: self.filled + more, ..self }),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Mail::Partial(self)
            }
            Err(_) => Mail::Gone,
        }
    }
}

/// Turns a guest away before it was challenged.
fn refuse(stream: &TcpStream, reason: RefuseReason) {
    say(stream, &Answer::Refused(reason).to_bytes());
}

/// Turns a guest away after it answered.
fn convict(stream: &TcpStream, reason: RefuseReason) {
    say(stream, &Verdict::Refused(reason).to_bytes());
}

/// Whether the whole message went out. These few bytes always fit a connection on which nothing was said before.
fn say(mut stream: &TcpStream, message: &[u8]) -> bool {
    stream.write(message).is_ok_and(|written| written == message.len())
}
