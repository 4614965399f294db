//! By which way the bytes of a group's ranks go, and what they sum on it.

use anyhow::{Result, ensure};
use reknit_collectives::{Buffer, ControlWord, Group, GroupOptions, ReduceOp, SharedMemory};
use serde::{Deserialize, Serialize};

use super::numbers::Number;

/// What `--transports` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Transport {
    /// Between all ranks, also on one host, summing in place
    Tcp,
    /// The same, summing in buffers of the group, whose result lies beside what it is made of
    TcpBuffer,
    /// Shared memory, summing in any memory
    Shm,
    /// Shared memory, summing in buffers that the group allocated there
    ShmBuffer,
}

impl Transport {
    pub(super) fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::TcpBuffer => "tcp-buffer",
            Transport::Shm => "shm",
            Transport::ShmBuffer => "shm-buffer",
        }
    }

    pub(super) fn is_tcp(self) -> bool {
        match self {
            Transport::Tcp | Transport::TcpBuffer => true,
            Transport::Shm | Transport::ShmBuffer => false,
        }
    }

    /// How a group that goes this way is formed.
    pub(super) fn options(self) -> GroupOptions {
        let shared_memory = if self.is_tcp() { SharedMemory::Unasked } else { SharedMemory::Offered };
        GroupOptions { shared_memory, ..GroupOptions::default() }
    }
}

/// The numbers that a rank sums, in the kind of memory that the transport is about.
pub(super) enum Operand<T> {
    InPlace(Vec<T>),
    Buffer(Buffer<T>),
}

impl<T: Number> Operand<T> {
    /// So many zeros.
    pub(super) fn new(group: &mut Group, transport: Transport, len: usize) -> Result<Operand<T>> {
        // A fall back to TCP would be timed as what it is not.
        let wanted = !transport.is_tcp() && group.size().0 > 1;
        ensure!(group.shares_memory() == wanted, "the ranks do not share memory: is /proc mounted?");
        match transport {
            Transport::Tcp | Transport::Shm => Ok(Operand::InPlace(vec![T::small(0); len])),
            Transport::TcpBuffer | Transport::ShmBuffer => Ok(Operand::Buffer(group.buffer(len)?)),
        }
    }

    /// What this rank adds.
    pub(super) fn numbers(&mut self) -> &mut [T] {
        match self {
            Operand::InPlace(numbers) => numbers,
            Operand::Buffer(buffer) => buffer,
        }
    }

    /// What came of it.
    pub(super) fn sums(&self) -> &[T] {
        match self {
            Operand::InPlace(numbers) => numbers,
            Operand::Buffer(buffer) => buffer.result(),
        }
    }

    pub(super) fn all_reduce(&mut self, group: &mut Group, op: ReduceOp) -> Result<()> {
        match self {
            Operand::InPlace(numbers) => group.all_reduce(numbers, op, ControlWord::NONE)?,
            Operand::Buffer(buffer) => group.all_reduce_buffer(buffer, op, ControlWord::NONE)?,
        };
        Ok(())
    }
}
