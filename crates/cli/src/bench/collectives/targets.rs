//! What was promised: how many times as fast as a peer an all-reduce of f32 is to be, on a machine with few cores.

use super::super::numbers::NumberType;
use super::super::peers::Wire;
use super::super::transport::Transport;
use super::contender::Line;

/// What the control word may cost.
pub(super) const OVERHEAD_PERCENT_MAX: f64 = 2.0;

/// In how many milliseconds a group of so many is to stand again.
pub(super) fn forming_ms(world: u32) -> Option<f64> {
    match world {
        4 => Some(5.0),
        64 => Some(100.0),
        _ => None,
    }
}

/// At least how much of an all-reduce's time its streams alone are to take.
pub(super) fn of_streams((number, _, bytes): (NumberType, u32, u64)) -> Option<f64> {
    (number == NumberType::F32 && bytes >= 1 << 20).then_some(0.8)
}

/// For sizes up to 1 KiB, 64 KiB, 1 MiB, 16 and 64 MiB, 256 MiB.
type BySize = [Option<f64>; 5];

/// At least how many times as fast ours is to be as theirs.
pub(super) fn speed_up(
    ours: Transport,
    theirs: Line,
    (number, world, bytes): (NumberType, u32, u64),
) -> Option<f64> {
    if number != NumberType::F32 {
        return None;
    }
    let column = match bytes {
        4..=0x400 => 0,
        0x1_0000 => 1,
        0x10_0000 => 2,
        0x100_0000 | 0x400_0000 => 3,
        0x1000_0000 => 4,
        _ => return None,
    };
    by_size(ours, theirs, world)?[column]
}

fn by_size(ours: Transport, theirs: Line, world: u32) -> Option<BySize> {
    let all = |targets: [f64; 5]| Some(targets.map(Some));
    match (ours, theirs, world) {
        (Transport::Tcp | Transport::TcpBuffer, Line::Gloo, 2) => all([15.0, 15.0, 5.0, 1.8, 1.5]),
        (Transport::Tcp | Transport::TcpBuffer, Line::Gloo, 4) => all([8.0, 10.0, 4.5, 1.3, 1.2]),
        (Transport::Tcp | Transport::TcpBuffer, Line::Mpi(Wire::Tcp), 2) => all([1.3, 3.5, 1.2, 1.7, 2.0]),
        (Transport::Shm, Line::Mpi(Wire::Shm), 2) => all([1.0, 4.0, 1.2, 2.0, 4.0]),
        (Transport::Shm, Line::Mpi(Wire::Shm), 4) => all([0.8, 4.0, 2.0, 3.5, 4.0]),
        (Transport::ShmBuffer, Line::Mpi(Wire::Shm), 2) => all([1.0, 15.0, 6.0, 6.0, 6.0]),
        (Transport::ShmBuffer, Line::Mpi(Wire::Shm), 4) => {
            Some([None, Some(15.0), Some(6.0), Some(7.0), Some(6.0)])
        }
        (
            Transport::Tcp | Transport::TcpBuffer | Transport::Shm | Transport::ShmBuffer,
            Line::Reknit(_) | Line::Gloo | Line::Mpi(_),
            _,
        ) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_for_floats_of_the_sizes_and_worlds_that_they_name() {
        let of = |ours, theirs, world, bytes| speed_up(ours, theirs, (NumberType::F32, world, bytes));
        let (tcp, buffer) = (Transport::Tcp, Transport::ShmBuffer);
        assert_eq!(of(tcp, Line::Gloo, 2, 4), Some(15.0));
        assert_eq!(of(tcp, Line::Gloo, 2, 64 << 20), Some(1.8));
        assert_eq!(of(tcp, Line::Gloo, 4, 256 << 20), Some(1.2));
        assert_eq!(of(tcp, Line::Gloo, 4, 2 << 20), None);
        assert_eq!(of(tcp, Line::Gloo, 8, 4), None);
        assert_eq!(of(tcp, Line::Mpi(Wire::Shm), 2, 4), None);
        assert_eq!(of(buffer, Line::Mpi(Wire::Shm), 4, 1024), None);
        assert_eq!(of(buffer, Line::Mpi(Wire::Shm), 4, 64 << 10), Some(15.0));
        assert_eq!(speed_up(tcp, Line::Gloo, (NumberType::F64, 2, 1024)), None);
    }
}
