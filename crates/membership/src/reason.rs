//! Reasons as values: why a job waits, why a member left, why the world changed, why a request was refused. Status,
//! log and error messages print these same values; nothing is decided by matching text.

use std::fmt;
use std::time::Duration;

use crate::holding::Resume;
use crate::ids::{Digest, Generation, HistoryId, MemberId, MemberName, Step, Timestamp};
use crate::spec::{BadSpec, Shape};

/// What a job waits for right now.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Waiting {
    /// Nothing: it runs, or it is closed.
    Nothing,
    /// Too few ranks have joined.
    BelowMin {
        /// Ranks that could take part.
        have: u32,
        /// Ranks needed.
        need: u32,
    },
    /// Enough ranks, but no multiple of `unit`.
    UnitRemainder {
        /// Ranks that could take part.
        have: u32,
        /// What their number must be a multiple of.
        unit: u32,
    },
    /// Enough ranks; a moment is left for more to join.
    LastCall {
        /// How long it still is.
        left: Duration,
    },
    /// Members of the last world lost their stream and may hold the newest state.
    Reattaching {
        /// Who they are. Nobody: the coordinator has just started, and members it does not know of may come back.
        missing: Vec<MemberId>,
    },
    /// Members are accused by a neighbour and have not yet spoken for themselves or hung up.
    Settling {
        /// Who they are.
        suspects: Vec<MemberId>,
    },
    /// Nothing that was committed could be read; tried again after a while.
    Unrestorable {
        /// Until the next try.
        left: Duration,
    },
    /// Members have not yet answered the new world; or have no place in it, and have not yet said what they hold.
    Ready {
        /// Who has not.
        missing: Vec<MemberId>,
    },
    /// Members have not yet brought their state to the resume step.
    Restored {
        /// Who has not.
        missing: Vec<MemberId>,
    },
    /// A planned change is collected with others that may follow.
    Merge {
        /// Until it is asked for.
        left: Duration,
    },
    /// A planned change was asked for; members have not yet reached the step boundary.
    Boundary {
        /// Who has not.
        missing: Vec<MemberId>,
    },
    /// Some members have finished, others have not.
    Finish {
        /// Who has not.
        missing: Vec<MemberId>,
    },
}

/// Why somebody is no longer a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Departure {
    /// Its stream ended and a neighbour saw its connection end too.
    Died,
    /// It was silent for longer than its lease.
    Silent,
    /// Its stream ended and it did not come back while others waited for it.
    Gone,
    /// It did not answer the world in time.
    Unready,
    /// It did not bring its state to the resume step in time.
    Unrestored,
    /// It did not reach the step boundary in time.
    Stuck,
    /// Its neighbours could not reach it, several worlds in a row.
    Unreachable,
    /// A new process joined under its name.
    Replaced {
        /// The new member.
        by: MemberId,
    },
    /// It said goodbye.
    Left,
    /// It left as planned, after a notice or an operator's drain.
    Drained,
    /// An operator evicted it.
    Evicted,
    /// Its state differs from what the majority holds.
    Diverged,
    /// Nobody has the job's state any more and no checkpoint was ever committed: only a program that is started again has
    /// a state to begin with.
    StateLost,
}

impl Departure {
    /// Whether its process may come back as a new member: it lost its lease, but not what it holds, and nobody wants it
    /// gone.
    pub fn may_come_back(self) -> bool {
        match self {
            Departure::Died
            | Departure::Silent
            | Departure::Gone
            | Departure::Unready
            | Departure::Unrestored
            | Departure::Stuck
            | Departure::Unreachable
            | Departure::Diverged => true,
            Departure::Replaced { .. }
            | Departure::Left
            | Departure::Drained
            | Departure::Evicted
            | Departure::StateLost => false,
        }
    }
}

/// Why a new world was formed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Enough members came together.
    Formed,
    /// A member joined.
    Joined {
        /// Who.
        name: MemberName,
    },
    /// A member of the world was lost.
    Lost {
        /// Who.
        name: MemberName,
        /// How.
        how: Departure,
    },
    /// A member is to leave: the cloud gave notice.
    Notice {
        /// Who.
        name: MemberName,
    },
    /// A member is to leave: an operator drains it.
    Drain {
        /// Who.
        name: MemberName,
    },
    /// An operator changed the bounds.
    Resized,
    /// The ring broke although no member was lost.
    LinkBroken,
    /// Ranks hold different states.
    Diverged,
    /// The world before it could not be brought to one state.
    Unrestored,
    /// The store was put back from a backup.
    StoreRolledBack,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Closure {
    /// Its members reached its last step.
    Completed {
        /// Which.
        step: Step,
    },
    /// An operator closed it.
    Closed,
    /// Its members ended it, and did not say at which step: agents of stock torchrun.
    ByMembers,
}

/// Why a join is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The job has ended.
    JobClosed(Closure),
    /// The bounds make no sense.
    BadSpec(BadSpec),
    /// It brings no rank, or more than a world may have.
    BadSlots {
        /// How many it brings.
        slots: u32,
    },
    /// Its state has other tensors than the job's.
    OtherShape {
        /// The job's.
        ours: Shape,
        /// Its own.
        theirs: Shape,
    },
    /// Its batch, data set, seed, number of steps or checkpoint interval differ from the job's.
    OtherRecipe,
    /// It was a member of a job of that name in another store.
    OtherHistory {
        /// This store's.
        ours: HistoryId,
        /// The one it knows.
        theirs: HistoryId,
    },
    /// The job has as many members as it may have.
    TooManyMembers {
        /// How many that is.
        limit: u32,
    },
    /// It was a member and is none any more.
    Departed(Departure),
}

/// Why there was no checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SaveTrouble {
    /// The step that it would have been of.
    pub step: Step,
    /// Who could not write its part. Its own log says why.
    pub member: MemberName,
}

/// Something worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Note {
    /// A member joined.
    Joined {
        /// Who.
        member: MemberId,
        /// What it is called.
        name: MemberName,
    },
    /// A member left or was lost.
    Departed {
        /// Who.
        member: MemberId,
        /// What it was called.
        name: MemberName,
        /// How.
        how: Departure,
    },
    /// A world was published.
    Formed {
        /// Its generation.
        generation: Generation,
        /// Its ranks.
        size: u32,
        /// Why.
        causes: Vec<Cause>,
    },
    /// A world runs.
    Running {
        /// Its generation.
        generation: Generation,
        /// From which state.
        resume: Resume,
    },
    /// A source of state turned out wrong and is not used again for this world.
    BadSource {
        /// The member whose memory it was.
        member: MemberId,
        /// Who noticed.
        noticed_by: MemberId,
    },
    /// A member could not load a checkpoint.
    BadCheckpoint {
        /// The checkpoint's step.
        step: Step,
        /// Who could not load it.
        noticed_by: MemberId,
    },
    /// No source of state is left.
    Unrestorable {
        /// The steps of the checkpoints that were tried.
        tried: Vec<Step>,
    },
    /// Ranks reported different digests of what should be one state.
    Diverged {
        /// The step at which.
        step: Step,
        /// The minority; empty if there is no majority.
        members: Vec<MemberId>,
    },
    /// A checkpoint was committed.
    Committed {
        /// Its step.
        step: Step,
        /// Digest of its manifest.
        manifest: Digest,
    },
    /// A member could not write its part of a checkpoint.
    SaveFailed(SaveTrouble),
    /// A checkpoint was given up.
    SaveDropped {
        /// Its step.
        step: Step,
    },
    /// A member brought proof that this store forgot generations.
    StoreRolledBack {
        /// The highest this store knew.
        knew: Generation,
        /// The highest the member was in.
        seen: Generation,
    },
    /// The job ended.
    Closed(Closure),
}

/// A warning that a member will be gone, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Drain {
    /// The last instant at which it can be expected to live; none if it stays until it is released.
    pub deadline: Option<Timestamp>,
    /// Whether the cloud said so, or else an operator.
    pub by_notice: bool,
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Departure::Died => write!(f, "its process died"),
            Departure::Silent => write!(f, "it was silent for longer than its lease"),
            Departure::Gone => write!(f, "its stream ended and it did not come back"),
            Departure::Unready => write!(f, "it did not answer the new world in time"),
            Departure::Unrestored => write!(f, "it did not load its state in time"),
            Departure::Stuck => write!(f, "it did not reach the step boundary in time"),
            Departure::Unreachable => write!(f, "its neighbours could not reach it"),
            Departure::Replaced { by } => write!(f, "member {by} joined under its name"),
            Departure::Left => write!(f, "it said goodbye"),
            Departure::Drained => write!(f, "it left as planned"),
            Departure::Evicted => write!(f, "an operator evicted it"),
            Departure::Diverged => write!(f, "its state differs from the majority's"),
            Departure::StateLost => write!(
                f,
                "nobody has the job's state any more and no checkpoint was ever committed; started again, it begins anew"
            ),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Formed => write!(f, "formed"),
            Cause::Joined { name } => write!(f, "{name} joined"),
            Cause::Lost { name, how } => write!(f, "lost {name}: {how}"),
            Cause::Notice { name } => write!(f, "notice for {name}"),
            Cause::Drain { name } => write!(f, "drain of {name}"),
            Cause::Resized => write!(f, "resized"),
            Cause::LinkBroken => write!(f, "the ring broke, nobody was lost"),
            Cause::Diverged => write!(f, "ranks held different states"),
            Cause::Unrestored => write!(f, "the state could not be restored"),
            Cause::StoreRolledBack => write!(f, "the store was put back from a backup"),
        }
    }
}

impl fmt::Display for Closure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Closure::Completed { step } => write!(f, "completed at step {step}"),
            Closure::Closed => write!(f, "closed by an operator"),
            Closure::ByMembers => write!(f, "ended by its members"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::JobClosed(closure) => {
                write!(f, "the job is over: {closure}; use another job id, or forget this one first")
            }
            Refusal::BadSpec(why) => write!(f, "{why}"),
            Refusal::BadSlots { slots } => write!(f, "a member brings 1 or more ranks, not {slots}"),
            Refusal::OtherShape { ours, theirs } => write!(
                f,
                "the job's state has {} tensors of {} bytes in all, this worker's has {} of {}, or their names, types \
                 or shapes differ; do all workers run the same model?",
                ours.count, ours.bytes, theirs.count, theirs.bytes
            ),
            Refusal::OtherRecipe => {
                let what = "this worker's global batch, data set length, seed, number of steps or checkpoint interval";
                write!(f, "{what} differ from the job's; start all workers with the same options")
            }
            Refusal::OtherHistory { ours, theirs } => write!(
                f,
                "this coordinator's store has another history of the job ({ours}, the worker knows {theirs}): the store \
                 is new or foreign; restart the worker to join the new history"
            ),
            Refusal::TooManyMembers { limit } => {
                write!(f, "the job has {limit} members, the most it may have")
            }
            Refusal::Departed(how) => write!(f, "no longer a member: {how}"),
        }
    }
}
