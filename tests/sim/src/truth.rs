//! What the states of the job truly are: every state that was ever computed, from which other one, by which world.

use std::collections::BTreeMap;

use reknit_membership::Generation;

/// A state that somebody has, or had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The state it was computed from; none for one that a program started with.
    pub parent: Option<u64>,
    /// How many steps are applied in it.
    pub step: u64,
    /// The world that computed it.
    pub world: Generation,
    /// Whether each rank of that world entered the last collective with its proper share of the samples.
    pub sampled: bool,
}

/// All states by their hash.
#[derive(Debug, Default)]
pub struct Truth {
    nodes: BTreeMap<u64, Node>,
}

impl Truth {
    /// Notes a state, unless it is known.
    pub fn note(&mut self, hash: u64, node: Node) {
        self.nodes.entry(hash).or_insert(node);
    }

    /// The state of that hash, if there ever was one.
    pub fn get(&self, hash: u64) -> Option<&Node> {
        self.nodes.get(&hash)
    }

    /// The state itself and all that it comes from, newest first.
    pub fn history(&self, hash: u64) -> impl Iterator<Item = (u64, &Node)> {
        let first = self.nodes.get(&hash).map(|node| (hash, node));
        std::iter::successors(first, |(_, node)| {
            let parent = node.parent?;
            self.nodes.get(&parent).map(|node| (parent, node))
        })
    }

    /// Whether `from` is `hash`, or a state that it comes from.
    pub fn descends(&self, hash: u64, from: u64) -> bool {
        let Some(oldest) = self.nodes.get(&from) else { return false };
        self.history(hash).take_while(|(_, node)| node.step >= oldest.step).any(|(hash, _)| hash == from)
    }
}
