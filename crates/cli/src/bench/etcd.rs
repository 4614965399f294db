//! A real etcd on this machine: three servers, as it is run by who does not say otherwise.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::processes::{Process, free_address, log_file};

const SERVERS: usize = 3;
/// How long they may take to agree on a leader.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How often they are asked.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Where one server listens, and what for.
struct Place {
    name: String,
    clients: SocketAddr,
    peers: SocketAddr,
}

pub(super) struct Etcd {
    places: Vec<Place>,
    _servers: Vec<Process>,
}

impl Etcd {
    /// Starts the servers, with their data in `dir`, and waits until they answer.
    pub(super) fn start(dir: &Path) -> Result<Etcd> {
        let program = std::env::var_os("REKNIT_ETCD").unwrap_or_else(|| OsString::from("etcd"));
        let places = (1..=SERVERS)
            .map(|number| {
                Ok(Place { name: format!("etcd{number}"), clients: free_address()?, peers: free_address()? })
            })
            .collect::<Result<Vec<Place>>>()?;
        let cluster: Vec<String> =
            places.iter().map(|place| format!("{}=http://{}", place.name, place.peers)).collect();
        let servers = places.iter().map(|place| launch(&program, dir, place, &cluster.join(",")));
        let etcd = Etcd { _servers: servers.collect::<Result<_>>()?, places };
        let until = Instant::now() + START_PATIENCE;
        for place in &etcd.places {
            while !is_healthy(place.clients).unwrap_or(false) {
                ensure!(
                    Instant::now() < until,
                    "{} does not answer; see its log in {}",
                    place.name,
                    dir.display()
                );
                std::thread::sleep(ASK_EVERY);
            }
        }
        Ok(etcd)
    }

    /// The store as `serve --store` takes it.
    pub(super) fn store(&self) -> String {
        let clients: Vec<String> = self.places.iter().map(|place| place.clients.to_string()).collect();
        format!("etcd://{}/reknit-bench", clients.join(","))
    }
}

fn launch(program: &OsString, dir: &Path, place: &Place, cluster: &str) -> Result<Process> {
    let (clients, peers) = (format!("http://{}", place.clients), format!("http://{}", place.peers));
    let child = Command::new(program)
        .args(["--name", &place.name, "--logger", "zap", "--data-dir"])
        .arg(dir.join(&place.name))
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", cluster, "--initial-cluster-state", "new"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_file(dir, &place.name)?)
        .spawn()
        .context("this needs etcd, in the path or named by REKNIT_ETCD")?;
    Ok(Process::new(child, &place.name))
}

/// Whether a server has a leader and takes what it is given.
fn is_healthy(clients: SocketAddr) -> Result<bool> {
    let mut stream = TcpStream::connect_timeout(&clients, START_PATIENCE)?;
    stream.set_read_timeout(Some(START_PATIENCE))?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply.contains("\"true\""))
}
