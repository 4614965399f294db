//! The types of number that the rings move and combine.

use std::fmt;

use half::{bf16, f16};

use crate::reduce::Fold;

#[cfg(target_endian = "big")]
compile_error!("the ring's streams are little-endian and are received straight into the caller's memory");

/// A type of number, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// 16-bit float of IEEE 754.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// A byte.
    U8,
}

impl DType {
    /// All of them.
    pub const ALL: [DType; 7] =
        [DType::F32, DType::F64, DType::F16, DType::Bf16, DType::I32, DType::I64, DType::U8];

    pub(crate) fn code(self) -> u8 {
        match self {
            DType::F32 => 1,
            DType::F64 => 2,
            DType::F16 => 3,
            DType::Bf16 => 4,
            DType::I32 => 5,
            DType::I64 => 6,
            DType::U8 => 7,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| dtype.code() == code)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U8 => "u8",
        })
    }
}

/// A number that a collective can move and combine. Nobody else can implement it: each type is a code in the stream.
pub trait Element: Fold {
    /// The type as a value.
    const DTYPE: DType;

    /// The type in which means are taken: one in which their sums fit.
    #[doc(hidden)]
    type Wide: Element;

    /// The same number in the wider type.
    #[doc(hidden)]
    fn widen(self) -> Self::Wide;

    /// A mean of widened numbers, which fits again.
    #[doc(hidden)]
    fn narrow(mean: Self::Wide) -> Self;
}

macro_rules! element {
    ($($number:ty => $dtype:ident, $wide:ty, $narrow:expr);+ $(;)?) => {
        $(impl Element for $number {
            const DTYPE: DType = DType::$dtype;

            type Wide = $wide;

            fn widen(self) -> $wide {
                <$wide>::from(self)
            }

            fn narrow(mean: $wide) -> $number {
                let narrow: fn($wide) -> $number = $narrow;
                narrow(mean)
            }
        })+
    };
}

element! {
    f32 => F32, f32, |mean| mean;
    f64 => F64, f64, |mean| mean;
    f16 => F16, f32, f16::from_f32;
    bf16 => Bf16, bf16, |mean| mean;
    i32 => I32, i64, |mean| mean as i32;
    i64 => I64, i64, |mean| mean;
    u8 => U8, i64, |mean| mean as u8;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_own_code() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_code(dtype.code()), Some(dtype));
        }
        assert_eq!(DType::from_code(0), None);
    }
}
