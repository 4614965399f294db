//! A state saved by N ranks loads into M (rules K-6 and K-8).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Device, Rng, assert_same, filled, layout, odd_specs, save_all, zeros_like};
use reknit_checkpoint::{
    ByteRange, NamedTensors, Part, digest_range, load_into, open, read_range, reads, shards, state_digest,
};

const RANKS: std::ops::RangeInclusive<u32> = 1..=8;

fn bytes_of(state: &NamedTensors, range: ByteRange) -> Vec<u8> {
    let mut bytes = Vec::new();
    read_range(state, &layout(state), range, |part| bytes.extend_from_slice(part));
    bytes
}

#[test]
fn k_8_what_n_ranks_saved_m_ranks_load_bit_for_bit() {
    for (name, specs) in odd_specs() {
        let dir = tempfile::tempdir().unwrap();
        let state = filled(&specs, 11);
        let layout = layout(&state);
        let whole = bytes_of(&state, layout.all());
        for n in RANKS {
            let commit = save_all(dir.path(), &state, n, u64::from(n), 1);
            let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
            assert_eq!(manifest.state_digest(), state_digest(&state, &layout).unwrap());

            let mut all = zeros_like(&state);
            let report = load_into(dir.path(), &manifest, Part::All, &mut all).unwrap();
            assert_same(&all, &state, &format!("{name}: {n} to all"));
            assert_eq!((report.bytes, report.files), (layout.total_bytes(), n as usize));

            for m in RANKS {
                let context = format!("{name}: {n} to {m}");
                let mut joined = zeros_like(&state);
                for range in shards(&layout, m) {
                    let mut alone = zeros_like(&state);
                    let report = load_into(dir.path(), &manifest, Part::Range(range), &mut alone).unwrap();
                    assert_eq!(report.bytes, range.len(), "{context}");
                    let mut expected = vec![0; whole.len()];
                    let part = range.start as usize..range.end as usize;
                    expected[part.clone()].copy_from_slice(&whole[part]);
                    assert!(bytes_of(&alone, layout.all()) == expected, "{context}: rank's part {range}");
                    load_into(dir.path(), &manifest, Part::Range(range), &mut joined).unwrap();
                }
                assert!(bytes_of(&joined, layout.all()) == whole, "{context}: the parts joined");
            }
        }
    }
}

#[test]
fn k_6_reads_cover_any_range_once_and_stay_within_the_files() {
    let mut rng = Rng::from_env("reads_cover_any_range_once");
    for (name, specs) in odd_specs() {
        let dir = tempfile::tempdir().unwrap();
        let state = filled(&specs, 12);
        let total = layout(&state).total_bytes();
        for n in RANKS {
            let commit = save_all(dir.path(), &state, n, u64::from(n), 1);
            let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
            for _ in 0..50 {
                let (a, b) = (rng.below(total + 1), rng.below(total + 1));
                let range = ByteRange::new(a.min(b), a.max(b));
                let mut at = range.start;
                for read in reads(&manifest, range) {
                    let shard = &manifest.shards()[read.shard];
                    assert_eq!(read.at, at, "{name} by {n}: {range}");
                    assert!(read.len > 0, "{name} by {n}: {range}");
                    assert!(read.file_offset >= shard.data_at(), "{name} by {n}: {range}");
                    assert!(read.file_offset + read.len <= shard.file_bytes, "{name} by {n}: {range}");
                    // What the plan says is where the bytes are.
                    let file = std::fs::read(dir.path().join(manifest.dir_name()).join(&shard.file)).unwrap();
                    let in_file = &file[read.file_offset as usize..][..read.len as usize];
                    assert!(
                        in_file == bytes_of(&state, ByteRange::new(at, at + read.len)),
                        "{name} by {n}: {range}"
                    );
                    at += read.len;
                }
                assert_eq!(at, range.end, "{name} by {n}: {range}");
            }
        }
    }
}

#[test]
fn k_8_any_range_loads_alone_and_changes_nothing_else() {
    let mut rng = Rng::from_env("any_range_loads_alone");
    for (name, specs) in odd_specs() {
        let dir = tempfile::tempdir().unwrap();
        let state = filled(&specs, 13);
        let layout = layout(&state);
        let whole = bytes_of(&state, layout.all());
        let commit = save_all(dir.path(), &state, 3, 1, 1);
        let manifest = open(dir.path(), commit.step, commit.generation, commit.manifest).unwrap();
        for _ in 0..100 {
            let (a, b) = (rng.below(whole.len() as u64 + 1), rng.below(whole.len() as u64 + 1));
            let range = ByteRange::new(a.min(b), a.max(b));
            let mut loaded = filled(&specs, 99);
            let mut expected = bytes_of(&loaded, layout.all());
            let part = range.start as usize..range.end as usize;
            expected[part.clone()].copy_from_slice(&whole[part]);
            load_into(dir.path(), &manifest, Part::Range(range), &mut loaded).unwrap();
            assert!(bytes_of(&loaded, layout.all()) == expected, "{name}: {range}");
        }
    }
}

#[test]
fn k_13_a_state_behind_calls_saves_and_loads_as_one_in_memory() {
    for (name, specs) in odd_specs() {
        let dir = tempfile::tempdir().unwrap();
        let state = filled(&specs, 14);
        let device = Device(state.clone());
        let layout = layout(&state);
        assert_eq!(state_digest(&device, &layout), state_digest(&state, &layout), "{name}");
        let memory = save_all(dir.path(), &state, 3, 1, 1);
        let called = save_all(dir.path(), &device, 3, 1, 2);
        let manifests = [memory, called].map(|c| open(dir.path(), c.step, c.generation, c.manifest).unwrap());
        let mut loaded = Device(zeros_like(&state));
        load_into(dir.path(), &manifests[0], Part::All, &mut loaded).unwrap();
        assert_same(&loaded.0, &state, name);
        let mut loaded = zeros_like(&state);
        load_into(dir.path(), &manifests[1], Part::All, &mut loaded).unwrap();
        assert_same(&loaded, &state, name);
        assert_eq!(
            digest_range(&loaded, &layout, layout.all()),
            digest_range(&device, &layout, layout.all()),
            "{name}"
        );
    }
}
