//! One connection of a client of PyTorch's TCPStore protocol: whole requests out of bytes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reknit_torchelastic::wire::{self, MAGIC, Parsed, Request, WireLimits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a client may take to show what it speaks.
const FIRST_BYTES: Duration = Duration::from_secs(5);

/// How long is waited when a connection cannot be accepted: there are no descriptors, and some may come free.
const CROWDED: Duration = Duration::from_millis(100);

/// The next connection, and a place for it if there is one left. It gives the place back by dropping it.
pub(super) async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, Arc::clone(places).try_acquire_owned().ok()),
            Err(why) => {
                tracing::warn!(error = %why, "a connection could not be accepted");
                tokio::time::sleep(CROWDED).await;
            }
        }
    }
}

/// The reading half.
pub(super) struct Requests {
    stream: OwnedReadHalf,
    limits: WireLimits,
    buffer: Vec<u8>,
    /// How much of it the last request took.
    used: usize,
}

fn bad(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Takes a connection once it has shown that it speaks the protocol.
pub(super) async fn greeted(stream: TcpStream, limits: WireLimits) -> io::Result<(Requests, OwnedWriteHalf)> {
    stream.set_nodelay(true)?;
    let (stream, writer) = stream.into_split();
    let mut requests = Requests { stream, limits, buffer: Vec::new(), used: 0 };
    let greeting = tokio::time::timeout(
        FIRST_BYTES,
        requests.next(|request, _| match request {
            Request::Validate { magic: MAGIC } => Ok(()),
            _ => Err(bad("it does not speak the protocol of PyTorch 2.2 or later")),
        }),
    );
    match greeting.await {
        Ok(Ok(Some(greeting))) => greeting.map(|()| (requests, writer)),
        Ok(Ok(None)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(Err(why)) => Err(why),
        Err(_) => Err(bad(format!("it says nothing for {FIRST_BYTES:?}"))),
    }
}

impl Requests {
    /// What `look` makes of the next request and of its bytes; nothing if the client has gone. Nothing is lost if it is dropped half way.
    pub(super) async fn next<T>(
        &mut self,
        look: impl FnOnce(Request<'_>, &[u8]) -> T,
    ) -> io::Result<Option<T>> {
        self.buffer.drain(..self.used);
        self.used = 0;
        let mut needs = 1;
        loop {
            if self.buffer.len() >= needs {
                match wire::parse(&self.buffer, &self.limits).map_err(bad)? {
                    Parsed::Whole(request, bytes) => {
                        self.used = bytes;
                        return Ok(Some(look(request, &self.buffer[..bytes])));
                    }
                    Parsed::Needs(bytes) => needs = bytes,
                }
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// Greets a store as a client does.
pub(super) async fn greet(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut greeting = Vec::new();
    Request::Validate { magic: MAGIC }.encode(&mut greeting);
    stream.write_all(&greeting).await
}
