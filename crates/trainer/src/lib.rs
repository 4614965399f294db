//! The library that an elastic training program embeds.
//!
//! A program trains as it always did, in plain threads; around its step it says four things: where the coordinator is,
//! what its state is, which step comes next, and that a step is done. In return its job survives the loss of any worker,
//! takes in new ones, leaves machines that will be taken away in good order, and goes on from a checkpoint when nothing
//! else is left. The program's own process and memory stay: only the ring between the workers is built anew.
//!
//! # A program
//! It fits a line to points, with any number of workers. Start a coordinator (`reknit serve`), then this program as often
//! as you like; kill some, start more.
//!
//! ```
//! use reknit_trainer::{DataOrder, NamedTensors, Options, Trainer};
//!
//! # fn serve() -> String {
//! #     use reknit_coordinator::{Config, Server, config::StoreConfig, server::Exposure};
//! #     let (address, bound) = std::sync::mpsc::channel();
//! #     std::thread::spawn(move || {
//! #         let runtime = tokio::runtime::Runtime::new().unwrap();
//! #         runtime.block_on(async move {
//! #             let listen = "127.0.0.1:0".parse().unwrap();
//! #             let config = Config { listen, store: StoreConfig::Memory, ..Config::default() };
//! #             let server = Server::bind(config, Exposure::Loopback).await.unwrap();
//! #             address.send(format!("http://{}", server.address())).unwrap();
//! #             server.run(std::future::pending()).await.unwrap();
//! #         });
//! #     });
//! #     bound.recv().unwrap()
//! # }
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // The data set: 1,000 points of y = 3x - 1. A step uses 50 of them, over all workers.
//!     let points: Vec<(f32, f32)> = (0..1000).map(|i| i as f32 / 500.0 - 1.0).map(|x| (x, 3.0 * x - 1.0)).collect();
//!     let order = DataOrder { dataset: 1000, global_batch: 50, seed: 1 };
//!     let mut state = NamedTensors::new().with_f32("slope and intercept", &[2], vec![0.0, 0.0]);
//!
//!     let coordinator = "http://127.0.0.1:7070";
//! #   let coordinator = &serve();
//!     let options = Options::new(coordinator, "line", order)?.workers(1, 8)?.steps(200);
//!     let mut trainer = Trainer::join(options, &state)?;
//!     while let Some(mut step) = trainer.next_step(&mut state)? {
//!         // The mean gradient over this worker's share of the step.
//!         let mut gradient = [0.0f32; 2];
//!         let [slope, intercept] = *state.f32("slope and intercept") else { unreachable!() };
//!         let share = step.samples().len().max(1) as f32;
//!         for sample in step.samples() {
//!             let (x, y) = points[sample as usize];
//!             let error = slope * x + intercept - y;
//!             gradient[0] += error * x / share;
//!             gradient[1] += error / share;
//!         }
//!         // Now over all workers. If the world breaks meanwhile, the same step comes again in the next one.
//!         if step.all_reduce_mean(&mut gradient).is_err() {
//!             continue;
//!         }
//!         for (weight, gradient) in state.f32_mut("slope and intercept").iter_mut().zip(gradient) {
//!             *weight -= 0.5 * gradient;
//!         }
//!         step.commit(&state);
//!     }
//!     let [slope, intercept] = *state.f32("slope and intercept") else { unreachable!() };
//!     println!("y = {slope:.3} x + {intercept:.3}");
//! #   assert!((slope - 3.0).abs() < 0.01 && (intercept + 1.0).abs() < 0.01);
//!     Ok(())
//! }
//! ```
//!
//! # A coordinator that asks who you are
//! Where coordinators speak TLS and ask for tokens, say what to show and what to check them by:
//!
//! ```no_run
//! # use reknit_trainer::{Credentials, DataOrder, Options};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let order = DataOrder { dataset: 1000, global_batch: 50, seed: 1 };
//! // REKNIT_CA, REKNIT_CERT, REKNIT_KEY, REKNIT_TOKEN_FILE or REKNIT_TOKEN, as far as they are set.
//! let credentials = Credentials::from_env()?;
//! let options = Options::new("https://coordinator:7070", "line", order)?.credentials(credentials);
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//! | rule | what is always true |
//! |---|---|
//! | T-1 | A step counts on every worker or, where a worker did not get that far, is fetched from one that did. |
//! | T-2 | Over all committed steps each sample is used exactly once per pass, whatever the world did meanwhile. |
//! | T-3 | The mean over a step is exact for shares of any size, and the same bits on every worker. |
//! | T-4 | No call waits longer than the program allowed in its [`Options`], or than the coordinator's own limits. |
//! | T-5 | A state is never half of one step and half of another: a restore that was broken off is done again, whole. |
//! | T-6 | Nothing is sent to the coordinator per step. |
//! | T-7 | A checkpoint that cannot be written costs no step and leaves nothing behind; the last step's is made if it can be. |
//! | T-8 | A worker that has joined and has not yet asked for a step holds nobody up. |
//! | T-9 | With [`Options::retry_in_place`], what a survivor has given for a step whose gradients were not added up counts, once; only what nobody has any more is computed again. |
//!
//! # Reading order
//! [`options`] what a program says · [`credentials`] what it shows, and checks the coordinator by · [`trainer`] joining, and the next step · [`step`] one step · [`buckets`] gradients that are added up meanwhile · [`order`] which samples · `retry` what is left of a step that was interrupted
//! · [`session`] the protocol, pure · `hub` where the threads meet · `link` the stream · `ring` building a world's ring ·
//! `restore` moving state · `saves` checkpoints · [`launcher`] a member without a state, that starts other programs.

#![forbid(unsafe_code)]

pub mod buckets;
pub mod credentials;
pub mod error;
pub mod gradient;
mod held;
mod hub;
pub mod launcher;
mod link;
pub mod options;
pub mod order;
mod restore;
mod retry;
mod ring;
mod saves;
pub mod session;
pub mod step;
pub mod trainer;

pub use buckets::{Buckets, Means};
pub use credentials::{Credentials, CredentialsError};
pub use error::{Interrupted, TrainError};
pub use launcher::{Launcher, LauncherOptions};
pub use options::{BadOptions, Checkpoints, Notice, Options};
pub use order::DataOrder;
pub use session::End;
pub use step::{Committed, Samples, Step};
pub use trainer::{Handle, Trainer};

pub use reknit_membership::reason::{Closure, Refusal};
pub use reknit_proto::Token;

pub use reknit_checkpoint::{Dtype, NamedTensors, State, TensorSpec, Values};
pub use reknit_collectives::{ControlWord, Element, Group, ReduceOp};
