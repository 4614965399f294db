//! What a member's memory holds, from the first state its program made to the last step it committed.

use reknit_membership::Digest;
use reknit_membership::Step;
use reknit_membership::holding::{Holding, Resume, Shards};

/// What the program's state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// What the program started with.
    Fresh(Digest),
    /// A state of the job.
    At(Resume),
    /// Half of one and half of another.
    Torn,
}

impl Held {
    /// The same, as it is told to the coordinator.
    pub(crate) fn holding(self) -> Holding {
        match self {
            Held::Fresh(digest) => Holding::Fresh { digest },
            Held::At(resume) => Holding::State { resume, shards: Shards::Whole },
            Held::Torn => Holding::Nothing,
        }
    }

    /// Whether it is the state `resume`: whoever asks for that gets the right bytes here, and whoever is to go from it can.
    /// A fresh state has no lineage until a world runs from it: it goes by the one it is about to get, at step 0.
    pub(crate) fn is(self, resume: Resume) -> bool {
        match self {
            Held::Fresh(_) => resume.step == Step(0),
            // What a new world runs from goes by a new lineage, at the same step.
            Held::At(held) => held == resume || (held.step == resume.step && resume.lineage > held.lineage),
            Held::Torn => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reknit_membership::Lineage;

    #[test]
    fn a_holder_serves_its_own_state_and_no_other() {
        let at = |lineage, step| Resume { lineage: Lineage(lineage), step: Step(step) };
        assert!(Held::At(at(2, 7)).is(at(2, 7)));
        assert!(!Held::At(at(2, 7)).is(at(2, 8)));
        assert!(!Held::At(at(2, 7)).is(at(1, 7)));
        assert!(Held::At(at(2, 7)).is(at(5, 7)), "a branch that is taken up again has a new name");
        assert!(Held::Fresh(Digest(1)).is(at(1, 0)));
        assert!(!Held::Fresh(Digest(1)).is(at(1, 1)));
        assert!(!Held::Torn.is(at(1, 0)));
    }
}
