//! What joins one rank to the others of its world: connections to its neighbours, and the memory that it shares with all if
//! they are on one host. Which of the two a collective uses is the [group](crate::Group)'s; here is how each ends.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use reknit_membership::ids::Rank;

use crate::abort::{AbortHandle, Attached, Rouse};
use crate::broken::BreakReason;
use crate::call::{Call, CallKind};
use crate::element::Element;
use crate::form::{GroupOptions, Place};
use crate::host::{Host, HostFault, Layout};
use crate::neighbours::{Neighbours, TcpTransport};
use crate::progress::{Progress, Stop, Stuck};
use crate::ring::{Fault, HEAD_BYTES, Limits, Run, Seat, drive};
use crate::schedule::Pattern;
use crate::segment::Segment;
use crate::table::{self, Table};
use crate::wake::Wake;
use crate::watcher::{Outcome, Watcher};
use crate::word::ControlWord;

/// The smallest and the largest chunk that [`GroupOptions::chunk_bytes`] can ask for.
const CHUNK_BYTES_MIN: usize = 4 << 10;
const CHUNK_BYTES_MAX: usize = 16 << 20;

/// How many bytes move at a time.
pub(crate) fn chunk_bytes(options: &GroupOptions) -> usize {
    options.chunk_bytes.clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
}

/// What joins this rank to the others.
pub(crate) struct Links {
    transport: TcpTransport,
    pub(crate) watcher: Watcher,
    staging: Vec<u8>,
    table: Table,
    seat: Seat,
    pub(crate) limits: Limits,
    /// Whether the control word travels; always, but to measure what that costs.
    pub(crate) carries_word: bool,
    abort: AbortHandle,
    /// What all ranks share, if they are on one host. The connections then only tell of losses.
    pub(crate) host: Option<Host>,
    attached: Vec<Attached>,
}

/// Who waits in shared memory looks up when this is roused.
impl Rouse for Progress {
    fn rouse(&self) {
        self.ring();
    }
}

impl Links {
    /// # Errors
    /// If there are no descriptors, or no thread to watch the connections.
    pub(crate) fn new(
        neighbours: Neighbours,
        place: &Place,
        options: &GroupOptions,
        abort: &AbortHandle,
    ) -> io::Result<Links> {
        let neighbours = Arc::new(neighbours);
        let aborted = Arc::new(Wake::new()?);
        let attached = vec![abort.attach(aborted.clone())];
        let watcher = Watcher::start(neighbours.clone(), aborted.clone())?;
        // A frame of so many chunks moves in so many pieces, its head included.
        let staging = vec![0; HEAD_BYTES + chunk_bytes(options)];
        let seat = Seat { size: place.size, rank: place.rank, prev: neighbours.prev_rank };
        let limits = Limits { spin: options.spin, stall: options.stall, until: None };
        let transport = TcpTransport { neighbours, aborted };
        let (carries_word, abort, host, table) = (true, abort.clone(), None, Table::default());
        Ok(Links { transport, watcher, staging, table, seat, limits, carries_word, abort, host, attached })
    }

    /// From now on collectives run in the memory that all ranks have mapped.
    pub(crate) fn share(&mut self, mut segment: Segment, layout: Layout, options: &GroupOptions) {
        // All have opened it who ever will.
        segment.close();
        let host = Host::new(segment, layout, self.seat.rank.0 as usize, options.spin, options.stall);
        self.watcher.rouse_when_unsound(Arc::new(host.progress().clone()));
        self.attached.push(self.abort.attach(Arc::new(host.progress().clone())));
        self.host = Some(host);
    }

    pub(crate) fn run<T: Element>(
        &mut self,
        call: Call,
        input: &[T],
        work: &mut [T],
        word: ControlWord,
    ) -> Result<ControlWord, (Vec<Rank>, BreakReason)> {
        self.watcher.begin().map_err(stopped)?;
        let gathers = match call.kind {
            CallKind::AllReduce { op, .. } if table::fits(size_of_val(input), self.seat.size) => Some(op),
            _ => None,
        };
        let (pattern, input, moved) = match gathers {
            Some(_) => (Pattern::AllGather, &[][..], self.table.lay(self.seat, input)),
            None => (call.kind.pattern(), input, &mut *work),
        };
        let mut run = Run::new(pattern, call, self.seat, input, moved, &mut self.staging, word);
        if !self.carries_word {
            run = run.without_word();
        }
        match drive(run, &mut self.transport, &self.abort, self.limits) {
            Ok(word) => {
                self.watcher.finish(Outcome::Done);
                if let Some(op) = gathers {
                    self.table.combine(op, self.seat.size, work);
                }
                Ok(word)
            }
            Err(fault) => {
                let (suspects, reason) = self.explain(fault);
                self.watcher.finish(Outcome::Failed(lost_by(&reason, &self.abort)));
                Err((suspects, reason))
            }
        }
    }

    /// Runs a collective in the memory that all ranks share.
    pub(crate) fn run_on_host(
        &mut self,
        work: impl FnOnce(&mut Host, &dyn Fn() -> Option<Stop>) -> Result<ControlWord, HostFault>,
    ) -> Result<ControlWord, (Vec<Rank>, BreakReason)> {
        self.watcher.begin().map_err(stopped)?;
        let host = self.host.as_mut().expect("asked before");
        let (watcher, abort) = (&self.watcher, &self.abort);
        let stop = || match (abort.is_aborted(), watcher.is_unsound()) {
            (true, _) => Some(Stop::Aborted),
            (false, true) => Some(Stop::Lost),
            (false, false) => None,
        };
        let (progress, rank) = (host.progress().clone(), host.rank());
        let mut unwinding = Unwinding { watcher, progress, rank, is_over: false };
        let result = work(host, &stop);
        unwinding.is_over = true;
        let fault = match result {
            Ok(word) => {
                self.watcher.finish(Outcome::Done);
                return Ok(word);
            }
            Err(fault) => fault,
        };
        let (suspects, reason) = match fault {
            HostFault::Stuck(Stuck::GivenUp(rank)) => lost_neighbour(rank, ErrorKind::ConnectionAborted),
            HostFault::Stuck(Stuck::Stopped(_)) => stopped(watcher.lost()),
            HostFault::Stuck(Stuck::Stalled { waited, late }) => (late, BreakReason::Stalled { waited }),
            HostFault::Mismatch { ours, theirs, rank } => {
                (vec![rank], BreakReason::Mismatch { ours, theirs })
            }
            HostFault::Protocol { what, rank } => (vec![rank], BreakReason::Protocol { what }),
            HostFault::System(kind) => (Vec::new(), BreakReason::System { kind }),
        };
        let lost = lost_by(&reason, abort);
        // Who gives up for another reason is lost to the others itself.
        host.progress().give_up(lost.unwrap_or(host.rank()));
        self.watcher.finish(Outcome::Failed(lost));
        Err((suspects, reason))
    }

    /// The fault in terms of ranks.
    fn explain(&self, fault: Fault) -> (Vec<Rank>, BreakReason) {
        let (next, prev) = (self.transport.neighbours.next_rank, self.transport.neighbours.prev_rank);
        match fault {
            Fault::NextLost(kind) => lost_neighbour(next, kind),
            Fault::PrevLost(kind) => lost_neighbour(prev, kind),
            Fault::Stalled { waited, want } => {
                let mut suspects = Vec::new();
                suspects.extend(want.bytes.then_some(prev));
                suspects.extend((want.room && !suspects.contains(&next)).then_some(next));
                (suspects, BreakReason::Stalled { waited })
            }
            Fault::Mismatch { ours, theirs } => (vec![prev], BreakReason::Mismatch { ours, theirs }),
            Fault::Protocol(what) => (vec![prev], BreakReason::Protocol { what }),
            Fault::Aborted => (Vec::new(), BreakReason::Aborted),
            Fault::System(kind) => (Vec::new(), BreakReason::System { kind }),
        }
    }
}

/// Gives up for a rank that panics in the middle of a collective: its counts would mean nothing any more.
struct Unwinding<'a> {
    watcher: &'a Watcher,
    progress: Progress,
    rank: Rank,
    is_over: bool,
}

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        self.progress.give_up(self.rank);
        self.watcher.finish(Outcome::Failed(None));
    }
}

/// Why a collective ends that is to stop, for a neighbour is lost; or if none is, because it was told to.
fn stopped(lost: Option<Rank>) -> (Vec<Rank>, BreakReason) {
    match lost {
        Some(rank) => lost_neighbour(rank, ErrorKind::UnexpectedEof),
        None => (Vec::new(), BreakReason::Aborted),
    }
}

/// Who was lost, if that is why a collective ended. After an abort it was this side that ended the connections.
fn lost_by(reason: &BreakReason, abort: &AbortHandle) -> Option<Rank> {
    match *reason {
        BreakReason::NeighbourLost { rank, .. } if !abort.is_aborted() => Some(rank),
        BreakReason::NeighbourLost { .. }
        | BreakReason::Stalled { .. }
        | BreakReason::Aborted
        | BreakReason::Mismatch { .. }
        | BreakReason::Protocol { .. }
        | BreakReason::System { .. } => None,
    }
}

fn lost_neighbour(rank: Rank, kind: ErrorKind) -> (Vec<Rank>, BreakReason) {
    (vec![rank], BreakReason::NeighbourLost { rank, kind })
}
