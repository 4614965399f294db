//! Who is let in, who is not, and that nobody can delay anybody: the listener, its doors and the dialler.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{BOUND, DIALLER_BYTES, SECRET, VERSION, hello, listener, listener_with, secret, soon, together};
use reknit_collectives::{
    AbortHandle, ArrivalError, BreakReason, ControlWord, DialError, Door, FormError, Group, GroupOptions,
    Listener, ListenerOptions, Place, Purpose, RefuseReason, Secret, dial,
};
use reknit_membership::ids::{Generation, MemberId, Rank, WorldSize};

/// From rank 3 to rank 4, the one that [`open`] opens a door for.
const RING: Purpose = Purpose::Ring { from: Rank(3), to: Rank(4) };
const STATE: Purpose = Purpose::State { member: MemberId(0xfeed) };

/// Shorter than any limit on a handshake, longer than what is not delayed takes on a busy machine.
const PROMPT: Duration = Duration::from_secs(2);

/// A door for rank 4 of a world of 5.
fn open(listener: &Listener, generation: u64, secret: Secret) -> Door {
    let next = listener.local_addr();
    let (rank, size) = (Rank(4), WorldSize(5));
    listener.open_ring(&Place { generation: Generation(generation), rank, size, secret, next })
}

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

#[test]
fn a_connection_that_proves_the_secret_comes_out_of_the_right_queue() {
    let listener = listener();
    let door = open(&listener, 7, secret());
    let mut ring = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let mut state = dial_as(STATE, listener.local_addr(), 7, &secret()).unwrap();
    let mut from_state = door.next_state(BOUND).unwrap();
    let mut from_ring = door.take_previous(soon(), &AbortHandle::new()).unwrap();
    assert_eq!(from_state.member, MemberId(0xfeed));
    for (near, far) in [(&mut ring, &mut from_ring), (&mut state, &mut from_state.stream)] {
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
    let door = open(&listener, 7, secret());
    let wrong = Secret::new([1; 32]);
    assert_eq!(reason(dial_as(RING, listener.local_addr(), 7, &wrong)), RefuseReason::BadProof, "C-8");
    assert!(door.next_state(Duration::ZERO).is_none());
    let nobody = door.take_previous(Instant::now(), &AbortHandle::new());
    assert_eq!(nobody.unwrap_err(), ArrivalError::TimedOut, "C-8");
}

#[test]
fn each_generation_has_its_own_secret_and_its_own_door() {
    let listener = listener();
    let (old, new) = (Secret::new([1; 32]), Secret::new([2; 32]));
    let _seven = open(&listener, 7, old.clone());
    let eight = open(&listener, 8, new.clone());
    assert_eq!(reason(dial_as(RING, listener.local_addr(), 8, &old)), RefuseReason::BadProof, "C-8");
    let _connection = dial_as(RING, listener.local_addr(), 8, &new).unwrap();
    assert!(eight.take_previous(soon(), &AbortHandle::new()).is_ok());
}

#[test]
fn a_generation_that_is_over_is_refused_at_once() {
    let listener = listener();
    drop(open(&listener, 7, secret()));
    for generation in [6, 7] {
        let result = dial_as(RING, listener.local_addr(), generation, &secret());
        assert_eq!(reason(result), RefuseReason::GenerationOver);
    }
}

#[test]
fn opening_a_generation_again_replaces_the_first_door() {
    let listener = listener();
    let first = listener.open(Generation(7), Secret::new([1; 32]));
    let second = open(&listener, 7, secret());
    assert!(first.is_closed() && !second.is_closed());
    drop(first);
    let _connection = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    assert!(second.take_previous(soon(), &AbortHandle::new()).is_ok());
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
    held.write_all(&hello(VERSION, 1, 7, 5)).unwrap();
    // The listener reads what came first first: when this has its answer, the one before has been read and is held.
    assert_eq!(ask(addr, &hello(VERSION + 1, 1, 7, 3)), (*b"rkA1", 1), "wrong version");
    let opened = Instant::now();
    let door = open(&listener, 7, secret());
    assert_eq!(hear_answer(&mut held), (*b"rkA1", 0), "challenged");
    assert!(door.take_previous(soon(), &AbortHandle::new()).is_ok());
    assert!(opened.elapsed() < PROMPT);
    assert!(early.join().unwrap().is_ok());
}

#[test]
fn who_comes_too_early_when_many_have_is_asked_to_come_back_at_once() {
    let listener =
        listener_with(ListenerOptions { held_max: 1, hold: BOUND * 2, ..ListenerOptions::default() });
    let mut held = TcpStream::connect(listener.local_addr()).unwrap();
    held.write_all(&hello(VERSION, 1, 7, 3)).unwrap();
    assert_eq!(
        ask(listener.local_addr(), &hello(VERSION, 1, 7, 3)),
        (*b"rkA1", 2),
        "C-9: unknown generation"
    );
    let _door = open(&listener, 7, secret());
    assert_eq!(hear_answer(&mut held), (*b"rkA1", 0), "challenged");
}

#[test]
fn who_dials_a_generation_that_never_opens_is_told_so() {
    let hold = Duration::from_millis(50);
    let listener = listener_with(ListenerOptions { hold, ..ListenerOptions::default() });
    let deadline = Instant::now() + Duration::from_secs(1);
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
    assert_eq!(ask(addr, &hello(VERSION, 1, 7, 5)), (*b"rkA1", 2), "unknown generation");
    let door = open(&listener, 7, secret());
    assert!(door.take_previous(soon(), &AbortHandle::new()).is_ok());
    assert!(early.join().unwrap().is_ok());
}

#[test]
fn another_version_is_told_so_and_garbage_is_told_nothing() {
    let listener = listener();
    let _door = open(&listener, 7, secret());
    let mut other = TcpStream::connect(listener.local_addr()).unwrap();
    other.write_all(&hello(VERSION + 1, 1, 7, 3)).unwrap();
    assert_eq!(hear_answer(&mut other), (*b"rkA1", 1), "wrong version");
    assert!(is_closed(&other));

    let garbage: [&[u8]; 3] = [b"GET / HTTP/1.1\r\n", &[0xff; 4096], &hello(VERSION, 9, 7, 3)];
    for garbage in garbage {
        let mut stream = TcpStream::connect(listener.local_addr()).unwrap();
        stream.write_all(garbage).unwrap();
        assert!(is_closed(&stream), "{garbage:?}");
    }
}

#[test]
fn a_proof_that_was_overheard_is_worth_nothing() {
    let listener = listener();
    let door = open(&listener, 7, secret());
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
    assert!(door.take_previous(soon(), &AbortHandle::new()).is_ok());
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
            challenge[..4].copy_from_slice(b"rkA1");
            challenge[4..6].copy_from_slice(&VERSION.to_le_bytes());
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
    let handshake = Duration::from_secs(1);
    let listener = listener_with(ListenerOptions { handshake, ..ListenerOptions::default() });
    let _door = open(&listener, 7, secret());
    let addr = listener.local_addr();
    let start = Instant::now();
    let idle: Vec<_> = (0..50)
        .map(|at| {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.write_all(&hello(VERSION, 1, 7, 3)[..at % 40]).unwrap();
            stream
        })
        .collect();
    // One that was challenged and does not answer.
    let mut mute = TcpStream::connect(addr).unwrap();
    mute.write_all(&hello(VERSION, 1, 7, 3)).unwrap();
    mute.read_exact(&mut [0; 24]).unwrap();
    let between = Instant::now();
    assert!(dial_as(STATE, addr, 7, &secret()).is_ok());
    assert!(between.elapsed() < handshake, "C-9: it waited for others");
    assert!(idle.iter().chain([&mute]).all(is_closed), "C-9");
    assert!(start.elapsed() >= handshake);
}

#[test]
fn members_get_in_at_once_however_many_silent_strangers_there_are() {
    let options = ListenerOptions {
        unproven_max: 4,
        // None of them goes by itself.
        handshake: 4 * BOUND,
        ..ListenerOptions::default()
    };
    let listener = listener_with(options);
    let _door = open(&listener, 7, secret());
    let addr = listener.local_addr();
    let mut strangers: Vec<_> = (0..4).map(|_| TcpStream::connect(addr).unwrap()).collect();
    // Half a hello is as good as none.
    strangers[1].write_all(&hello(VERSION, 2, 7, 3)[..20]).unwrap();
    let start = Instant::now();
    let _members = [(); 2].map(|()| dial_as(STATE, addr, 7, &secret()).unwrap());
    assert!(start.elapsed() < PROMPT, "C-9");
    let is_up = |mut stranger: &TcpStream| {
        stranger.set_nonblocking(true).unwrap();
        let is_up = stranger.read(&mut [0]).is_err_and(|why| why.kind() == ErrorKind::WouldBlock);
        stranger.set_nonblocking(false).unwrap();
        is_up
    };
    strangers.retain(is_up);
    assert_eq!(strangers.len(), 3, "C-9: one made room, for one member after the other");
    // The others are still listened to.
    let last = strangers.last_mut().unwrap();
    last.write_all(&hello(VERSION, 2, 7, 3)).unwrap();
    assert_eq!(hear_answer(last), (*b"rkA1", 0));
}

#[test]
fn a_flood_of_strangers_keeps_no_member_out() {
    let options = ListenerOptions { unproven_max: 16, ..ListenerOptions::default() };
    let listener = listener_with(options);
    let door = open(&listener, 7, secret());
    let addr = listener.local_addr();
    let over = Arc::new(AtomicBool::new(false));
    let flood = {
        let over = over.clone();
        thread::spawn(move || {
            let mut strangers = std::collections::VecDeque::new();
            while !over.load(Ordering::Relaxed) {
                strangers.extend(TcpStream::connect(addr).ok());
                if strangers.len() > 100 {
                    strangers.pop_front();
                }
            }
        })
    };
    for _ in 0..50 {
        let near = dial_as(STATE, addr, 7, &secret());
        assert!(near.is_ok() && door.next_state(BOUND).is_some(), "C-9: {near:?}");
    }
    over.store(true, Ordering::Relaxed);
    flood.join().unwrap();
}

#[test]
fn a_full_queue_asks_to_come_back_and_does_so_for_each_kind_by_itself() {
    let listener = listener_with(ListenerOptions { waiting_max: 2, ..ListenerOptions::default() });
    let door = open(&listener, 7, secret());
    let addr = listener.local_addr();
    let _waiting: Vec<_> = (0..2).map(|_| dial_as(STATE, addr, 7, &secret()).unwrap()).collect();
    let deadline = Instant::now() + PROMPT;
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
    let door = open(&listener, 7, secret());
    let first = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let mut second = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    assert!(is_closed(&first));
    second.write_all(b"2").unwrap();
    let mut heard = [0; 1];
    door.take_previous(soon(), &AbortHandle::new()).unwrap().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"2");
}

#[test]
fn closing_a_door_wakes_who_waits_in_it_and_drops_who_queues() {
    let listener = listener();
    let door = Arc::new(open(&listener, 7, secret()));
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
    assert_eq!(door.take_previous(soon(), &AbortHandle::new()).unwrap_err(), ArrivalError::Closed);
}

#[test]
fn a_listener_that_is_dropped_closes_its_doors() {
    let listener = listener();
    let door = open(&listener, 7, secret());
    drop(listener);
    assert!(door.is_closed());
    assert!(door.next_state(BOUND).is_none());
}

#[test]
fn an_abort_wakes_who_dials_and_who_waits_at_a_door() {
    let abort = AbortHandle::new();
    let listener = Arc::new(listener());
    let door = open(&listener, 7, secret());
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
            let result = door.take_previous(soon(), &waits);
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
    let options = GroupOptions { form: Duration::from_secs(1), ..GroupOptions::default() };
    let (listener, next) = (listener(), listener());
    let door = listener.open_ring(&place(1, 3, next.local_addr()));
    let _next_door = next.open_ring(&place(2, 3, listener.local_addr()));
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
fn a_door_lets_its_own_neighbour_in_once_and_says_so_to_everybody_else() {
    let (listener, elsewhere) = (listener(), common::listener());
    let door = open(&listener, 7, secret());
    let _no_seat = elsewhere.open(Generation(7), secret());
    let ring = |from, to| Purpose::Ring { from: Rank(from), to: Rank(to) };
    let refused = |purpose, listener: &Listener| {
        let refused = reason(dial_as(purpose, listener.local_addr(), 7, &secret()));
        assert_eq!(refused, RefuseReason::WrongNeighbour, "{purpose:?}");
    };
    // Told an address that is another member's by now; another rank than the one before; a member without a place.
    refused(ring(3, 0), &listener);
    refused(ring(2, 4), &listener);
    refused(ring(3, 4), &elsewhere);
    let right = dial_as(RING, listener.local_addr(), 7, &secret()).unwrap();
    let taken = door.take_previous(soon(), &AbortHandle::new()).unwrap();
    refused(RING, &listener);
    right.set_nonblocking(true).unwrap();
    assert_eq!((&right).read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock, "it is still up");
    drop(taken);
}

#[test]
fn a_rank_that_was_told_a_wrong_address_says_so_and_the_ring_fails_at_once() {
    // Rank 0 is told where rank 2 listens instead of rank 1.
    let listeners = [listener(), listener(), listener()];
    let addrs = listeners.each_ref().map(Listener::local_addr);
    let forming = listeners.into_iter().zip([(0, addrs[2]), (1, addrs[2]), (2, addrs[0])]);
    let forming = forming.map(|(listener, (rank, next))| {
        move || {
            let place = place(rank, 3, next);
            let door = listener.open_ring(&place);
            Group::form(&door, &place, &GroupOptions::default(), AbortHandle::new()).map(|mut group| {
                assert!(group.barrier(ControlWord::NONE).is_err());
            })
        }
    });
    let start = Instant::now();
    let results = together(forming.collect());
    let wrong =
        |why: &DialError| matches!(why, DialError::Refused { reason: RefuseReason::WrongNeighbour, .. });
    let told = matches!(&results[0], Err(FormError::Next { rank: Rank(1), source }) if wrong(source));
    assert!(told, "{results:?}");
    // The ring is not to be: that travels around. A rank whose own neighbours are there learns it in its first call.
    assert!(matches!(&results[1], Err(FormError::Next { rank: Rank(2), .. })), "{results:?}");
    assert!(start.elapsed() < PROMPT, "C-1");
}

#[test]
fn a_next_rank_that_goes_while_the_previous_one_is_awaited_is_noticed_at_once() {
    let (listener, next) = (listener(), listener());
    let place = place(1, 3, next.local_addr());
    let door = listener.open_ring(&place);
    let next_place = Place { rank: Rank(2), ..place.clone() };
    let next_door = next.open_ring(&next_place);
    let goes = move || {
        drop(next_door.take_previous(soon(), &AbortHandle::new()).unwrap());
        None
    };
    let waits = move || Group::form(&door, &place, &GroupOptions::default(), AbortHandle::new()).err();
    let works: Vec<Box<dyn FnOnce() -> Option<FormError> + Send>> = vec![Box::new(goes), Box::new(waits)];
    let start = Instant::now();
    let errors = together(works);
    assert!(matches!(errors[1], Some(FormError::Next { rank: Rank(2), .. })), "C-1: {errors:?}");
    assert!(start.elapsed() < PROMPT, "C-1");
}

#[test]
fn a_place_that_does_not_exist_or_is_not_the_doors_is_refused() {
    let listener = listener();
    let addr = listener.local_addr();
    let (door, other) = (listener.open_ring(&place(0, 2, addr)), open(&listener, 8, secret()));
    let form = |door, rank, size| {
        let place = place(rank, size, addr);
        Group::form(door, &place, &GroupOptions::default(), AbortHandle::new()).err().unwrap()
    };
    assert!(matches!(form(&door, 3, 3), FormError::BadPlace { .. }));
    assert!(matches!(form(&door, 0, 0), FormError::BadPlace { .. }));
    assert!(matches!(form(&door, 1, 2), FormError::NoSeat { .. }));
    assert!(matches!(form(&other, 0, 2), FormError::WrongDoor { .. }));
}
