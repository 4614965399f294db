//! Owned tensors in host memory.

use std::collections::BTreeMap;

use half::{bf16, f16};
use serde_json::Value;

use crate::dtype::{Dtype, TensorSpec};
use crate::state::State;
use crate::to_usize;
use crate::values::Values;

/// Owned, aligned tensors in host memory and the values that go with them: the [`State`] of programs that have none of
/// their own.
///
/// ```
/// use reknit_checkpoint::NamedTensors;
///
/// let mut state = NamedTensors::new().with_f32("w", [2, 3], vec![0.0; 6]).with_f32("m", [2, 3], vec![0.0; 6]);
/// state.set_value("learning_rate", 0.1);
/// let [w, m] = state.f32_each_mut(["w", "m"]);
/// w[0] += 1.0 + m[0];
/// assert_eq!(state.f32("w")[0], 1.0);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NamedTensors {
    tensors: Vec<(TensorSpec, Data)>,
    by_name: BTreeMap<String, usize>,
    values: Values,
}

#[derive(Debug, Clone, PartialEq)]
enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    I16(Vec<i16>),
    I8(Vec<i8>),
    U8(Vec<u8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    /// As bytes: what is loaded is kept as it is, even if a byte is neither 0 nor 1.
    Bool(Vec<u8>),
}

/// Does the same with the elements of every type.
macro_rules! each_type {
    ($data:expr, $elements:ident => $do:expr) => {
        match $data {
            Data::F64($elements) => $do,
            Data::F32($elements) => $do,
            Data::F16($elements) => $do,
            Data::Bf16($elements) => $do,
            Data::I64($elements) => $do,
            Data::I32($elements) => $do,
            Data::I16($elements) => $do,
            Data::I8($elements) => $do,
            Data::U8($elements) => $do,
            Data::U16($elements) => $do,
            Data::U32($elements) => $do,
            Data::U64($elements) => $do,
            Data::Bool($elements) => $do,
        }
    };
}

macro_rules! accessors {
    ($($variant:ident $element:ty: $with:ident $get:ident $get_mut:ident $each_mut:ident)*) => {$(
        #[doc = concat!("Adds a tensor of `", stringify!($element), "`, its elements row-major.")]
        ///
        /// # Panics
        /// If the name is taken or the shape has another number of elements than there are.
        #[must_use]
        pub fn $with(
            self,
            name: impl Into<String>,
            shape: impl Into<Vec<u64>>,
            elements: Vec<$element>,
        ) -> NamedTensors {
            self.with(TensorSpec::new(name, Dtype::$variant, shape), Data::$variant(elements))
        }

        #[doc = concat!("The elements of the `", stringify!($element), "` tensor `name`.")]
        ///
        /// # Panics
        /// If there is no tensor of this name and type.
        pub fn $get(&self, name: &str) -> &[$element] {
            match &self.tensors[self.index(name)] {
                (_, Data::$variant(elements)) => elements,
                (spec, _) => panic!("the tensor {name:?} is of {}", spec.dtype.name()),
            }
        }

        #[doc = concat!("The elements of the `", stringify!($element), "` tensor `name`, to be changed.")]
        ///
        /// # Panics
        /// If there is no tensor of this name and type.
        pub fn $get_mut(&mut self, name: &str) -> &mut [$element] {
            let [elements] = self.$each_mut([name]);
            elements
        }

        #[doc = concat!("The elements of several `", stringify!($element), "` tensors at once, to be changed.")]
        ///
        /// # Panics
        /// If there is no tensor of one of these names and this type, or a name is given twice.
        pub fn $each_mut<const N: usize>(&mut self, names: [&str; N]) -> [&mut [$element]; N] {
            self.each_mut(names).map(|tensor| match tensor {
                (_, Data::$variant(elements)) => elements.as_mut_slice(),
                (spec, _) => panic!("the tensor {:?} is of {}", spec.name, spec.dtype.name()),
            })
        }
    )*};
}

impl NamedTensors {
    /// No tensors, no values.
    pub fn new() -> NamedTensors {
        NamedTensors::default()
    }

    /// Tensors of these names, types and shapes, all zero: what a program that is about to load its state starts with.
    ///
    /// # Panics
    /// If a name is given twice or a tensor is larger than memory can be.
    pub fn zeros(specs: &[TensorSpec]) -> NamedTensors {
        specs.iter().fold(NamedTensors::new(), |tensors, spec| {
            let n = to_usize(spec.elements().expect("a tensor has fewer elements than memory has bytes"));
            let data = match spec.dtype {
                Dtype::F64 => Data::F64(vec![0.0; n]),
                Dtype::F32 => Data::F32(vec![0.0; n]),
                Dtype::F16 => Data::F16(vec![f16::ZERO; n]),
                Dtype::Bf16 => Data::Bf16(vec![bf16::ZERO; n]),
                Dtype::I64 => Data::I64(vec![0; n]),
                Dtype::I32 => Data::I32(vec![0; n]),
                Dtype::I16 => Data::I16(vec![0; n]),
                Dtype::I8 => Data::I8(vec![0; n]),
                Dtype::U8 => Data::U8(vec![0; n]),
                Dtype::U16 => Data::U16(vec![0; n]),
                Dtype::U32 => Data::U32(vec![0; n]),
                Dtype::U64 => Data::U64(vec![0; n]),
                Dtype::Bool => Data::Bool(vec![0; n]),
            };
            tensors.with(spec.clone(), data)
        })
    }

    accessors! {
        F64 f64: with_f64 f64 f64_mut f64_each_mut
        F32 f32: with_f32 f32 f32_mut f32_each_mut
        F16 f16: with_f16 f16 f16_mut f16_each_mut
        Bf16 bf16: with_bf16 bf16 bf16_mut bf16_each_mut
        I64 i64: with_i64 i64 i64_mut i64_each_mut
        I32 i32: with_i32 i32 i32_mut i32_each_mut
        I16 i16: with_i16 i16 i16_mut i16_each_mut
        I8 i8: with_i8 i8 i8_mut i8_each_mut
        U8 u8: with_u8 u8 u8_mut u8_each_mut
        U16 u16: with_u16 u16 u16_mut u16_each_mut
        U32 u32: with_u32 u32 u32_mut u32_each_mut
        U64 u64: with_u64 u64 u64_mut u64_each_mut
    }

    /// Adds a tensor of `bool`, its elements row-major.
    ///
    /// # Panics
    /// If the name is taken or the shape has another number of elements than there are.
    #[must_use]
    pub fn with_bool(
        self,
        name: impl Into<String>,
        shape: impl Into<Vec<u64>>,
        elements: &[bool],
    ) -> NamedTensors {
        let elements = elements.iter().map(|element| u8::from(*element)).collect();
        self.with(TensorSpec::new(name, Dtype::Bool, shape), Data::Bool(elements))
    }

    /// The bytes of the tensor `name`, whatever its type, as [`State::bytes`] gives them. For a `bool` tensor one byte
    /// per element.
    ///
    /// # Panics
    /// If there is no tensor of this name.
    pub fn raw(&self, name: &str) -> &[u8] {
        self.tensors[self.index(name)].1.bytes()
    }

    /// The bytes of the tensor `name`, to be changed.
    ///
    /// # Panics
    /// If there is no tensor of this name.
    pub fn raw_mut(&mut self, name: &str) -> &mut [u8] {
        let index = self.index(name);
        self.tensors[index].1.bytes_mut()
    }

    /// The value `name`, if there is one.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// Sets the value `name`.
    pub fn set_value(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.values.insert(name.into(), value.into());
    }

    fn with(mut self, spec: TensorSpec, data: Data) -> NamedTensors {
        let elements = each_type!(&data, elements => elements.len());
        assert!(
            spec.elements() == Some(elements as u64),
            "{elements} elements do not make the tensor {spec:?}"
        );
        let before = self.by_name.insert(spec.name.clone(), self.tensors.len());
        assert!(before.is_none(), "two tensors are called {:?}", spec.name);
        self.tensors.push((spec, data));
        self
    }

    fn index(&self, name: &str) -> usize {
        *self.by_name.get(name).unwrap_or_else(|| panic!("there is no tensor {name:?}"))
    }

    fn each_mut<const N: usize>(&mut self, names: [&str; N]) -> [&mut (TensorSpec, Data); N] {
        let indices = names.map(|name| self.index(name));
        self.tensors
            .get_disjoint_mut(indices)
            .unwrap_or_else(|_| panic!("a tensor is named twice in {names:?}"))
    }
}

impl Data {
    fn bytes(&self) -> &[u8] {
        each_type!(self, elements => bytemuck::cast_slice(elements))
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        each_type!(self, elements => bytemuck::cast_slice_mut(elements))
    }
}

impl State for NamedTensors {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|(spec, _)| spec.clone()).collect()
    }

    fn read(&self, tensor: usize, offset: u64, into: &mut [u8]) {
        into.copy_from_slice(&self.tensors[tensor].1.bytes()[to_usize(offset)..][..into.len()]);
    }

    fn write(&mut self, tensor: usize, offset: u64, bytes: &[u8]) {
        self.tensors[tensor].1.bytes_mut()[to_usize(offset)..][..bytes.len()].copy_from_slice(bytes);
    }

    fn bytes(&self, tensor: usize) -> Option<&[u8]> {
        Some(self.tensors.get(tensor)?.1.bytes())
    }

    fn bytes_mut(&mut self, tensor: usize) -> Option<&mut [u8]> {
        Some(self.tensors.get_mut(tensor)?.1.bytes_mut())
    }

    fn all_bytes_mut(&mut self) -> Option<Vec<&mut [u8]>> {
        Some(self.tensors.iter_mut().map(|(_, data)| data.bytes_mut()).collect())
    }

    fn values(&self) -> Values {
        self.values.clone()
    }

    fn set_values(&mut self, values: Values) {
        self.values = values;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_found_by_name_and_type() {
        let mut state = NamedTensors::new()
            .with_f32("w", [2, 2], vec![1.0, 2.0, 3.0, 4.0])
            .with_bool("mask", [3], &[true, false, true])
            .with_bf16("h", [], vec![bf16::from_f32(1.5)]);
        assert_eq!(state.f32("w"), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(state.raw("mask"), [1, 0, 1]);
        assert_eq!(state.raw("h"), [0xc0, 0x3f]);
        state.f32_mut("w")[3] = 5.0;
        state.write(0, 4, &6.0f32.to_le_bytes());
        assert_eq!(state.f32("w"), [1.0, 6.0, 3.0, 5.0]);
        let mut read = [0; 4];
        state.read(0, 12, &mut read);
        assert_eq!(read, 5.0f32.to_le_bytes());
        assert_eq!(
            state.tensors(),
            [
                TensorSpec::new("w", Dtype::F32, [2, 2]),
                TensorSpec::new("mask", Dtype::Bool, [3]),
                TensorSpec::new("h", Dtype::Bf16, []),
            ]
        );
    }

    #[test]
    fn zeros_have_every_type() {
        let specs: Vec<_> =
            Dtype::ALL.into_iter().map(|dtype| TensorSpec::new(dtype.name(), dtype, [3])).collect();
        let state = NamedTensors::zeros(&specs);
        assert_eq!(state.tensors(), specs);
        for spec in &specs {
            assert_eq!(state.raw(&spec.name), vec![0; 3 * spec.dtype.bytes() as usize]);
        }
    }

    #[test]
    #[should_panic(expected = "3 elements do not make the tensor")]
    fn a_shape_that_does_not_fit_is_refused() {
        let _ = NamedTensors::new().with_i64("t", [2, 2], vec![1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "the tensor \"t\" is of I64")]
    fn another_type_is_refused() {
        NamedTensors::new().with_i64("t", [1], vec![1]).f32("t");
    }
}
