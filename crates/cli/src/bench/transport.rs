//! By which way the bytes of a group's ranks go, and what they sum on it.

use anyhow::{Result, ensure};
use reknit_collectives::{ControlWord, Group, GroupOptions, ReduceOp};
use serde::{Deserialize, Serialize};

use super::numbers::Number;

/// What `--transports` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Transport {
    /// Between all ranks, also on one host
    Tcp,
    /// Shared memory, summing in any memory
    Shm,
    /// Shared memory, summing in buffers that the group allocated there
    ShmBuffer,
}

impl Transport {
    pub(super) fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Shm => "shm",
            Transport::ShmBuffer => "shm-buffer",
        }
    }

    /// How a group that goes this way is formed.
    pub(super) fn options(self) -> Result<GroupOptions> {
        ensure!(self == Transport::Tcp, "groups over {} are not in this build", self.name());
        Ok(GroupOptions::default())
    }
}

/// The numbers that a rank sums in place, in the kind of memory that the transport is about.
pub(super) struct Operand<T> {
    numbers: Vec<T>,
}

impl<T: Number> Operand<T> {
    /// So many zeros.
    pub(super) fn new(_group: &mut Group, transport: Transport, len: usize) -> Result<Operand<T>> {
        match transport {
            Transport::Tcp | Transport::Shm | Transport::ShmBuffer => {
                Ok(Operand { numbers: vec![T::small(0); len] })
            }
        }
    }

    pub(super) fn numbers(&mut self) -> &mut [T] {
        &mut self.numbers
    }

    pub(super) fn all_reduce(&mut self, group: &mut Group, op: ReduceOp) -> Result<()> {
        group.all_reduce(&mut self.numbers, op, ControlWord::NONE)?;
        Ok(())
    }
}
