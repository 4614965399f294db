//! What happened at least once. A fault that never strikes and a path that is never taken prove nothing, so the tests
//! demand that each of [`EXPECTED`] has been seen over their seeds.

use std::collections::BTreeMap;

/// See the module.
#[derive(Debug, Default, Clone)]
pub struct Coverage {
    /// How often, by what.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Coverage {
    /// It happened.
    pub fn hit(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Adds what another run has seen.
    pub fn add(&mut self, other: &Coverage) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }

    /// What of [`EXPECTED`] has not been seen.
    pub fn missing(&self) -> Vec<&'static str> {
        EXPECTED.iter().copied().filter(|what| !self.counts.contains_key(what)).collect()
    }
}

/// What a thousand seeds must have seen.
pub const EXPECTED: &[&str] = &[
    "a boundary is reached",
    "a break leaves some a step ahead",
    "a checkpoint cannot be loaded",
    "a checkpoint is damaged",
    "a checkpoint is loaded",
    "a checkpoint is passed over while one is being written",
    "a collective completes after a neighbour was lost",
    "a connection between neighbours breaks",
    "a coordinator dies at any time",
    "a coordinator does not answer in time",
    "a coordinator hears late of a stream's end",
    "a coordinator is gone without a word",
    "a coordinator is succeeded while it lives",
    "a coordinator that does not lead any more saves nothing",
    "a coordinator's death in peace",
    "a death in peace",
    "a job is over and everybody knows",
    "a job reaches its last step",
    "a machine is gone without a word",
    "a manifest cannot be written",
    "a member comes back as a new one",
    "a member gives a silent stream up",
    "a member is killed",
    "a member is refused",
    "a member is stopped for a while",
    "a member is told that it is to leave",
    "a member is told that its world is over",
    "a member serves a world that it has no place in",
    "a neighbour cannot be dialled",
    "a neighbour is lost",
    "a part of a checkpoint cannot be written",
    "a part of a checkpoint is given up",
    "a plan is void before it is carried out",
    "a program asks for a world only after it was let in",
    "a program leaves",
    "a restore fails because of a source",
    "a restore is interrupted",
    "a save conflicts",
    "a save fails",
    "a save is carried out late",
    "a save's answer is lost",
    "a spare's death and return in peace",
    "a state arrives wrong",
    "a state does not arrive",
    "a state is restored",
    "a step is committed when a later world is known",
    "a store's absence in peace",
    "a stream breaks",
    "a stream's end in peace",
    "a world begins",
    "a world resumes from a checkpoint",
    "a world resumes from memory",
    "an operator asks again",
    "an operator asks for something",
    "an operator closes the job",
    "members are partitioned",
    "members are partitioned one way",
    "save",
    "something is said without a stream",
    "state is fetched from outside the world",
    "the cloud takes a machine that has not left in time",
    "the cloud warns",
    "the coordinator dies after a save, before it knows",
    "the coordinator dies before a save",
    "the coordinator dies between save and tell",
    "the coordinator is stopped for a while",
    "the last checkpoint is made when there is nothing else to do",
    "the store is away",
    "the task's inbox is full",
    "the way between two members is cut",
];
