//! What can happen at an instant: a closed list.

use reknit_membership::Generation;

use crate::collective::CallKey;
use crate::disk::PartKey;
use crate::faults::Fault;

/// Index of a process in [`crate::sim::Sim::processes`]; never used again.
pub(crate) type ProcessKey = usize;

/// Index of a stream in [`crate::sim::Sim::streams`]; never used again.
pub(crate) type StreamKey = usize;

/// Which way something travels on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// From the member to the coordinator.
    Up,
    /// From the coordinator to the member.
    Down,
}

/// See the module.
#[derive(Debug)]
pub(crate) enum Happening {
    /// A coordinator's process starts.
    ServerStarts { server: usize },
    /// It goes on after it was stopped.
    ServerContinues { server: usize, life: u32 },
    /// It is put out of service.
    ServerRetires { server: usize, life: u32 },
    /// The store carries out a save.
    StoreWrites { request: u64 },
    /// The store's answer arrives.
    StoreAnswers { request: u64 },
    /// The first thing on its way arrives.
    Arrives { stream: StreamKey, way: Way },
    /// One side has heard nothing for so long that it gives the stream up.
    KeepaliveEnds { stream: StreamKey, side: Way },
    /// A member's link tries to reach a coordinator.
    Connects { process: ProcessKey, attempt: u64 },
    /// It has waited for an answer long enough.
    ConnectTimesOut { process: ProcessKey, stream: StreamKey },
    /// A renewal is due.
    Renews { process: ProcessKey, stream: StreamKey },
    /// A program takes its next step.
    ProgramGoesOn { process: ProcessKey, turn: u64 },
    /// A member dials the next one in the ring.
    Dials { process: ProcessKey, generation: Generation },
    /// A member's ring stands.
    RingStands { process: ProcessKey, generation: Generation },
    /// A neighbour's connection has ended.
    NeighbourLost { process: ProcessKey, generation: Generation, neighbour: ProcessKey },
    /// The thread that watches the ring says so.
    LossIsSeen { process: ProcessKey, generation: Generation, neighbour: ProcessKey },
    /// The door of a generation that is over closes.
    DoorCloses { process: ProcessKey, generation: Generation },
    /// Whether a collective that waits for a cut connection can go on is looked at again.
    CollectiveResumes { process: ProcessKey, call: CallKey },
    /// One rank has all of a collective's result.
    CollectiveEnds { process: ProcessKey, call: CallKey },
    /// A transfer of state goes on.
    FetchGoesOn { process: ProcessKey, turn: u64, source: usize },
    /// A checkpoint was read, or could not be.
    LoadEnds { process: ProcessKey, turn: u64 },
    /// A part of a checkpoint was written, or could not be.
    PartEnds { process: ProcessKey, key: PartKey },
    /// A manifest was written, or could not be.
    ManifestEnds { process: ProcessKey, key: PartKey },
    /// A stopped process goes on.
    Continues { process: ProcessKey },
    /// A machine gets a new process.
    Starts { host: usize },
    /// The cloud takes a machine.
    Takes { process: ProcessKey },
    /// The last words of a process that has left are said.
    LinkCloses { process: ProcessKey },
    /// A fault strikes.
    Strikes { fault: Fault },
    /// A partition, or a cut between members, is over.
    CutHeals { number: u64 },
    /// The store is there again.
    StoreReturns,
    /// An operator asks again.
    AsksAgain { number: u64 },
    /// Somebody looks at the job's status.
    Looks,
}

impl Happening {
    /// The process that must be running for it to happen: while it is stopped, it is put off.
    pub(crate) fn process(&self) -> Option<ProcessKey> {
        match self {
            Happening::Connects { process, .. }
            | Happening::ConnectTimesOut { process, .. }
            | Happening::Renews { process, .. }
            | Happening::ProgramGoesOn { process, .. }
            | Happening::Dials { process, .. }
            | Happening::RingStands { process, .. }
            | Happening::NeighbourLost { process, .. }
            | Happening::LossIsSeen { process, .. }
            | Happening::DoorCloses { process, .. }
            | Happening::CollectiveResumes { process, .. }
            | Happening::CollectiveEnds { process, .. }
            | Happening::FetchGoesOn { process, .. }
            | Happening::LoadEnds { process, .. }
            | Happening::PartEnds { process, .. }
            | Happening::ManifestEnds { process, .. }
            | Happening::LinkCloses { process } => Some(*process),
            Happening::ServerStarts { .. }
            | Happening::ServerContinues { .. }
            | Happening::ServerRetires { .. }
            | Happening::StoreWrites { .. }
            | Happening::StoreAnswers { .. }
            | Happening::Arrives { .. }
            | Happening::KeepaliveEnds { .. }
            | Happening::Continues { .. }
            | Happening::Starts { .. }
            | Happening::Takes { .. }
            | Happening::Strikes { .. }
            | Happening::CutHeals { .. }
            | Happening::StoreReturns
            | Happening::AsksAgain { .. }
            | Happening::Looks => None,
        }
    }
}
