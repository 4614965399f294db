//! A small convolutional network, its gradients, and the optimizer (SGD with momentum).
//!
//! Its tensors live in a [`NamedTensors`]: that is the state which the library saves, moves and restores. Weights and
//! momentum are both in it, so a worker that comes back goes on exactly where the others are.

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{loss, ops};
use reknit_trainer::NamedTensors;

use crate::data::SIDE;

const LAYERS: [(&str, &[u64]); 6] = [
    ("conv1", &[8, 1, 3, 3]),
    ("conv2", &[24, 8, 3, 3]),
    ("dense1", &[64, 24 * (SIDE as u64 / 2) * (SIDE as u64 / 2)]),
    ("bias1", &[64]),
    ("dense2", &[10, 64]),
    ("bias2", &[10]),
];
const LEARNING_RATE: f32 = 0.05;
const MOMENTUM: f32 = 0.9;

/// The network that every worker starts with: the same seed gives the same weights.
pub(crate) fn initial() -> NamedTensors {
    let mut state = NamedTensors::new();
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    for (name, shape) in LAYERS {
        let count = shape.iter().product::<u64>() as usize;
        let inputs = (count as u64 / shape[0]) as f32;
        let spread = if shape.len() == 1 { 0.0 } else { (2.0 / inputs).sqrt() };
        // xorshift64 (Marsaglia, 2003), and the sum of four for something near a normal distribution.
        let mut draw = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        let weights = (0..count).map(|_| (draw() + draw() + draw() + draw()) * 1.73 * spread).collect();
        state = state.with_f32(name, shape, weights);
        state = state.with_f32(momentum(name), shape, vec![0.0; count]);
    }
    state
}

fn momentum(name: &str) -> String {
    format!("{name}.momentum")
}

fn weights(state: &NamedTensors) -> Result<Vec<Var>> {
    let var = |(name, shape): &(&str, &[u64])| {
        let shape: Vec<usize> = shape.iter().map(|n| *n as usize).collect();
        Ok(Var::from_slice(state.f32(name), shape, &Device::Cpu)?)
    };
    LAYERS.iter().map(var).collect()
}

fn logits(weights: &[Var], images: &Tensor) -> Result<Tensor> {
    let [conv1, conv2, dense1, bias1, dense2, bias2] = weights else { anyhow::bail!("six layers") };
    let x = images.conv2d(conv1, 1, 1, 1, 1)?.relu()?;
    let x = x.conv2d(conv2, 1, 1, 1, 1)?.relu()?.max_pool2d(2)?;
    let x = x.flatten_from(1)?.matmul(&dense1.t()?)?.broadcast_add(bias1)?.relu()?;
    Ok(x.matmul(&dense2.t()?)?.broadcast_add(bias2)?)
}

/// The mean gradient over the given images, all layers one after the other, and behind it the mean loss: what is
/// summed over the ranks anyway can carry one number more.
pub(crate) fn gradients(state: &NamedTensors, images: &Tensor, labels: &Tensor) -> Result<Vec<f32>> {
    if labels.elem_count() == 0 {
        // More workers than images: this one has none, and adds nothing to the mean.
        let numbers: u64 = LAYERS.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
        return Ok(vec![0.0; numbers as usize + 1]);
    }
    let weights = weights(state)?;
    let loss = loss::cross_entropy(&logits(&weights, images)?, labels)?;
    let gradients = loss.backward()?;
    let mut all = Vec::new();
    for weight in &weights {
        let gradient = gradients.get(weight).context("every layer has a gradient")?;
        all.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
    }
    all.push(loss.to_scalar()?);
    Ok(all)
}

/// One step of the optimizer. Returns the loss.
pub(crate) fn apply(state: &mut NamedTensors, gradients: &[f32]) -> f32 {
    let (mut rest, loss) = gradients.split_at(gradients.len() - 1);
    for (name, _) in LAYERS {
        let [weights, momenta] = state.f32_each_mut([name, &momentum(name)]);
        let (own, others) = rest.split_at(weights.len());
        for ((weight, momentum), gradient) in weights.iter_mut().zip(momenta).zip(own) {
            *momentum = MOMENTUM * *momentum + gradient;
            *weight -= LEARNING_RATE * *momentum;
        }
        rest = others;
    }
    loss[0]
}

/// The share of images whose digit is recognised.
pub(crate) fn accuracy(state: &NamedTensors, images: &Tensor, labels: &Tensor) -> Result<f64> {
    let guesses = ops::softmax(&logits(&weights(state)?, images)?, D::Minus1)?.argmax(D::Minus1)?;
    let right = guesses.eq(labels)?.to_dtype(DType::F64)?.mean_all()?;
    Ok(right.to_scalar()?)
}
