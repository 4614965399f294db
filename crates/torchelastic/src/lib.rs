//! PyTorch's TCPStore protocol and torchrun's `c10d` rendezvous, as pure code: no socket, no clock, no thread.
//!
//! ```text
//!   bytes ──► wire::parse ──► Request ──► Rendezvous::request ──► reply, who is woken, Effect
//!                                            │           │
//!                        /torch.rendezvous.… │           │ anything else
//!                                            ▼           ▼
//!                              Run (pickle, State)    KvStore
//! ```
//!
//! The server of all this is `reknit_coordinator::torchelastic`; TorchElastic's words stop there.
//!
//! # Reading order
//! [`wire`] the bytes of a request · [`kv`] the store · [`pickle`] how agents write what they agree on · [`state`] what that is ·
//! [`run`] one run, and what is done about the faults of stock torchrun · [`rendezvous`] all runs behind one port · [`seat`] the same as one agent
//! behind a relay is shown it.
//!
//! # Words
//! | word | means | here |
//! |---|---|---|
//! | run | one use of torchrun's `--rdzv-id` | job |
//! | agent | a `torchrun` process, one per machine; it starts the workers | member |
//! | worker | the process that trains | rank |
//! | round | the number of a formation | generation |
//!
//! # Invariants
//! | rule | what is always true |
//! |---|---|
//! | E-1 | Nothing that is read is ever executed: a pickle can name five classes and yields data. |
//! | E-2 | Only what a [`state::State`] can be is ever stored as the state of a run, with the guard on. |
//! | E-3 | A round never goes back, and a run that is closed stays closed, for as long as somebody is in it. |
//! | E-4 | A request is carried out when it is all there, or not at all. |
//! | E-5 | Whoever is told another state than it sent can go on from it: it is one that an agent could have written. |
//! | E-6 | Keys of one run are never changed by another one, and are gone with the last of its agents. |
//! | E-7 | Whatever a client sends has a limit, and what is beyond it ends its connection and nobody else's. |

#![forbid(unsafe_code)]

pub mod kv;
pub mod pickle;
pub mod rendezvous;
pub mod run;
pub mod seat;
pub mod state;
pub mod wire;
