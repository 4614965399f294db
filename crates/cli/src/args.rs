//! What can be typed: every command, flag and environment variable is declared here, with its doc and default; those of
//! `bench` in `bench/args.rs`.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use ipnet::IpNet;
use reknit_torchelastic::run::Repair;

/// Keeps distributed training jobs going on machines that come and go
///
/// Exit codes: 0 done · 1 it failed · 2 the command line is wrong · 3 no coordinator answers · 4 there is no such job or
/// member · 5 the job is not in a state in which this can be done · 6 the port or the store is in use · 7 the
/// coordinator does not allow it: no token, another job's token, or no certificate that it accepts.
#[derive(Debug, Parser)]
#[command(name = "reknit", version, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command has that talks to a coordinator.
#[derive(Debug, clap::Args)]
pub(crate) struct Connection {
    /// The coordinator to talk to; several separated by commas are tried in turn
    #[arg(long, env = "REKNIT_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    pub(crate) coordinator: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The certificate (PEM) of the authority that the coordinator's certificate must be of; for https:// addresses
    #[arg(long, env = "REKNIT_CA", value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// The certificate (PEM) to show to a coordinator that asks for one
    #[arg(long, env = "REKNIT_CERT", value_name = "FILE")]
    pub(crate) cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "REKNIT_KEY", value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// The file that holds the token to show; without it, the one in REKNIT_TOKEN
    #[arg(long, env = "REKNIT_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a coordinator
    Serve(Box<Serve>),
    /// Stand between stock torchrun and the coordinators, on each machine that runs it
    ///
    /// Agents connect to it on loopback, as to a store of PyTorch's: torchrun --rdzv-backend=c10d
    /// --rdzv-endpoint=127.0.0.1:29400 --rdzv-conf=is_host=0. Each is a member of the job that its --rdzv-id names, with TLS
    /// and tokens towards the coordinators, and lives through the death of any of them. Agents of PyTorch 2.6 and later.
    Relay(Box<Relay>),
    /// Show it all: a training run on this machine that lives through everything a spot fleet does
    Demo(Demo),
    /// Measure how fast it is on this machine, next to what the machine itself allows
    Bench(crate::bench::args::Bench),
    /// Show all jobs, or one: who is in, in which order, at which step, and what it waits for
    Status(Status),
    /// Show the coordinators that were named: which one leads, since how long, and over which store
    Coordinators(Coordinators),
    /// Show a job's status again and again, whenever it changes
    Watch(Watch),
    /// Show each generation of a job's world: its cause and its times
    ///
    /// Times begin when the coordinator learned of the cause: a worker that hung had then been silent for as long as
    /// `serve --silence` says. LOST counts the steps that the coordinator had heard of.
    History(Job),
    /// Show a job's committed checkpoints, or verify what lies in a directory
    Checkpoints(Checkpoints),
    /// Take a member out at the next step boundary
    Drain(Member),
    /// Take back a drain or a notice
    Undrain(Member),
    /// Take a member out now
    Evict(Member),
    /// Say that the cloud will take a member's machine
    Notice(Notice),
    /// Change how many ranks a job's world has at least and at most
    Resize(Resize),
    /// Ask for a checkpoint at the next step boundary
    Save(Job),
    /// End a job at the next step boundary
    Close(Job),
    /// Delete the record of a job that has ended, so that its id can be used again
    Forget(Job),
    /// Make an authority for tests, and certificates of it for a coordinator and its clients
    ///
    /// An authority that is in DIR already is used again. Nothing that exists is written over, unless --renew says so.
    Certs(Certs),
    /// Make a token for a job, for some jobs, or for operators
    ///
    /// The token goes to standard output, and the line by which the coordinator will know it (`reknit serve --tokens
    /// FILE`) to standard error: `reknit token digits >digits.token 2>>tokens` puts both where they belong.
    Token(Token),
    /// Print a completion script for a shell
    Completions(Completions),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// Where to listen
    #[arg(long, env = "REKNIT_LISTEN", default_value = "127.0.0.1:7070")]
    pub(crate) listen: SocketAddr,
    /// Where to keep the jobs' records: a directory, `memory`, or an etcd that several coordinators share,
    /// etcd://HOST:PORT,HOST:PORT/PREFIX (etcds:// with TLS)
    #[arg(long, env = "REKNIT_STORE", default_value = "reknit-data")]
    pub(crate) store: String,
    /// With etcd: the URL under which members and the other coordinators reach this one [default: where it listens]
    #[arg(long, env = "REKNIT_ADVERTISE", value_name = "URL")]
    pub(crate) advertise: Option<String>,
    /// With etcd: how long a leader that is silent leads on, in whole seconds
    #[arg(long, env = "REKNIT_LEASE", default_value = "2s", value_parser = duration)]
    pub(crate) lease: Duration,
    #[command(flatten)]
    pub(crate) etcd: EtcdAccess,
    /// How long a silent member may live; every other wait follows from it
    #[arg(long, env = "REKNIT_SILENCE", default_value = "3s", value_parser = duration)]
    pub(crate) silence: Duration,
    /// Which log events are shown, e.g. `debug` or `reknit_coordinator=debug`
    #[arg(long, env = "REKNIT_LOG", default_value = "info")]
    pub(crate) log: String,
    /// This coordinator's certificate (PEM): connections are encrypted. It is read again when it changes
    #[arg(long, env = "REKNIT_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "REKNIT_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The authority (PEM) whose certificates clients must show
    #[arg(long, env = "REKNIT_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_client_ca: Option<PathBuf>,
    /// The authority (PEM) by which the certificates of other coordinators are checked [default: that for clients]
    #[arg(long, env = "REKNIT_TLS_CA", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The file that lists whose tokens are let in, in lines `JOBS HASH` (see `reknit help token`). It is read again when
    /// it changes
    #[arg(long, env = "REKNIT_TOKENS", value_name = "FILE")]
    pub(crate) tokens: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) torchelastic: ForTorchrun,
    /// Listen on an address that other machines can reach although TLS or tokens are missing
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Print what the flags and the environment come to, and stop
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Print it as JSON
    #[arg(long, requires = "print_config")]
    pub(crate) json: bool,
    /// Print the address it listens on to standard output once it does
    #[arg(long)]
    pub(crate) announce: bool,
    /// Append what is saved and told to this file, for a check afterwards
    #[arg(long, hide = true)]
    pub(crate) record: Option<PathBuf>,
}

/// The endpoint for stock torchrun.
#[derive(Debug, clap::Args)]
pub(crate) struct ForTorchrun {
    /// Listen for stock torchrun here, e.g. 127.0.0.1:29400 (`torchrun --rdzv-backend=c10d --rdzv-endpoint=HOST:29400
    /// --rdzv-conf=is_host=0`)
    #[arg(long, env = "REKNIT_TORCHELASTIC", value_name = "ADDRESS")]
    pub(crate) torchelastic: Option<SocketAddr>,
    /// The networks whose machines may connect to it, e.g. 10.0.0.0/8: its protocol has neither tokens nor TLS
    #[arg(
        long,
        env = "REKNIT_TORCHELASTIC_ALLOW",
        value_name = "NETWORKS",
        value_delimiter = ',',
        requires = "torchelastic"
    )]
    pub(crate) torchelastic_allow: Vec<IpNet>,
    /// What is not to be done about the faults of stock torchrun: own-store, supplied-keys, eviction, short-last-call,
    /// spares, guard
    #[arg(long, value_name = "REPAIRS", value_delimiter = ',', value_parser = repair, requires = "torchelastic")]
    pub(crate) torchelastic_without: Vec<Repair>,
    /// The host that workers are told to meet at [default: the address by which their agent has reached this one]
    #[arg(long, env = "REKNIT_TORCHELASTIC_ADVERTISE", value_name = "HOST", requires = "torchelastic")]
    pub(crate) torchelastic_advertise: Option<String>,
    /// The ports at which the workers of each run meet, e.g. 29500-29599 [default: any]
    #[arg(long, env = "REKNIT_TORCHELASTIC_WORKER_PORTS", value_name = "FIRST-LAST", value_parser = ports, requires = "torchelastic")]
    pub(crate) torchelastic_worker_ports: Option<RangeInclusive<u16>>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Relay {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// Where agents on this machine connect: on loopback
    #[arg(long, env = "REKNIT_RELAY_LISTEN", default_value = "127.0.0.1:29400")]
    pub(crate) listen: SocketAddr,
    /// How many nodes a run has at least and at most, as torchrun's --nnodes says it
    #[arg(long, env = "REKNIT_RELAY_NODES", value_name = "MIN[:MAX]", value_parser = nodes)]
    pub(crate) nodes: RangeInclusive<u32>,
    /// The address of this machine at which the relays and workers of others reach it
    #[arg(long, env = "REKNIT_RELAY_ADVERTISE", value_name = "IP", default_value = "127.0.0.1")]
    pub(crate) advertise: IpAddr,
    /// Which log events are shown, e.g. `debug`
    #[arg(long, env = "REKNIT_LOG", default_value = "info")]
    pub(crate) log: String,
    /// Print the address that it listens on, once it does
    #[arg(long)]
    pub(crate) announce: bool,
}

/// How a coordinator shows an etcd who it is.
#[derive(Debug, clap::Args)]
pub(crate) struct EtcdAccess {
    /// The authority that etcd's certificates must come from (PEM)
    #[arg(long, env = "REKNIT_ETCD_CA", value_name = "FILE")]
    pub(crate) etcd_ca: Option<PathBuf>,
    /// The certificate shown to etcd (PEM)
    #[arg(long, env = "REKNIT_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    pub(crate) etcd_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, env = "REKNIT_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    pub(crate) etcd_key: Option<PathBuf>,
    /// The user to be towards etcd
    #[arg(long, env = "REKNIT_ETCD_USER", value_name = "NAME", requires = "etcd_password_file")]
    pub(crate) etcd_user: Option<String>,
    /// The file that holds the user's password
    #[arg(long, env = "REKNIT_ETCD_PASSWORD_FILE", value_name = "FILE", requires = "etcd_user")]
    pub(crate) etcd_password_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// How many steps to train; fewer than 1000 would be over before all has happened
    #[arg(long, default_value_t = 1200, value_parser = clap::value_parser!(u64).range(1000..))]
    pub(crate) steps: u64,
    /// The least time a step takes while the fleet is disturbed, in milliseconds: so that there are steps to disturb
    #[arg(long, default_value_t = 20)]
    pub(crate) step_ms: u64,
    /// Where the report goes [default: reknit-demo.html]
    #[arg(long)]
    pub(crate) report: Option<PathBuf>,
    /// Write the outcome to this file, as JSON
    #[arg(long = "json", value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
    /// Keep logs, checkpoints and evidence in this directory
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// The training program [default: reknit-digits beside this program]
    #[arg(long)]
    pub(crate) worker: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job; without it, all jobs in a line each
    pub(crate) job: Option<String>,
    /// How many members to list at most
    #[arg(long, default_value_t = 100)]
    pub(crate) members: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Coordinators {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Watch {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job
    pub(crate) job: String,
    /// How many members to list at most
    #[arg(long, default_value_t = 20)]
    pub(crate) members: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Job {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job
    pub(crate) job: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Checkpoints {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job
    #[arg(required_unless_present = "dir", conflicts_with = "dir")]
    pub(crate) job: Option<String>,
    /// Read and check the files in this directory instead of asking the coordinator
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Member {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job
    pub(crate) job: String,
    /// The member's name
    pub(crate) member: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Notice {
    #[command(flatten)]
    pub(crate) member: Member,
    /// How long its machine can still be expected to live
    #[arg(long = "in", default_value = "120s", value_parser = duration)]
    pub(crate) left: Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// The job
    pub(crate) job: String,
    /// The fewest ranks
    #[arg(long)]
    pub(crate) min: u32,
    /// The most ranks
    #[arg(long)]
    pub(crate) max: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Certs {
    /// The directory
    pub(crate) dir: PathBuf,
    /// A name or an IP address by which the coordinator is reached, besides localhost; may be given several times
    #[arg(long = "host", value_name = "NAME_OR_IP")]
    pub(crate) hosts: Vec<String>,
    /// How many days the certificates are valid
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) days: u32,
    /// Replace the coordinator's and the clients' certificates if they are there
    #[arg(long)]
    pub(crate) renew: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Token {
    /// A job, or the beginning of the names of several and a `*`
    #[arg(required_unless_present = "operator", conflicts_with = "operator")]
    pub(crate) jobs: Option<String>,
    /// For operators: all jobs, and the server itself
    #[arg(long)]
    pub(crate) operator: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// A repair by its name.
fn repair(text: &str) -> Result<Repair, String> {
    let names = Repair::ALL.map(Repair::name).join(", ");
    let known = Repair::ALL.into_iter().find(|repair| repair.name() == text);
    known.ok_or_else(|| format!("write one or more of {names}"))
}

/// How many nodes, as torchrun's --nnodes says it: `MIN:MAX`, or one number.
fn nodes(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (min, max) = text.split_once(':').unwrap_or((text, text));
    match (min.parse(), max.parse()) {
        (Ok(min @ 1..), Ok(max)) if min <= max => Ok(min..=max),
        _ => Err("write it as --nnodes says it: 4, or 2:8".to_owned()),
    }
}

/// A range of ports, as `FIRST-LAST` or one alone.
fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first @ 1..), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err("write FIRST-LAST, e.g. 29500-29599".to_owned()),
    }
}

/// A duration as people write it: `250ms`, `3s`, `2m`, `1h`; a bare number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 =
        number.parse().map_err(|_| format!("{text:?} is no duration; write 250ms, 3s, 2m or 1h"))?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(format!("{unit:?} is no unit of time; write ms, s, m or h")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn durations_read_as_people_write_them() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2"), Ok(Duration::from_secs(2)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("x").is_err());
        assert!(duration("3 days").is_err());
        assert!(duration("99999999999999999999h").is_err());
    }
}
