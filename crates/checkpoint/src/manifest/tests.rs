use serde_json::{Value, json};

use super::*;
use crate::common::{self, Rng, assemble, filled, layout, save_parts};
use crate::digest::digest;
use crate::dtype::{Dtype, TensorSpec};
use crate::saver::Saved;
use crate::state::State;
use crate::tensors::NamedTensors;

/// A state of three chunks, and what two ranks wrote of it.
fn parts(dir: &Path) -> (NamedTensors, Vec<Saved>) {
    let mut state = NamedTensors::new().with_f32("w", [5, 8], (0..40u8).map(f32::from).collect()).with_bool(
        "mask",
        [3],
        &[true, false, true],
    );
    state.set_value("rate", 0.1);
    let parts = save_parts(dir, &state, 2, 120, 7);
    (state, parts)
}

fn reassemble(layout: &Layout, parts: &[Saved], reports: &[ShardReport]) -> Result<Manifest, AssembleError> {
    let meta = common::manifest_meta(120, 7, 2);
    Manifest::assemble(meta, layout, &parts[0].fingerprint, parts[0].values.clone(), reports)
}

#[test]
fn a_manifest_reads_as_text() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let bytes = assemble(&layout(&state), 120, 7, &parts).to_bytes();
    let expected = r#"{
  "format": 1,
  "written_by": "reknit-checkpoint VERSION",
  "job": "digits",
  "history": "000000000000feed",
  "step": 120,
  "lineage": 1,
  "generation": 7,
  "world_size": 2,
  "state_bytes": 163,
  "state_digest": "STATE",
  "chunk_bytes": 64,
  "tensors": [
    {
      "name": "w",
      "dtype": "F32",
      "shape": [
        5,
        8
      ]
    },
    {
      "name": "mask",
      "dtype": "BOOL",
      "shape": [
        3
      ]
    }
  ],
  "values": {
    "rate": 0.1
  },
  "shards": [
    {
      "file": "rank-00000-of-00002.safetensors",
      "file_bytes": 4160,
      "digest": "DIGEST0",
      "start": 0,
      "end": 64,
      "chunks": "CHUNK0"
    },
    {
      "file": "rank-00001-of-00002.safetensors",
      "file_bytes": 4195,
      "digest": "DIGEST1",
      "start": 64,
      "end": 163,
      "chunks": "CHUNK1CHUNK2"
    }
  ]
}
"#;
    // Computed apart from the library, from the description of the format.
    let golden = [
        ("VERSION", env!("CARGO_PKG_VERSION")),
        ("STATE", "a0db3c957068f4fdce10b742276b5c51"),
        ("DIGEST0", "6f24f8ccd84222217a71fb23c2cdc61e"),
        ("DIGEST1", "31b39f8fb23cb33f7d3febe611dec894"),
        ("CHUNK0", "20a0508a7cc22b4bf9634f0841efb85d"),
        ("CHUNK1", "927cd1dfcdbb68a146a5930cfcb66559"),
        ("CHUNK2", "eed39119dddeafa8363359288c34bd51"),
    ];
    let expected = golden.iter().fold(expected.to_owned(), |text, (key, value)| text.replace(key, value));
    assert_eq!(String::from_utf8(bytes).unwrap(), expected);
}

#[test]
fn what_is_written_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    for (name, specs) in common::odd_specs() {
        for n in [1, 2, 8] {
            let state = filled(&specs, 5);
            let parts = save_parts(&dir.path().join(name), &state, n, 1, 1);
            let manifest = assemble(&layout(&state), 1, 1, &parts);
            assert_eq!(Manifest::parse(&manifest.to_bytes()).unwrap(), manifest, "{name} by {n}");
        }
    }
}

#[test]
fn k_9_each_rank_reports_once_and_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let layout = layout(&state);
    let reports = [parts[0].report, parts[1].report];
    let check =
        |reports: &[ShardReport]| reassemble(&layout, &parts, reports).map(|manifest| manifest.to_bytes());
    let good = check(&reports).unwrap();
    assert_eq!(check(&[reports[1], reports[0]]), Ok(good), "the order of the reports makes no difference");

    assert_eq!(check(&reports[..1]), Err(AssembleError::Missing { rank: Rank(1) }));
    assert_eq!(check(&reports[1..]), Err(AssembleError::Missing { rank: Rank(0) }));
    let twice = [reports[0], reports[0], reports[1]];
    assert_eq!(check(&twice), Err(AssembleError::Unexpected { rank: Rank(0) }));
    let foreign = [reports[0], reports[1], ShardReport { rank: Rank(2), ..reports[1] }];
    assert_eq!(check(&foreign), Err(AssembleError::Unexpected { rank: Rank(2) }));
    let other = ShardReport { state_digest: digest(b"another state"), ..reports[1] };
    assert_eq!(check(&[reports[0], other]), Err(AssembleError::Diverged { ranks: vec![Rank(1)] }));
    for file_bytes in [0, 98, 106, u64::MAX] {
        let wrong = ShardReport { file_bytes, ..reports[1] };
        assert_eq!(check(&[reports[0], wrong]), Err(AssembleError::FileSize { rank: Rank(1), file_bytes }));
    }
}

#[test]
fn k_9_a_fingerprint_of_another_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let reports = [parts[0].report, parts[1].report];
    let meta = common::manifest_meta(120, 7, 2);
    let (fingerprint, values) = (&parts[0].fingerprint, &parts[0].values);
    let mut other_values = values.clone();
    other_values.insert("rate".to_owned(), json!(0.2));
    let error = Manifest::assemble(meta.clone(), &layout(&state), fingerprint, other_values, &reports);
    assert_eq!(error, Err(AssembleError::OtherState));
    let other =
        Layout::new(vec![TensorSpec::new("w", Dtype::F32, [40]), state.tensors()[1].clone()]).unwrap();
    let error = Manifest::assemble(meta, &other, fingerprint, values.clone(), &reports);
    assert_eq!(error, Err(AssembleError::OtherState));
    for n in [0, RANKS_MAX + 1] {
        let meta = common::manifest_meta(120, 7, n);
        let error = Manifest::assemble(meta, &layout(&state), fingerprint, values.clone(), &reports);
        assert_eq!(error, Err(AssembleError::WorldSize { world_size: WorldSize(n) }));
    }
}

#[test]
fn shards_that_are_not_there_are_found_before_the_manifest_is() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let manifest = assemble(&layout(&state), 120, 7, &parts);
    let shard = dir.path().join("step-00000120-g7/rank-00001-of-00002.safetensors");
    let content = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &content[..4000]).unwrap();
    match publish_manifest(dir.path(), &manifest).unwrap_err() {
        PublishError::ShardLength { file, expected: 4195, found: 4000 } => assert_eq!(file, shard),
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(&shard).unwrap();
    match publish_manifest(dir.path(), &manifest).unwrap_err() {
        PublishError::ShardMissing { file } => assert_eq!(file, shard),
        other => panic!("{other:?}"),
    }
    assert!(!dir.path().join("step-00000120-g7/manifest.json").exists());
    std::fs::write(&shard, &content).unwrap();
    publish_manifest(dir.path(), &manifest).unwrap();
}

#[test]
fn k_1_a_manifest_is_published_once() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let manifest = assemble(&layout(&state), 120, 7, &parts);
    let first = publish_manifest(dir.path(), &manifest).unwrap();
    assert_eq!(
        publish_manifest(dir.path(), &manifest).unwrap(),
        first,
        "a repeated request is answered again"
    );
    let mut later = manifest.clone();
    later.meta.lineage = Lineage(99);
    let error = publish_manifest(dir.path(), &later).unwrap_err();
    assert!(matches!(error, PublishError::File(FileError::Exists { .. })), "{error:?}");
    let file = dir.path().join("step-00000120-g7/manifest.json");
    assert_eq!(std::fs::read(file).unwrap(), manifest.to_bytes());
}

/// Fields that no other field of the manifest tells; of the last two the shard's file tells.
const FREE: [&str; 8] =
    ["written_by", "job", "history", "step", "lineage", "generation", "file_bytes", "digest"];

#[test]
fn k_11_a_field_that_does_not_fit_the_others_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let good: Value = serde_json::from_slice(&assemble(&layout(&state), 120, 7, &parts).to_bytes()).unwrap();
    let parse = |value: &Value| Manifest::parse(&serde_json::to_vec(value).unwrap());
    assert!(parse(&good).is_ok());

    let wrong = [
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(63),
        json!(64),
        json!(128),
        json!(162),
        json!(u64::MAX),
        json!(-1),
        json!(0.5),
        json!(""),
        json!("../manifest.json"),
        json!("/etc/passwd"),
        json!("0123456789abcdef0123456789abcdef"),
        json!([]),
        json!({}),
        json!([[]]),
    ];
    let mut tried = 0;
    for pointer in pointers(&good) {
        let field = pointer.rsplit('/').next().unwrap();
        for wrong in &wrong {
            let mut bad = good.clone();
            *bad.pointer_mut(&pointer).unwrap() = wrong.clone();
            if bad == good {
                continue;
            }
            let result = parse(&bad);
            assert!(result.is_err() || FREE.contains(&field), "{pointer} = {wrong} is taken");
            tried += 1;
        }
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let mut bad = good.clone();
        match bad.pointer_mut(parent).unwrap() {
            Value::Object(object) => drop(object.remove(key)),
            Value::Array(array) => drop(array.remove(key.parse().unwrap())),
            _ => unreachable!("a pointer leads through objects and arrays"),
        }
        assert!(parse(&bad).is_err(), "{pointer} can be left out");
        if let Value::Object(object) = bad.pointer_mut(parent).unwrap() {
            object.insert("unknown".to_owned(), json!(1));
        }
        assert!(parse(&bad).is_err(), "an unknown field beside {pointer} is taken");
    }
    assert!(tried > 500, "{tried}");

    let mut later = good;
    *later.pointer_mut("/format").unwrap() = json!(2);
    later.as_object_mut().unwrap().insert("new_in_2".to_owned(), json!(1));
    assert!(matches!(parse(&later), Err(BadManifest::UnknownFormat { found: 2 })));
}

/// Makes the digest of the whole fit the chunks again, as somebody would who forges a manifest.
fn forged(
    mut manifest: Value,
    layout: &Layout,
    change: impl Fn(&mut Value),
) -> Result<Manifest, BadManifest> {
    change(&mut manifest);
    let shards = manifest["shards"].as_array().unwrap();
    let text: String = shards.iter().map(|shard| shard["chunks"].as_str().unwrap()).collect();
    let chunks = text
        .as_bytes()
        .chunks(32)
        .map(|hex| Digest(u128::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap()));
    let values = serde_json::from_value(manifest["values"].clone()).unwrap();
    let fingerprint = Fingerprint::from_parts(layout, chunks.collect(), &values).unwrap();
    manifest["state_digest"] = json!(fingerprint.state().to_string());
    Manifest::parse(&serde_json::to_vec(&manifest).unwrap())
}

#[test]
fn k_11_a_forged_manifest_whose_parts_do_not_cover_the_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let layout = layout(&state);
    let good: Value = serde_json::from_slice(&assemble(&layout, 120, 7, &parts).to_bytes()).unwrap();
    let chunks = |n: usize| json!("0123456789abcdef0123456789abcdef".repeat(n));
    let check = |change: &dyn Fn(&mut Value)| match forged(good.clone(), &layout, change) {
        Ok(_) => "nothing",
        Err(BadManifest::Inconsistent { field }) => field,
        Err(other) => panic!("{other}"),
    };
    assert_eq!(check(&|_| {}), "nothing");
    assert_eq!(check(&|m| m["shards"][0]["chunks"] = chunks(1)), "nothing");
    assert_eq!(check(&|m| m["shards"][0]["chunks"] = chunks(2)), "chunks");
    assert_eq!(check(&|m| m["shards"][0]["chunks"] = chunks(0)), "chunks");
    let cut_through_a_chunk = |m: &mut Value| {
        m["shards"][0]["end"] = json!(65);
        m["shards"][0]["chunks"] = chunks(2);
        m["shards"][1]["start"] = json!(65);
    };
    assert_eq!(check(&cut_through_a_chunk), "end");
    let not_to_the_end = |m: &mut Value| {
        m["shards"][1]["end"] = json!(128);
        m["shards"][1]["chunks"] = chunks(1);
    };
    assert_eq!(check(&not_to_the_end), "end");
    let beyond_the_end = |m: &mut Value| {
        m["shards"][1]["end"] = json!(192);
        m["shards"][1]["file_bytes"] = json!(5000);
    };
    assert_eq!(check(&beyond_the_end), "start");
    for file_bytes in [0, 63, 64, 71, 64 + 8 + HEADER_BYTES_MAX + 1, u64::MAX] {
        assert_eq!(check(&|m| m["shards"][0]["file_bytes"] = json!(file_bytes)), "file_bytes");
    }
    for file_bytes in [72, 64 + 8 + HEADER_BYTES_MAX] {
        assert_eq!(check(&|m| m["shards"][0]["file_bytes"] = json!(file_bytes)), "nothing");
    }
    // There is one way to write a digest.
    let upper = |m: &mut Value| {
        m["shards"][1]["digest"] = json!(m["shards"][1]["digest"].as_str().unwrap().to_uppercase());
    };
    assert_eq!(check(&upper), "digest");
}

/// Where in `value` something is.
fn pointers(value: &Value) -> Vec<String> {
    let below = |key: String, value: &Value| {
        let inner = pointers(value).into_iter().map(move |pointer| pointer.to_owned());
        let mut all = vec![format!("/{key}")];
        all.extend(inner.map(|pointer| format!("/{key}{pointer}")));
        all
    };
    match value {
        Value::Object(object) => object.iter().flat_map(|(key, value)| below(key.clone(), value)).collect(),
        Value::Array(array) => {
            array.iter().enumerate().flat_map(|(i, value)| below(i.to_string(), value)).collect()
        }
        _ => Vec::new(),
    }
}

#[test]
fn k_11_no_bytes_make_the_parser_panic() {
    let dir = tempfile::tempdir().unwrap();
    let (state, parts) = parts(dir.path());
    let good = assemble(&layout(&state), 120, 7, &parts).to_bytes();
    let mut rng = Rng::from_env("no_bytes_make_the_parser_panic");
    for _ in 0..3000 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(3) {
            if bad.is_empty() {
                break;
            }
            let at = rng.below(bad.len() as u64) as usize;
            match rng.below(4) {
                0 => bad[at] = rng.next() as u8,
                1 => bad[at] = b"0123456789\"[]{},:-.eE"[rng.below(21) as usize],
                2 => drop(bad.drain(at..(at + 1 + rng.below(40) as usize).min(bad.len()))),
                _ => bad.truncate(at),
            }
        }
        let _ = Manifest::parse(&bad);
    }
    let deep = [b"{\"format\":1,\"values\":".to_vec(), vec![b'['; 1 << 20]].concat();
    assert!(matches!(Manifest::parse(&deep), Err(BadManifest::Json(_))));
}
