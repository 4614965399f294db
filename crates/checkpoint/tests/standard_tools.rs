//! What we write, everybody's tools read (rule K-14).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;

use common::{files_of, filled, layout, odd_specs, save_all};
use reknit_checkpoint::{Dtype, State};
use safetensors::SafeTensors;

fn theirs(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F64 => safetensors::Dtype::F64,
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
        Dtype::I64 => safetensors::Dtype::I64,
        Dtype::I32 => safetensors::Dtype::I32,
        Dtype::I16 => safetensors::Dtype::I16,
        Dtype::I8 => safetensors::Dtype::I8,
        Dtype::U8 => safetensors::Dtype::U8,
        Dtype::U16 => safetensors::Dtype::U16,
        Dtype::U32 => safetensors::Dtype::U32,
        Dtype::U64 => safetensors::Dtype::U64,
        Dtype::Bool => safetensors::Dtype::BOOL,
    }
}

/// `name[start..end]` taken apart.
fn piece(name: &str) -> Option<(&str, usize, usize)> {
    let (name, range) = name.strip_suffix(']')?.rsplit_once('[')?;
    let (start, end) = range.split_once("..")?;
    Some((name, start.parse().ok()?, end.parse().ok()?))
}

#[test]
fn k_14_the_reference_reader_finds_every_element_of_every_tensor_once() {
    for (layout_name, specs) in odd_specs() {
        for n in [1, 2, 3, 7] {
            let context = format!("{layout_name} by {n}");
            let dir = tempfile::tempdir().unwrap();
            let state = filled(&specs, 21);
            let commit = save_all(dir.path(), &state, n, 120, 7);
            let by_name: BTreeMap<_, _> = state.tensors().into_iter().map(|s| (s.name.clone(), s)).collect();
            // Of each tensor the elements found, by where they start.
            let mut found: BTreeMap<String, BTreeMap<usize, Vec<u8>>> = BTreeMap::new();
            for (rank, file) in
                files_of(dir.path(), &commit).iter().filter(|f| !f.ends_with("manifest.json")).enumerate()
            {
                let bytes = std::fs::read(file).unwrap();
                let (header_bytes, header) = SafeTensors::read_metadata(&bytes).expect(&context);
                assert_eq!((header_bytes + 8) % 4096, 0, "{context}: the data starts on a page");
                let notes = header.metadata().as_ref().expect(&context);
                let rank = rank.to_string();
                for (key, value) in [("job", "digits"), ("step", "120"), ("generation", "7"), ("rank", &rank)]
                {
                    assert_eq!(notes[key], value, "{context}");
                }
                for (name, tensor) in SafeTensors::deserialize(&bytes).expect(&context).tensors() {
                    let (whole, start) = match piece(&name) {
                        Some((whole, start, end)) => {
                            assert_eq!(tensor.shape(), [end - start], "{context}");
                            (whole.to_owned(), start)
                        }
                        None => {
                            let shape: Vec<usize> =
                                by_name[&name].shape.iter().map(|d| *d as usize).collect();
                            assert_eq!(tensor.shape(), shape, "{context}");
                            (name, 0)
                        }
                    };
                    assert_eq!(tensor.dtype(), theirs(by_name[&whole].dtype), "{context}");
                    let at = tensor.data().as_ptr().addr() - bytes.as_ptr().addr();
                    assert_eq!(
                        at % by_name[&whole].dtype.bytes() as usize,
                        0,
                        "{context}: {whole} is not aligned"
                    );
                    let before = found.entry(whole).or_default().insert(start, tensor.data().to_vec());
                    assert!(before.is_none(), "{context}");
                }
            }
            assert_eq!(found.len(), specs.len(), "{context}: every tensor is named");
            for (name, pieces) in found {
                let mut joined = Vec::new();
                for (start, bytes) in pieces {
                    assert_eq!(
                        joined.len(),
                        start * by_name[&name].dtype.bytes() as usize,
                        "{context}: {name}"
                    );
                    joined.extend(bytes);
                }
                assert!(joined == state.raw(&name), "{context}: {name}");
            }
        }
    }
}

#[test]
fn k_14_a_state_saved_by_one_rank_is_a_plain_file_of_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let (_, specs) = odd_specs().remove(6);
    let state = filled(&specs, 22);
    let commit = save_all(dir.path(), &state, 1, 120, 7);
    let bytes = std::fs::read(&files_of(dir.path(), &commit)[1]).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), specs.len());
    assert_eq!(layout(&state).total_bytes() + 4096, bytes.len() as u64);
    for spec in &specs {
        assert_eq!(file.tensor(&spec.name).unwrap().data(), state.raw(&spec.name));
    }
}
