//! The kernels, compiled for the host from the source that devices run, against Rust's arithmetic: bit by bit.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use common::{BOUND, driver};
use half::{bf16, f16};
use reknit_collectives::Element;
use reknit_cuda::{DIGEST_CHUNK_MIN, DeviceBuffer, Gpu, Image, Kernels, Packed, Stream};

/// The stand-in for the driver takes any image for that of the kernels which it has been built with.
fn kernels() -> (Gpu, Kernels, Stream) {
    let gpu = driver().gpu(0).unwrap();
    let kernels = Kernels::load(&gpu, &Image::new(b"any".to_vec())).unwrap();
    let stream = Stream::on(&gpu).unwrap();
    (gpu, kernels, stream)
}

/// A number for every exponent and sign, with mantissas around every place where a narrower type rounds, and chance besides.
fn numbers() -> Vec<f32> {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut chance = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u32
    };
    let edges = [
        0u32, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x40_0000,
        0x7f_ffff,
    ];
    let mut bits: Vec<u32> = Vec::new();
    for high in 0..512u32 {
        bits.extend(edges.iter().map(|edge| (high << 23) | edge));
        bits.extend((0..500).map(|_| (high << 23) | (chance() & 0x7f_ffff)));
    }
    bits.into_iter().map(f32::from_bits).collect()
}

fn on<T: Element>(gpu: &Gpu, host: &[T]) -> DeviceBuffer<T> {
    DeviceBuffer::from_host(gpu, host, BOUND).unwrap()
}

/// Packs `numbers` behind three others, and unpacks them again.
fn there_and_back<T: Packed>(numbers: &[f32], weight: f64) -> (Vec<T>, Vec<f32>) {
    let (gpu, kernels, stream) = kernels();
    let bucket: DeviceBuffer<T> = on(&gpu, &vec![T::zeroed(); numbers.len() + 3]);
    kernels.pack(&stream, &on(&gpu, numbers), &bucket, 3, weight).unwrap().wait(BOUND).unwrap();
    let back = on(&gpu, &vec![0.0f32; numbers.len()]);
    kernels.unpack(&stream, &bucket, 3, &back, 0.5).unwrap().wait(BOUND).unwrap();
    (bucket.to_host(BOUND).unwrap(), back.to_host(BOUND).unwrap())
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// What is a NaN is one in any of its forms: a product of one may have lost its sign or its payload.
fn same(ours: f32, theirs: f32) -> bool {
    ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan())
}

#[test]
fn packing_rounds_as_rust_does() {
    let numbers = numbers();
    // A weight of one changes no bits, so that the rounding is seen alone; with a third something else is rounded.
    for weight in [1.0, 1.0 / 3.0] {
        let weighted: Vec<f32> = numbers.iter().map(|number| number * weight as f32).collect();
        let (bucket, _) = there_and_back::<bf16>(&numbers, weight);
        for ((got, of), at) in bucket[3..].iter().zip(&weighted).zip(0..) {
            let expected = bf16::from_f32(*of);
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && of.is_nan()),
                "{at}: {of:e} {got} {expected}"
            );
        }
        assert!(bucket[..3].iter().all(|number| number.to_bits() == 0), "what was before it is as it was");
        let (bucket, _) = there_and_back::<f16>(&numbers, weight);
        for (got, of) in bucket[3..].iter().zip(&weighted) {
            let expected = f16::from_f32(*of);
            assert!(
                got.to_bits() == expected.to_bits() || (got.is_nan() && of.is_nan()),
                "{of:e} {got} {expected}"
            );
        }
        let (bucket, _) = there_and_back::<f32>(&numbers, weight);
        assert!(bucket[3..].iter().zip(&weighted).all(|(got, expected)| same(*got, *expected)));
    }
}

#[test]
fn unpacking_widens_every_number_of_16_bits_as_rust_does() {
    let (gpu, kernels, stream) = kernels();
    let to = on(&gpu, &vec![0.0f32; 1 << 16]);
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    kernels.unpack(&stream, &on(&gpu, &all), 0, &to, 0.5).unwrap().wait(BOUND).unwrap();
    let got = to.to_host(BOUND).unwrap();
    assert!(got.iter().zip(&all).all(|(got, of)| same(*got, of.to_f32() * 0.5)));
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    kernels.unpack(&stream, &on(&gpu, &all), 0, &to, 1.0).unwrap().wait(BOUND).unwrap();
    let got = to.to_host(BOUND).unwrap();
    assert!(got.iter().zip(&all).all(|(got, of)| same(*got, of.to_f32())));
}

#[test]
fn there_and_back_gives_the_weighted_number() {
    let numbers: Vec<f32> = (-500..500).map(|number| number as f32).collect();
    let halves: Vec<f32> = numbers.iter().map(|number| number / 2.0).collect();
    assert_eq!(bits(&there_and_back::<f32>(&numbers, 1.0).1), bits(&halves));
    assert_eq!(bits(&there_and_back::<f16>(&numbers, 1.0).1), bits(&halves));
    assert_eq!(bits(&there_and_back::<bf16>(&numbers[400..600], 1.0).1), bits(&halves[400..600]));
}

#[test]
fn one_number_that_is_not_finite_is_found() {
    let (gpu, kernels, stream) = kernels();
    let is_finite = |numbers: &[f32]| {
        let f32s = kernels.are_finite(&stream, &on(&gpu, numbers), BOUND).unwrap();
        let narrow: Vec<bf16> = numbers.iter().map(|number| bf16::from_f32(*number)).collect();
        let bf16s = kernels.are_finite(&stream, &on(&gpu, &narrow), BOUND).unwrap();
        let narrow: Vec<f16> = numbers.iter().map(|number| f16::from_f32(*number)).collect();
        let f16s = kernels.are_finite(&stream, &on(&gpu, &narrow), BOUND).unwrap();
        assert!(f32s == bf16s && f32s == f16s, "{numbers:?}");
        f32s
    };
    let mut numbers = vec![-1.5f32; 1000];
    assert!(is_finite(&numbers) && is_finite(&[]));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        numbers[700] = bad;
        assert!(!is_finite(&numbers), "{bad}");
    }
    assert!(!kernels.are_finite(&stream, &on(&gpu, &[f16::MAX, f16::INFINITY]), BOUND).unwrap());
}

#[test]
fn digests_are_those_of_the_host_bit_by_bit() {
    let (gpu, kernels, stream) = kernels();
    let bytes: Vec<u8> =
        (0..50_000u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    let edges = [
        0, 1, 64, 240, 241, 255, 256, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 4095, 4096, 4097,
        50_000,
    ];
    for len in edges {
        for chunk in [1, 2, 16].map(|blocks| blocks * DIGEST_CHUNK_MIN) {
            let expected: Vec<_> = bytes[..len]
                .chunks(chunk as usize)
                .filter(|chunk| chunk.len() > 240)
                .map(twox_hash::xxhash3_128::Hasher::oneshot)
                .collect();
            let got = kernels.digests(&stream, &on(&gpu, &bytes[..len]), chunk, BOUND).unwrap();
            let got: Vec<u128> = got.into_iter().map(|digest| digest.0).collect();
            assert_eq!(got, expected, "{len} bytes in chunks of {chunk}");
        }
    }
}
