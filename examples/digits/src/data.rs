//! Handwritten digits: 1,797 images of 8 by 8 pixels.
//!
//! E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
//! (doi 10.24432/C50P49), licence CC BY 4.0. The crate `smartcore` ships them, so nothing is downloaded.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

/// How many of the images are kept for the test, from the end of the set.
const TEST: usize = 297;

pub(crate) const SIDE: usize = 8;
const PIXELS: usize = SIDE * SIDE;
/// The largest value of a pixel.
const WHITE: f32 = 16.0;

pub(crate) struct Digits {
    pixels: Vec<f32>,
    labels: Vec<u32>,
}

impl Digits {
    pub(crate) fn load() -> Digits {
        let set = smartcore::dataset::digits::load_dataset();
        Digits {
            pixels: set.data.iter().map(|pixel| pixel / WHITE).collect(),
            labels: set.target.iter().map(|label| *label as u32).collect(),
        }
    }

    /// How many images there are to train on.
    pub(crate) fn train(&self) -> u64 {
        (self.labels.len() - TEST) as u64
    }

    /// Images and their labels.
    pub(crate) fn batch(&self, samples: &[u64]) -> Result<(Tensor, Tensor)> {
        let mut pixels = Vec::with_capacity(samples.len() * PIXELS);
        let mut labels = Vec::with_capacity(samples.len());
        for sample in samples {
            let at = usize::try_from(*sample)?;
            pixels
                .extend_from_slice(self.pixels.get(at * PIXELS..(at + 1) * PIXELS).context("no such image")?);
            labels.push(self.labels[at]);
        }
        let images = Tensor::from_vec(pixels, (samples.len(), 1, SIDE, SIDE), &Device::Cpu)?;
        Ok((images, Tensor::from_vec(labels, samples.len(), &Device::Cpu)?))
    }

    /// The images that no step has seen.
    pub(crate) fn test(&self) -> Result<(Tensor, Tensor)> {
        let samples: Vec<u64> = (self.train()..self.labels.len() as u64).collect();
        self.batch(&samples)
    }
}
