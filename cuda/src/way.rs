//! A committed world as this crate is told of it, and which way leads there.

use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::unique_id::UniqueId;
use crate::version::{Feature, Version};

/// A world that the coordinator has committed, and this process's part of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// Of which generation.
    pub generation: Generation,
    /// How many ranks there are.
    pub size: WorldSize,
    /// The ranks of this process: one for each of its devices, in the devices' order.
    pub ranks: Vec<Rank>,
    /// How its ranks come together: the same on all of them.
    pub way: Way,
}

/// How the ranks of a world come together. All of a world go the same way, so it is part of what is committed: a rank
/// that chose for itself would wait for the others for ever.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Way {
    /// From nothing: the way that is always there.
    Fresh {
        /// Made by a rank of the new world.
        id: UniqueId,
    },
    /// The survivors of `parent` go on, renumbered in order.
    Shrink {
        /// The generation whose communicator it is made of.
        parent: Generation,
        /// Which ranks of the parent are gone, in order.
        exclude: Vec<Rank>,
    },
    /// All ranks of `parent` keep their ranks, and newcomers are appended.
    Grow {
        /// The generation whose communicator it is made of.
        parent: Generation,
        /// How many ranks the parent has.
        quorum: WorldSize,
        /// Made by the parent's rank 0, with [`Communicator::grow_id`](crate::Communicator::grow_id).
        id: UniqueId,
    },
}

/// What one rank of a world to be brings along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// The communicator that it still holds, if any.
    pub parent: Option<Parent>,
    /// Its NCCL.
    pub version: Version,
}

/// A rank's part of a communicator that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// Formed in which generation. A generation is never used twice, so it names the communicator.
    pub generation: Generation,
    /// How many ranks it has.
    pub size: WorldSize,
    /// This rank's place in it.
    pub rank: Rank,
    /// Whether it was broken and its operations revoked: it can be shrunk then, but not grown.
    pub revoked: bool,
}

/// A way without its seed, which a rank has yet to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// See [`Way::Fresh`].
    Fresh,
    /// See [`Way::Shrink`].
    Shrink {
        /// The common parent.
        parent: Generation,
        /// Which of its ranks are gone.
        exclude: Vec<Rank>,
    },
    /// See [`Way::Grow`].
    Grow {
        /// The common parent.
        parent: Generation,
        /// How many ranks it has.
        quorum: WorldSize,
    },
}

/// The shortest way to a world of which the ranks offer this, in the order of their new ranks.
///
/// Who both loses ranks and gains some does it in two generations, or afresh: NCCL replaces nobody in one call.
pub fn shortest(offers: &[Offer]) -> Kind {
    let can = |feature| offers.iter().all(|offer| offer.version.has(feature));
    let Some(first) = offers.first().and_then(|offer| offer.parent) else { return Kind::Fresh };
    let Parent { generation, size, .. } = first;
    let parents: Vec<Parent> = offers
        .iter()
        .map_while(|offer| {
            offer.parent.filter(|parent| (parent.generation, parent.size) == (generation, size))
        })
        .collect();
    let ranks: Vec<Rank> = parents.iter().map(|parent| parent.rank).collect();
    let in_order = ranks.windows(2).all(|pair| pair[0] < pair[1]);
    // A communicator of one has no network to its peers that could be built upon.
    if ranks.len() < 2 || !in_order || ranks.iter().any(|rank| rank.0 >= size.0) {
        return Kind::Fresh;
    }
    let (all_are_there, somebody_is_new) = (ranks.len() == size.0 as usize, ranks.len() < offers.len());
    match (all_are_there, somebody_is_new) {
        (false, false) if can(Feature::Shrink) => {
            let exclude = (0..size.0).map(Rank).filter(|rank| !ranks.contains(rank)).collect();
            Kind::Shrink { parent: generation, exclude }
        }
        (true, true) if can(Feature::Grow) && parents.iter().all(|parent| !parent.revoked) => {
            Kind::Grow { parent: generation, quorum: size }
        }
        // The same ranks again are what is left of a break that nobody died of.
        (true | false, true | false) => Kind::Fresh,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Version = Version::new(2, 30, 7);

    fn holds(rank: u32) -> Offer {
        let generation = Generation(7);
        let parent = Parent { generation, size: WorldSize(4), rank: Rank(rank), revoked: false };
        Offer { parent: Some(parent), version: NEW }
    }

    fn newcomer() -> Offer {
        Offer { parent: None, version: NEW }
    }

    fn with(offer: Offer, change: impl Fn(&mut Parent)) -> Offer {
        Offer {
            parent: offer.parent.map(|mut parent| {
                change(&mut parent);
                parent
            }),
            ..offer
        }
    }

    #[test]
    fn survivors_of_one_communicator_shrink_it() {
        let shrink = Kind::Shrink { parent: Generation(7), exclude: vec![Rank(1)] };
        assert_eq!(shortest(&[holds(0), holds(2), holds(3)]), shrink);
        let revoked: Vec<Offer> =
            [0, 2, 3].map(|rank| with(holds(rank), |parent| parent.revoked = true)).into();
        assert_eq!(shortest(&revoked), shrink);
    }

    #[test]
    fn newcomers_are_appended_to_a_whole_communicator() {
        let all = [holds(0), holds(1), holds(2), holds(3), newcomer()];
        assert_eq!(shortest(&all), Kind::Grow { parent: Generation(7), quorum: WorldSize(4) });
    }

    #[test]
    fn whatever_does_not_fit_begins_afresh() {
        let old = Version::new(2, 27, 2);
        let cases: [(&str, Vec<Offer>); 9] = [
            ("nobody holds anything", vec![newcomer(), newcomer()]),
            ("nobody is there", vec![]),
            ("one is left", vec![holds(2)]),
            ("all are there again", vec![holds(0), holds(1), holds(2), holds(3)]),
            ("one is lost and one is new", vec![holds(0), holds(1), holds(2), newcomer()]),
            ("they are in another order", vec![holds(2), holds(0)]),
            ("one has another parent", vec![holds(0), with(holds(2), |p| p.generation = Generation(6))]),
            ("one has an old NCCL", vec![holds(0), Offer { version: old, ..holds(2) }]),
            (
                "it was revoked",
                vec![holds(0), holds(1), holds(2), with(holds(3), |p| p.revoked = true), newcomer()],
            ),
        ];
        for (what, offers) in cases {
            assert_eq!(shortest(&offers), Kind::Fresh, "{what}");
        }
    }
}
