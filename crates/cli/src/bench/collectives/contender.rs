//! Who takes part, and in which order.

use super::super::numbers::NumberType;
use super::super::peers::{Algorithm, Mpi, Wire};
use super::super::transport::Transport;

/// An implementation and the way its bytes go: a line of the table and of the plot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Line {
    Reknit(Transport),
    Gloo,
    Mpi(Wire),
}

impl Line {
    /// Its name and its transport's, as the JSON has them.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Line::Reknit(transport) => ("reknit", transport.name()),
            Line::Gloo => ("gloo", "default"),
            Line::Mpi(Wire::Tcp) => ("mpi", "tcp"),
            Line::Mpi(Wire::Shm) => ("mpi", "shm"),
        }
    }

    /// As people call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Line::Reknit(Transport::Tcp) => "reknit tcp",
            Line::Reknit(Transport::TcpBuffer) => "reknit tcp-buffer",
            Line::Reknit(Transport::Shm) => "reknit shm",
            Line::Reknit(Transport::ShmBuffer) => "reknit shm-buffer",
            Line::Gloo => "Gloo",
            Line::Mpi(Wire::Tcp) => "Open MPI tcp",
            Line::Mpi(Wire::Shm) => "Open MPI shm",
        }
    }

    /// Whether it is ours, over TCP.
    pub(super) fn is_ours_over_tcp(self) -> bool {
        matches!(self, Line::Reknit(ours) if ours.is_tcp())
    }

    /// Whether the two are to be compared: Gloo with all of ours, for it has one way only; Open MPI with ours of the same
    /// kind.
    pub(super) fn rivals(self, ours: Transport) -> bool {
        match self {
            Line::Reknit(_) => false,
            Line::Gloo => true,
            Line::Mpi(Wire::Tcp) => ours.is_tcp(),
            Line::Mpi(Wire::Shm) => !ours.is_tcp(),
        }
    }
}

/// A line, in one of its ways of summing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Contender {
    pub(super) line: Line,
    /// Open MPI's; the others choose themselves.
    pub(super) algorithm: Algorithm,
}

impl Contender {
    /// Whether it sums such numbers.
    pub(super) fn has(self, number: NumberType) -> bool {
        match self.line {
            Line::Reknit(_) | Line::Gloo => true,
            Line::Mpi(_) => Mpi::has(number),
        }
    }
}

/// Who takes part: we by these transports, and the peers by the same kinds of them.
pub(super) fn all(transports: &[Transport], peers: bool) -> Vec<Contender> {
    let contender = |line| Contender { line, algorithm: Algorithm::Default };
    let mut all: Vec<Contender> = Vec::new();
    for transport in transports {
        let ours = contender(Line::Reknit(*transport));
        if !all.contains(&ours) {
            all.push(ours);
        }
    }
    if peers {
        all.push(contender(Line::Gloo));
        let wires = [Wire::Tcp, Wire::Shm];
        let wires = wires.into_iter().filter(|w| transports.iter().any(|t| Line::Mpi(*w).rivals(*t)));
        let each = |wire| Algorithm::ALL.map(|algorithm| Contender { line: Line::Mpi(wire), algorithm });
        all.extend(wires.flat_map(each));
    }
    all
}

/// All of them, each round beginning further down, so that nobody always comes after the same other one.
pub(super) fn in_turn(all: &[Contender], round: u32, rounds: u32) -> impl Iterator<Item = Contender> {
    let skip = all.len() * round as usize / rounds.max(1) as usize;
    all.iter().copied().cycle().skip(skip).take(all.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_take_part_by_the_transports_that_are_asked_for() {
        let lines = |transports: &[Transport], peers| {
            let mut lines: Vec<Line> = all(transports, peers).into_iter().map(|c| c.line).collect();
            lines.dedup();
            lines
        };
        let (tcp, shm, buffer) = (Transport::Tcp, Transport::Shm, Transport::ShmBuffer);
        assert_eq!(lines(&[tcp, tcp], false), [Line::Reknit(tcp)]);
        assert_eq!(lines(&[tcp], true), [Line::Reknit(tcp), Line::Gloo, Line::Mpi(Wire::Tcp)]);
        let buffers = [Line::Reknit(buffer), Line::Gloo, Line::Mpi(Wire::Shm)];
        assert_eq!(lines(&[buffer], true), buffers);
        assert_eq!(all(&[tcp, shm, buffer], true).len(), 3 + 1 + 2 * Algorithm::ALL.len());
    }

    #[test]
    fn everybody_has_a_turn_in_every_round_and_another_one_begins() {
        let all = all(&[Transport::Tcp, Transport::Shm], true);
        let mut first = Vec::new();
        for round in 0..3 {
            let mut turn: Vec<Contender> = in_turn(&all, round, 3).collect();
            first.push(turn[0]);
            turn.sort();
            let mut everybody = all.clone();
            everybody.sort();
            assert_eq!(turn, everybody);
        }
        first.dedup();
        assert_eq!(first.len(), 3);
    }

    #[test]
    fn open_mpi_is_not_asked_for_halves() {
        let [gloo, mpi] =
            [Line::Gloo, Line::Mpi(Wire::Tcp)].map(|line| Contender { line, algorithm: Algorithm::Default });
        assert!(gloo.has(NumberType::Bf16) && mpi.has(NumberType::F32) && !mpi.has(NumberType::Bf16));
    }
}
