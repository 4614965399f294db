//! A world: the immutable ranked membership of one generation, and how it is chosen.

use crate::ids::{Generation, MemberId, MemberName, Rank, WorldSize};
use crate::spec::Spec;
use std::time::Duration;

/// One member's part of a world: the ranks it brings.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Seat {
    /// Who sits here.
    pub member: MemberId,
    /// What people call it.
    pub name: MemberName,
    /// Its first rank; the others follow without a gap.
    pub rank: Rank,
    /// How many ranks it has.
    pub slots: u32,
    /// Where other members reach its data plane (`host:port`).
    pub address: String,
}

/// The ranked membership of one generation. Never changes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// Its fencing number.
    pub generation: Generation,
    /// Its members in rank order.
    pub seats: Vec<Seat>,
}

/// Another member, as far as somebody must know it in order to talk to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Who it is.
    pub member: MemberId,
    /// Its first rank in the world at hand.
    pub rank: Rank,
    /// Where its data plane listens (`host:port`).
    pub address: String,
}

/// What one member is told of a world. Its size does not depend on the world's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// The world's generation.
    pub generation: Generation,
    /// The member's first rank.
    pub rank: Rank,
    /// How many ranks the member has.
    pub slots: u32,
    /// How many ranks the world has.
    pub size: WorldSize,
    /// Which seat, in ring order, the member has.
    pub seat: u32,
    /// How many seats (members) the ring has.
    pub seats: u32,
    /// The member before it in the ring (itself if it is alone).
    pub prev: Peer,
    /// The member after it in the ring (itself if it is alone).
    pub next: Peer,
    /// Digest of the whole roster: two members that agree on it agree on every rank.
    pub roster: u64,
    /// How often it is to renew its lease from now on.
    pub renew_every: Duration,
}

impl World {
    /// How many ranks it has.
    pub fn size(&self) -> WorldSize {
        WorldSize(self.seats.iter().map(|s| s.slots).sum())
    }

    /// The seat of `member`, if it has one.
    pub fn seat(&self, member: MemberId) -> Option<&Seat> {
        self.seats.iter().find(|s| s.member == member)
    }

    /// The member that has `rank`, if the world has that rank.
    pub fn member_at(&self, rank: Rank) -> Option<MemberId> {
        let after = self.seats.partition_point(|s| s.rank <= rank);
        let seat = self.seats.get(after.checked_sub(1)?)?;
        (rank.0 - seat.rank.0 < seat.slots).then_some(seat.member)
    }

    /// What the member at `seat` is told.
    pub fn place(&self, seat: usize, roster: Roster, renew_every: Duration) -> Place {
        let n = self.seats.len();
        let own = &self.seats[seat];
        let peer = |s: &Seat| Peer { member: s.member, rank: s.rank, address: s.address.clone() };
        Place {
            generation: self.generation,
            rank: own.rank,
            slots: own.slots,
            size: roster.size,
            seat: seat as u32,
            seats: n as u32,
            prev: peer(&self.seats[(seat + n - 1) % n]),
            next: peer(&self.seats[(seat + 1) % n]),
            roster: roster.digest,
            renew_every,
        }
    }

    /// What all members are told alike. Costs a pass over the seats, so it is computed once per world.
    pub fn roster(&self) -> Roster {
        Roster { size: self.size(), digest: self.roster_digest() }
    }

    /// Digest of the roster (FNV-1a, 64 bits, over every seat in order). It tells two rosters apart by accident-proof
    /// means only; who may join is the secret's business.
    pub fn roster_digest(&self) -> u64 {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        let mut eat = |bytes: &[u8]| {
            for &byte in bytes {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        eat(&self.generation.0.to_le_bytes());
        for seat in &self.seats {
            eat(&seat.member.0.to_le_bytes());
            eat(&seat.rank.0.to_le_bytes());
            eat(&seat.slots.to_le_bytes());
            eat(&(seat.address.len() as u64).to_le_bytes());
            eat(seat.address.as_bytes());
        }
        hash
    }
}

/// What every member of a world is told alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Roster {
    /// How many ranks the world has.
    pub size: WorldSize,
    /// See [`World::roster_digest`].
    pub digest: u64,
}

/// Why no world can be made out of the candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shortage {
    /// They bring fewer ranks than `min`.
    BelowMin {
        /// Ranks they bring.
        have: u32,
        /// Ranks needed.
        need: u32,
    },
    /// They bring enough ranks, but no multiple of `unit` that is at least `min`.
    UnitRemainder {
        /// Ranks they bring.
        have: u32,
        /// What the number must be a multiple of.
        unit: u32,
    },
}

/// Who of the candidates, given in rank order, makes the largest world that `spec` allows.
///
/// A candidate that does not fit below `max` is passed over; then members are left out from the end until the number
/// of ranks is a multiple of `unit`.
pub fn select(spec: &Spec, candidates: &[(MemberId, u32)]) -> Result<Vec<MemberId>, Shortage> {
    let mut taken = Vec::with_capacity(candidates.len());
    let mut total = 0u32;
    let mut best = (0usize, 0u32);
    for &(member, slots) in candidates {
        if slots == 0 || slots > spec.max - total {
            continue;
        }
        taken.push(member);
        total += slots;
        if total.is_multiple_of(spec.unit) {
            best = (taken.len(), total);
        }
    }
    if total < spec.min {
        return Err(Shortage::BelowMin { have: total, need: spec.min });
    }
    if best.1 < spec.min {
        return Err(Shortage::UnitRemainder { have: total, unit: spec.unit });
    }
    taken.truncate(best.0);
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(slots: &[u32]) -> World {
        let mut rank = 0;
        let seats = slots
            .iter()
            .enumerate()
            .map(|(i, &slots)| {
                let seat = Seat {
                    member: MemberId(i as u64),
                    name: MemberName::new(&format!("w{i}")).expect("a plain name"),
                    rank: Rank(rank),
                    slots,
                    address: format!("127.0.0.1:{}", 9000 + i),
                };
                rank += slots;
                seat
            })
            .collect();
        World { generation: Generation(3), seats }
    }

    #[test]
    fn m3_following_next_from_any_seat_visits_every_seat_once() {
        for n in 1..=8 {
            let world = world(&vec![2; n]);
            let mut at = 0usize;
            let mut seen = Vec::new();
            for _ in 0..n {
                let place = world.place(at, world.roster(), Duration::ZERO);
                seen.push(place.rank.0);
                let next =
                    world.seats.iter().position(|s| s.member == place.next.member).expect("next has a seat");
                assert_eq!(
                    world.place(next, world.roster(), Duration::ZERO).prev.member,
                    world.seats[at].member
                );
                at = next;
            }
            assert_eq!(at, 0);
            assert_eq!(seen, (0..n as u32).map(|i| i * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_rank_belongs_to_the_member_whose_slots_hold_it() {
        let world = world(&[2, 1, 3]);
        assert_eq!(world.size(), WorldSize(6));
        let owners: Vec<_> = (0..7).map(|r| world.member_at(Rank(r)).map(|m| m.0)).collect();
        assert_eq!(owners, [Some(0), Some(0), Some(1), Some(2), Some(2), Some(2), None]);
    }

    #[test]
    fn m4_the_selection_is_the_largest_that_the_spec_allows() {
        let spec = |min, max, unit| Spec { min, max, unit, keep: 1 };
        let ids = |slots: &[u32]| -> Vec<(MemberId, u32)> {
            slots.iter().enumerate().map(|(i, &s)| (MemberId(i as u64), s)).collect()
        };
        let chosen = |spec: Spec, slots: &[u32]| {
            select(&spec, &ids(slots)).map(|v| v.into_iter().map(|m| m.0).collect::<Vec<_>>())
        };
        assert_eq!(chosen(spec(2, 3, 1), &[1, 1, 1, 1]), Ok(vec![0, 1, 2]));
        assert_eq!(chosen(spec(2, 8, 2), &[1, 1, 1]), Ok(vec![0, 1]));
        assert_eq!(
            chosen(spec(1, 8, 1), &[4, 8, 4]),
            Ok(vec![0, 2]),
            "a member that does not fit is passed over"
        );
        assert_eq!(chosen(spec(3, 8, 1), &[1, 1]), Err(Shortage::BelowMin { have: 2, need: 3 }));
        assert_eq!(chosen(spec(3, 8, 4), &[1, 1, 1]), Err(Shortage::UnitRemainder { have: 3, unit: 4 }));
        assert_eq!(chosen(spec(1, 8, 1), &[0]), Err(Shortage::BelowMin { have: 0, need: 1 }));
    }

    #[test]
    fn the_roster_digest_tells_any_two_rosters_apart() {
        let base = world(&[1, 1]);
        let mut other = base.clone();
        other.seats.swap(0, 1);
        assert_ne!(base.roster_digest(), other.roster_digest());
        let mut moved = base.clone();
        moved.seats[1].address.push('0');
        assert_ne!(base.roster_digest(), moved.roster_digest());
    }
}
