//! What callers use: this process's part in one world after another.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::{AbortHandle, DType, Element, ReduceOp};
use reknit_membership::ids::Generation;

use crate::broken::{Broken, FormError, Left, ReduceError, Trouble};
use crate::driver::{DriverError, Event, Gpu, Stream};
use crate::life::{self, Action, ExitReason, Held, Life, Refusal, State};
use crate::memory::DeviceBuffer;
use crate::nccl::Nccl;
use crate::owner::{Answer, Local, Owner, Part, Reduce, Task};
use crate::unique_id::UniqueId;
use crate::version::Feature;
use crate::way::{Offer, Parent, World};

/// How long a communicator waits for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long forming a world may take.
    pub form: Duration,
    /// How long a collective may take, from this rank's call on. It includes the time by which another rank enters it later.
    pub stall: Duration,
    /// How long ending what runs may take, before the handle is aborted instead.
    pub revoke: Duration,
    /// How long an abort may take, before the process is given up.
    pub abort: Duration,
    /// How long leaving in good order may take.
    pub leave: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            // NCCL itself gives up on a peer that refuses connections after a minute.
            form: Duration::from_secs(60),
            stall: Duration::from_secs(60),
            revoke: Duration::from_secs(5),
            abort: Duration::from_secs(10),
            leave: Duration::from_secs(10),
        }
    }
}

/// How long a seed may take to be made.
const SEED: Duration = Duration::from_secs(5);

/// This process's part in the communicators of one job: one world after another, with one rank for each of its devices.
///
/// All ranks call the same collectives in the same order, with the same type, operation and number of elements. Once one has
/// failed every later one fails at once, until the next world has been formed. Every call returns by a deadline.
pub struct Communicator {
    nccl: Nccl,
    life: Life,
    owner: Owner,
    locals: Vec<Local>,
    options: Options,
    /// Ends everything that waits in the newest world.
    abort: AbortHandle,
    broken: Option<Broken>,
    /// Whether a reduction was started that was not finished.
    started: bool,
}

/// Why there is no communicator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There must be a device.
    #[error("a communicator needs a device")]
    NoDevice,
    /// The device gave no stream.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The process is out of threads.
    #[error("cannot start the thread that makes the calls")]
    System(#[source] std::io::Error),
}

/// Why there is no seed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// NCCL made none.
    #[error(transparent)]
    Trouble(#[from] Trouble),
    /// There is no world of two ranks or more that could grow, or this NCCL cannot grow any.
    #[error("there is nothing that could grow")]
    NothingToGrow,
    /// The process is to end.
    #[error(transparent)]
    Exit(#[from] ExitReason),
}

impl Communicator {
    /// A part in no world yet, with these devices.
    pub fn open(nccl: Nccl, gpus: &[Gpu], options: Options) -> Result<Communicator, OpenError> {
        let local = |gpu: &Gpu| Ok(Local { gpu: gpu.clone(), side: Arc::new(Stream::on(gpu)?) });
        let locals: Vec<Local> = gpus.iter().map(local).collect::<Result<_, DriverError>>()?;
        if locals.is_empty() {
            return Err(OpenError::NoDevice);
        }
        let owner = Owner::start(nccl.clone(), locals.clone()).map_err(OpenError::System)?;
        let life = Life::new(nccl.version());
        let abort = AbortHandle::new();
        Ok(Communicator { nccl, life, owner, locals, options, abort, broken: None, started: false })
    }

    /// What each rank of this process brings along to the next world: for the coordinator, who chooses the
    /// [`shortest`](crate::shortest) way to it for all.
    pub fn offers(&self) -> Vec<Offer> {
        let version = self.nccl.version();
        let parents = self.life.parents();
        if parents.is_empty() {
            return vec![Offer { parent: None, version }; self.locals.len()];
        }
        parents.into_iter().map(|parent: Parent| Offer { parent: Some(parent), version }).collect()
    }

    /// The world that can be used, if there is one.
    pub fn world(&self) -> Option<&Held> {
        self.life.usable()
    }

    /// Why this process has to end, if it has to.
    pub fn exit(&self) -> Option<ExitReason> {
        match self.life.state() {
            State::Exit(reason) => Some(*reason),
            State::Empty
            | State::Forming { .. }
            | State::Releasing { .. }
            | State::Healthy(_)
            | State::Revoking { .. }
            | State::Revoked(_)
            | State::Aborting { .. }
            | State::Leaving { .. } => None,
        }
    }

    /// A seed for a world that is formed afresh. It is good for one formation, and this process must be a rank of it: the
    /// others find each other through this one. NCCL holds a thread and a socket for each until all have come, so
    /// it is made once for a generation, when that is wanted.
    pub fn unique_id(&mut self) -> Result<UniqueId, SeedError> {
        self.seed(Task::UniqueId)
    }

    /// A seed for newcomers to the world that stands: made by the process of its rank 0, for one formation.
    pub fn grow_id(&mut self) -> Result<UniqueId, SeedError> {
        let grows = self.life.usable().is_some_and(|held| held.size.0 >= 2);
        if !grows || !self.nccl.version().has(Feature::Grow) {
            return Err(SeedError::NothingToGrow);
        }
        self.seed(Task::GrowId)
    }

    fn seed(&mut self, task: Task) -> Result<UniqueId, SeedError> {
        if let Some(reason) = self.exit() {
            return Err(reason.into());
        }
        match self.owner.ask(task, SEED) {
            Some(Answer::Id(id)) => Ok(id),
            Some(Answer::Failed(trouble)) => Err(trouble.into()),
            Some(Answer::Done | Answer::Missed | Answer::GivenUp(_)) => {
                Err(Trouble::Late { waited: SEED }.into())
            }
            None => {
                self.settle(life::Event::Stuck);
                Err(Trouble::Hangs { waited: SEED }.into())
            }
        }
    }

    /// Forms the world that the coordinator has committed, out of what is there or afresh, as it says.
    ///
    /// That this rank has formed it does not mean that all have: a world counts once the coordinator's barrier has opened for its
    /// generation. If a newer one is committed meanwhile, `abort` ends this call and the newer one is
    /// formed next.
    pub fn form(&mut self, world: World, abort: AbortHandle) -> Result<(), FormError> {
        let generation = world.generation;
        let (ranks, devices) = (world.ranks.len(), self.locals.len());
        if ranks != devices {
            return Err(FormError::Devices { ranks, devices });
        }
        self.abort = abort;
        if std::mem::take(&mut self.started) {
            // What was started and not finished is given up: what a world is made of has to be quiet.
            self.settle(life::Event::Broke);
        }
        let Settled { refused, trouble } = self.settle(life::Event::Told(world));
        if let Some(refusal) = refused {
            return Err(refusal.into());
        }
        if self.life.usable().is_some_and(|held| held.generation == generation) {
            self.broken = None;
            return Ok(());
        }
        let trouble = trouble.unwrap_or(Trouble::Late { waited: self.options.form });
        Err(FormError::Failed { generation, trouble, left: self.left() })
    }

    /// Has what is reduced next on the device of this number wait for `event`, which stands for work on another stream.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn after(&self, device: usize, event: &Event) -> Result<(), DriverError> {
        self.locals[device].side.wait_for(event)
    }

    /// Combines the elements of all ranks, in place, on a stream of its own. If it fails, what is in `data` is undefined. A mean
    /// is of floats alone, and NCCL's own, of which the last bits may differ from the ring's.
    ///
    /// There is one buffer for each of this process's devices, in their order.
    pub fn all_reduce<T: Element>(
        &mut self,
        data: &mut [DeviceBuffer<T>],
        op: ReduceOp,
    ) -> Result<(), ReduceError> {
        let len = data.first().map_or(0, DeviceBuffer::len);
        let part =
            |buffer: &DeviceBuffer<T>| Part { input: buffer.allocation(), output: buffer.allocation() };
        let alike = data.iter().all(|buffer| buffer.len() == len);
        self.reduce(Task::Reduce, data.iter().map(part).collect(), alike, len, T::DTYPE, op)
    }

    /// Begins to combine the elements of all ranks, in place, and returns as soon as the devices have been given the work: they
    /// do it beside other work of theirs. What was started is done in order, on every rank the same.
    ///
    /// Until [`finish`](Communicator::finish) has returned, what is in `data` is undefined.
    pub fn start_all_reduce<T: Element>(
        &mut self,
        data: &[&DeviceBuffer<T>],
        op: ReduceOp,
    ) -> Result<(), ReduceError> {
        let len = data.first().map_or(0, |buffer| buffer.len());
        let part =
            |buffer: &&DeviceBuffer<T>| Part { input: buffer.allocation(), output: buffer.allocation() };
        let alike = data.iter().all(|buffer| buffer.len() == len);
        self.reduce(Task::Start, data.iter().map(part).collect(), alike, len, T::DTYPE, op)?;
        self.started = true;
        Ok(())
    }

    /// Waits until all that was started is done. If it fails, none of it has a result.
    pub fn finish(&mut self) -> Result<(), ReduceError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone().into());
        }
        if !self.started {
            return Ok(());
        }
        let generation = self.usable()?;
        self.collect(generation, Task::Finish(self.abort.clone()))?;
        self.started = false;
        Ok(())
    }

    /// Combines the `input`s of all ranks into `output`, on a stream of its own. If it fails, `input` is what it was, and what is
    /// in `output` is undefined: so it can be done again in the next world.
    pub fn all_reduce_into<T: Element>(
        &mut self,
        input: &[DeviceBuffer<T>],
        output: &mut [DeviceBuffer<T>],
        op: ReduceOp,
    ) -> Result<(), ReduceError> {
        let len = input.first().map_or(0, DeviceBuffer::len);
        let pairs = input.iter().zip(output.iter());
        let parts =
            pairs.map(|(input, output)| Part { input: input.allocation(), output: output.allocation() });
        let alike = input.len() == output.len() && input.iter().chain(output.iter()).all(|b| b.len() == len);
        self.reduce(Task::Reduce, parts.collect(), alike, len, T::DTYPE, op)
    }

    fn reduce(
        &mut self,
        task: impl FnOnce(Reduce, AbortHandle) -> Task,
        parts: Vec<Part>,
        alike: bool,
        count: usize,
        dtype: DType,
        op: ReduceOp,
    ) -> Result<(), ReduceError> {
        let devices = self.locals.len();
        if parts.len() != devices || !alike {
            return Err(ReduceError::Buffers { devices });
        }
        let is_integer = matches!(dtype, DType::I32 | DType::I64 | DType::U8);
        if op == ReduceOp::Mean && is_integer {
            return Err(ReduceError::Unsupported { op, dtype });
        }
        let generation = self.usable()?;
        self.collect(generation, task(Reduce { parts, count, dtype, op }, self.abort.clone()))
    }

    /// The generation in which a collective can be called.
    fn usable(&self) -> Result<Generation, ReduceError> {
        match (&self.broken, self.life.usable()) {
            (Some(broken), _) => Err(broken.clone().into()),
            (None, Some(held)) => Ok(held.generation),
            (None, None) => Err(ReduceError::NotFormed),
        }
    }

    /// Has a collective's task done; if that fails, the world is broken.
    fn collect(&mut self, generation: Generation, task: Task) -> Result<(), ReduceError> {
        let stall = self.options.stall;
        let (event, trouble) = match self.owner.ask(task, stall) {
            Some(Answer::Done | Answer::Id(_)) => return Ok(()),
            Some(Answer::Failed(trouble)) => (life::Event::Broke, trouble),
            Some(Answer::Missed) => (life::Event::Broke, Trouble::Late { waited: stall }),
            Some(Answer::GivenUp(reason)) => (life::Event::Broke, Trouble::GivenUp(reason)),
            None => (life::Event::Stuck, Trouble::Hangs { waited: stall }),
        };
        self.settle(event);
        Err(self.break_for(generation, trouble).into())
    }

    /// Ends the world on this rank: what runs is over when this returns. The other ranks are told by the coordinator.
    pub fn break_up(&mut self, reason: reknit_collectives::BreakReason) {
        self.abort.abort(reason.clone());
        if let Some(generation) = self.life.usable().map(|held| held.generation) {
            self.settle(life::Event::Broke);
            self.break_for(generation, Trouble::GivenUp(reason));
        }
    }

    /// Leaves in good order, together with all ranks of the world. This one can form worlds afterwards.
    pub fn leave(&mut self) -> Result<(), Left> {
        if self.started && self.finish().is_err() {
            return Err(self.left());
        }
        let had = self.life.usable().is_some();
        let Settled { trouble, .. } = self.settle(life::Event::Leave);
        match (self.exit(), had, trouble) {
            (Some(reason), _, _) => Err(Left::Exit(reason)),
            (None, true, Some(_)) => Err(Left::Nothing),
            (None, _, _) => Ok(()),
        }
    }

    fn break_for(&mut self, generation: Generation, trouble: Trouble) -> Broken {
        self.started = false;
        let broken = Broken { generation, trouble, left: self.left() };
        self.broken.insert(broken).clone()
    }

    fn left(&self) -> Left {
        match (self.exit(), self.life.parents().is_empty()) {
            (Some(reason), _) => Left::Exit(reason),
            (None, false) => Left::Handle,
            (None, true) => Left::Nothing,
        }
    }

    /// Does what follows from `event`, and from that, until nothing does.
    fn settle(&mut self, event: life::Event) -> Settled {
        let mut settled = Settled::default();
        let mut next = self.life.on(event);
        while let Some(action) = next {
            next = match action {
                Action::Refuse(refusal) => {
                    settled.refused = Some(refusal);
                    None
                }
                Action::Exit(_) => None,
                action => {
                    let event = self.act(action, &mut settled);
                    self.life.on(event)
                }
            };
        }
        settled
    }

    fn act(&mut self, action: Action, settled: &mut Settled) -> life::Event {
        let ticket = action.ticket().unwrap_or_default();
        let Options { form, revoke, abort, leave, .. } = self.options;
        let (patience, is_abort) = match &action {
            Action::Init(..) | Action::Shrink(..) | Action::Grow(..) => (form, false),
            Action::Revoke(_) => (revoke, false),
            Action::Leave(_) => (leave, false),
            Action::Release(_) | Action::Abort(_) | Action::Refuse(_) | Action::Exit(_) => (abort, true),
        };
        // The first trouble is the cause of those that follow.
        let mut trouble = |cause| {
            settled.trouble.get_or_insert(cause);
        };
        match self.owner.ask(Task::Act(action, self.abort.clone()), patience) {
            Some(Answer::Done | Answer::Id(_)) => life::Event::Done(ticket),
            Some(Answer::Failed(cause)) => {
                trouble(cause);
                life::Event::Failed(ticket)
            }
            Some(Answer::Missed) => {
                trouble(Trouble::Late { waited: patience });
                life::Event::Missed(ticket)
            }
            Some(Answer::GivenUp(reason)) => {
                trouble(Trouble::GivenUp(reason));
                life::Event::Broke
            }
            // An abort blocks for as long as it takes: no answer is a missed deadline like any other.
            None if is_abort => {
                trouble(Trouble::Hangs { waited: patience });
                life::Event::Missed(ticket)
            }
            None => {
                trouble(Trouble::Hangs { waited: patience });
                life::Event::Stuck
            }
        }
    }
}

/// What has become of an event.
#[derive(Default)]
struct Settled {
    refused: Option<Refusal>,
    trouble: Option<Trouble>,
}

impl Drop for Communicator {
    /// Gives the handles up without the others. Who wants to go together with them calls [`leave`](Communicator::leave).
    fn drop(&mut self) {
        if self.exit().is_none() && !self.life.parents().is_empty() {
            self.owner.ask(
                Task::Act(Action::Abort(life::Ticket::default()), self.abort.clone()),
                self.options.abort,
            );
        }
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({:?}, {:?})", self.nccl, self.life.state())
    }
}
