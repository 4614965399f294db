//! The part of a rank: one end of a ring without a coordinator, in a process of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reknit_collectives::{
    AbortHandle, ControlWord, Group, GroupOptions, Listener, ListenerOptions, Place, ReduceOp, Secret,
    SharedMemory,
};
use reknit_membership::{Generation, Rank, WorldSize};
use serde::{Deserialize, Serialize};

use super::company::{self, Company, PlayerId, Role};

/// How long the ranks may take for any one order.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a rank is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Order {
    /// Open a listener.
    Listen,
    /// Take this place in the ring.
    Form { rank: u32, size: u32, next: SocketAddr, secret: [u8; 32] },
    /// Sum so many numbers in place, so many times.
    Sum { elements: usize, times: usize },
    /// Sum so many numbers in place so many times with the control word, and as often without, by turns.
    Compare { elements: usize, pairs: usize },
}

/// What it says. Times are in nanoseconds, of one call each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Says {
    Listening(SocketAddr),
    Formed,
    Summed { times: Vec<u64> },
    Compared { with: Vec<u64>, without: Vec<u64> },
}

pub(super) fn play() -> Result<()> {
    let mut listener = None;
    let mut group = None;
    for order in company::orders() {
        match order? {
            Order::Listen => {
                let at = SocketAddr::from(([127, 0, 0, 1], 0));
                let listener = listener.insert(Listener::bind(at, ListenerOptions::default())?);
                company::say(&Says::Listening(listener.local_addr()))?;
            }
            Order::Form { rank, size, next, secret } => {
                let (generation, secret) = (Generation(1), Secret::new(secret));
                let listener: &Listener = listener.as_ref().context("a rank must listen first")?;
                let place = Place { generation, rank: Rank(rank), size: WorldSize(size), secret, next };
                let door = listener.open_ring(&place);
                let shared_memory = SharedMemory::Unasked;
                let options = GroupOptions { shared_memory, ..GroupOptions::default() };
                group = Some(Group::form(&door, &place, &options, AbortHandle::new())?);
                company::say(&Says::Formed)?;
            }
            Order::Sum { elements, times } => {
                let group = group.as_mut().context("a rank without a ring")?;
                company::say(&Says::Summed { times: sum(group, elements, times)? })?;
            }
            Order::Compare { elements, pairs } => {
                let group = group.as_mut().context("a rank without a ring")?;
                let (with, without) = compare(group, elements, pairs)?;
                company::say(&Says::Compared { with, without })?;
            }
        }
    }
    Ok(())
}

/// How often a sum is done before it is timed.
const WARM_UP: usize = 3;

fn sum(group: &mut Group, elements: usize, times: usize) -> Result<Vec<u64>> {
    let mut data = vec![0f32; elements];
    for _ in 0..WARM_UP {
        checked_sum(group, &mut data)?;
    }
    (0..times).map(|_| one_sum(group, &mut data)).collect()
}

fn one_sum(group: &mut Group, data: &mut [f32]) -> Result<u64> {
    let began = Instant::now();
    // Maxima, so that numbers do not grow without end when the same ones are summed again and again; they cost the
    // same. What a sum comes to was looked at before.
    group.all_reduce(data, ReduceOp::Max, ControlWord::NONE)?;
    Ok(u64::try_from(began.elapsed().as_nanos())?)
}

/// A sum whose result is looked at.
fn checked_sum(group: &mut Group, data: &mut [f32]) -> Result<()> {
    data.fill(group.rank().0 as f32 + 1.0);
    group.all_reduce(data, ReduceOp::Sum, ControlWord::NONE)?;
    let size = group.size().0 as f32;
    let expected = size * (size + 1.0) / 2.0;
    ensure!(data.iter().all(|element| *element == expected), "the ring has summed wrongly");
    Ok(())
}

/// By turns, so that whatever else the machine does hits both alike.
fn compare(group: &mut Group, elements: usize, pairs: usize) -> Result<(Vec<u64>, Vec<u64>)> {
    let mut data = vec![0f32; elements];
    for carry in [true, false] {
        group.carry_word(carry);
        (0..WARM_UP).try_for_each(|_| checked_sum(group, &mut data))?;
    }
    let (mut with, mut without) = (Vec::with_capacity(pairs), Vec::with_capacity(pairs));
    for pair in 0..pairs {
        // Which of the two comes first changes, too.
        for carry in if pair % 2 == 0 { [true, false] } else { [false, true] } {
            group.carry_word(carry);
            let took = one_sum(group, &mut data)?;
            if carry { with.push(took) } else { without.push(took) }
        }
    }
    group.carry_word(true);
    Ok((with, without))
}

/// A ring of ranks, each a process of its own.
pub(super) struct Ring {
    company: Company<Says>,
    ranks: Vec<PlayerId>,
}

impl Ring {
    pub(super) fn form(logs: &Path, size: u32) -> Result<Ring> {
        let mut company: Company<Says> = Company::new(Role::Rank, logs);
        let (mut ranks, mut addresses) = (Vec::new(), Vec::new());
        for _ in 0..size {
            ranks.push(company.start(&Order::Listen)?);
            match company.hear(PATIENCE)?.1 {
                Says::Listening(address) => addresses.push(address),
                other => bail!("a rank was to listen and says {other:?}"),
            }
        }
        for (rank, (player, next)) in (0..size).zip(ranks.iter().zip(addresses.iter().cycle().skip(1))) {
            company.tell(*player, &Order::Form { rank, size, next: *next, secret: [7; 32] })?;
        }
        let mut ring = Ring { company, ranks };
        ring.each(|said| matches!(said, Says::Formed).then_some(()))?;
        Ok(ring)
    }

    /// What each rank says next, in no order.
    fn each<T>(&mut self, take: impl Fn(Says) -> Option<T>) -> Result<Vec<T>> {
        let mut taken = Vec::new();
        while taken.len() < self.ranks.len() {
            let said = self.company.hear(PATIENCE)?.1;
            taken.push(take(said).context("a rank did something else than it was told")?);
        }
        Ok(taken)
    }

    fn tell_all(&mut self, order: Order) -> Result<()> {
        self.ranks.iter().try_for_each(|rank| self.company.tell(*rank, &order))
    }

    /// How long one all-reduce takes, on each rank, each time.
    pub(super) fn sum(&mut self, elements: usize, times: usize) -> Result<Vec<Vec<u64>>> {
        self.tell_all(Order::Sum { elements, times })?;
        self.each(|said| match said {
            Says::Summed { times } => Some(times),
            Says::Listening(_) | Says::Formed | Says::Compared { .. } => None,
        })
    }

    /// How long one all-reduce takes on each rank with the control word, and how long without.
    pub(super) fn compare(&mut self, elements: usize, pairs: usize) -> Result<Vec<(Vec<u64>, Vec<u64>)>> {
        self.tell_all(Order::Compare { elements, pairs })?;
        self.each(|said| match said {
            Says::Compared { with, without } => Some((with, without)),
            Says::Listening(_) | Says::Formed | Says::Summed { .. } => None,
        })
    }
}
