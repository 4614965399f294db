//! Gradients in buckets: packed as they become ready, reduced while others are still being computed, and given back as means.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::ReduceOp;

use crate::broken::ReduceError;
use crate::communicator::Communicator;
use crate::driver::{DriverError, Event, Gpu, Stream};
use crate::kernels::{Kernels, Packed, Work};
use crate::memory::{DeviceBuffer, MemoryError};

/// The gradients of one model, reduced as a few large buffers of type `T` in place of many small ones.
///
/// All ranks have the same tensors in the same order and make every tensor ready once a step, with a weight; the weights of all ranks add
/// up to one. The buckets are reduced in the tensors' order, whatever the order is in which tensors become ready, so that all ranks call the
/// same: the tensor that is ready first should come first.
///
/// The gradients themselves are only read until all is reduced: after a break they are what they were, and the step can be reduced again in
/// the next world, with its weights.
#[derive(Debug)]
pub struct Buckets<T> {
    devices: Vec<Device<T>>,
    /// Which tensors are in which bucket.
    of_bucket: Vec<Range<usize>>,
    places: Vec<Place>,
    /// The first bucket that has not been given to the communicator in this step.
    next: usize,
}

#[derive(Debug)]
struct Device<T> {
    kernels: Arc<Kernels>,
    stream: Stream,
    buffers: Vec<DeviceBuffer<T>>,
    /// What packs this step's tensors.
    packing: Vec<Work>,
}

/// Where a tensor is.
#[derive(Debug, Clone)]
struct Place {
    bucket: usize,
    at: usize,
    len: usize,
    is_ready: bool,
}

/// Why a step's gradients were not reduced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BucketError {
    /// There is no result, for the reason given.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    /// The device did not pack or unpack.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Some tensor has not been made ready.
    #[error("tensor {tensor} has not been made ready")]
    NotReady {
        /// The first such.
        tensor: usize,
    },
}

impl From<DriverError> for BucketError {
    fn from(error: DriverError) -> BucketError {
        BucketError::Memory(error.into())
    }
}

impl<T: Packed> Buckets<T> {
    /// Buckets for tensors of so many numbers each, on each of these devices. A bucket has `bytes` at most, unless a single tensor
    /// has more.
    pub fn new(
        devices: &[(Gpu, Arc<Kernels>)],
        lens: &[usize],
        bytes: usize,
    ) -> Result<Buckets<T>, MemoryError> {
        let (places, lens_of_buckets) = divide(lens, bytes / size_of::<T>());
        let device = |(gpu, kernels): &(Gpu, Arc<Kernels>)| {
            let buffers = lens_of_buckets
                .iter()
                .map(|len| DeviceBuffer::undefined(gpu, *len))
                .collect::<Result<_, _>>()?;
            Ok(Device { kernels: kernels.clone(), stream: Stream::on(gpu)?, buffers, packing: Vec::new() })
        };
        let devices = devices.iter().map(device).collect::<Result<_, MemoryError>>()?;
        let of_bucket = (0..lens_of_buckets.len())
            .map(|bucket| {
                let begin = places.partition_point(|place| place.bucket < bucket);
                begin..places.partition_point(|place| place.bucket <= bucket)
            })
            .collect();
        Ok(Buckets { devices, of_bucket, places, next: 0 })
    }

    /// How many buckets there are.
    pub fn len(&self) -> usize {
        self.of_bucket.len()
    }

    /// Whether there is nothing to reduce.
    pub fn is_empty(&self) -> bool {
        self.of_bucket.is_empty()
    }

    /// Says that a tensor's gradient has been computed, on each device, once `after` has been reached there; it counts with `weight`. Buckets that
    /// are full are given to the devices to be reduced.
    ///
    /// # Panics
    /// If there is no such tensor, or not one gradient of its length, and one event, for each device.
    pub fn ready(
        &mut self,
        communicator: &mut Communicator,
        tensor: usize,
        gradients: &[&DeviceBuffer<f32>],
        weight: f64,
        after: &[&Event],
    ) -> Result<(), BucketError> {
        let place = &mut self.places[tensor];
        assert!(
            gradients.len() == self.devices.len() && after.len() == self.devices.len(),
            "one for each device"
        );
        for ((device, gradient), after) in self.devices.iter_mut().zip(gradients).zip(after) {
            assert_eq!(gradient.len(), place.len, "a gradient has the length of its tensor");
            device.stream.wait_for(after)?;
            let bucket = &device.buffers[place.bucket];
            device.packing.push(device.kernels.pack(&device.stream, gradient, bucket, place.at, weight)?);
        }
        place.is_ready = true;
        while let Some(tensors) = self.of_bucket.get(self.next) {
            if !self.places[tensors.clone()].iter().all(|place| place.is_ready) {
                break;
            }
            for (at, device) in self.devices.iter().enumerate() {
                communicator.after(at, &device.stream.record()?)?;
            }
            let buffers: Vec<&DeviceBuffer<T>> =
                self.devices.iter().map(|device| &device.buffers[self.next]).collect();
            communicator.start_all_reduce(&buffers, ReduceOp::Sum)?;
            self.next += 1;
        }
        Ok(())
    }

    /// Waits until all is reduced, and writes the means to `gradients`: for each device those of all tensors. Gives whether all of them are
    /// finite; if not they are written all the same. The next step can begin then.
    ///
    /// # Panics
    /// If there is not one gradient of each tensor's length, for each device.
    pub fn finish(
        &mut self,
        communicator: &mut Communicator,
        gradients: &[Vec<&DeviceBuffer<f32>>],
        patience: Duration,
    ) -> Result<bool, BucketError> {
        if let Some(tensor) = self.places.iter().position(|place| !place.is_ready) {
            return Err(BucketError::NotReady { tensor });
        }
        communicator.finish()?;
        assert_eq!(gradients.len(), self.devices.len(), "one for each device");
        let mut all_finite = true;
        for (device, gradients) in self.devices.iter_mut().zip(gradients) {
            assert_eq!(gradients.len(), self.places.len(), "one for each tensor");
            for bucket in &device.buffers {
                all_finite &= device.kernels.are_finite(&device.stream, bucket, patience)?;
            }
            let mut works = std::mem::take(&mut device.packing);
            for (place, gradient) in self.places.iter().zip(gradients) {
                assert_eq!(gradient.len(), place.len, "a gradient has the length of its tensor");
                let bucket = &device.buffers[place.bucket];
                works.push(device.kernels.unpack(&device.stream, bucket, place.at, gradient, 1.0)?);
            }
            for work in works {
                work.wait(patience)?;
            }
        }
        self.begin_again(patience)?;
        Ok(all_finite)
    }

    /// Forgets what was made ready, for the step to be reduced from the beginning: after a break, in the next world.
    pub fn begin_again(&mut self, patience: Duration) -> Result<(), MemoryError> {
        for work in self.devices.iter_mut().flat_map(|device| device.packing.drain(..)) {
            work.wait(patience)?;
        }
        self.places.iter_mut().for_each(|place| place.is_ready = false);
        self.next = 0;
        Ok(())
    }
}

/// Where each tensor goes, and how long each bucket is, if none is longer than `len_max` but for one that holds a single tensor.
fn divide(lens: &[usize], len_max: usize) -> (Vec<Place>, Vec<usize>) {
    let mut buckets: Vec<usize> = Vec::new();
    let mut places = Vec::with_capacity(lens.len());
    for len in lens {
        match buckets.last() {
            Some(filled) if *filled > 0 && filled + len > len_max => buckets.push(0),
            Some(_) => {}
            None => buckets.push(0),
        }
        let bucket = buckets.len() - 1;
        places.push(Place { bucket, at: buckets[bucket], len: *len, is_ready: false });
        buckets[bucket] += len;
    }
    (places, buckets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_fill_buckets_in_their_order() {
        let divided = |lens: &[usize], max| {
            let (places, buckets) = divide(lens, max);
            (places.iter().map(|place| (place.bucket, place.at)).collect::<Vec<_>>(), buckets)
        };
        assert_eq!(divided(&[], 10), (vec![], vec![]));
        assert_eq!(
            divided(&[4, 6, 1, 25, 3], 10),
            (vec![(0, 0), (0, 4), (1, 0), (2, 0), (3, 0)], vec![10, 1, 25, 3])
        );
        assert_eq!(divided(&[0, 20, 0], 10), (vec![(0, 0), (0, 0), (1, 0)], vec![20, 0]));
    }
}
