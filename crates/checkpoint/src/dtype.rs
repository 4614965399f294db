//! What a tensor is: its name, the type of its elements, its shape.

use serde::{Deserialize, Serialize};

/// The type of a tensor's elements. The names are those of safetensors files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// IEEE 754, 64 bits.
    F64,
    /// IEEE 754, 32 bits.
    F32,
    /// IEEE 754, 16 bits.
    F16,
    /// The upper half of an [`Dtype::F32`].
    Bf16,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 8 bits.
    U8,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 64 bits.
    U64,
    /// One byte: 0 or 1.
    Bool,
}

impl Dtype {
    /// Every type there is.
    pub const ALL: [Dtype; 13] = [
        Dtype::F64,
        Dtype::F32,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::I64,
        Dtype::I32,
        Dtype::I16,
        Dtype::I8,
        Dtype::U8,
        Dtype::U16,
        Dtype::U32,
        Dtype::U64,
        Dtype::Bool,
    ];

    /// The size of one element in bytes: a power of two, at most 8.
    pub fn bytes(self) -> u64 {
        match self {
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::Bf16 | Dtype::I16 | Dtype::U16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// The name that safetensors files use.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I16 => "I16",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::U16 => "U16",
            Dtype::U32 => "U32",
            Dtype::U64 => "U64",
            Dtype::Bool => "BOOL",
        }
    }
}

/// One named tensor of a state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// What the program calls it; no two tensors of a state share a name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// How many elements in each dimension, row-major; empty for a scalar, which has one element.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// A tensor of this name, element type and shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<u64>>) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// How many elements it has; `None` if that does not fit 64 bits.
    pub fn elements(&self) -> Option<u64> {
        // Tools multiply the dimensions as they stand, so those of an empty tensor must fit too.
        let mut dimensions = self.shape.iter().filter(|dimension| **dimension != 0);
        let product = dimensions.try_fold(1u64, |product, dimension| product.checked_mul(*dimension))?;
        Some(if self.shape.contains(&0) { 0 } else { product })
    }

    /// Its size in bytes; `None` if that does not fit 64 bits.
    pub fn bytes(&self) -> Option<u64> {
        self.elements()?.checked_mul(self.dtype.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_type_is_the_one_that_is_saved() {
        for dtype in Dtype::ALL {
            let json = serde_json::to_string(&dtype).unwrap();
            assert_eq!(json, format!("\"{}\"", dtype.name()));
            assert_eq!(serde_json::from_str::<Dtype>(&json).unwrap(), dtype);
        }
    }

    #[test]
    fn a_scalar_has_one_element_and_an_empty_dimension_none() {
        let bytes = |shape: &[u64]| TensorSpec::new("t", Dtype::F32, shape).bytes();
        assert_eq!(bytes(&[]), Some(4));
        assert_eq!(bytes(&[3, 5]), Some(60));
        assert_eq!(bytes(&[3, 0, 5]), Some(0));
        assert_eq!(bytes(&[u64::MAX, u64::MAX, 0]), None);
        assert_eq!(bytes(&[u64::MAX, 2]), None);
        assert_eq!(bytes(&[u64::MAX / 2]), None);
    }
}
