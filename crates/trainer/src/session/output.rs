//! What follows from news: what is to be done, what the program is to do, and how it all ends.

use std::time::Duration;

use reknit_membership::event::Event;
use reknit_membership::holding::{Plan, Resume, ShardReport};
use reknit_membership::reason::{Closure, Refusal};
use reknit_membership::record::Commit;
use reknit_membership::world::Place;
use reknit_membership::{Generation, Step};
use reknit_proto::rendezvous::SecretBytes;

/// Something to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Tell the coordinator; if there is no stream, it need not be kept.
    Send(Event),
    /// Build the ring of this world, in the background.
    Form {
        /// The place in it.
        place: Place,
        /// What its connections must prove.
        secret: SecretBytes,
    },
    /// End the ring of this world, and whatever state is being moved for it.
    Abort {
        /// Which.
        generation: Generation,
    },
    /// What is being moved for the plan that the program carries out is of no use any more.
    AbandonPlan {
        /// Its world.
        generation: Generation,
    },
    /// Let members of this world in that want state, and serve them while the program rests.
    Serve {
        /// A world in which this member has no place.
        generation: Generation,
        /// What their connections must prove.
        secret: SecretBytes,
    },
    /// End the stream and begin a new one, with a new introduction.
    Reconnect,
    /// The program's directive may have changed.
    Wake,
    /// Write the list that makes these parts one checkpoint.
    Publish {
        /// The world that made it.
        generation: Generation,
        /// The step it is of.
        step: Step,
        /// What each rank wrote.
        shards: Vec<ShardReport>,
    },
    /// Delete this member's part of a checkpoint: it will never be whole.
    SaveGivenUp {
        /// The world that made it.
        generation: Generation,
        /// The step it is of.
        step: Step,
    },
    /// Tell the program that it is to leave.
    Notice {
        /// How long its machine can still be expected to live; none if it stays until it is released.
        left: Option<Duration>,
    },
    /// These checkpoints are committed; older ones may be deleted.
    Committed {
        /// Oldest first.
        kept: Vec<Commit>,
    },
}

/// How a membership ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The job is over.
    Closed(Closure),
    /// The planned leave is complete.
    Released,
    /// The coordinator does not let this process in, or not any more.
    Refused(Refusal),
    /// The coordinator cannot be talked to, and trying again will not help.
    Rejected {
        /// What it said.
        why: String,
    },
    /// The operating system does not give this process what a world needs: descriptors, threads.
    MachineFailed {
        /// What it refused.
        why: String,
    },
    /// The program left.
    Left,
}

/// What the training program is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Directive {
    /// Nothing yet.
    Wait,
    /// Bring the state to the plan's step, then say so.
    Restore(Plan),
    /// Train, from this state.
    Run {
        /// The world.
        place: Place,
        /// The state.
        resume: Resume,
    },
    /// Stop: there will be no further step.
    Over(End),
}
