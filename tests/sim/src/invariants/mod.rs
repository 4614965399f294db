//! What must always hold, one property to a file. Each sees everything that the simulation shows ([`Seen`]), may look at
//! how things truly are ([`Sim`]), and keeps what it has to remember.
//!
//! | property | rule | file |
//! |---|---|---|
//! | a generation has one world, and every member is told that one | M-1 | `unique_world.rs` |
//! | generations strictly rise, in the store and for every member | M-2 | `rising_generations.rs` |
//! | ranks are 0..n-1, survivors keep their order, names are unique | M-3 | `ranks.rs` |
//! | a world's size is within the bounds in force | M-4 | `size.rs` |
//! | nobody is told of anything that is not in the store | M-5, D-2 | `told_is_stored.rs` |
//! | a world goes only when all its members hold its state | M-6 | `barrier.rs` |
//! | no step is computed in an old world with members of a new one | S6 | `one_world_runs.rs` |
//! | no committed step is lost while somebody with a lease holds it | M-7 | `no_step_lost.rs` |
//! | whoever is named as a source lets receivers in | M-7 | `sources.rs` |
//! | whoever has left stays away | M-8 | `fenced.rs` |
//! | what an operator was promised is kept | M-10, D-2 | `promises.rs` |
//! | every wait has a reason | M-11 | `waits.rs` |
//! | planned changes merge, and what is no change costs none | M-9, M-12, M-13 | `calm.rs` |
//! | a checkpoint counts only when all its parts are there and agree | M-14 | `checkpoints.rs` |
//! | what is kept can be loaded | M-14 | `kept_checkpoints.rs` |
//! | two members that name one state hold the same | M-15 | `one_state_per_name.rs` |
//! | whoever computes together is at one step, with one state | M-6, M-15 | `one_collective.rs` |
//! | every step is applied once | M-7 | `applied_once.rs` |
//! | every sample is in exactly one committed step | design §5 | `samples.rs` |
//! | what waits for a reader is bounded | D-4 | `queues.rs` |
//! | a member is turned away for a reason only | L6 | `endings.rs` |
//! | who is well is not struck off | M-8 | `unharmed.rs` |
//!
//! That all becomes well when nothing fails any more is demanded by `run.rs`.

mod applied_once;
mod barrier;
mod calm;
mod checkpoints;
mod endings;
mod fenced;
mod kept_checkpoints;
mod no_step_lost;
mod one_collective;
mod one_state_per_name;
mod one_world_runs;
mod promises;
mod queues;
mod ranks;
mod rising_generations;
mod samples;
mod size;
mod sources;
mod told_is_stored;
mod unharmed;
mod unique_world;
mod waits;

use reknit_membership::event::{Answer, Message, Operation};
use reknit_membership::holding::Resume;
use reknit_membership::record::{Commit, Stage};
use reknit_membership::{Generation, JobRecord, MemberId, Status};
use reknit_trainer::session::End;

use crate::collective::Entry;
use crate::happening::ProcessKey;
use crate::process::Content;
use crate::queue::Ms;
use crate::sim::Sim;

/// What the simulation shows.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    /// A record is in the store from now on. A ghost is a coordinator that has died since it asked for that.
    Stored { server: usize, by_ghost: bool, before: Option<&'a JobRecord>, after: &'a JobRecord },
    /// The store was put back from a backup.
    RolledBack { found: &'a JobRecord },
    /// A coordinator died or has to start over: what it knew beyond the record is gone.
    Forgot { server: usize },
    /// A coordinator tells a member something.
    Told { server: usize, member: MemberId, message: &'a Message },
    /// A coordinator has taken in that a member knows this generation.
    Proved { generation: Generation },
    /// What a coordinator said has arrived.
    Heard { process: ProcessKey, message: &'a Message },
    /// A member begins to train in a world.
    TookGo { process: ProcessKey, generation: Generation, resume: Resume, content: Content },
    /// A member has carried out its plan.
    Restored { resume: Resume, content: Content },
    /// Everybody has entered a collective.
    Reduced { generation: Generation, entries: &'a [Entry] },
    /// A member commits a step.
    Committed {
        process: ProcessKey,
        generation: Generation,
        index: u64,
        resume: Resume,
        before: Content,
        after: Content,
    },
    /// A member that is to get its state from another one was not let in there for as long as it waited.
    LetsNobodyIn { holder: ProcessKey, by: ProcessKey, since: Ms },
    /// A member is said not to have delivered a state.
    Accused { member: MemberId },
    /// A member could not load a checkpoint.
    LoadFailed { commit: &'a Commit, on_purpose: bool, why: &'a str },
    /// A member's part in the job is over.
    Ended { process: ProcessKey, end: &'a End },
    /// So many messages wait for a reader.
    Queued { waiting: usize },
    /// An operator asks for something …
    Asked { operation: &'a Operation },
    /// … and is answered.
    Answered { operation: &'a Operation, answer: &'a Answer, repeated: bool },
    /// Somebody looked at the job.
    Status { status: &'a Status, members: u32 },
    /// When all was well, so many planned changes came within one window and cost so many generations.
    Burst { changes: u64, generations: u64 },
    /// When all was well, something happened that is no change, and the generation went from one to another.
    Undisturbed { what: &'static str, before: Generation, after: Generation },
    /// When all was well, a member was killed, and the survivors committed their next step so much later.
    Recovered { took: Ms, allowed: Ms },
}

/// Something that must always hold.
pub(crate) trait Invariant {
    /// Its name.
    fn name(&self) -> &'static str;

    /// Takes in what was seen.
    ///
    /// # Errors
    /// What does not hold.
    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String>;
}

/// All of them, at the beginning of a run.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(unique_world::UniqueWorld::default()),
        Box::new(rising_generations::RisingGenerations::default()),
        Box::new(ranks::Ranks),
        Box::new(size::Size),
        Box::new(told_is_stored::ToldIsStored::default()),
        Box::new(barrier::Barrier::default()),
        Box::new(one_world_runs::OneWorldRuns::default()),
        Box::new(no_step_lost::NoStepLost::default()),
        Box::new(sources::Sources),
        Box::new(fenced::Fenced::default()),
        Box::new(promises::Promises::default()),
        Box::new(waits::Waits),
        Box::new(calm::Calm),
        Box::new(checkpoints::Checkpoints::default()),
        Box::new(kept_checkpoints::KeptCheckpoints::default()),
        Box::new(one_state_per_name::OneStatePerName::default()),
        Box::new(one_collective::OneCollective),
        Box::new(applied_once::AppliedOnce),
        Box::new(samples::Samples),
        Box::new(queues::Queues),
        Box::new(endings::Endings::default()),
        Box::new(unharmed::Unharmed::default()),
    ]
}

/// The rule holds, or `what` says how it does not.
fn demand(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

/// The world that a record lets run for the first time, if it does.
fn goes<'a>(before: Option<&JobRecord>, after: &'a JobRecord) -> Option<&'a reknit_membership::World> {
    let runs = |record: &JobRecord| (record.stage == Stage::Running).then_some(record.generation);
    let new = runs(after).is_some() && before.and_then(runs) != runs(after);
    after.world.as_ref().filter(|_| new)
}

/// The world that a record publishes, if it does.
fn publishes<'a>(before: Option<&JobRecord>, after: &'a JobRecord) -> Option<&'a reknit_membership::World> {
    let old = before.and_then(|record| record.world.as_ref());
    after.world.as_ref().filter(|world| old != Some(*world))
}
