//! Numbers that gradients are made of.

use half::{bf16, f16};
use reknit_collectives::Element;

/// A number that can be weighted: f32, f64, f16 or bf16.
pub trait Gradient: Element {
    /// Multiplies each element by `weight`, in the wider type for the 16-bit ones. A weight of zero gives zero, also
    /// where an element is infinite or no number.
    fn scale(elements: &mut [Self], weight: f64);

    /// Adds to each element the other at its place, in the wider type for the 16-bit ones.
    fn add(elements: &mut [Self], others: &[Self]);
}

macro_rules! gradient {
    ($type:ty, $wide:ty, $into:expr, $from:expr) => {
        impl Gradient for $type {
            fn scale(elements: &mut [$type], weight: f64) {
                if weight == 0.0 {
                    elements.fill($from(0.0));
                } else if weight != 1.0 {
                    let weight = weight as $wide;
                    for element in elements {
                        *element = $from($into(*element) * weight);
                    }
                }
            }

            fn add(elements: &mut [$type], others: &[$type]) {
                for (element, other) in elements.iter_mut().zip(others) {
                    *element = $from($into(*element) + $into(*other));
                }
            }
        }
    };
}

gradient!(f32, f32, |x: f32| x, |x: f32| x);
gradient!(f64, f64, |x: f64| x, |x: f64| x);
gradient!(f16, f32, f16::to_f32, f16::from_f32);
gradient!(bf16, f32, bf16::to_f32, bf16::from_f32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_of_zero_silences_what_is_no_number() {
        let mut elements = [f32::NAN, f32::INFINITY, 1.0];
        f32::scale(&mut elements, 0.0);
        assert_eq!(elements, [0.0, 0.0, 0.0]);
        let mut halves = [bf16::from_f32(3.0)];
        bf16::scale(&mut halves, 0.5);
        assert_eq!(halves, [bf16::from_f32(1.5)]);
        bf16::add(&mut halves, &[bf16::from_f32(0.25)]);
        assert_eq!(halves, [bf16::from_f32(1.75)]);
    }
}
