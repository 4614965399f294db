//! What can be typed after `reknit bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Subcommand, value_parser};

use super::company::Role;
use super::numbers::{NumberType, WORLD_MAX};
use super::transport::Transport;
use crate::args::duration;

/// One measurement.
#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub(super) enum What {
    /// How long training stands still when a worker is killed, leaves or joins
    Recovery(Recovery),
    /// How long nobody leads when the leading coordinator dies, and what training notices of it; needs etcd
    Failover(Failover),
    /// How one coordinator does with thousands of members
    Swarm(Swarm),
    /// What the coordinator and the control word cost while a world runs
    Steady(Steady),
    /// How fast a joiner gets its state from the others' memory
    Restore(Restore),
    /// How fast the TCP ring sums, by size and number of ranks
    Allreduce(Allreduce),
    /// How fast ranks sum, by size, world, type and transport; beside Gloo and Open MPI if asked
    Collectives(Collectives),
    /// How long a checkpoint holds training up, and how fast it is written and loaded
    Checkpoint(Checkpoint),
    /// Play a part in one of these; started by them
    #[command(hide = true)]
    Role(Play),
}

/// What every measurement has.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Common {
    /// Print JSON; or write it to this file, and print the table
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<Option<PathBuf>>,
    /// Only look whether it works: a few seconds, and figures that mean little
    #[arg(long)]
    pub(super) quick: bool,
    /// Keep logs and stores in this directory
    #[arg(long)]
    pub(super) dir: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Recovery {
    #[command(flatten)]
    pub(super) common: Common,
    /// How many workers are killed
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..))]
    pub(super) kills: u32,
    /// How many workers leave after a notice
    #[arg(long, default_value_t = 50, value_parser = value_parser!(u32).range(1..))]
    pub(super) leaves: u32,
    /// How many workers the world has when all is well
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(2..=64))]
    pub(super) workers: u32,
    /// Draws who is killed, and when
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(super) struct Failover {
    #[command(flatten)]
    pub(super) common: Common,
    /// How many times the leading coordinator is killed
    #[arg(long, default_value_t = 50, value_parser = value_parser!(u32).range(1..))]
    pub(super) kills: u32,
    /// How many times it is stopped for longer than its lease
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..))]
    pub(super) stops: u32,
    /// How many coordinators there are
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(2..=7))]
    pub(super) coordinators: u32,
    /// How many workers train meanwhile
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(2..=64))]
    pub(super) workers: u32,
    /// How long a coordinator leads without hearing from the store
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub(super) lease: Duration,
    /// Draws when it is killed
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(super) struct Swarm {
    #[command(flatten)]
    pub(super) common: Common,
    /// How many members join
    #[arg(long, default_value_t = 10_000, value_parser = value_parser!(u32).range(3..=20_000))]
    pub(super) members: u32,
    /// How many processes they are in: each member has a connection of its own, and a process may have only so many
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u32).range(1..=64))]
    pub(super) processes: u32,
    /// How many members are lost, one after the other
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100))]
    pub(super) losses: u32,
    /// For how many seconds the coordinator's use of the processor is measured while nothing happens
    #[arg(long, default_value_t = 20, value_parser = value_parser!(u64).range(1..=3600))]
    pub(super) steady_s: u64,
    /// Where the coordinator keeps its records, as `serve --store` takes it; `etcd` starts one for it [default: a fresh
    /// directory]
    #[arg(long)]
    pub(super) store: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Steady {
    #[command(flatten)]
    pub(super) common: Common,
    /// How many workers the world has
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u32).range(2..=64))]
    pub(super) workers: u32,
    /// During how many steps the coordinator's messages are counted
    #[arg(long, default_value_t = 20_000, value_parser = value_parser!(u64).range(1..))]
    pub(super) steps: u64,
    /// How many times an all-reduce with the control word is compared with one without
    #[arg(long, default_value_t = 4_000, value_parser = value_parser!(u32).range(2..))]
    pub(super) pairs: u32,
    /// What is summed in it
    #[arg(long, default_value = "1MiB", value_parser = bytes)]
    pub(super) bytes: u64,
}

#[derive(Debug, clap::Args)]
pub(super) struct Restore {
    #[command(flatten)]
    pub(super) common: Common,
    /// How large the state is
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    pub(super) bytes: u64,
    /// How many workers hold it
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u32).range(1..=16))]
    pub(super) holders: u32,
    /// How many joiners get it, one after the other
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100))]
    pub(super) joiners: u32,
}

#[derive(Debug, clap::Args)]
pub(super) struct Allreduce {
    #[command(flatten)]
    pub(super) common: Common,
    /// What is summed, several sizes separated by commas
    #[arg(long, default_value = "4,1KiB,64KiB,1MiB,16MiB,64MiB", value_delimiter = ',', value_parser = bytes)]
    pub(super) sizes: Vec<u64>,
    /// How many ranks there are, several numbers separated by commas
    #[arg(long, default_value = "2,3,4,8", value_delimiter = ',', value_parser = value_parser!(u32).range(2..=64))]
    pub(super) ranks: Vec<u32>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Collectives {
    #[command(flatten)]
    pub(super) common: Common,
    /// How many ranks there are, each a process of its own; several numbers separated by commas
    #[arg(long, default_value = "2,4", value_delimiter = ',', value_parser = value_parser!(u32).range(2..=i64::from(WORLD_MAX)))]
    pub(super) worlds: Vec<u32>,
    /// What is summed, several sizes separated by commas
    #[arg(long, default_value = "4,1k,64k,1m,16m,64m,256m", value_delimiter = ',', value_parser = summed_bytes)]
    pub(super) sizes: Vec<u64>,
    /// By which way the bytes go, several separated by commas
    #[arg(long, default_value = "tcp,shm,shm-buffer", value_delimiter = ',')]
    pub(super) transports: Vec<Transport>,
    /// What kinds of number are summed, several separated by commas
    #[arg(long, default_value = "f32", value_delimiter = ',')]
    pub(super) types: Vec<NumberType>,
    /// How often everybody has a turn; figures are medians over the rounds
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=100))]
    pub(super) rounds: u32,
    /// Run Gloo and Open MPI in turn with ours: wants PyTorch in the Python that --python names, and Open MPI's mpicc and
    /// mpirun (Debian: libopenmpi-dev, openmpi-bin)
    #[arg(long)]
    pub(super) peers: bool,
    /// A Python that has PyTorch
    #[arg(long, default_value = "python3")]
    pub(super) python: PathBuf,
    /// Draw the results into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Checkpoint {
    #[command(flatten)]
    pub(super) common: Common,
    /// How large the state is
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    pub(super) bytes: u64,
    /// How many checkpoints are made
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u32).range(1..=1000))]
    pub(super) saves: u32,
}

#[derive(Debug, clap::Args)]
pub(super) struct Play {
    /// Which
    pub(super) role: Role,
}

/// A size of which each rank and each of what it is compared with can hold a few.
fn summed_bytes(text: &str) -> Result<u64, String> {
    const MAX: u64 = 1 << 30;
    bytes(text).and_then(
        |bytes| {
            if bytes <= MAX { Ok(bytes) } else { Err(format!("{text:?} is more than 1 GiB")) }
        },
    )
}

/// A size as people write it: `4096`, `64k`, `64KiB`, `1GiB`, `1MB`.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is no size; write 4096, 64k, 64KiB, 1GiB or 1MB");
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(wrong()),
    };
    let bytes = number * unit;
    // Beyond it a number with a fraction does not tell neighbours apart, and no memory is so large.
    if !(1.0..=1e15).contains(&bytes) || bytes.fract() != 0.0 {
        return Err(format!("{text:?} is not a whole number of bytes from 1 to 1 PB"));
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(bytes("4"), Ok(4));
        assert_eq!(bytes("64KiB"), Ok(65_536));
        assert_eq!(bytes("1.5MiB"), Ok(1_572_864));
        assert_eq!(bytes("1GB"), Ok(1_000_000_000));
        assert_eq!(bytes("1gib"), Ok(1 << 30));
        assert_eq!([bytes("1k"), bytes("16M"), bytes("1g")], [Ok(1024), Ok(16 << 20), Ok(1 << 30)]);
        for wrong in ["", "GiB", "1 GiB", "0", "0.5", "-1", "1EiB", "99999999GiB", "1.0001KiB"] {
            assert!(bytes(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(summed_bytes("1g"), Ok(1 << 30));
        assert!(summed_bytes("2g").is_err());
    }
}
