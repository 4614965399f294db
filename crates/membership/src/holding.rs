//! What members hold, and the decision that brings a world to one state: which step it resumes at, who keeps what it
//! has, who fetches from whom, who loads from a checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Digest, Generation, Lineage, MemberId, Rank, Step};
use crate::record::Commit;
use crate::spec::Sharding;
use crate::world::{Peer, Seat};

/// One exact state of the job: two members that name the same one hold the same bytes (rule M-15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Resume {
    /// The world that computed it, or that started with it.
    pub lineage: Lineage,
    /// How many steps are committed in it.
    pub step: Step,
}

/// Which parts of a state a member has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shards {
    /// All of it.
    Whole,
    /// These shards of [`Sharding::Sharded`].
    Only(BTreeSet<u32>),
}

/// What a member has in memory when it answers a world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Holding {
    /// Nothing of use: a restore was interrupted half way.
    Nothing,
    /// The state its program started with. Members with one digest start alike.
    Fresh {
        /// Digest of the whole state.
        digest: Digest,
    },
    /// A state of the job.
    State {
        /// Which.
        resume: Resume,
        /// Which parts of it.
        shards: Shards,
    },
}

/// Where a world's state came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Survivors' memory; nothing was lost that a survivor had.
    Memory,
    /// A committed checkpoint.
    Checkpoint {
        /// The step at which it was made.
        step: Step,
    },
    /// The memory of members of an abandoned branch: neither a survivor nor a checkpoint was left.
    AbandonedMemory,
    /// The state the programs start with.
    Initial,
}

/// Shards to get from other members, any part of them from any of the sources.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fetch {
    /// Which shards; empty means the whole of a replicated state.
    pub shards: Vec<u32>,
    /// Who has them: at least one, at most [`SOURCES_MAX`].
    pub from: Vec<Peer>,
}

/// Shards to read from a committed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Load {
    /// The checkpoint.
    pub commit: Commit,
    /// Which shards; empty means the whole of a replicated state.
    pub shards: Vec<u32>,
}

/// What one member has to do before the barrier opens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan {
    /// The world that restores.
    pub generation: Generation,
    /// Counts the plans of this generation: an answer to an older one is ignored.
    pub attempt: u32,
    /// The state to reach, by the name it has until the barrier opens.
    pub resume: Resume,
    /// What to get from other members' memory.
    pub fetch: Vec<Fetch>,
    /// What to read from a checkpoint.
    pub load: Option<Load>,
}

/// How one part of a state arrived at a member: what its source says it sent, and what came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moved {
    /// The member that sent it.
    pub from: MemberId,
    /// Bytes moved.
    pub bytes: u64,
    /// The source's digest of them.
    pub sent: Digest,
    /// The receiver's digest of them.
    pub got: Digest,
}

/// What one rank wrote for a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ShardReport {
    /// Size of its file in bytes.
    pub bytes: u64,
    /// Digest of its file.
    pub file: Digest,
    /// Digest of the whole state as this rank had it: ranks are compared at every commit.
    pub state: Digest,
}

/// The most members one plan names as sources: a plan's size must not grow with the world.
pub const SOURCES_MAX: usize = 8;

/// All that the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct Holdings<'a> {
    /// The generation that is about to run.
    pub generation: Generation,
    /// Its members.
    pub seats: &'a [Seat],
    /// What they hold.
    pub held: &'a BTreeMap<MemberId, Holding>,
    /// Members that have no place in the world (because they leave, or because there is none for them) and still hold
    /// something, with their addresses.
    pub leaving: &'a [(Peer, Holding)],
    /// The lineage of the last world that ran.
    pub lineage: Lineage,
    /// The states on the way to the present one: see [`crate::record::JobRecord::branch`].
    pub branch: &'a BTreeMap<Lineage, Step>,
    /// The committed checkpoints, oldest first. They lie on the branch.
    pub commits: &'a [Commit],
    /// How the state is spread.
    pub sharding: Sharding,
    /// Members whose memory was found wrong.
    pub distrusted: &'a BTreeSet<MemberId>,
    /// Checkpoints that nobody could read.
    pub unreadable: &'a BTreeSet<(Generation, Step)>,
}

/// What one member has to move; members that are not named keep what they have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Moves {
    /// See [`Plan::fetch`].
    pub fetch: Vec<Fetch>,
    /// See [`Plan::load`].
    pub load: Option<Load>,
}

/// The state a world resumes from, and who has to move what.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Decision {
    /// The state that every member has when the barrier opens, by the name it has had so far. From then on it goes by
    /// the lineage of the world that runs from it.
    pub resume: Resume,
    /// Where it comes from.
    pub source: Source,
    /// Who has to move something.
    pub moves: BTreeMap<MemberId, Moves>,
}

/// Decides from what a world resumes: the highest step whose whole state survives in members' memory, else the newest
/// readable checkpoint, else (if none was ever committed) what is left of an abandoned branch, else the initial state.
///
/// `None` if checkpoints were committed but none is readable and no memory survives, or if all that survives is in
/// memory that is not trusted for now: starting over would throw away what an operator may still be able to mend.
pub fn decide(h: &Holdings<'_>) -> Option<Decision> {
    let memory = in_memory(h, |member| !h.distrusted.contains(&member));
    let present = best(h, &memory, |resume| is_present(h, resume));
    let commit = h.commits.iter().rev().find(|c| !h.unreadable.contains(&c.key()));
    match (present, commit) {
        (Some(resume), commit) if commit.is_none_or(|c| c.step <= resume.step) => {
            Some(from_memory(h, &memory, resume, Source::Memory))
        }
        (_, Some(commit)) => Some(from_checkpoint(h, commit)),
        (_, None) if !h.commits.is_empty() => None,
        (_, None) => match best(h, &memory, |_| true) {
            Some(held) => Some(from_memory(h, &memory, held, Source::AbandonedMemory)),
            None if best(h, &in_memory(h, |_| true), |_| true).is_some() => None,
            None => from_initial(h),
        },
    }
}

/// A member that has a state, or part of it.
struct Holder<'a> {
    member: MemberId,
    rank: Rank,
    address: &'a str,
    shards: &'a Shards,
    seated: bool,
}

/// Who holds what, the seated members of each state before the others.
type Memory<'a> = BTreeMap<Resume, Vec<Holder<'a>>>;

fn in_memory<'a>(h: &Holdings<'a>, trusted: impl Fn(MemberId) -> bool) -> Memory<'a> {
    let seated = h.seats.iter().filter_map(|seat| {
        let holding = h.held.get(&seat.member)?;
        Some((seat.member, seat.rank, seat.address.as_str(), holding, true))
    });
    let leaving = h.leaving.iter();
    let leaving =
        leaving.map(|(peer, holding)| (peer.member, peer.rank, peer.address.as_str(), holding, false));
    let mut memory = Memory::new();
    for (member, rank, address, holding, seated) in seated.chain(leaving) {
        match holding {
            Holding::State { resume, shards } if trusted(member) => {
                let holder = Holder { member, rank, address, shards, seated };
                memory.entry(present_name(h, *resume)).or_default().push(holder);
            }
            Holding::State { .. } | Holding::Fresh { .. } | Holding::Nothing => {}
        }
    }
    memory
}

fn is_on_branch(h: &Holdings<'_>, resume: Resume) -> bool {
    h.branch.get(&resume.lineage).is_some_and(|last| resume.step <= *last)
}

/// Whether `resume` lies on the way to the present state, or beyond all that the record knows of.
fn is_present(h: &Holdings<'_>, resume: Resume) -> bool {
    is_on_branch(h, resume) || resume.lineage > h.lineage
}

/// A branch has one state per step, whichever of its worlds a member has it from: all go by the last lineage.
fn present_name(h: &Holdings<'_>, resume: Resume) -> Resume {
    if is_on_branch(h, resume) { Resume { lineage: h.lineage, step: resume.step } } else { resume }
}

/// The best state in memory of which every part survives: highest step first, then newest lineage.
fn best(h: &Holdings<'_>, memory: &Memory<'_>, allowed: impl Fn(Resume) -> bool) -> Option<Resume> {
    let mut states: Vec<Resume> = memory.keys().copied().filter(|resume| allowed(*resume)).collect();
    states.sort_by_key(|resume| (resume.step, resume.lineage));
    states.into_iter().rev().find(|resume| is_whole(h.sharding, &memory[resume]))
}

/// Whether the holders of a state have all of it between them.
fn is_whole(sharding: Sharding, holders: &[Holder<'_>]) -> bool {
    let mut have = BTreeSet::new();
    for holder in holders {
        match holder.shards {
            Shards::Whole => return true,
            Shards::Only(some) => have.extend(some.iter().copied()),
        }
    }
    match sharding {
        Sharding::Replicated => false,
        Sharding::Sharded { count } => (0..count).all(|shard| have.contains(&shard)),
    }
}

/// The shards that the member at `seat` needs in a world of `size` ranks, empty for a replicated state.
fn needed(sharding: Sharding, seat: &Seat, size: u32) -> Vec<u32> {
    match sharding {
        Sharding::Replicated => Vec::new(),
        Sharding::Sharded { count } => {
            let bound = |rank: u32| (u64::from(rank) * u64::from(count) / u64::from(size)) as u32;
            (bound(seat.rank.0)..bound(seat.rank.0 + seat.slots)).collect()
        }
    }
}

fn world_size(h: &Holdings<'_>) -> u32 {
    h.seats.iter().map(|s| s.slots).sum()
}

/// Everybody comes to the state `resume` that trusted members have in memory.
fn from_memory(h: &Holdings<'_>, memory: &Memory<'_>, resume: Resume, source: Source) -> Decision {
    let holders = Sources::of(&memory[&resume]);
    let size = world_size(h);
    let mut moves = BTreeMap::new();
    for (index, seat) in h.seats.iter().enumerate() {
        let own = holders.shards_of(seat.member);
        let fetch = match h.sharding {
            Sharding::Replicated if own.is_some() => Vec::new(),
            Sharding::Replicated => vec![Fetch { shards: Vec::new(), from: holders.pick(None, index) }],
            Sharding::Sharded { .. } => {
                let missing = needed(h.sharding, seat, size).into_iter().filter(|shard| match own {
                    Some(Shards::Whole) => false,
                    Some(Shards::Only(some)) => !some.contains(shard),
                    None => true,
                });
                // Shards with the same holders travel together.
                let mut by_source: BTreeMap<Vec<MemberId>, Fetch> = BTreeMap::new();
                for shard in missing {
                    let from = holders.pick(Some(shard), index);
                    let key = from.iter().map(|peer| peer.member).collect();
                    by_source
                        .entry(key)
                        .or_insert_with(|| Fetch { shards: Vec::new(), from })
                        .shards
                        .push(shard);
                }
                by_source.into_values().collect()
            }
        };
        if !fetch.is_empty() {
            moves.insert(seat.member, Moves { fetch, load: None });
        }
    }
    Decision { resume, source, moves }
}

/// The holders of one state, so arranged that finding some for a receiver costs no pass over all of them.
struct Sources<'a> {
    holders: &'a [Holder<'a>],
    of_member: BTreeMap<MemberId, usize>,
    /// Indices of those that have all of it, in order.
    whole: Vec<usize>,
    /// Indices of those that have a part of it, by shard, in order.
    part: BTreeMap<u32, Vec<usize>>,
}

impl<'a> Sources<'a> {
    fn of(holders: &'a [Holder<'a>]) -> Sources<'a> {
        let of_member = holders.iter().enumerate().map(|(i, holder)| (holder.member, i)).collect();
        let (mut whole, mut part) = (Vec::new(), BTreeMap::<u32, Vec<usize>>::new());
        for (i, holder) in holders.iter().enumerate() {
            match holder.shards {
                Shards::Whole => whole.push(i),
                Shards::Only(some) => some.iter().for_each(|shard| part.entry(*shard).or_default().push(i)),
            }
        }
        Sources { holders, of_member, whole, part }
    }

    fn shards_of(&self, member: MemberId) -> Option<&'a Shards> {
        self.of_member.get(&member).map(|i| self.holders[*i].shards)
    }

    /// Up to [`SOURCES_MAX`] holders of `shard` (of the whole, if `None`), not the same ones for every receiver. Who has
    /// no place in the world comes last: it may have little time left.
    fn pick(&self, shard: Option<u32>, receiver: usize) -> Vec<Peer> {
        let part = shard.and_then(|shard| self.part.get(&shard)).map_or(&[][..], Vec::as_slice);
        let (part, part_outside) = self.seated_first(part);
        let (whole, whole_outside) = self.seated_first(&self.whole);
        let mut picked = self.rotated(part, whole, receiver, SOURCES_MAX);
        let room = SOURCES_MAX - picked.len();
        picked.extend(self.rotated(part_outside, whole_outside, receiver, room));
        picked
    }

    fn seated_first<'b>(&self, list: &'b [usize]) -> (&'b [usize], &'b [usize]) {
        list.split_at(list.partition_point(|i| self.holders[*i].seated))
    }

    fn rotated(&self, a: &[usize], b: &[usize], start: usize, most: usize) -> Vec<Peer> {
        let n = a.len() + b.len();
        let at = |i: usize| if i < a.len() { a[i] } else { b[i - a.len()] };
        (0..n.min(most)).map(|i| self.holders[at((start + i) % n)].peer()).collect()
    }
}

impl Holder<'_> {
    fn peer(&self) -> Peer {
        Peer { member: self.member, rank: self.rank, address: self.address.to_owned() }
    }
}

fn from_checkpoint(h: &Holdings<'_>, commit: &Commit) -> Decision {
    let size = world_size(h);
    let load = |seat: &Seat| Load { commit: *commit, shards: needed(h.sharding, seat, size) };
    let moves = h
        .seats
        .iter()
        .map(|seat| (seat.member, Moves { fetch: Vec::new(), load: Some(load(seat)) }))
        .collect();
    let resume = Resume { lineage: h.lineage, step: commit.step };
    Decision { resume, source: Source::Checkpoint { step: commit.step }, moves }
}

/// The lowest rank that has a fresh state is the model for all others; who starts with the same digest keeps its own.
/// With a sharded state each rank starts with the shards it has.
fn from_initial(h: &Holdings<'_>) -> Option<Decision> {
    let fresh = |member: MemberId| match h.held.get(&member) {
        Some(Holding::Fresh { digest }) if !h.distrusted.contains(&member) => Some(*digest),
        Some(Holding::Fresh { .. } | Holding::State { .. } | Holding::Nothing) | None => None,
    };
    let (model, digest) = h.seats.iter().find_map(|seat| Some((seat, fresh(seat.member)?)))?;
    let from = vec![Peer { member: model.member, rank: model.rank, address: model.address.clone() }];
    let mut moves = BTreeMap::new();
    for seat in h.seats {
        let keeps = match h.sharding {
            Sharding::Replicated => fresh(seat.member) == Some(digest),
            Sharding::Sharded { .. } => fresh(seat.member).is_some(),
        };
        if !keeps {
            let shards = needed(h.sharding, seat, world_size(h));
            moves
                .insert(seat.member, Moves { fetch: vec![Fetch { shards, from: from.clone() }], load: None });
        }
    }
    let resume = Resume { lineage: Lineage(h.generation.0), step: Step(0) };
    Some(Decision { resume, source: Source::Initial, moves })
}

impl Peer {
    /// A peer that has left the world but still serves what it holds.
    pub fn outside(member: MemberId, address: String) -> Peer {
        Peer { member, rank: Rank(u32::MAX), address }
    }

    /// Whether it has no place in the world.
    pub fn is_outside(&self) -> bool {
        self.rank == Rank(u32::MAX)
    }
}

#[cfg(test)]
#[path = "holding_tests.rs"]
mod tests;
