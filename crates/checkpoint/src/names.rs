//! The names of files and directories. Each is used once: a world commits a step at most once, and a rank writes its
//! part of it at most once.

use std::hash::{BuildHasher, Hasher};

use reknit_membership::{Generation, Rank, Step, WorldSize};

/// The file that makes shards a checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The directory of the checkpoint that `generation` makes of `step`.
pub(crate) fn checkpoint(step: Step, generation: Generation) -> String {
    format!("step-{:08}-g{}", step.0, generation.0)
}

/// The file of one rank's part.
pub(crate) fn shard(rank: Rank, world_size: WorldSize) -> String {
    format!("rank-{:05}-of-{:05}.safetensors", rank.0, world_size.0)
}

/// Where `name` is written before it gets its name. Drawn at random: two writers never share one.
pub(crate) fn temporary(name: &str) -> String {
    // The standard library seeds each hasher state from the system's randomness.
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("{name}.tmp-{random:016x}")
}

/// A file that shows whether a directory can be written to.
pub(crate) fn probe() -> String {
    temporary("probe")
}

/// The step and generation whose directory this is.
pub(crate) fn parse_checkpoint(name: &str) -> Option<(Step, Generation)> {
    let (step, generation) = name.strip_prefix("step-")?.split_once("-g")?;
    let parsed = (Step(step.parse().ok()?), Generation(generation.parse().ok()?));
    // There is one way to write a name: anything else is not ours.
    (checkpoint(parsed.0, parsed.1) == name).then_some(parsed)
}

/// What a name within a checkpoint's directory stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Manifest,
    Shard,
    /// What a writer left behind, or is writing.
    Temporary,
    /// Nothing of ours.
    Foreign,
}

/// What `name` stands for within a checkpoint's directory.
pub(crate) fn entry(name: &str) -> Entry {
    match untemporary(name) {
        Some(name) if name == MANIFEST || is_shard(name) => Entry::Temporary,
        None if name == MANIFEST => Entry::Manifest,
        None if is_shard(name) => Entry::Shard,
        Some(_) | None => Entry::Foreign,
    }
}

/// Whether a file of this name was made by [`probe`].
pub(crate) fn is_probe(name: &str) -> bool {
    untemporary(name) == Some("probe")
}

fn untemporary(name: &str) -> Option<&str> {
    let (name, random) = name.rsplit_once(".tmp-")?;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (random.len() == 16 && random.bytes().all(hex)).then_some(name)
}

fn is_shard(name: &str) -> bool {
    let parse = || {
        let numbers = name.strip_prefix("rank-")?.strip_suffix(".safetensors")?;
        let (rank, world_size) = numbers.split_once("-of-")?;
        Some((Rank(rank.parse().ok()?), WorldSize(world_size.parse().ok()?)))
    };
    parse().is_some_and(|(rank, world_size)| rank.0 < world_size.0 && shard(rank, world_size) == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_what_they_stand_for() {
        assert_eq!(checkpoint(Step(120), Generation(7)), "step-00000120-g7");
        for (step, generation) in [(0, 0), (120, 7), (99_999_999, 1), (123_456_789_012, u64::MAX)] {
            let name = checkpoint(Step(step), Generation(generation));
            assert_eq!(parse_checkpoint(&name), Some((Step(step), Generation(generation))));
        }
        assert_eq!(shard(Rank(3), WorldSize(4)), "rank-00003-of-00004.safetensors");
        assert_eq!(entry(&shard(Rank(3), WorldSize(4))), Entry::Shard);
        assert_eq!(entry(&shard(Rank(123_456), WorldSize(200_000))), Entry::Shard);
        assert_eq!(entry(MANIFEST), Entry::Manifest);
        assert_eq!(entry(&temporary(MANIFEST)), Entry::Temporary);
        assert_eq!(entry(&temporary(&shard(Rank(0), WorldSize(1)))), Entry::Temporary);
        assert!(is_probe(&probe()));
        assert_ne!(probe(), probe());
    }

    #[test]
    fn k_10_nearly_our_names_are_foreign() {
        for name in [
            "step-120-g7",
            "step-00000120-g07",
            "step-00000120-g+7",
            "step-00000120",
            "step-00000120-g7 ",
            "step-00000120-g7.bak",
            "Step-00000120-g7",
        ] {
            assert_eq!(parse_checkpoint(name), None, "{name:?}");
        }
        for name in [
            "manifest.json~",
            "manifest.json.tmp-",
            "manifest.json.tmp-0123456789abcdeF",
            "notes.txt.tmp-0123456789abcdef",
            "rank-00004-of-00004.safetensors",
            "rank-3-of-4.safetensors",
            "rank-+0003-of-00004.safetensors",
            "rank-00003-of-00004.safetensors.bak",
            "model.safetensors",
            "probe.tmp-0123456789abcdef",
            "",
        ] {
            assert_eq!(entry(name), Entry::Foreign, "{name:?}");
        }
        assert!(!is_probe("probe"));
    }
}
