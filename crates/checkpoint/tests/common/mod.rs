//! What the tests share: odd states, whole saves, a seeded source of randomness.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of this")]
#![allow(clippy::print_stdout, reason = "a test that fails shows how to replay it")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use reknit_checkpoint::{
    CommitRef, Dtype, Fingerprint, Layout, Manifest, ManifestMeta, NamedTensors, SaveMeta, Saved, Saver,
    SaverOptions, State, TensorSpec, Values, list, publish_manifest,
};
use reknit_membership::{Digest, Generation, HistoryId, JobId, Lineage, Rank, Step, WorldSize};

/// Longer than any save of a test takes: a test that waits this long has hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// SplitMix64: small, and the same everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Seeded from `REKNIT_SEED`, or else from the clock; says how to replay.
    pub fn from_env(test: &str) -> Rng {
        let seed = std::env::var("REKNIT_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            now.as_nanos() as u64 % 1_000_000_007
        });
        println!("replay: REKNIT_SEED={seed} cargo test -p reknit-checkpoint {test}");
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A state of these tensors with every bit random, so that floats have all their odd values too.
pub fn filled(specs: &[TensorSpec], seed: u64) -> NamedTensors {
    let mut rng = Rng::new(seed);
    let mut state = NamedTensors::zeros(specs);
    for spec in specs {
        state.raw_mut(&spec.name).fill_with(|| rng.next() as u8);
    }
    state.set_value("step", seed);
    state.set_value("schedule", serde_json::json!({"warm": true, "rate": 0.1, "at": [1, -2, null]}));
    state
}

fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec::new(name, dtype, shape)
}

/// States whose layouts are hard to cut.
pub fn odd_specs() -> Vec<(&'static str, Vec<TensorSpec>)> {
    let each = |shape: &[u64]| -> Vec<TensorSpec> {
        Dtype::ALL.into_iter().map(|dtype| spec(dtype.name(), dtype, shape)).collect()
    };
    vec![
        ("no tensor", vec![]),
        ("empty tensors", vec![spec("a", Dtype::F32, &[0]), spec("b", Dtype::U8, &[3, 0, 2])]),
        ("one byte", vec![spec("a", Dtype::U8, &[])]),
        ("one scalar", vec![spec("a", Dtype::F64, &[])]),
        (
            "three bytes in three tensors",
            vec![spec("a", Dtype::Bool, &[1]), spec("b", Dtype::I8, &[]), spec("c", Dtype::U8, &[1, 1])],
        ),
        ("a scalar of every type", each(&[])),
        ("every type in an odd shape", each(&[3, 1, 5])),
        (
            "odd ones between large ones",
            vec![
                spec("first", Dtype::U8, &[1]),
                spec("large", Dtype::F32, &[37, 11]),
                spec("none", Dtype::Bf16, &[0]),
                spec("half", Dtype::F16, &[129]),
                spec("mask", Dtype::Bool, &[77]),
                spec("wide", Dtype::I64, &[2, 33]),
                spec("last", Dtype::F64, &[]),
            ],
        ),
        ("one tensor over all ranks", vec![spec("w", Dtype::F32, &[1000])]),
        ("larger chunks", vec![spec("w", Dtype::F32, &[300, 100]), spec("b", Dtype::U8, &[40_001])]),
    ]
}

pub fn layout(state: &dyn State) -> Layout {
    Layout::new(state.tensors()).unwrap()
}

pub fn zeros_like(state: &dyn State) -> NamedTensors {
    NamedTensors::zeros(&state.tensors())
}

/// Panics unless both states hold the same tensors and values, bit for bit.
pub fn assert_same(one: &NamedTensors, other: &NamedTensors, context: &str) {
    assert_eq!(one.tensors(), other.tensors(), "{context}");
    for spec in one.tensors() {
        assert!(one.raw(&spec.name) == other.raw(&spec.name), "{context}: {:?} differs", spec.name);
    }
    assert_eq!(one.values(), other.values(), "{context}");
}

pub fn meta(step: u64, generation: u64, rank: u32, n: u32) -> SaveMeta {
    SaveMeta {
        job: JobId::new("digits").unwrap(),
        step: Step(step),
        lineage: Lineage(1),
        generation: Generation(generation),
        rank: Rank(rank),
        world_size: WorldSize(n),
    }
}

pub fn manifest_meta(step: u64, generation: u64, n: u32) -> ManifestMeta {
    ManifestMeta {
        job: JobId::new("digits").unwrap(),
        history: HistoryId(0xfeed),
        step: Step(step),
        lineage: Lineage(1),
        generation: Generation(generation),
        world_size: WorldSize(n),
    }
}

pub fn commit(step: u64, generation: u64, manifest: Digest) -> CommitRef {
    CommitRef { step: Step(step), generation: Generation(generation), manifest }
}

/// What `n` ranks that hold the same state write; each gives its part.
pub fn save_parts(dir: &Path, state: &dyn State, n: u32, step: u64, generation: u64) -> Vec<Saved> {
    let mut saver = Saver::new(dir.to_owned(), layout(state), SaverOptions::default()).unwrap();
    let save = |rank| {
        saver.begin(meta(step, generation, rank, n), state).unwrap();
        saver.wait(PATIENCE).expect("a save ends").unwrap()
    };
    (0..n).map(save).collect()
}

pub fn assemble(layout: &Layout, step: u64, generation: u64, parts: &[Saved]) -> Manifest {
    let reports: Vec<_> = parts.iter().map(|part| part.report).collect();
    let n = parts.len() as u32;
    let (fingerprint, values): (&Fingerprint, &Values) = (&parts[0].fingerprint, &parts[0].values);
    Manifest::assemble(manifest_meta(step, generation, n), layout, fingerprint, values.clone(), &reports)
        .unwrap()
}

/// A whole checkpoint by `n` ranks, committed.
pub fn save_all(dir: &Path, state: &dyn State, n: u32, step: u64, generation: u64) -> CommitRef {
    let parts = save_parts(dir, state, n, step, generation);
    let manifest = assemble(&layout(state), step, generation, &parts);
    commit(step, generation, publish_manifest(dir, &manifest).unwrap())
}

/// The files of one checkpoint, sorted.
pub fn files_of(dir: &Path, commit: &CommitRef) -> Vec<PathBuf> {
    let listed = list(dir).unwrap();
    let listed = listed.iter().find(|l| (l.step, l.generation) == (commit.step, commit.generation)).unwrap();
    let mut files: Vec<_> = std::fs::read_dir(&listed.path).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// The same state behind calls, as on a device: nothing in place.
pub struct Device(pub NamedTensors);

impl State for Device {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.0.tensors()
    }
    fn read(&self, tensor: usize, offset: u64, into: &mut [u8]) {
        self.0.read(tensor, offset, into);
    }
    fn write(&mut self, tensor: usize, offset: u64, bytes: &[u8]) {
        self.0.write(tensor, offset, bytes);
    }
    fn values(&self) -> Values {
        self.0.values()
    }
    fn set_values(&mut self, values: Values) {
        self.0.set_values(values);
    }
}
