//! What goes into the core and what comes out of it: two closed lists. A new event makes the compiler list the work.

use std::time::Duration;

use crate::holding::{Holding, Moved, Plan, Resume, ShardReport};
use crate::ids::{Digest, Generation, HistoryId, MemberId, MemberName, Rank, Step, Timestamp};
use crate::reason::{Closure, Note, Refusal};
use crate::record::JobRecord;
use crate::spec::{Shape, Spec};
use crate::world::Place;

/// How a member introduces itself, the first time and every time its stream is new.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Join {
    /// What people call it; a live member of that name is replaced.
    pub name: MemberName,
    /// How many ranks it brings.
    pub slots: u32,
    /// Where its data plane listens (`host:port`).
    pub address: String,
    /// The bounds that the job gets if this is its first member.
    pub spec: Spec,
    /// What it must have in common with the others.
    pub shape: Shape,
    /// The history it belongs to, if it was a member before.
    pub history: Option<HistoryId>,
    /// The last world it was told of; zero if none.
    pub generation: Generation,
    /// Whether it was told to go in that world.
    pub running: bool,
    /// Whether its program has asked for a world: see [`Event::Available`].
    pub available: bool,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// A member's stream began.
    Attach {
        /// Who.
        member: MemberId,
        /// How it introduces itself.
        join: Join,
    },
    /// A member's stream ended: a hint, not a death.
    Detached {
        /// Who.
        member: MemberId,
    },
    /// A member renews its lease.
    Renew {
        /// Who.
        member: MemberId,
        /// The last world it was told of.
        generation: Generation,
        /// The last step it has committed.
        step: Step,
    },
    /// A member's program asks for a world. Until then it may be doing anything, like reading its data for an hour, and
    /// gets no place (rule M-16).
    Available {
        /// Who.
        member: MemberId,
    },
    /// A member says goodbye.
    Leave {
        /// Who.
        member: MemberId,
    },
    /// A member has left the old world, has built the new one, and says what it holds.
    Ready {
        /// Who.
        member: MemberId,
        /// The new world.
        generation: Generation,
        /// What it holds.
        holding: Holding,
    },
    /// A member has carried out its plan.
    Restored {
        /// Who.
        member: MemberId,
        /// The world.
        generation: Generation,
        /// Which of its plans.
        attempt: u32,
        /// Where it now is.
        resume: Resume,
        /// What was moved, with the digests of both ends.
        moved: Vec<Moved>,
    },
    /// A member could not carry out its plan.
    RestoreFailed {
        /// Who.
        member: MemberId,
        /// The world.
        generation: Generation,
        /// Which of its plans.
        attempt: u32,
        /// The member whose state did not arrive, or none if it was the checkpoint.
        culprit: Option<MemberId>,
    },
    /// A member's ring broke.
    Broken {
        /// Who says so.
        member: MemberId,
        /// Which world's ring.
        generation: Generation,
        /// Whose connection ended or stalled.
        suspects: Vec<Rank>,
    },
    /// A member rests at a step boundary: the one it was asked to stop at, or the one at which it was when it was told
    /// that its world is over ([`Message::Break`]).
    Boundary {
        /// Who.
        member: MemberId,
        /// The world.
        generation: Generation,
        /// What it holds.
        holding: Holding,
    },
    /// A member has committed the first step of a world.
    FirstStep {
        /// Who.
        member: MemberId,
        /// The world.
        generation: Generation,
        /// The step.
        step: Step,
    },
    /// A member has reached the job's last step.
    Finished {
        /// Who.
        member: MemberId,
        /// The world.
        generation: Generation,
        /// The step.
        step: Step,
    },
    /// A member has written its part of a checkpoint.
    ShardWritten {
        /// Who.
        member: MemberId,
        /// The world that makes the checkpoint.
        generation: Generation,
        /// The step it is of.
        step: Step,
        /// What was written.
        report: ShardReport,
    },
    /// A member could not write its part of a checkpoint.
    SaveFailed {
        /// Who.
        member: MemberId,
        /// The world that makes the checkpoint.
        generation: Generation,
        /// The step it is of.
        step: Step,
    },
    /// The member that was asked to has written the list that makes the parts one.
    ManifestWritten {
        /// Who.
        member: MemberId,
        /// The world that made the checkpoint.
        generation: Generation,
        /// The step it is of.
        step: Step,
        /// Digest of the manifest.
        manifest: Digest,
    },
    /// The cloud warns that a member will be taken.
    Notice {
        /// Who.
        member: MemberId,
        /// The last instant at which it can be expected to live.
        deadline: Timestamp,
    },
    /// An operator asks for something.
    Operate {
        /// Names the request, so that it can be answered.
        request: Request,
        /// What.
        operation: Operation,
    },
    /// The driver was itself held up, so that members could not be heard: leases are lengthened by that much.
    Stalled {
        /// For how long.
        by: Duration,
    },
    /// Time has passed.
    Tick,
}

/// Names an operator's request, so that its answer finds the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request(pub u64);

/// What an operator can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Take a member out at the next step boundary.
    Drain {
        /// Its name.
        name: MemberName,
    },
    /// Tell a member's world that the cloud will take it.
    Notice {
        /// Its name.
        name: MemberName,
        /// The last instant at which it can be expected to live.
        deadline: Timestamp,
    },
    /// Take back a drain or a notice.
    Undrain {
        /// The member's name.
        name: MemberName,
    },
    /// Take a member out now.
    Evict {
        /// Its name.
        name: MemberName,
    },
    /// Change the bounds.
    Resize {
        /// The least number of ranks.
        min: u32,
        /// The most.
        max: u32,
    },
    /// Make a checkpoint at the next step boundary.
    SaveNow,
    /// End the job at the next step boundary.
    Close,
}

/// What became of an operator's request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// It is saved and under way (or was already so).
    Done,
    /// No member has that name.
    NoSuchMember {
        /// The name.
        name: MemberName,
        /// The names there are, at most sixteen.
        known: Vec<MemberName>,
    },
    /// The bounds make no sense.
    BadSpec(crate::spec::BadSpec),
    /// The job has ended.
    JobClosed(Closure),
    /// No world runs that could do it.
    NotRunning,
}

/// What a member is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Message {
    /// It is a member (again).
    Attached {
        /// The history it belongs to.
        history: HistoryId,
        /// How often it is to renew its lease.
        renew_every: Duration,
    },
    /// It is not, or no longer, a member. Its stream ends here.
    Refused(Refusal),
    /// Its place in a new world: leave the old one, build this one, answer `Ready`.
    World(Place),
    /// What to do before the barrier opens.
    Plan(Plan),
    /// The barrier is open: run from this state.
    Go {
        /// The world.
        generation: Generation,
        /// The state that the member has, by the name it has from now on.
        resume: Resume,
    },
    /// The world is over, and the member has no place in another one yet. It answers [`Event::Boundary`] as soon as its
    /// program rests, unless a world has come before that: what it holds may be the newest state.
    Break {
        /// The world.
        generation: Generation,
    },
    /// Stop at the next step boundary.
    Boundary {
        /// The world.
        generation: Generation,
    },
    /// This member is to leave: at a step boundary, or when its machine is taken away if that comes first.
    Draining {
        /// How long it can still be expected to live; none if it stays until it is released.
        left: Option<Duration>,
    },
    /// This member has no place in that world, but holds what some of its members need: it is to let them in and serve
    /// them while its program rests.
    Serve {
        /// The world.
        generation: Generation,
    },
    /// A checkpoint that this member has written its part of will never be whole: the part is of no use.
    SaveGivenUp {
        /// The world that made it.
        generation: Generation,
        /// The step it is of.
        step: Step,
    },
    /// Make a checkpoint at the next step boundary.
    SaveNow {
        /// The world.
        generation: Generation,
    },
    /// Write the list that makes these parts one checkpoint.
    Publish {
        /// The world that made it.
        generation: Generation,
        /// The step it is of.
        step: Step,
        /// What each rank reported, in rank order.
        shards: Vec<ShardReport>,
    },
    /// A checkpoint counts from now on; older ones may be deleted.
    Committed {
        /// The checkpoints that are kept, oldest first.
        kept: Vec<crate::record::Commit>,
    },
    /// The planned leave is complete. Its stream ends here.
    Released,
    /// The job is over. Its stream ends here.
    Closed(Closure),
}

impl Message {
    /// Whether the member's stream ends with this message.
    pub fn is_last(&self) -> bool {
        match self {
            Message::Refused(_) | Message::Released | Message::Closed(_) => true,
            Message::Attached { .. }
            | Message::World(_)
            | Message::Plan(_)
            | Message::Go { .. }
            | Message::Break { .. }
            | Message::Boundary { .. }
            | Message::Draining { .. }
            | Message::Serve { .. }
            | Message::SaveGivenUp { .. }
            | Message::SaveNow { .. }
            | Message::Publish { .. }
            | Message::Committed { .. } => false,
        }
    }
}

/// Something the driver has to do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Tell a member something.
    Tell {
        /// Whom.
        member: MemberId,
        /// What.
        message: Message,
    },
    /// Answer an operator.
    Answer {
        /// Which request.
        request: Request,
        /// What became of it.
        answer: Answer,
    },
    /// Log something.
    Note(Note),
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[must_use = "the record must be saved before the effects are performed"]
pub struct Transition {
    /// The record to save, by compare-and-swap on the job's revision, before anything else is done.
    pub save: Option<JobRecord>,
    /// What to do once that has succeeded (at once, if there is nothing to save), in order.
    pub then: Vec<Effect>,
}
