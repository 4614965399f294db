//! The small structured values of a state, and their one encoding for digests.
//!
//! JSON text will not do for a digest: the same number can be written in several ways, and libraries change theirs.

use std::collections::BTreeMap;

use reknit_membership::Digest;
use serde_json::Value;

use crate::digest::digest;

/// Small structured values by name: step, seeds, schedule, data cursor. Limits: [`VALUES_BYTES_MAX`] in all and
/// [`VALUES_DEPTH_MAX`] levels.
///
/// Numbers are unsigned or signed 64-bit integers or finite 64-bit floats and come back bit for bit.
pub type Values = BTreeMap<String, Value>;

/// The most bytes that the [`Values`] of a state may take, encoded.
pub const VALUES_BYTES_MAX: usize = 1 << 20;
/// How deep lists and objects may be nested in [`Values`].
pub const VALUES_DEPTH_MAX: usize = 32;

/// Why values cannot be saved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValuesError {
    /// They take more than [`VALUES_BYTES_MAX`].
    #[error("the state's values take more than {VALUES_BYTES_MAX} bytes: keep what is large in a tensor")]
    TooLarge,
    /// One is nested deeper than [`VALUES_DEPTH_MAX`].
    #[error("the value {name:?} is nested deeper than {VALUES_DEPTH_MAX} levels")]
    TooDeep {
        /// The value's name.
        name: String,
    },
}

/// The digest of `values`, the same on every machine and in every version, if they are within the limits.
pub(crate) fn values_digest(values: &Values) -> Result<Digest, ValuesError> {
    let mut bytes = Vec::new();
    for (name, value) in values {
        text(name, &mut bytes);
        if !encode(value, VALUES_DEPTH_MAX, &mut bytes) {
            return Err(ValuesError::TooDeep { name: name.clone() });
        }
        if bytes.len() > VALUES_BYTES_MAX {
            return Err(ValuesError::TooLarge);
        }
    }
    Ok(digest(&bytes))
}

/// Appends one value: a tag, then a length or a number in eight bytes, then what it holds. False if it is too deep.
fn encode(value: &Value, depth: usize, into: &mut Vec<u8>) -> bool {
    let mut tagged = |tag: u8, number: u64| {
        into.push(tag);
        into.extend_from_slice(&number.to_le_bytes());
    };
    match value {
        Value::Null => tagged(0, 0),
        Value::Bool(yes) => tagged(1, u64::from(*yes)),
        Value::Number(number) => {
            if let Some(number) = number.as_u64() {
                tagged(2, number);
            } else if let Some(number) = number.as_i64() {
                tagged(3, number.cast_unsigned());
            } else {
                // What is neither integer is a float, unless a build of serde_json keeps numbers as text.
                tagged(4, number.as_f64().unwrap_or(f64::NAN).to_bits());
            }
        }
        Value::String(string) => {
            tagged(5, 0);
            text(string, into);
        }
        Value::Array(items) => {
            tagged(6, items.len() as u64);
            return depth > 0 && items.iter().all(|item| encode(item, depth - 1, into));
        }
        Value::Object(members) => {
            tagged(7, members.len() as u64);
            // A build of serde_json may keep members as they were inserted; the digest must not.
            let members: BTreeMap<&String, &Value> = members.iter().collect();
            return depth > 0
                && members.into_iter().all(|(name, member)| {
                    text(name, into);
                    encode(member, depth - 1, into)
                });
        }
    }
    true
}

fn text(text: &str, into: &mut Vec<u8>) {
    into.extend_from_slice(&(text.len() as u64).to_le_bytes());
    into.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::Rng;
    use serde_json::json;

    fn of(value: Value) -> Digest {
        values_digest(&Values::from([("v".to_owned(), value)])).unwrap()
    }

    #[test]
    fn k_13_the_digest_tells_values_apart() {
        let values = [
            json!(null),
            json!(false),
            json!(true),
            json!(0),
            json!(1),
            json!(-1),
            json!(u64::MAX),
            json!(0.0),
            json!(-0.0),
            json!(1.0),
            json!(""),
            json!("1"),
            json!([]),
            json!([1]),
            json!([[1]]),
            json!([1, 1]),
            json!({}),
            json!({"1": 1}),
            json!({"1": {"1": 1}}),
            json!(["ab", "c"]),
            json!(["a", "bc"]),
        ];
        for (i, value) in values.iter().enumerate() {
            for other in &values[i + 1..] {
                assert_ne!(of(value.clone()), of(other.clone()), "{value} and {other}");
            }
        }
        assert_ne!(values_digest(&Values::new()), Ok(of(json!(null))));
    }

    #[test]
    fn k_13_the_digest_stays_what_it_was() {
        // The format promises it: a checkpoint of today is verified by the library of tomorrow.
        let value = json!({"b": [1, -2, 0.5, true, null], "a": "x"});
        assert_eq!(of(value).to_string(), "cd3a87fc6fdf075076c153c06c548bf7");
    }

    #[test]
    fn k_8_numbers_come_back_from_json_bit_for_bit() {
        let mut rng = Rng::from_env("numbers_come_back_from_json");
        let odd = [0.1, -0.0, 5e-324, f64::MAX, f64::MIN_POSITIVE, 1.0, 8.41e21, 9.5367431640625e-7];
        let random = (0..10_000).map(|_| f64::from_bits(rng.next())).filter(|float| float.is_finite());
        for float in odd.into_iter().chain(random) {
            let value = json!(float);
            let back: Value = serde_json::from_str(&value.to_string()).unwrap();
            assert_eq!(back.as_f64().unwrap().to_bits(), float.to_bits(), "{float:e}");
            assert_eq!(of(back), of(value), "{float:e}");
        }
        for value in [json!(u64::MAX), json!(i64::MIN), json!(-1), json!(0), json!(1u64 << 53 | 1)] {
            let back: Value = serde_json::from_str(&value.to_string()).unwrap();
            assert_eq!(of(back), of(value.clone()), "{value}");
        }
    }

    #[test]
    fn k_11_values_are_small_and_shallow() {
        let values = |value| Values::from([("v".to_owned(), value)]);
        assert_eq!(values_digest(&values(json!("x".repeat(1 << 20)))), Err(ValuesError::TooLarge));
        assert!(values_digest(&values(json!("x".repeat((1 << 20) - 100)))).is_ok());
        let nested = |depth| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        assert!(values_digest(&values(nested(VALUES_DEPTH_MAX))).is_ok());
        let deep = values_digest(&values(nested(VALUES_DEPTH_MAX + 1)));
        assert_eq!(deep, Err(ValuesError::TooDeep { name: "v".to_owned() }));
    }
}
