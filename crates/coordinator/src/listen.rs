//! Connections before they are HTTP: how many, how soon they must show what they speak, and how fast a dead one shows.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::config::Limits;
use crate::rate::Allowance;
use crate::reload::Current;

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a connection whose handshake failed is listened to, so that it hears why before it is reset.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How much it may say meanwhile.
const LAST_WORDS_BYTES: u64 = 64 * 1024;

/// Who is at the other end of a connection, and how many calls it may still make.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    address: SocketAddr,
    calls: Arc<Mutex<Allowance>>,
}

impl Peer {
    /// Where it is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether one call more is within its limit.
    pub(crate) fn may_call(&self, now: Instant) -> bool {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).try_take(now)
    }
}

/// How connections are taken.
#[derive(Clone)]
pub(crate) struct Acceptance {
    pub(crate) limits: Limits,
    pub(crate) silence: Duration,
    /// What they are encrypted with, if they are.
    pub(crate) tls: Option<Current<ServerConfig>>,
}

/// A connection that speaks HTTP/2, and its place among those that may be open.
pub(crate) struct Connection {
    stream: Box<dyn Wire>,
    /// How much of the preface, which was read to know it, has been read again.
    replayed: usize,
    peer: Peer,
    _place: Place,
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// Accepts connections until the receiver is dropped. An error of one accept never ends the loop.
pub(crate) fn connections(
    listener: TcpListener,
    acceptance: Acceptance,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(64);
    let limits = acceptance.limits;
    let permits = Arc::new(Semaphore::new(limits.connections));
    let peers = PerPeer::new(limits.connections_per_peer);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(why) => {
                    // Out of descriptors, most likely: closing ones will free some.
                    tracing::warn!(error = %why, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
                tracing::warn!(limit = limits.connections, "too many connections: one is closed at once");
                continue;
            };
            let Some(seat) = peers.take(address.ip()) else { continue };
            let place = Place { _permit: permit, _seat: seat };
            let (ready, acceptance) = (ready.clone(), acceptance.clone());
            tokio::spawn(async move {
                if let Some(connection) = admit(stream, address, place, acceptance).await {
                    // If nobody takes it, the server is stopping.
                    let _ = ready.send(Ok(connection)).await;
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

/// The connection, if it begins as it should, and in time.
async fn admit(
    stream: TcpStream,
    address: SocketAddr,
    place: Place,
    acceptance: Acceptance,
) -> Option<Connection> {
    let Acceptance { limits, silence, tls } = acceptance;
    let socket = SockRef::from(&stream);
    // Without the first, small messages wait for acknowledgements; without the second, a message to a host that has
    // vanished is sent again for a quarter of an hour.
    let set = socket.set_tcp_nodelay(true).and_then(|()| socket.set_tcp_user_timeout(Some(silence * 2)));
    set.ok()?;
    let begin = async {
        match tls {
            None => begun(stream).await,
            Some(tls) => begun(shake_hands(stream, address, tls.get()).await?).await,
        }
    };
    let stream = tokio::time::timeout(limits.first_bytes, begin).await.ok()??;
    let calls = Allowance::new(limits.calls_per_second, limits.calls_per_second, Instant::now());
    let peer = Peer { address, calls: Arc::new(Mutex::new(calls)) };
    Some(Connection { stream, replayed: 0, peer, _place: place })
}

/// The encrypted stream, if the two can agree on one. If not, the other side hears why.
async fn shake_hands(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
) -> Option<impl Wire + 'static> {
    match TlsAcceptor::from(config).accept(stream).into_fallible().await {
        Ok(stream) => Some(stream),
        Err((why, mut stream)) => {
            tracing::debug!(%address, %why, "a TLS handshake failed");
            // Closing with unread bytes would reset the connection, and the alert would be lost with it.
            if stream.shutdown().await.is_ok() {
                let mut rest = stream.take(LAST_WORDS_BYTES);
                let mut nowhere = tokio::io::sink();
                let drain = tokio::io::copy(&mut rest, &mut nowhere);
                let _ = tokio::time::timeout(LAST_WORDS, drain).await;
            }
            None
        }
    }
}

/// The stream once it has shown that it speaks HTTP/2.
async fn begun(mut stream: impl Wire + 'static) -> Option<Box<dyn Wire>> {
    let mut seen = [0; PREFACE.len()];
    let mut n = 0;
    while n < PREFACE.len() {
        let more = stream.read(&mut seen[n..]).await.ok()?;
        n += more;
        if more == 0 || seen[..n] != PREFACE[..n] {
            tracing::debug!("a connection that does not speak HTTP/2 is closed");
            return None;
        }
    }
    Some(Box::new(stream))
}

/// What an open connection counts against; given back when it is closed.
struct Place {
    _permit: OwnedSemaphorePermit,
    _seat: Seat,
}

/// How many connections each address has open.
#[derive(Clone)]
pub(crate) struct PerPeer {
    open: Arc<Mutex<BTreeMap<IpAddr, Open>>>,
    limit: usize,
}

#[derive(Default)]
struct Open {
    connections: usize,
    /// Whether it was said that one more was closed, since there last was room.
    said: bool,
}

/// One address's place for one connection.
pub(crate) struct Seat {
    peers: PerPeer,
    address: IpAddr,
}

impl PerPeer {
    pub(crate) fn new(limit: usize) -> PerPeer {
        PerPeer { open: Arc::default(), limit }
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more, if the address may have one.
    pub(crate) fn take(&self, address: IpAddr) -> Option<Seat> {
        let address = address.to_canonical();
        let mut open = self.open();
        let own = open.entry(address).or_default();
        if own.connections >= self.limit {
            if !std::mem::replace(&mut own.said, true) {
                tracing::warn!(%address, limit = self.limit, "too many connections of one peer: more are closed at once");
            }
            return None;
        }
        own.connections += 1;
        Some(Seat { peers: self.clone(), address })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.peers.open();
        if let Some(own) = open.get_mut(&self.address) {
            own.connections -= 1;
            own.said = false;
            if own.connections == 0 {
                open.remove(&self.address);
            }
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let again = &PREFACE[self.replayed..];
        if !again.is_empty() {
            let n = again.len().min(buf.remaining());
            buf.put_slice(&again[..n]);
            self.replayed += n;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d7_an_address_has_so_many_places_and_no_more_however_it_is_written() {
        let peers = PerPeer::new(2);
        let [v4, mapped]: [IpAddr; 2] = ["10.0.0.1", "::ffff:10.0.0.1"].map(|text| text.parse().unwrap());
        let first = peers.take(v4).unwrap();
        let _second = peers.take(mapped).unwrap();
        assert!(peers.take(v4).is_none() && peers.take(mapped).is_none());
        assert!(peers.take("10.0.0.2".parse().unwrap()).is_some(), "others have their own");
        drop(first);
        assert!(peers.take(v4).is_some());
        assert_eq!(peers.open().len(), 1, "addresses without a connection are forgotten");
    }
}
