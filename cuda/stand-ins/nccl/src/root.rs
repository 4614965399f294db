//! How ranks find each other: the root of a unique id takes everybody's address, and tells everybody all of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use reknit_collectives::AbortHandle;

/// What an id of this library begins with.
const MAGIC: [u8; 8] = *b"stand-in";

static NEXT: AtomicU64 = AtomicU64::new(1);

/// What a unique id says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Id {
    port: u16,
    /// What names the communicators that come of it.
    pub(crate) seed: u64,
}

impl Id {
    pub(crate) fn bytes(self) -> [u8; 128] {
        let mut bytes = [0xa5; 128];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.seed.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.port.to_le_bytes());
        bytes
    }

    /// The id of these bytes, if they have come through whole.
    pub(crate) fn read(bytes: &[u8; 128]) -> Option<Id> {
        let seed = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let id = Id { port: u16::from_le_bytes([bytes[16], bytes[17]]), seed };
        (id.bytes() == *bytes).then_some(id)
    }
}

/// Opens a root, which lives until as many ranks have come as the first says that there are.
pub(crate) fn open() -> Option<Id> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    let port = listener.local_addr().ok()?.port();
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    // No two processes of a test have the same port at a time; generations are not to be zero.
    let seed = (u64::from(port) << 40) | (u64::from(std::process::id() & 0xffff) << 20) | count;
    thread::Builder::new().name("stand-in-root".to_owned()).spawn(move || serve(&listener)).ok()?;
    Some(Id { port, seed })
}

fn serve(listener: &TcpListener) {
    let mut came: Vec<(u32, u16, TcpStream)> = Vec::new();
    loop {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut said = [0; 10];
        if stream.read_exact(&mut said).is_err() {
            continue;
        }
        let size = u32::from_le_bytes([said[0], said[1], said[2], said[3]]);
        let rank = u32::from_le_bytes([said[4], said[5], said[6], said[7]]);
        came.push((rank, u16::from_le_bytes([said[8], said[9]]), stream));
        if came.len() == size as usize {
            break;
        }
    }
    came.sort_by_key(|(rank, _, _)| *rank);
    let ports: Vec<u8> = came.iter().flat_map(|(_, port, _)| port.to_le_bytes()).collect();
    for (_, _, mut stream) in came {
        // Who is gone by now does not want to know.
        let _ = stream.write_all(&ports);
    }
}

/// Tells the root of `id` where this rank listens, and waits for the addresses of all.
pub(crate) fn join(
    id: Id,
    size: u32,
    rank: u32,
    listens: SocketAddr,
    abort: &AbortHandle,
) -> Option<Vec<SocketAddr>> {
    let mut stream = loop {
        if abort.is_aborted() {
            return None;
        }
        match TcpStream::connect((Ipv4Addr::LOCALHOST, id.port)) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut said = Vec::from(size.to_le_bytes());
    said.extend(rank.to_le_bytes());
    said.extend(listens.port().to_le_bytes());
    stream.write_all(&said).ok()?;
    stream.set_read_timeout(Some(Duration::from_millis(5))).ok()?;
    let mut ports = vec![0; 2 * size as usize];
    let mut read = 0;
    while read < ports.len() {
        if abort.is_aborted() {
            return None;
        }
        match stream.read(&mut ports[read..]) {
            Ok(0) => return None,
            Ok(more) => read += more,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(_) => return None,
        }
    }
    let addr = |port: &[u8]| SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from_le_bytes([port[0], port[1]])));
    Some(ports.chunks(2).map(addr).collect())
}
