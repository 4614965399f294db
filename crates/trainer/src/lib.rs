//! The library that an elastic training program embeds.
//!
//! (doc follows)
#![forbid(unsafe_code)]

pub mod options;
pub mod order;
pub mod error;
pub mod gradient;
pub mod session;
mod held;
mod hub;
mod ring;
mod link;
mod restore;
mod saves;
pub mod trainer;
pub mod step;

pub use error::{Interrupted, TrainError};
pub use options::{BadOptions, Checkpoints, Notice, Options};
pub use order::DataOrder;
pub use session::End;
pub use step::{Committed, Samples, Step};
pub use trainer::{Handle, Trainer};

pub use reknit_checkpoint::{Dtype, NamedTensors, State, TensorSpec, Values};
pub use reknit_collectives::{ControlWord, Element, Group, ReduceOp};
