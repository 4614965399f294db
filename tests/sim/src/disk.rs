//! The storage that all members share: parts of checkpoints and the manifests that make them one.

use std::collections::{BTreeMap, BTreeSet};

use reknit_membership::holding::ShardReport;
use reknit_membership::record::Commit;
use reknit_membership::{Digest, Generation, Rank, Step};

use crate::process::Content;
use crate::rng::fold;

/// Which part of which checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PartKey {
    /// The world that makes it.
    pub generation: Generation,
    /// The state's step.
    pub step: Step,
    /// The rank that wrote it.
    pub rank: Rank,
}

/// A manifest as it lies there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its own digest.
    pub digest: Digest,
    /// What every rank reported.
    pub parts: Vec<ShardReport>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Disk {
    /// What was written, and what it truly is.
    pub parts: BTreeMap<PartKey, Content>,
    /// By generation and step.
    pub manifests: BTreeMap<(Generation, Step), Manifest>,
    /// Checkpoints that a fault has damaged.
    pub damaged: BTreeSet<(Generation, Step)>,
    /// Checkpoints that were deleted because they were too old, or a part of them because it was given up.
    pub deleted: BTreeSet<(Generation, Step)>,
}

/// Digest of the file of a part.
pub fn file_digest(key: &PartKey, content: &Content) -> Digest {
    let PartKey { generation, step, rank } = key;
    let low = fold(&[generation.0, step.0, u64::from(rank.0), content.hash]);
    Digest(u128::from(low) << 64 | u128::from(fold(&[low])))
}

/// Digest of a state.
pub fn state_digest(content: &Content) -> Digest {
    Digest(u128::from(content.hash) << 64 | u128::from(fold(&[content.hash])))
}

/// Digest of a manifest.
pub fn manifest_digest(generation: Generation, step: Step, parts: &[ShardReport]) -> Digest {
    let mut numbers = vec![generation.0, step.0];
    numbers.extend(parts.iter().map(|part| part.file.0 as u64));
    let low = fold(&numbers);
    Digest(u128::from(low) << 64 | u128::from(fold(&[low, 1])))
}

impl Disk {
    /// What loading a committed checkpoint gives.
    ///
    /// # Errors
    /// Why it cannot be loaded.
    pub fn load(&self, commit: &Commit) -> Result<Content, &'static str> {
        let key = commit.key();
        if self.damaged.contains(&key) {
            return Err("it is damaged");
        }
        let manifest = self.manifests.get(&key).ok_or("it has no manifest")?;
        if manifest.digest != commit.manifest {
            return Err("its manifest is another one");
        }
        let mut whole: Option<Content> = None;
        let mut files = manifest.parts.iter();
        for (_, content) in self.parts_of(key) {
            let expected = files.next().ok_or("it has a part too many")?;
            if expected.file != file_digest(&content.0, &content.1) {
                return Err("a part is not the one that the manifest lists");
            }
            let part = content.1;
            whole = Some(match whole {
                Some(so_far) if so_far.hash != part.hash => Content {
                    hash: fold(&[so_far.hash, part.hash]),
                    flipped: so_far.flipped | part.flipped,
                    ..part
                },
                Some(so_far) => so_far,
                None => part,
            });
        }
        if files.next().is_some() {
            return Err("a part is missing");
        }
        whole.ok_or("it has no parts")
    }

    /// The parts of a checkpoint in rank order.
    pub fn parts_of(
        &self,
        (generation, step): (Generation, Step),
    ) -> impl Iterator<Item = (Rank, (PartKey, Content))> {
        let first = PartKey { generation, step, rank: Rank(0) };
        let last = PartKey { generation, step, rank: Rank(u32::MAX) };
        self.parts.range(first..=last).map(|(key, content)| (key.rank, (*key, *content)))
    }

    /// Deletes one part.
    pub fn remove_part(&mut self, key: &PartKey) {
        self.parts.remove(key);
        self.deleted.insert((key.generation, key.step));
    }

    /// Deletes what is older than the newest of `kept` and not in it, as the checkpoint crate does.
    pub fn retain(&mut self, kept: &[(Generation, Step)]) {
        let Some(newest) = kept.iter().max().copied() else { return };
        let gone = |key: (Generation, Step)| key <= newest && !kept.contains(&key);
        let all: BTreeSet<_> = self.parts.keys().map(|part| (part.generation, part.step)).collect();
        self.deleted.extend(all.into_iter().filter(|key| gone(*key)));
        self.parts.retain(|part, _| !gone((part.generation, part.step)));
        self.manifests.retain(|key, _| !gone(*key));
    }
}
