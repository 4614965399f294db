//! The types of number that are summed.

use half::{bf16, f16};
use reknit_collectives::Element;
use serde::{Deserialize, Serialize};

/// What `--types` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum NumberType {
    F32,
    F64,
    F16,
    Bf16,
    I32,
    I64,
    U8,
}

impl NumberType {
    pub(super) fn name(self) -> &'static str {
        match self {
            NumberType::F32 => "f32",
            NumberType::F64 => "f64",
            NumberType::F16 => "f16",
            NumberType::Bf16 => "bf16",
            NumberType::I32 => "i32",
            NumberType::I64 => "i64",
            NumberType::U8 => "u8",
        }
    }

    pub(super) fn bytes(self) -> u64 {
        match self {
            NumberType::U8 => 1,
            NumberType::F16 | NumberType::Bf16 => 2,
            NumberType::F32 | NumberType::I32 => 4,
            NumberType::F64 | NumberType::I64 => 8,
        }
    }
}

/// A number whose sums can be looked at.
pub(super) trait Number: Element + PartialEq {
    /// A number so small that all of these types have it.
    fn small(number: u8) -> Self;
}

macro_rules! number {
    ($($number:ty => $small:expr),+ $(,)?) => {
        $(impl Number for $number {
            fn small(number: u8) -> Self {
                let small: fn(u8) -> $number = $small;
                small(number)
            }
        })+
    };
}

number! {
    f32 => f32::from,
    f64 => f64::from,
    f16 => |number| f16::from_f32(number.into()),
    bf16 => |number| bf16::from_f32(number.into()),
    i32 => i32::from,
    i64 => i64::from,
    u8 => |number| number,
}

/// How many different numbers a rank has. With as many ranks as [`WORLD_MAX`], the sums still are numbers that every
/// type has.
const DIFFERENT: usize = 7;
pub(super) const WORLD_MAX: u32 = 16;

/// What a rank has at a place, and what the sum over all ranks must be there.
pub(super) fn summand(rank: u32, place: usize) -> u8 {
    (rank as usize + 1 + place % DIFFERENT) as u8
}

pub(super) fn sum(world: u32, place: usize) -> u8 {
    (world * (world + 1) / 2 + world * (place % DIFFERENT) as u32) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sums_are_right_and_every_type_has_them() {
        for place in 0..10 {
            for world in 2..=WORLD_MAX {
                let all: u32 = (0..world).map(|rank| u32::from(summand(rank, place))).sum();
                assert_eq!(all, u32::from(sum(world, place)));
                assert_eq!(bf16::small(sum(world, place)).to_f32(), all as f32);
            }
        }
    }
}
