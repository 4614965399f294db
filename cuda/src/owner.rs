//! The one thread that holds a process's handles and makes every call with them.
//!
//! NCCL's handles may not be used by two threads at once, and an abort beside another call hangs. So there is one thread, which
//! asks rather than waits, and by a deadline; who asked for it waits with a deadline too, should a call
//! that returns at once in NCCL's book not return in this world.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use reknit_collectives::{AbortHandle, BreakReason, DType, ReduceOp};

use crate::broken::Trouble;
use crate::driver::{Gpu, Stream};
use crate::hands::Hands;
use crate::life::Action;
use crate::memory::Allocation;
use crate::nccl::Nccl;
use crate::unique_id::UniqueId;
use crate::wait::{Waited, wait};

/// How long the caller waits for an answer after the deadline, by which the answer should have been given.
const GRACE: Duration = Duration::from_secs(1);

/// What the thread is asked for.
pub(crate) enum Task {
    /// One of the life's actions.
    Act(Action, AbortHandle),
    /// Give an all-reduce to the devices, and go on.
    Start(Reduce, AbortHandle),
    /// Wait until all that was started is done.
    Finish(AbortHandle),
    /// Both at once.
    Reduce(Reduce, AbortHandle),
    /// The seed of a world that is formed from nothing.
    UniqueId,
    /// The seed for newcomers to what is formed.
    GrowId,
}

/// One all-reduce.
pub(crate) struct Reduce {
    pub(crate) parts: Vec<Part>,
    pub(crate) count: usize,
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
}

/// One device's memory in it.
pub(crate) struct Part {
    pub(crate) input: Arc<Allocation>,
    pub(crate) output: Arc<Allocation>,
}

/// How a task ended.
pub(crate) enum Answer {
    Done,
    Id(UniqueId),
    Failed(Trouble),
    Missed,
    GivenUp(BreakReason),
}

/// What the thread is reached by.
pub(crate) struct Owner {
    tasks: Option<Sender<(Task, Duration)>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
}

impl Owner {
    pub(crate) fn start(nccl: Nccl, locals: Vec<Local>) -> std::io::Result<Owner> {
        let (tasks, asked) = channel::<(Task, Duration)>();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name("reknit-nccl".to_owned()).spawn(move || {
            let mut hands = Hands::new(nccl, locals);
            for (task, patience) in asked {
                // Who does not wait for it any more has given this thread up.
                let _ = answer.send(hands.perform(task, patience));
            }
        })?;
        Ok(Owner { tasks: Some(tasks), answers, thread: Some(thread) })
    }

    /// Has `task` done within `patience`. Nothing, if no answer comes: then the thread is lost, and must not be asked again.
    pub(crate) fn ask(&mut self, task: Task, patience: Duration) -> Option<Answer> {
        let answer = self.tasks.as_ref().and_then(|tasks| {
            tasks.send((task, patience)).ok()?;
            self.answers.recv_timeout(patience.saturating_add(GRACE)).ok()
        });
        if answer.is_none() {
            // What it holds is leaked: it may still be in use.
            self.tasks = None;
            self.thread = None;
        }
        answer
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It ends when there is nobody to ask it. If it does not answer it is not waited for.
        drop(self.tasks.take());
        if let Some(thread) = self.thread.take() {
            let ended = wait(GRACE, || false, || thread.is_finished().then_some(()));
            if ended == Waited::Came(()) {
                let _ = thread.join();
            }
        }
    }
}

/// One device of this process, and the stream on which its collectives run.
#[derive(Clone)]
pub(crate) struct Local {
    pub(crate) gpu: Gpu,
    pub(crate) side: Arc<Stream>,
}
