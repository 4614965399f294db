//! The header of a shard's file, which makes it a safetensors file that standard tools open.
//!
//! A shard holds a run of the logical byte space, so it holds whole tensors under their own names and shapes, and at
//! its ends pieces of tensors: `name[start..end]`, one-dimensional, its elements counted row-major in the whole.
//! Tensors without elements go with rank 0, so that all ranks' files together name each tensor.

use std::fmt::Write as _;

use crate::files::DIRECT_ALIGN;
use crate::layout::{ByteRange, Layout, piece_name};
use crate::saver::SaveMeta;

/// The largest header that the format allows, in bytes.
pub(crate) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// All bytes before the data of the file in which the rank of `meta` keeps the bytes `own` of the state. Padded with
/// spaces, so that the data starts on a page and can be written and mapped without a copy.
pub(crate) fn header(meta: &SaveMeta, layout: &Layout, own: ByteRange) -> Vec<u8> {
    let mut json = String::from("{\"__metadata__\":{\"reknit_format\":\"1\"");
    let notes = [
        ("job", meta.job.to_string()),
        ("step", meta.step.to_string()),
        ("lineage", meta.lineage.to_string()),
        ("generation", meta.generation.to_string()),
        ("rank", meta.rank.to_string()),
        ("world_size", meta.world_size.to_string()),
    ];
    for (key, value) in notes {
        put(&mut json, format_args!(",{}:{}", quoted(key), quoted(&value)));
    }
    json.push('}');
    if meta.rank.0 == 0 {
        for (tensor, spec) in layout.specs().iter().enumerate() {
            if layout.span(tensor).is_some_and(ByteRange::is_empty) {
                put_tensor(&mut json, &spec.name, spec.dtype.name(), &spec.shape, ByteRange::default());
            }
        }
    }
    for piece in layout.locate(own) {
        let spec = &layout.specs()[piece.tensor];
        let place = ByteRange::new(piece.at - own.start, piece.at - own.start + piece.len);
        if spec.bytes() == Some(piece.len) {
            put_tensor(&mut json, &spec.name, spec.dtype.name(), &spec.shape, place);
        } else {
            let element = spec.dtype.bytes();
            let (start, end) = (piece.offset / element, (piece.offset + piece.len) / element);
            let name = piece_name(&spec.name, start, end);
            put_tensor(&mut json, &name, spec.dtype.name(), &[end - start], place);
        }
    }
    json.push('}');
    let padded = (8 + json.len()).next_multiple_of(DIRECT_ALIGN) - 8;
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header.resize(8 + padded, b' ');
    header
}

fn put_tensor(json: &mut String, name: &str, dtype: &str, shape: &[u64], place: ByteRange) {
    let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
    put(
        json,
        format_args!(
            ",{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
            quoted(name),
            shape.join(","),
            place.start,
            place.end
        ),
    );
}

fn put(json: &mut String, text: std::fmt::Arguments<'_>) {
    json.write_fmt(text).expect("writing to a string does not fail");
}

fn quoted(text: &str) -> serde_json::Value {
    serde_json::Value::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{Dtype, TensorSpec};
    use reknit_membership::{Generation, JobId, Lineage, Rank, Step, WorldSize};

    #[test]
    fn the_header_reads_as_the_format_says() {
        let meta = SaveMeta {
            job: JobId::new("digits").unwrap(),
            step: Step(120),
            lineage: Lineage(3),
            generation: Generation(7),
            rank: Rank(0),
            world_size: WorldSize(4),
        };
        let layout = Layout::new(vec![
            TensorSpec::new("quote\"µ", Dtype::F32, [2, 4]),
            TensorSpec::new("none", Dtype::I64, [0, 3]),
            TensorSpec::new("w", Dtype::F32, [8]),
        ])
        .unwrap();
        let header = header(&meta, &layout, ByteRange::new(0, 40));
        assert_eq!(header.len(), 4096);
        assert_eq!(header[..8], 4088u64.to_le_bytes());
        assert_eq!(
            std::str::from_utf8(&header[8..]).unwrap().trim_end(),
            "{\"__metadata__\":{\"reknit_format\":\"1\",\"job\":\"digits\",\"step\":\"120\",\"lineage\":\"3\",\
             \"generation\":\"7\",\"rank\":\"0\",\"world_size\":\"4\"},\
             \"none\":{\"dtype\":\"I64\",\"shape\":[0,3],\"data_offsets\":[0,0]},\
             \"quote\\\"µ\":{\"dtype\":\"F32\",\"shape\":[2,4],\"data_offsets\":[0,32]},\
             \"w[0..2]\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[32,40]}}"
        );
    }

    #[test]
    fn the_limits_of_a_layout_keep_the_header_within_the_formats_limit() {
        use crate::layout::{DIMENSIONS_MAX, NAME_BYTES_MAX, STATE_BYTES_MAX, TENSORS_MAX};
        // Each byte of a name may be escaped to two; sizes have at most as many digits as the largest.
        let digits = STATE_BYTES_MAX.to_string().len();
        let name = 2 * NAME_BYTES_MAX + 2 * digits + 4;
        // A shape with many dimensions has small ones: together they have the digits of the product, and the commas.
        let shape = 2 * DIMENSIONS_MAX + digits;
        let tensor = name + shape + 2 * digits + 60;
        assert!((TENSORS_MAX * tensor) as u64 + 10_000 < HEADER_BYTES_MAX);
    }
}
