//! Who is let in, who is not, and that nobody can delay anybody: the listener, its doors and the dialler.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{BOUND, DIALLER_BYTES, SECRET, listener, listener_with, secret, soon, together};
use reknit_collectives::{
    AbortHandle, ArrivalError, BreakReason, DialError, FormError, Group, GroupOptions, ListenerOptions,
    Place, Purpose, RefuseReason, Secret, dial,
};
use reknit_membership::ids::{Generation, MemberId, Rank, WorldSize};

const RING: Purpose = Purpose::Ring { rank: Rank(3) };
const STATE: Purpose = Purpose::State { member: MemberId(0xfeed) };

/// Shorter than any limit on a handshake, longer than what is not delayed takes on a busy machine.
const PROMPT: Duration = Duration::from_secs(2);

fn dial_as(
    purpose: Purpose,
    addr: SocketAddr,
    generation: u64,
    secret: &Secret,
) -> Result<TcpStream, DialError> {
    dial(addr, purpose, Generation(generation), secret, soon(), &AbortHandle::new())
}

fn reason(result: Result<TcpStream, DialError>) -> RefuseReason {
    match result {
        Err(DialError::Refused { reason, .. }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

/// Whether the other side has closed the connection, by what a read says.
fn is_closed(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(BOUND)).unwrap();
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => matches!(error.kind(), ErrorKind::ConnectionReset),
    }
}

/// A hello of the right shape, byte by byte as the format says.
fn hello(version: u16, kind: u8, generation: u64, claim: u64) -> [u8; 40] {
    let mut bytes = [7; 40];
    bytes[..4].copy_from_slice(b"rkD1");
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes[6..8].copy_from_slice(&[kind, 0]);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&claim.to_le_bytes());
    bytes
}

#[test]
fn a_connection_that_proves_the_secret_comes_out_of_the_right_queue() {
    let listener = listener();
    let door = listener.open(Generation(7), secret());
    let mut ring = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let mut state = dial_as(STATE, listener.local_addr(), 7, &secret()).unwrap();
    let mut from_state = door.next_state(BOUND).unwrap();
    let mut from_ring = door.next_ring(soon(), &AbortHandle::new()).unwrap();
    assert_eq!((from_ring.rank, from_state.member), (Rank(3), MemberId(0xfeed)));
    for (near, far) in [(&mut ring, &mut from_ring.stream), (&mut state, &mut from_state.stream)] {
        let mut heard = [0; 2];
        near.write_all(b"to").unwrap();
        far.read_exact(&mut heard).unwrap();
        far.write_all(&heard).unwrap();
        near.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"to");
    }
}

#[test]
fn a_wrong_secret_is_refused() {
    let listener = listener();
    let door = listener.open(Generation(7), secret());
    let wrong = Secret::new([1; 32]);
    assert_eq!(reason(dial_as(RING, listener.local_addr(), 7, &wrong)), RefuseReason::BadProof, "C-8");
    assert!(door.next_state(Duration::ZERO).is_none());
    let nobody = door.next_ring(Instant::now(), &AbortHandle::new());
    assert_eq!(nobody.unwrap_err(), ArrivalError::TimedOut, "C-8");
}

#[test]
fn each_generation_has_its_own_secret_and_its_own_door() {
    let listener = listener();
    let (old, new) = (Secret::new([1; 32]), Secret::new([2; 32]));
    let _seven = listener.open(Generation(7), old.clone());
    let eight = listener.open(Generation(8), new.clone());
    assert_eq!(reason(dial_as(RING, listener.local_addr(), 8, &old)), RefuseReason::BadProof, "C-8");
    let _connection = dial_as(RING, listener.local_addr(), 8, &new).unwrap();
    assert!(eight.next_ring(soon(), &AbortHandle::new()).is_ok());
}

#[test]
fn a_generation_that_is_over_is_refused_at_once() {
    let listener = listener();
    drop(listener.open(Generation(7), secret()));
    for generation in [6, 7] {
        let result = dial_as(RING, listener.local_addr(), generation, &secret());
        assert_eq!(reason(result), RefuseReason::GenerationOver);
    }
}

#[test]
fn opening_a_generation_again_replaces_the_first_door() {
    let listener = listener();
    let first = listener.open(Generation(7), Secret::new([1; 32]));
    let second = listener.open(Generation(7), secret());
    assert!(first.is_closed() && !second.is_closed());
    drop(first);
    let _connection = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    assert!(second.next_ring(soon(), &AbortHandle::new()).is_ok());
}

/// Says `hello` and hears the first answer: its sign and why it is refused, or zero.
fn ask(addr: SocketAddr, hello: &[u8]) -> ([u8; 4], u8) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.write_all(hello).unwrap();
    hear_answer(&mut stream)
}

fn hear_answer(stream: &mut TcpStream) -> ([u8; 4], u8) {
    let mut answer = [0; 24];
    stream.set_read_timeout(Some(BOUND)).unwrap();
    stream.read_exact(&mut answer).unwrap();
    (*answer.first_chunk().unwrap(), answer[6])
}

#[test]
fn who_dials_before_the_door_opens_is_let_in_when_it_does() {
    let listener = listener();
    let addr = listener.local_addr();
    let early = thread::spawn(move || dial_as(RING, addr, 7, &secret()));
    let mut held = TcpStream::connect(addr).unwrap();
    held.write_all(&hello(1, 1, 7, 5)).unwrap();
    // The listener reads what came first first: when this has its answer, the one before has been read and is held.
    assert_eq!(ask(addr, &hello(2, 1, 7, 3)), (*b"rkA1", 1), "wrong version");
    let opened = Instant::now();
    let door = listener.open(Generation(7), secret());
    assert_eq!(hear_answer(&mut held), (*b"rkA1", 0), "challenged");
    assert_eq!(door.next_ring(soon(), &AbortHandle::new()).unwrap().rank, Rank(3));
    assert!(opened.elapsed() < PROMPT);
    assert!(early.join().unwrap().is_ok());
}

#[test]
fn who_comes_too_early_when_many_have_is_asked_to_come_back_at_once() {
    let listener =
        listener_with(ListenerOptions { held_max: 1, hold: BOUND * 2, ..ListenerOptions::default() });
    let mut held = TcpStream::connect(listener.local_addr()).unwrap();
    held.write_all(&hello(1, 1, 7, 3)).unwrap();
    assert_eq!(ask(listener.local_addr(), &hello(1, 1, 7, 3)), (*b"rkA1", 2), "C-9: unknown generation");
    let _door = listener.open(Generation(7), secret());
    assert_eq!(hear_answer(&mut held), (*b"rkA1", 0), "challenged");
}

#[test]
fn who_dials_a_generation_that_never_opens_is_told_so() {
    let hold = Duration::from_millis(50);
    let listener = listener_with(ListenerOptions { hold, ..ListenerOptions::default() });
    let deadline = Instant::now() + Duration::from_millis(200);
    let addr = listener.local_addr();
    let result = dial(addr, RING, Generation(7), &secret(), deadline, &AbortHandle::new());
    assert_eq!(reason(result), RefuseReason::UnknownGeneration);
    assert!(Instant::now() >= deadline, "it is worth trying again until the deadline");
}

#[test]
fn a_door_that_opens_after_the_hold_is_reached_by_dialling_again() {
    let listener =
        listener_with(ListenerOptions { hold: Duration::from_millis(1), ..ListenerOptions::default() });
    let addr = listener.local_addr();
    let early = thread::spawn(move || dial_as(RING, addr, 7, &secret()));
    // Held for as long and refused, as the dialler is by about now: so the door opens while it pauses, or it is open.
    assert_eq!(ask(addr, &hello(1, 1, 7, 5)), (*b"rkA1", 2), "unknown generation");
    let door = listener.open(Generation(7), secret());
    assert!(door.next_ring(soon(), &AbortHandle::new()).is_ok());
    assert!(early.join().unwrap().is_ok());
}

#[test]
fn another_version_is_told_so_and_garbage_is_told_nothing() {
    let listener = listener();
    let _door = listener.open(Generation(7), secret());
    let mut other = TcpStream::connect(listener.local_addr()).unwrap();
    other.write_all(&hello(2, 1, 7, 3)).unwrap();
    assert_eq!(hear_answer(&mut other), (*b"rkA1", 1), "wrong version");
    assert!(is_closed(&other));

    let garbage: [&[u8]; 4] =
        [b"GET / HTTP/1.1\r\n", &[0xff; 4096], &hello(1, 9, 7, 3), &hello(1, 1, 7, 1 << 40)];
    for garbage in garbage {
        let mut stream = TcpStream::connect(listener.local_addr()).unwrap();
        stream.write_all(garbage).unwrap();
        assert!(is_closed(&stream), "{garbage:?}");
    }
}

#[test]
fn a_proof_that_was_overheard_is_worth_nothing() {
    let listener = listener();
    let door = listener.open(Generation(7), secret());
    // Between the two: passes everything on and remembers it.
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let (between, target) = (socket.local_addr().unwrap(), listener.local_addr());
    let eavesdropper = thread::spawn(move || {
        let (mut client, _) = socket.accept().unwrap();
        let mut server = TcpStream::connect(target).unwrap();
        let mut heard = (Vec::new(), Vec::new());
        for (bytes, back) in [(40, 24), (32, 40)] {
            let mut message = vec![0; bytes];
            client.read_exact(&mut message).unwrap();
            server.write_all(&message).unwrap();
            heard.0.extend(message);
            let mut message = vec![0; back];
            server.read_exact(&mut message).unwrap();
            client.write_all(&message).unwrap();
            heard.1.extend(message);
        }
        heard
    });
    let _connection = dial_as(RING, between, 7, &secret()).unwrap();
    assert!(door.next_ring(soon(), &AbortHandle::new()).is_ok());
    let (said, answered) = eavesdropper.join().unwrap();
    assert_eq!(said.len(), DIALLER_BYTES);
    for overheard in [&said, &answered] {
        assert!(!overheard.windows(8).any(|bytes| SECRET.windows(8).any(|part| part == bytes)), "C-8");
    }

    let mut replay = TcpStream::connect(target).unwrap();
    replay.write_all(&said[..40]).unwrap();
    let mut challenge = [0; 24];
    replay.read_exact(&mut challenge).unwrap();
    assert_ne!(challenge[..], answered[..24], "the challenge is a new one");
    replay.write_all(&said[40..]).unwrap();
    let mut verdict = [0; 40];
    replay.read_exact(&mut verdict).unwrap();
    assert_eq!(verdict[0], 4, "C-8: bad proof");
}

#[test]
fn a_listener_that_does_not_know_the_secret_is_an_impostor() {
    for accepted in [true, false] {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = socket.local_addr().unwrap();
        let impostor = thread::spawn(move || {
            let (mut client, _) = socket.accept().unwrap();
            client.read_exact(&mut [0; 40]).unwrap();
            if !accepted {
                client.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
                return;
            }
            let mut challenge = [0; 24];
            challenge[..6].copy_from_slice(b"rkA1\x01\0");
            client.write_all(&challenge).unwrap();
            client.read_exact(&mut [0; 32]).unwrap();
            client.write_all(&[0; 40]).unwrap();
        });
        let result = dial_as(RING, addr, 7, &secret());
        assert!(matches!(result, Err(DialError::Impostor { .. })), "C-8: {result:?}");
        impostor.join().unwrap();
    }
}

#[test]
fn nobody_listening_is_an_error_at_once() {
    let addr = listener().local_addr();
    let start = Instant::now();
    let result = dial_as(RING, addr, 7, &secret());
    assert!(matches!(result, Err(DialError::Unreachable { .. })), "{result:?}");
    assert!(start.elapsed() < PROMPT);
}

#[test]
fn a_listener_that_says_nothing_is_given_up_at_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let addr = silent.local_addr().unwrap();
    let result = dial(addr, RING, Generation(7), &secret(), deadline, &AbortHandle::new());
    assert!(matches!(result, Err(DialError::TimedOut { .. })), "C-1: {result:?}");
}

#[test]
fn who_says_nothing_or_half_is_closed_in_time_and_delays_nobody() {
    let handshake = Duration::from_millis(300);
    let listener = listener_with(ListenerOptions { handshake, ..ListenerOptions::default() });
    let _door = listener.open(Generation(7), secret());
    let addr = listener.local_addr();
    let start = Instant::now();
    let idle: Vec<_> = (0..50)
        .map(|at| {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(&hello(1, 1, 7, 3)[..at % 40]).unwrap();
            stream
        })
        .collect();
    // One that was challenged and does not answer.
    let mut mute = TcpStream::connect(addr).unwrap();
    mute.write_all(&hello(1, 1, 7, 3)).unwrap();
    mute.read_exact(&mut [0; 24]).unwrap();
    let between = Instant::now();
    assert!(dial_as(STATE, addr, 7, &secret()).is_ok());
    assert!(between.elapsed() < handshake, "C-9: it waited for others");
    assert!(idle.iter().chain([&mute]).all(is_closed), "C-9");
    assert!(start.elapsed() >= handshake);
}

#[test]
fn more_strangers_than_allowed_are_closed_at_once_and_members_get_in_after_them() {
    let options = ListenerOptions {
        unproven_max: 4,
        handshake: Duration::from_millis(300),
        ..ListenerOptions::default()
    };
    let listener = listener_with(options);
    let _door = listener.open(Generation(7), secret());
    let addr = listener.local_addr();
    let start = Instant::now();
    let strangers: Vec<_> = (0..4).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let fifth = TcpStream::connect(addr).unwrap();
    assert!(is_closed(&fifth), "C-9");
    assert!(start.elapsed() < Duration::from_millis(300), "C-9: it was closed at once");
    assert!(dial_as(STATE, addr, 7, &secret()).is_ok(), "it dials again until there is room");
    assert!(strangers.iter().all(is_closed));
}

#[test]
fn a_full_queue_asks_to_come_back_and_does_so_for_each_kind_by_itself() {
    let listener = listener_with(ListenerOptions { waiting_max: 2, ..ListenerOptions::default() });
    let door = listener.open(Generation(7), secret());
    let addr = listener.local_addr();
    let _waiting: Vec<_> = (0..2).map(|_| dial_as(STATE, addr, 7, &secret()).unwrap()).collect();
    let deadline = Instant::now() + Duration::from_millis(20);
    let result = dial(addr, STATE, Generation(7), &secret(), deadline, &AbortHandle::new());
    assert_eq!(reason(result), RefuseReason::Busy, "C-9");
    assert!(dial_as(RING, addr, 7, &secret()).is_ok());
    let third = thread::spawn(move || dial_as(STATE, addr, 7, &secret()));
    assert!(door.next_state(BOUND).is_some());
    assert!(third.join().unwrap().is_ok());
}

#[test]
fn a_rank_that_dials_again_replaces_its_first_connection() {
    let listener = listener();
    let door = listener.open(Generation(7), secret());
    let first = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let mut second = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    assert!(is_closed(&first));
    second.write_all(b"2").unwrap();
    let mut heard = [0; 1];
    door.next_ring(soon(), &AbortHandle::new()).unwrap().stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"2");
}

#[test]
fn closing_a_door_wakes_who_waits_in_it_and_drops_who_queues() {
    let listener = listener();
    let door = Arc::new(listener.open(Generation(7), secret()));
    let queued = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let (waiting, ready) = mpsc::channel();
    let (inside, start) = (door.clone(), Instant::now());
    let server = thread::spawn(move || {
        waiting.send(()).unwrap();
        inside.next_state(BOUND).is_none()
    });
    ready.recv().unwrap();
    door.close();
    assert!(server.join().unwrap());
    assert!(start.elapsed() < PROMPT);
    assert!(door.is_closed() && is_closed(&queued));
    assert_eq!(door.next_ring(soon(), &AbortHandle::new()).unwrap_err(), ArrivalError::Closed);
}

#[test]
fn a_listener_that_is_dropped_closes_its_doors() {
    let listener = listener();
    let door = listener.open(Generation(7), secret());
    drop(listener);
    assert!(door.is_closed());
    assert!(door.next_state(BOUND).is_none());
}

#[test]
fn an_abort_wakes_who_dials_and_who_waits_at_a_door() {
    let abort = AbortHandle::new();
    let listener = Arc::new(listener());
    let door = listener.open(Generation(7), secret());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = silent.local_addr().unwrap();
    let unopened = listener.local_addr();
    let dial_with = |addr: SocketAddr, abort: AbortHandle| {
        move || {
            matches!(
                dial(addr, RING, Generation(8), &secret(), soon(), &abort),
                Err(DialError::Aborted { .. })
            )
        }
    };
    let waits = abort.clone();
    let works: Vec<Box<dyn FnOnce() -> bool + Send>> = vec![
        Box::new(dial_with(nobody, abort.clone())),
        Box::new(dial_with(unopened, abort.clone())),
        Box::new(move || {
            let result = door.next_ring(soon(), &waits);
            result.unwrap_err() == ArrivalError::Aborted { reason: BreakReason::Aborted }
        }),
        Box::new(move || {
            // Not to hit all of them asleep, which would take a sleep, but now and then some.
            thread::yield_now();
            abort.abort(BreakReason::Aborted);
            true
        }),
    ];
    let start = Instant::now();
    assert_eq!(together(works), [true; 4]);
    assert!(start.elapsed() < PROMPT, "C-1");
}

fn place(rank: u32, size: u32, next: SocketAddr) -> Place {
    Place { generation: Generation(7), rank: Rank(rank), size: WorldSize(size), secret: secret(), next }
}

#[test]
fn forming_says_which_neighbour_is_missing() {
    let options = GroupOptions { form: Duration::from_millis(100), ..GroupOptions::default() };
    let (listener, next) = (listener(), listener());
    let door = listener.open(Generation(7), secret());
    let _next_door = next.open(Generation(7), secret());
    let error =
        Group::form(&door, &place(1, 3, next.local_addr()), &options, AbortHandle::new()).err().unwrap();
    assert!(
        matches!(error, FormError::Previous { rank: Rank(0), source: ArrivalError::TimedOut }),
        "{error:?}"
    );
    assert_eq!(error.suspect(), Some(Rank(0)));

    let gone = common::listener().local_addr();
    let error = Group::form(&door, &place(1, 3, gone), &options, AbortHandle::new()).err().unwrap();
    assert!(matches!(error, FormError::Next { rank: Rank(2), .. }), "{error:?}");
    assert_eq!(error.suspect(), Some(Rank(2)));
}

#[test]
fn forming_takes_no_connection_from_another_rank_than_the_previous() {
    let listener = listener();
    let next = common::listener();
    let door = listener.open(Generation(7), secret());
    let _next_door = next.open(Generation(7), secret());
    let addr = listener.local_addr();
    let stray = dial_as(RING, addr, 7, &secret()).unwrap();
    let right = dial_as(Purpose::Ring { rank: Rank(0) }, addr, 7, &secret()).unwrap();
    let place = place(1, 4, next.local_addr());
    let group = Group::form(&door, &place, &GroupOptions::default(), AbortHandle::new()).unwrap();
    assert!(is_closed(&stray));
    right.set_nonblocking(true).unwrap();
    assert_eq!(
        (&right).read(&mut [0; 1]).unwrap_err().kind(),
        ErrorKind::WouldBlock,
        "the right one is in use"
    );
    drop(group);
}

#[test]
fn a_place_that_does_not_exist_or_is_of_another_generation_is_refused() {
    let listener = listener();
    let (door, other) = (listener.open(Generation(7), secret()), listener.open(Generation(8), secret()));
    let form = |door, rank, size| {
        let place = place(rank, size, listener.local_addr());
        Group::form(door, &place, &GroupOptions::default(), AbortHandle::new()).err().unwrap()
    };
    assert!(matches!(form(&door, 3, 3), FormError::BadPlace { .. }));
    assert!(matches!(form(&door, 0, 0), FormError::BadPlace { .. }));
    assert!(matches!(form(&other, 0, 2), FormError::WrongDoor { .. }));
}
