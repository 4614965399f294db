//! One process of the job: the real session, and a model of the threads around it.

use std::collections::BTreeMap;

use reknit_membership::holding::{Holding, Plan, Resume, ShardReport, Shards};
use reknit_membership::world::Place;
use reknit_membership::{Digest, Generation, MemberId, MemberName, Step};
use reknit_proto::rendezvous::SecretBytes;
use reknit_trainer::ControlWord;
use reknit_trainer::session::Session;

use crate::collective::{CallKey, Reduced};
use crate::disk::PartKey;
use crate::happening::{Happening, ProcessKey, StreamKey};
use crate::queue::Ms;
use crate::rng::Rng;

/// What a member's memory truly is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Content {
    /// Follows from every step that was ever applied, and with what.
    pub hash: u64,
    /// How many steps that were.
    pub step: u64,
    /// Whether a bit of it has flipped.
    pub flipped: bool,
}

/// What the program believes its memory is, as in the trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    Fresh(Digest),
    At(Resume),
    Torn,
}

impl Held {
    pub(crate) fn holding(self) -> Holding {
        match self {
            Held::Fresh(digest) => Holding::Fresh { digest },
            Held::At(resume) => Holding::State { resume, shards: Shards::Whole },
            Held::Torn => Holding::Nothing,
        }
    }

    pub(crate) fn is(self, resume: Resume) -> bool {
        match self {
            Held::Fresh(_) => resume.step == Step(0),
            Held::At(held) => held == resume || (held.step == resume.step && resume.lineage > held.lineage),
            Held::Torn => false,
        }
    }

    /// As many steps as the program believes are committed.
    pub(crate) fn steps_done(self) -> u64 {
        match self {
            Held::At(resume) => resume.step.0,
            Held::Fresh(_) | Held::Torn => 0,
        }
    }
}

/// Where the link's thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// It pauses before the next attempt.
    Pauses,
    /// It has introduced itself and waits to be heard.
    Calls(StreamKey),
    /// Its stream is up.
    Up(StreamKey),
    /// It says the last words.
    Parts(StreamKey),
    /// It has ended.
    Over,
}

/// A step on its way.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct StepWork {
    pub(crate) place: Place,
    pub(crate) index: u64,
    pub(crate) calls: u32,
    pub(crate) word: ControlWord,
    /// What its collectives have come to so far.
    pub(crate) result: Option<Reduced>,
}

/// Where the program's thread is.
#[derive(Debug, Clone)]
pub(crate) enum Program {
    /// It asks what to do.
    Looks,
    /// It waits and serves what it holds.
    Rests { world: Generation },
    /// It has stopped waiting, and has not yet said that it is busy.
    RestEnds,
    /// It carries out a plan.
    Restores(Restoring),
    /// It computes.
    Computes(StepWork),
    /// It is inside a collective.
    Reduces(StepWork),
    /// Its collective has failed.
    Broke { generation: Generation, suspects: Vec<reknit_membership::Rank> },
    /// It applies the step.
    Updates(StepWork),
    /// It has done the last step.
    Finishes,
    /// It is done with the job.
    Over,
}

/// A plan that is being carried out.
#[derive(Debug, Clone)]
pub(crate) struct Restoring {
    pub(crate) plan: Plan,
    pub(crate) sources: Vec<Fetch>,
    pub(crate) since: Ms,
}

/// One source's part of a transfer.
#[derive(Debug, Clone)]
pub(crate) struct Fetch {
    pub(crate) from: MemberId,
    pub(crate) address: String,
    pub(crate) stage: FetchStage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FetchStage {
    Dials,
    /// Connected; the holder takes it up when it rests.
    Waits {
        holder: ProcessKey,
        since: Ms,
    },
    /// Bytes flow, for as long as the holder rests on.
    Flows {
        holder: ProcessKey,
        rest: u64,
        until: Ms,
    },
    Done {
        content: Content,
        sent: Digest,
        got: Digest,
    },
}

/// What the watcher of a ring knows of its connections, as in the collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    Idle,
    Running,
    RunningOut(ProcessKey),
    Down,
}

/// The present world's ring, as one member has it.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    pub(crate) place: Place,
    pub(crate) secret: SecretBytes,
    pub(crate) next: Option<ProcessKey>,
    pub(crate) prev: Option<ProcessKey>,
    /// Whether both neighbours are connected …
    pub(crate) linked: bool,
    /// … and the threads of this member know.
    pub(crate) formed: bool,
    pub(crate) aborted: bool,
    pub(crate) watch: Watch,
    /// A connection that ended before the ring stood.
    pub(crate) lost_early: Option<ProcessKey>,
    /// The number of the next collective.
    pub(crate) call: u64,
}

impl Ring {
    pub(crate) fn generation(&self) -> Generation {
        self.place.generation
    }

    /// The first rank of the neighbour that listens at `address`.
    pub(crate) fn rank_at(&self, address: &str) -> reknit_membership::Rank {
        if self.place.next.address == address { self.place.next.rank } else { self.place.prev.rank }
    }
}

/// Parts of checkpoints that this process has written or is writing.
#[derive(Debug, Default)]
pub(crate) struct Saver {
    pub(crate) writing: Option<(PartKey, Content)>,
    pub(crate) written: BTreeMap<(Generation, Step), (PartKey, Content)>,
    pub(crate) publishing: BTreeMap<(Generation, Step), Vec<ShardReport>>,
}

/// Whether a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It does.
    Runs,
    /// It is stopped and may go on.
    Stopped,
    /// It is gone, or on its way out; its machine may be, too.
    Gone {
        /// Nobody is told.
        silently: bool,
    },
}

pub(crate) struct Process {
    pub(crate) host: usize,
    pub(crate) name: MemberName,
    pub(crate) address: String,
    pub(crate) life: Life,
    pub(crate) session: Session,
    pub(crate) link: Link,
    /// Attempts to reach a coordinator since the last one that did.
    pub(crate) attempts: u32,
    /// Makes old [`Happening::Connects`] void.
    pub(crate) connect_turn: u64,
    pub(crate) rng: Rng,
    pub(crate) program: Program,
    /// Makes old [`Happening::ProgramGoesOn`] void.
    pub(crate) turn: u64,
    /// When the program's next turn is due, if one is.
    pub(crate) due: Option<Ms>,
    pub(crate) held: Held,
    pub(crate) content: Content,
    /// The world whose go was taken.
    pub(crate) running: Option<Generation>,
    /// The newest ring that was handed over and not yet taken.
    pub(crate) new_group: Option<Generation>,
    pub(crate) group: Option<Generation>,
    pub(crate) ring: Option<Ring>,
    /// The collective that the program is inside.
    pub(crate) in_call: Option<CallKey>,
    /// Generations whose door is open, with its secret.
    pub(crate) doors: BTreeMap<Generation, SecretBytes>,
    /// The world without a place for it whose members it lets in.
    pub(crate) serving: Option<Generation>,
    /// The newest generation whose door was closed.
    pub(crate) doors_over: Option<Generation>,
    /// Counts the times it began to rest.
    pub(crate) rest: u64,
    pub(crate) saver: Saver,
    pub(crate) finishing: Option<(Generation, Ms)>,
    pub(crate) last_saved_in: Option<Generation>,
    pub(crate) deferred: Vec<Happening>,
    /// The cloud's deadline, if it warned.
    pub(crate) noticed: bool,
    /// What it last heard of a go, for a mutant.
    pub(crate) last_go: Option<Resume>,
    /// Who it has been, the present last.
    pub(crate) ids: Vec<MemberId>,
    /// Steps it has committed, in all worlds.
    pub(crate) commits: u64,
}

impl Process {
    pub(crate) fn runs(&self) -> bool {
        self.life == Life::Runs
    }

    pub(crate) fn is_there(&self) -> bool {
        !matches!(self.life, Life::Gone { .. })
    }

    pub(crate) fn member(&self) -> MemberId {
        self.session.member()
    }

    /// The last world it was told of.
    pub(crate) fn generation(&self) -> Generation {
        self.session.place().map(|place| place.generation).unwrap_or_default()
    }

    pub(crate) fn is_resting(&self) -> bool {
        matches!(self.program, Program::Rests { .. })
    }

    /// The state it truly has, if that is a state.
    pub(crate) fn state(&self) -> Option<Content> {
        (self.held != Held::Torn && self.is_there()).then_some(self.content)
    }

    pub(crate) fn ring_of(&mut self, generation: Generation) -> Option<&mut Ring> {
        self.ring.as_mut().filter(|ring| ring.generation() == generation)
    }

    pub(crate) fn close_door(&mut self, generation: Generation) {
        if self.doors.remove(&generation).is_some() {
            self.doors_over = self.doors_over.max(Some(generation));
        }
    }
}
