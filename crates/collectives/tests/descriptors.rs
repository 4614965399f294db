//! C-9: a process that runs out of descriptors gets its listener back when it has some again. The only test in its
//! process, because it takes all descriptors there are.

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::{listener, secret};
use reknit_collectives::Purpose;
use reknit_membership::ids::{Generation, MemberId};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

#[test]
fn a_listener_without_descriptors_neither_ends_nor_spins() {
    let listener = listener();
    let door = listener.open(Generation(1), secret());
    let client = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();

    let used = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(used + 10), ..before }).unwrap();
    let hoard: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(!hoard.is_empty() && File::open("/dev/null").is_err());

    // The kernel completes the connection, but the listener cannot take it.
    rustix::net::connect(&client, &listener.local_addr()).unwrap();
    let mut client = TcpStream::from(client);
    client.write_all(b"rkD1").unwrap();
    let busy = cpu_time();
    client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(cpu_time() - busy < Duration::from_millis(150), "it spins");

    drop(hoard);
    setrlimit(Resource::Nofile, before).unwrap();
    // What follows makes it the hello of another version, which is refused in so many words.
    client.set_read_timeout(Some(common::BOUND)).unwrap();
    client.write_all(&[9; 36]).unwrap();
    client.read_exact(&mut [0; 24]).unwrap();

    let purpose = Purpose::State { member: MemberId(5) };
    let abort = reknit_collectives::AbortHandle::new();
    let dialled = reknit_collectives::dial(
        listener.local_addr(),
        purpose,
        Generation(1),
        &secret(),
        common::soon(),
        &abort,
    );
    assert!(dialled.is_ok(), "{dialled:?}");
    assert!(door.next_state(common::BOUND).is_some());
}

/// How long this process has been computing.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
