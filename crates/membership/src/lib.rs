//! The pure core of reknit: who is in a training job, in what order, since when, and from which state it goes on.
//!
//! ```text
//!             Event ──►  Job::step(now, event)  ──►  Transition { save, then }
//!                                                                  │     │
//!              the driver saves the record by compare-and-swap ◄───┘     │
//!              and only when that has succeeded performs the effects ◄───┘
//!
//! Forming ──enough, last call over──► Establishing(g) ──all ready──► Restoring(g, plan) ──all loaded──► Running(g)
//!    ▲                                    │ loss                        │ loss, bad digest                 │ loss, or
//!    └────────────────────────────────────┴─────────────────────────────┴──────────────────────────────────┘ boundary
//! ```
//!
//! Nothing here knows of sockets, tasks, files, clocks or randomness: time is an argument, ids come in with the
//! events, and the same events at the same instants give the same transitions, byte for byte. That is what lets the
//! tests walk the whole state space and a simulation replay a failure from a seed.
//!
//! # Reading order
//! [`ids`] the words · [`spec`] what a job asks for and the times that follow · [`world`] a ranked membership and how
//! it is chosen · [`holding`] what members hold and the plan that brings them to one state · [`reason`] why the job
//! waits, why a member left, why the world changed · [`event`] what goes in and comes out · [`record`] what is saved ·
//! [`job`] the state machine · [`status`] what an operator sees.
//!
//! # Invariants
//! Tests name the rule they prove.
//!
//! | rule | what is always true |
//! |---|---|
//! | M-1 | A generation has at most one world: its content never changes once it is published. |
//! | M-2 | Generations strictly rise, over crashes, restarts and a store that was put back from a backup. |
//! | M-3 | Ranks are 0..n-1 without gaps; survivors keep their relative order, newcomers follow. |
//! | M-4 | A published world has between `min` and `max` ranks and a multiple of `unit`; the rest wait as spares. |
//! | M-5 | Nobody is told of a generation, a go or a commit before it is saved: such effects come with a `save`. |
//! | M-6 | A world runs only after every member of it was ready and reported the same step of the same lineage. |
//! | M-7 | A committed step that a member with a lease holds is never lost: the world resumes at the highest one, unless that memory was found wrong. |
//! | M-8 | A member that lost its lease, or an older incarnation of a name, changes nothing and is told so. |
//! | M-9 | A late or repeated join of the same member changes nothing. |
//! | M-10 | A request repeated after a lost reply changes nothing more, and is answered: done again, or that the member has gone. |
//! | M-11 | Every wait has a reason that can be shown and an instant at which it is looked at again. |
//! | M-12 | A joiner beyond what the world can take changes nothing for the members that run. |
//! | M-13 | Planned changes merge: they cost one generation, taken at a step boundary. |
//! | M-14 | A checkpoint counts only when every rank of its world reported its part with one digest of the state. |
//! | M-15 | Two members that name the same state hold the same bytes: a state goes by the world that computed it. |
//! | M-16 | A member gets a place only once its program has asked for one: what a program does before holds nobody up. |

#![forbid(unsafe_code)]
#![deny(clippy::wildcard_enum_match_arm)]

pub mod event;
pub mod holding;
pub mod ids;
pub mod job;
pub mod reason;
pub mod record;
pub mod spec;
pub mod status;
pub mod world;

pub use event::{Answer, Effect, Event, Join, Message, Operation, Request, Transition};
pub use holding::{Holding, Plan, Resume, ShardReport, Source};
pub use ids::{
    BadName, Digest, Generation, HistoryId, JobId, Lineage, MemberId, MemberName, Rank, Step, Timestamp,
    WorldSize,
};
pub use job::Job;
pub use reason::{Cause, Closure, Departure, Note, Refusal, SaveTrouble, Waiting};
pub use record::{Commit, JobRecord, Stage, WorldChange};
pub use spec::{Shape, Sharding, Spec, Timing};
pub use status::{MemberStatus, PhaseName, Status};
pub use world::{Peer, Place, Seat, World};
