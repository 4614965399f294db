//! Rules broken on purpose. Each must be caught: a simulation that cannot see a broken rule proves nothing about a sound
//! one.
//!
//! A mutant distorts what surrounds the code under test (its store, its network, a member's program), so that the code
//! itself stays as it is; each stands for a mistake that the code could make.

use clap::ValueEnum;

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mutant {
    /// The store answers some saves without writing: a coordinator that saves to a cache.
    AckWithoutWriting,
    /// Saves are answered before they are written: a driver that tells before it has saved.
    TellBeforeSaving,
    /// A restarted coordinator takes up the record before the last one: a store that loses what it confirmed.
    ForgetsTheLast,
    /// A member counts a step although its collective broke: no fence around the ring.
    CommitsAfterBreak,
    /// A member applies a step again after a break.
    AppliesTwice,
    /// A member claims to hold one step more than it does.
    ClaimsTooMuch,
    /// A barrier opens at once with the state of the go before, and members do not look whether they have it: a go that is
    /// not bound to its generation.
    StaleGo,
    /// Ranks take their shares as if they were one rank further.
    ShiftsShares,
    /// A part of a checkpoint is reported and not written.
    LosesParts,
    /// Every part of a checkpoint is reported with the same digest of the state, whatever the state.
    BlindDigests,
    /// Two members of a world are told each other's ranks.
    SwapsRanks,
    /// A member that is refused goes on under its old id and old world.
    IgnoresRefusal,
    /// A committed checkpoint's files are deleted too early.
    DeletesKept,
    /// An operator's request is answered, and the coordinator dies and comes back without it.
    ForgetsPromises,
}
