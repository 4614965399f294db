//! The part of a rank: one end of a ring without a coordinator, in a process of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use reknit_collectives::{
    AbortHandle, ControlWord, Group, Listener, ListenerOptions, Place, ReduceOp, Secret,
};
use reknit_membership::{Generation, Rank, WorldSize};
use serde::{Deserialize, Serialize};

use super::company::{self, Company, PlayerId, Role};
use super::numbers::{self, Number, NumberType};
use super::stats::median;
use super::transport::{Operand, Transport};

/// How long the ranks may take for any one order.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a rank is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Order {
    /// Open a listener.
    Listen,
    /// Take this place in the ring.
    Form { rank: u32, size: u32, next: SocketAddr, secret: [u8; 32], transport: Transport },
    /// Sum so many numbers in place, so many times.
    Sum { elements: usize, times: usize },
    /// Sum so many numbers of a type in place, again and again.
    Time { number: NumberType, elements: usize, budget: Budget },
    /// Sum so many numbers in place so many times with the control word, and as often without, by turns.
    Compare { elements: usize, pairs: usize },
}

/// What it says. Times are in nanoseconds, of one call each.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Says {
    Listening(SocketAddr),
    Formed,
    Summed { times: Vec<u64> },
    Timed { median: f64 },
    Compared(Compared),
}

/// The times of the calls with the control word and of those without.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Compared {
    pub(super) with: Vec<u64>,
    pub(super) without: Vec<u64>,
}

/// How often a sum is timed: for about so long, and how often at least and at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Budget {
    pub(super) time_ms: u64,
    pub(super) calls_min: u64,
    pub(super) calls_max: u64,
}

impl Budget {
    /// How many calls that is, if one takes so long.
    pub(super) fn calls(self, one: Duration) -> u64 {
        let fit = u128::from(self.time_ms) * 1_000_000 / one.as_nanos().max(1);
        u64::try_from(fit).unwrap_or(u64::MAX).clamp(self.calls_min, self.calls_max)
    }
}

pub(super) fn play() -> Result<()> {
    let mut listener = None;
    let mut live = None;
    for order in company::orders() {
        let said = match order? {
            Order::Listen => {
                let at = SocketAddr::from(([127, 0, 0, 1], 0));
                let listener = listener.insert(Listener::bind(at, ListenerOptions::default())?);
                Says::Listening(listener.local_addr())
            }
            Order::Form { rank, size, next, secret, transport } => {
                let (generation, secret) = (Generation(1), Secret::new(secret));
                let listener: &Listener = listener.as_ref().context("a rank must listen first")?;
                let place = Place { generation, rank: Rank(rank), size: WorldSize(size), secret, next };
                let door = listener.open_ring(&place);
                let group = Group::form(&door, &place, &transport.options(), AbortHandle::new())?;
                live = Some(Live { group, transport });
                Says::Formed
            }
            Order::Sum { elements, times } => {
                let live = live.as_mut().context("a rank without a ring")?;
                Says::Summed { times: live.sum(elements, times)? }
            }
            Order::Time { number, elements, budget } => {
                let live = live.as_mut().context("a rank without a ring")?;
                let median = match number {
                    NumberType::F32 => live.time::<f32>(elements, budget),
                    NumberType::F64 => live.time::<f64>(elements, budget),
                    NumberType::F16 => live.time::<f16>(elements, budget),
                    NumberType::Bf16 => live.time::<bf16>(elements, budget),
                    NumberType::I32 => live.time::<i32>(elements, budget),
                    NumberType::I64 => live.time::<i64>(elements, budget),
                    NumberType::U8 => live.time::<u8>(elements, budget),
                };
                Says::Timed { median: median? }
            }
            Order::Compare { elements, pairs } => {
                let live = live.as_mut().context("a rank without a ring")?;
                Says::Compared(live.compare(elements, pairs)?)
            }
        };
        company::say(&said)?;
    }
    Ok(())
}

/// How often a sum is done before it is timed, and how often one that is over in a moment.
const WARM_UP: usize = 3;
const WARM_UP_SHORT: usize = 10;
const SHORT_BYTES: usize = 4 << 20;

/// A rank in its ring.
struct Live {
    group: Group,
    transport: Transport,
}

impl Live {
    fn sum(&mut self, elements: usize, times: usize) -> Result<Vec<u64>> {
        let mut operand = self.checked::<f32>(elements)?;
        (0..WARM_UP).try_for_each(|_| self.one_sum(&mut operand).map(drop))?;
        (0..times).map(|_| self.one_sum(&mut operand)).collect()
    }

    /// The median of as many calls as the budget allows.
    fn time<T: Number>(&mut self, elements: usize, budget: Budget) -> Result<f64> {
        let mut operand = self.checked::<T>(elements)?;
        let warm_up = if elements * size_of::<T>() < SHORT_BYTES { WARM_UP_SHORT } else { WARM_UP };
        let warm: Vec<u64> = (0..warm_up).map(|_| self.one_sum(&mut operand)).collect::<Result<_>>()?;
        let shortest = Duration::from_nanos(warm.into_iter().min().unwrap_or_default());
        // All ranks must call as often as the first one finds right.
        let mut calls = [i64::try_from(budget.calls(shortest))?];
        self.group.broadcast(&mut calls, Rank(0), ControlWord::NONE)?;
        let times: Vec<u64> = (0..calls[0]).map(|_| self.one_sum(&mut operand)).collect::<Result<_>>()?;
        median(times.into_iter().map(|ns| ns as f64)).context("no call was timed")
    }

    /// By turns, so that whatever else the machine does hits both alike.
    fn compare(&mut self, elements: usize, pairs: usize) -> Result<Compared> {
        let mut operand = self.checked::<f32>(elements)?;
        for carry in [true, false] {
            self.group.carry_word(carry);
            (0..WARM_UP).try_for_each(|_| self.one_sum(&mut operand).map(drop))?;
        }
        let (mut with, mut without) = (Vec::with_capacity(pairs), Vec::with_capacity(pairs));
        for pair in 0..pairs {
            // Which of the two comes first changes, too.
            for carry in if pair % 2 == 0 { [true, false] } else { [false, true] } {
                self.group.carry_word(carry);
                let took = self.one_sum(&mut operand)?;
                if carry { with.push(took) } else { without.push(took) }
            }
        }
        self.group.carry_word(true);
        Ok(Compared { with, without })
    }

    fn one_sum<T: Number>(&mut self, operand: &mut Operand<T>) -> Result<u64> {
        let began = Instant::now();
        operand.all_reduce(&mut self.group, ReduceOp::Sum)?;
        Ok(u64::try_from(began.elapsed().as_nanos())?)
    }

    /// Zeros whose sums are right: a sum of other numbers in the same memory was looked at. Sums of zeros do not grow
    /// when they are summed again and again, and take as long as any.
    fn checked<T: Number>(&mut self, elements: usize) -> Result<Operand<T>> {
        let (Rank(rank), WorldSize(world)) = (self.group.rank(), self.group.size());
        let mut operand = Operand::<T>::new(&mut self.group, self.transport, elements)?;
        for (place, number) in operand.numbers().iter_mut().enumerate() {
            *number = T::small(numbers::summand(rank, place));
        }
        operand.all_reduce(&mut self.group, ReduceOp::Sum)?;
        let sums = operand.sums();
        let is_right = sums.len() == elements
            && sums.iter().enumerate().all(|(place, sum)| *sum == T::small(numbers::sum(world, place)));
        ensure!(is_right, "rank {rank} of {world} has a wrong sum of {elements} {}s", T::DTYPE);
        operand.numbers().fill(T::small(0));
        Ok(operand)
    }
}

/// A ring of ranks, each a process of its own.
pub(super) struct Ring {
    company: Company<Says>,
    ranks: Vec<PlayerId>,
    formed_in: Duration,
}

impl Ring {
    pub(super) fn form(logs: &Path, size: u32, transport: Transport) -> Result<Ring> {
        let mut company: Company<Says> = Company::new(Role::Rank, logs);
        let (mut ranks, mut addresses) = (Vec::new(), Vec::new());
        for _ in 0..size {
            ranks.push(company.start(&Order::Listen)?);
            match company.hear(PATIENCE)?.1 {
                Says::Listening(address) => addresses.push(address),
                other => bail!("a rank was to listen and says {other:?}"),
            }
        }
        let began = Instant::now();
        for (rank, (player, next)) in (0..size).zip(ranks.iter().zip(addresses.iter().cycle().skip(1))) {
            let order = Order::Form { rank, size, next: *next, secret: [7; 32], transport };
            company.tell(*player, &order)?;
        }
        let mut ring = Ring { company, ranks, formed_in: Duration::ZERO };
        ring.each(|said| matches!(said, Says::Formed).then_some(()))?;
        ring.formed_in = began.elapsed();
        Ok(ring)
    }

    /// How long it took from when the first rank was told to until all had said that it stands: between processes that were
    /// there before.
    pub(super) fn formed_in(&self) -> Duration {
        self.formed_in
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
            Says::Listening(_) | Says::Formed | Says::Timed { .. } | Says::Compared(_) => None,
        })
    }

    /// How long one all-reduce takes: the slowest rank's median, in nanoseconds.
    pub(super) fn time(&mut self, number: NumberType, elements: usize, budget: Budget) -> Result<f64> {
        self.tell_all(Order::Time { number, elements, budget })?;
        let medians = self.each(|said| match said {
            Says::Timed { median } => Some(median),
            Says::Listening(_) | Says::Formed | Says::Summed { .. } | Says::Compared(_) => None,
        })?;
        medians.into_iter().max_by(f64::total_cmp).context("a ring without ranks")
    }

    /// How long one all-reduce takes with the control word, and how long without. All ranks are in one ring and wait
    /// for each other, so one of them tells as much as all.
    pub(super) fn compare(&mut self, elements: usize, pairs: usize) -> Result<Compared> {
        self.tell_all(Order::Compare { elements, pairs })?;
        let compared = self.each(|said| match said {
            Says::Compared(compared) => Some(compared),
            Says::Listening(_) | Says::Formed | Says::Summed { .. } | Says::Timed { .. } => None,
        })?;
        compared.into_iter().next().context("a ring without ranks")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_spent_on_calls_within_their_limits() {
        let budget = Budget { time_ms: 100, calls_min: 5, calls_max: 1000 };
        let calls = |us| budget.calls(Duration::from_micros(us));
        assert_eq!([calls(0), calls(10), calls(1000), calls(50_000)], [1000, 1000, 100, 5]);
    }
}
