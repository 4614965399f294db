//! Every call that is made with a communicator's handles, by the thread that owns them.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use reknit_collectives::{AbortHandle, BreakReason};
use reknit_membership::ids::{Rank, WorldSize};

use crate::broken::Trouble;
use crate::config::Config;
use crate::driver::{DriverError, Event};
use crate::life::Action;
use crate::memory::look;
use crate::nccl::{Nccl, NcclCode, NcclError, RawComm, RawResult, dtype_code, op_code};
use crate::owner::{Answer, Local, Reduce, Task};
use crate::unique_id::UniqueId;
use crate::version::Feature;
use crate::wait::{Waited, wait};
use crate::way::{Way, World};

/// `NCCL_SHRINK_ABORT`: ends what the parent runs before it is shrunk.
const SHRINK_ABORT: c_int = 1;

/// Handles, one for each device.
type Handles = Box<[RawComm]>;

/// Handles that are being made, at addresses that a thread of NCCL's may write to meanwhile.
type Slots = Box<[AtomicPtr<c_void>]>;

pub(crate) struct Hands {
    nccl: Nccl,
    locals: Vec<Local>,
    formed: Handles,
    child: Slots,
    parent: Handles,
    /// What a shrink or a grow under way was given by address.
    lent: Lent,
    /// What was given to the devices, each with the points at which they are done with it.
    started: Vec<(Reduce, Vec<Event>)>,
    /// What the devices may still write to.
    kept: Vec<Reduce>,
}

#[derive(Default)]
struct Lent {
    exclude: Vec<c_int>,
    id: Option<Box<UniqueId>>,
    config: Option<Box<Config>>,
}

/// Why a task is over before its end.
enum Over {
    Trouble(Trouble),
    Missed,
    GivenUp(BreakReason),
}

impl<T: Into<Trouble>> From<T> for Over {
    fn from(trouble: T) -> Over {
        Over::Trouble(trouble.into())
    }
}

/// How long a task still has, and who may end it.
struct Limit<'a> {
    until: Option<Instant>,
    abort: Option<&'a AbortHandle>,
}

impl Limit<'_> {
    fn left(&self) -> Duration {
        self.until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()))
    }

    /// Waits until `look` has an answer.
    fn wait<R>(&self, mut look: impl FnMut() -> Option<Result<R, Trouble>>) -> Result<R, Over> {
        let gives_up = || self.abort.is_some_and(AbortHandle::is_aborted);
        match wait(self.left(), gives_up, &mut look) {
            Waited::Came(result) => result.map_err(Over::Trouble),
            Waited::Missed => Err(Over::Missed),
            Waited::GivenUp => {
                let reason = self.abort.and_then(AbortHandle::reason).unwrap_or(BreakReason::Aborted);
                Err(Over::GivenUp(reason))
            }
        }
    }
}

fn none(len: usize) -> Handles {
    vec![std::ptr::null_mut(); len].into_boxed_slice()
}

fn slots(len: usize) -> Slots {
    std::iter::repeat_with(AtomicPtr::default).take(len).collect()
}

/// What has been written so far.
fn written(slots: &Slots) -> Handles {
    slots.iter().map(|slot| slot.load(Ordering::Acquire)).collect()
}

fn int(number: u32) -> c_int {
    c_int::try_from(number).unwrap_or(c_int::MAX)
}

impl Hands {
    pub(crate) fn new(nccl: Nccl, locals: Vec<Local>) -> Hands {
        let len = locals.len();
        let (formed, child, parent) = (none(len), slots(len), none(len));
        Hands {
            nccl,
            locals,
            formed,
            child,
            parent,
            lent: Lent::default(),
            started: Vec::new(),
            kept: Vec::new(),
        }
    }

    pub(crate) fn perform(&mut self, task: Task, patience: Duration) -> Answer {
        let until = Instant::now().checked_add(patience);
        let done = match task {
            Task::Act(action, abort) => self.act(action, until, &abort).map(|()| Answer::Done),
            Task::Start(reduce, abort) => {
                let limit = Limit { until, abort: Some(&abort) };
                let started = self.start(reduce, &limit);
                self.keep_unless(started)
            }
            Task::Finish(abort) => {
                let finished = self.finish(&Limit { until, abort: Some(&abort) });
                self.keep_unless(finished)
            }
            Task::Reduce(reduce, abort) => {
                let limit = Limit { until, abort: Some(&abort) };
                let reduced = self.start(reduce, &limit).and_then(|()| self.finish(&limit));
                self.keep_unless(reduced)
            }
            Task::UniqueId => self.unique_id().map(Answer::Id),
            Task::GrowId => self.grow_id().map(Answer::Id),
        };
        match done {
            Ok(answer) => answer,
            Err(Over::Trouble(trouble)) => Answer::Failed(trouble),
            Err(Over::Missed) => Answer::Missed,
            Err(Over::GivenUp(reason)) => Answer::GivenUp(reason),
        }
    }

    fn act(&mut self, action: Action, until: Option<Instant>, abort: &AbortHandle) -> Result<(), Over> {
        let can_be_given_up = Limit { until, abort: Some(abort) };
        let alone = Limit { until, abort: None };
        match action {
            Action::Init(_, world) | Action::Shrink(_, world) | Action::Grow(_, world) => {
                self.form(&world, &can_be_given_up)
            }
            Action::Release(_) => {
                let parent = std::mem::replace(&mut self.parent, none(self.locals.len()));
                self.abort(&[parent])
            }
            Action::Revoke(_) => self.revoke(&alone),
            Action::Abort(_) => self.abort_all(&alone),
            Action::Leave(_) => self.leave(&alone),
            Action::Refuse(_) | Action::Exit(_) => Ok(()),
        }
    }

    fn unique_id(&self) -> Result<UniqueId, Over> {
        let mut id = UniqueId::new([0; UniqueId::BYTES]);
        // SAFETY: it writes 128 bytes.
        let made = unsafe { (self.nccl.functions.get_unique_id)(id.as_mut_ptr()) };
        self.check("ncclGetUniqueId", made, None)?;
        Ok(id)
    }

    fn grow_id(&self) -> Result<UniqueId, Over> {
        let (Some(get), Some(first)) = (self.nccl.functions.comm_get_unique_id, self.formed.first()) else {
            return Err(self.lacks("ncclCommGetUniqueId"));
        };
        let mut id = UniqueId::new([0; UniqueId::BYTES]);
        self.locals[0].gpu.context.enter()?;
        // SAFETY: it writes 128 bytes; the handle is alive, for it is in `formed`.
        let made = unsafe { get(*first, id.as_mut_ptr()) };
        self.check("ncclCommGetUniqueId", made, Some(*first))?;
        Ok(id)
    }

    /// Forms what is told, out of `formed` if the way is one that is made of a parent.
    fn form(&mut self, world: &World, limit: &Limit<'_>) -> Result<(), Over> {
        let len = self.locals.len();
        let newcomer = match &world.way {
            Way::Fresh { .. } => true,
            Way::Shrink { .. } => false,
            Way::Grow { quorum, .. } => world.ranks.iter().all(|rank| rank.0 >= quorum.0),
        };
        if !newcomer {
            self.parent = std::mem::replace(&mut self.formed, none(len));
        }
        self.child = slots(len);
        self.lent = Lent { exclude: Vec::new(), id: None, config: Some(Box::new(Config::non_blocking())) };
        match &world.way {
            Way::Fresh { .. } => {}
            Way::Shrink { exclude, .. } => {
                self.lent.exclude = exclude.iter().map(|rank| int(rank.0)).collect()
            }
            Way::Grow { id, .. } => self.lent.id = Some(Box::new(*id)),
        }
        self.group(|hands, at| {
            let (rank, size) = (int(world.ranks[at].0), int(world.size.0));
            let Lent { exclude, id, config } = &mut hands.lent;
            let config: *mut Config = config.as_mut().map_or(std::ptr::null_mut(), |config| &mut **config);
            let child: *mut RawComm = hands.child[at].as_ptr();
            let functions = &hands.nccl.functions;
            match &world.way {
                Way::Fresh { id } => {
                    // SAFETY: `child` and `config` stay where they are until it has ended or was aborted.
                    let answer = unsafe { (functions.init_rank_config)(child, size, *id, rank, config) };
                    ("ncclCommInitRankConfig", Some(answer))
                }
                Way::Shrink { .. } => {
                    let (list, count) = (exclude.as_mut_ptr(), int(exclude.len() as u32));
                    let parent = hands.parent[at];
                    let answer = functions.shrink.filter(|_| !parent.is_null()).map(|shrink| {
                        // SAFETY: as above, and the list too. The parent is alive, and not null, which would be a crash.
                        unsafe { shrink(parent, list, count, child, config, SHRINK_ABORT) }
                    });
                    ("ncclCommShrink", answer)
                }
                Way::Grow { .. } => {
                    let parent = hands.parent[at];
                    let id: *const UniqueId = id.as_ref().map_or(std::ptr::null(), |id| &**id);
                    // Who was there keeps its rank, and only the parent's rank 0 gives the id that it has made.
                    let given = if newcomer || world.ranks[at] == Rank(0) { id } else { std::ptr::null() };
                    let rank = if newcomer { rank } else { -1 };
                    let answer = functions.grow.map(|grow| {
                        // SAFETY: as above, and the id too. A newcomer's parent is null, as NCCL wants it.
                        unsafe { grow(parent, size, given, rank, child, config) }
                    });
                    ("ncclCommGrow", answer)
                }
            }
        })?;
        limit.wait(|| self.has_formed())?;
        self.check_seats(world)?;
        self.formed = written(&std::mem::replace(&mut self.child, slots(len)));
        self.lent = Lent::default();
        Ok(())
    }

    /// Whether the children, and their parents, have nothing in progress any more.
    fn has_formed(&self) -> Option<Result<(), Trouble>> {
        let mut all = true;
        for (at, child) in written(&self.child).iter().enumerate() {
            // A parent in progress may not have written its child's handle yet.
            for comm in [self.parent[at], *child].into_iter().filter(|comm| !comm.is_null()) {
                match self.state(at, comm) {
                    Ok(None) => {}
                    Ok(Some(NcclCode::InProgress)) => all = false,
                    // Of what a shrink ended there may be an error left; what counts is the child.
                    Ok(Some(_)) if comm == self.parent[at] && !child.is_null() => {}
                    Ok(Some(code)) => return Some(Err(self.trouble("forming the communicator", code, comm))),
                    Err(trouble) => return Some(Err(trouble)),
                }
            }
            all &= !child.is_null();
        }
        all.then_some(Ok(()))
    }

    /// What NCCL gave must be what was told: else two ranks would both believe to be the same.
    fn check_seats(&self, world: &World) -> Result<(), Over> {
        for (at, comm) in written(&self.child).iter().enumerate() {
            let (mut rank, mut size) = (0, 0);
            // SAFETY: it writes one integer; the handle is alive.
            let ranked = unsafe { (self.nccl.functions.user_rank)(*comm, &mut rank) };
            self.check("ncclCommUserRank", ranked, Some(*comm))?;
            // SAFETY: as above.
            let counted = unsafe { (self.nccl.functions.count)(*comm, &mut size) };
            self.check("ncclCommCount", counted, Some(*comm))?;
            let (told_rank, told_size) = (world.ranks[at], world.size);
            if (rank, size) != (int(told_rank.0), int(told_size.0)) {
                let (rank, size) = (Rank(rank as u32), WorldSize(size as u32));
                return Err(Trouble::WrongSeat { rank, size, told_rank, told_size }.into());
            }
        }
        Ok(())
    }

    fn revoke(&mut self, limit: &Limit<'_>) -> Result<(), Over> {
        self.group(|hands, at| {
            let comm = hands.formed[at];
            // SAFETY: the handle is alive; zero is the one flag there is.
            let answer = hands.nccl.functions.revoke.map(|revoke| unsafe { revoke(comm, 0) });
            ("ncclCommRevoke", answer)
        })?;
        limit.wait(|| {
            for (at, comm) in self.formed.iter().enumerate() {
                match self.state(at, *comm) {
                    Ok(Some(NcclCode::InProgress)) => return None,
                    // What broke it may still be told; it is why it was revoked.
                    Ok(_) => {}
                    Err(trouble) => return Some(Err(trouble)),
                }
            }
            Some(Ok(()))
        })?;
        self.rest(limit)
    }

    /// Waits until the devices do nothing any more that was asked for here.
    fn rest(&mut self, limit: &Limit<'_>) -> Result<(), Over> {
        self.keep_started();
        for local in &self.locals {
            limit.wait(|| match local.side.is_done() {
                Ok(false) => None,
                Ok(true) => Some(Ok(())),
                Err(error) => Some(Err(error.into())),
            })?;
        }
        self.kept.clear();
        Ok(())
    }

    /// Gives every handle up, whatever state it is in (rule G-2: they are out of reach before the first call).
    fn abort_all(&mut self, limit: &Limit<'_>) -> Result<(), Over> {
        let len = self.locals.len();
        let parent = std::mem::replace(&mut self.parent, none(len));
        let formed = std::mem::replace(&mut self.formed, none(len));
        // Who is being formed waits on its parent's connections: only the parent's abort frees it. So its handle is looked
        // at when that is over.
        let freed = self.abort(&[parent, formed]);
        let child = std::mem::replace(&mut self.child, slots(len));
        let aborted = self.abort(&[written(&child)]);
        // Only now does nobody write to them any more.
        drop(child);
        self.lent = Lent::default();
        freed.and(aborted)?;
        self.rest(limit)
    }

    /// Aborts as one group: one abort alone may wait for a device that another handle's operation keeps busy.
    fn abort(&self, handles: &[Handles]) -> Result<(), Over> {
        let functions = &self.nccl.functions;
        let alive = || {
            handles.iter().flat_map(|handles| handles.iter().enumerate()).filter(|(_, comm)| !comm.is_null())
        };
        if alive().next().is_none() {
            return Ok(());
        }
        // SAFETY: groups are of this thread alone.
        let mut answers = vec![("ncclGroupStart", unsafe { (functions.group_start)() })];
        for (at, comm) in alive() {
            // A device that cannot be entered any more must not keep the handle from being aborted.
            let _ = self.locals[at].gpu.context.enter();
            // SAFETY: the handle is given up here: the caller has taken it from where calls find it.
            answers.push(("ncclCommAbort", unsafe { (functions.abort)(*comm) }));
        }
        // SAFETY: as above.
        answers.push(("ncclGroupEnd", unsafe { (functions.group_end)() }));
        for (call, answer) in answers {
            self.check(call, answer, None)?;
        }
        Ok(())
    }

    fn leave(&mut self, limit: &Limit<'_>) -> Result<(), Over> {
        self.group(|hands, at| {
            // SAFETY: the handle is alive.
            ("ncclCommFinalize", Some(unsafe { (hands.nccl.functions.finalize)(hands.formed[at]) }))
        })?;
        limit.wait(|| self.is_settled())?;
        let formed = std::mem::replace(&mut self.formed, none(self.locals.len()));
        if !self.nccl.version().has(Feature::Destroy) {
            return self.abort(&[formed]);
        }
        for (at, comm) in formed.iter().enumerate() {
            self.locals[at].gpu.context.enter()?;
            // SAFETY: the handle is given up here.
            let destroyed = unsafe { (self.nccl.functions.destroy)(*comm) };
            self.check("ncclCommDestroy", destroyed, None)?;
        }
        Ok(())
    }

    /// Gives an all-reduce to the devices. What it uses is kept from the first call on.
    fn start(&mut self, reduce: Reduce, limit: &Limit<'_>) -> Result<(), Over> {
        let Reduce { count, dtype, op, .. } = reduce;
        let parts: Vec<_> =
            reduce.parts.iter().map(|part| (part.input.address(), part.output.address())).collect();
        self.started.push((reduce, Vec::new()));
        self.group(|hands, at| {
            let comm = hands.formed[at];
            let (input, output) = (parts[at].0 as *const _, parts[at].1 as *mut _);
            let stream = hands.locals[at].side.raw();
            let (dtype, op) = (dtype_code(dtype), op_code(op));
            // SAFETY: both are `count` numbers of the device's memory, which is kept until the device has done with them; the
            // handle and the stream are alive and of this device.
            let answer =
                unsafe { (hands.nccl.functions.all_reduce)(input, output, count, dtype, op, comm, stream) };
            ("ncclAllReduce", Some(answer))
        })?;
        // Until it has been launched nothing else may be given to the stream.
        limit.wait(|| self.is_settled())?;
        let events: Result<Vec<Event>, DriverError> =
            self.locals.iter().map(|local| local.side.record()).collect();
        let events = events?;
        if let Some((_, of_last)) = self.started.last_mut() {
            *of_last = events;
        }
        Ok(())
    }

    /// Waits until the devices are done with all that was started.
    fn finish(&mut self, limit: &Limit<'_>) -> Result<(), Over> {
        limit.wait(|| {
            let mut all = true;
            for event in self.started.iter().flat_map(|(_, events)| events) {
                match look(event) {
                    None => all = false,
                    Some(Ok(())) => {}
                    Some(Err(error)) => return Some(Err(error.into())),
                }
            }
            if all {
                return Some(Ok(()));
            }
            // NCCL knows of a peer's end before the device does, if ever the device does.
            match self.is_settled() {
                Some(Err(trouble)) => Some(Err(trouble)),
                Some(Ok(())) | None => None,
            }
        })?;
        self.started.clear();
        Ok(())
    }

    /// What was started is freed when the revoke or the abort that follows a failure has brought the devices to rest.
    fn keep_unless(&mut self, done: Result<(), Over>) -> Result<Answer, Over> {
        if done.is_err() {
            self.keep_started();
        }
        done.map(|()| Answer::Done)
    }

    fn keep_started(&mut self) {
        self.kept.extend(self.started.drain(..).map(|(reduce, _)| reduce));
    }

    /// Whether what is formed has nothing in progress; its error, if it has one.
    fn is_settled(&self) -> Option<Result<(), Trouble>> {
        for (at, comm) in self.formed.iter().enumerate() {
            match self.state(at, *comm) {
                Ok(None) => {}
                Ok(Some(NcclCode::InProgress)) => return None,
                Ok(Some(code)) => return Some(Err(self.trouble("ncclCommGetAsyncError", code, *comm))),
                Err(trouble) => return Some(Err(trouble)),
            }
        }
        Some(Ok(()))
    }

    /// What a communicator says of itself. Asking is also what makes it go on.
    fn state(&self, at: usize, comm: RawComm) -> Result<Option<NcclCode>, Trouble> {
        self.locals[at].gpu.context.enter()?;
        let mut state: RawResult = 0;
        // SAFETY: it writes one integer; the handle is alive.
        let answer = unsafe { (self.nccl.functions.get_async_error)(comm, &mut state) };
        match NcclCode::of(answer) {
            None | Some(NcclCode::InProgress) => Ok(NcclCode::of(state)),
            Some(_) => Err(self.nccl.error("ncclCommGetAsyncError", answer, Some(comm)).into()),
        }
    }

    fn trouble(&self, call: &'static str, code: NcclCode, comm: RawComm) -> Trouble {
        NcclError { call, code, said: self.nccl.last_error(Some(comm)) }.into()
    }

    /// Makes a call for each device, as one group: so that none of them waits for another of this thread.
    fn group(
        &mut self,
        mut call: impl FnMut(&mut Hands, usize) -> (&'static str, Option<RawResult>),
    ) -> Result<(), Over> {
        let functions = self.nccl.functions;
        // SAFETY: groups are of this thread alone.
        self.check("ncclGroupStart", unsafe { (functions.group_start)() }, None)?;
        let mut failed = None;
        for at in 0..self.locals.len() {
            let entered = self.locals[at].gpu.context.enter().map(drop);
            let (name, answer) = match entered {
                Ok(()) => call(self, at),
                Err(error) => {
                    failed = Some(error.into());
                    break;
                }
            };
            let checked = match answer {
                Some(answer) => self.check(name, answer, None),
                None => Err(self.lacks(name)),
            };
            if let Err(over) = checked {
                failed = Some(over);
                break;
            }
        }
        // SAFETY: as above. A group that was begun has to be ended, whatever happened in it.
        let ended = unsafe { (functions.group_end)() };
        match failed {
            Some(over) => Err(over),
            None => self.check("ncclGroupEnd", ended, None),
        }
    }

    fn lacks(&self, call: &'static str) -> Over {
        let said = "this NCCL has no such function".to_owned();
        NcclError { call, code: NcclCode::InvalidUsage, said }.into()
    }

    fn check(&self, call: &'static str, answer: RawResult, comm: Option<RawComm>) -> Result<(), Over> {
        match NcclCode::of(answer) {
            None | Some(NcclCode::InProgress) => Ok(()),
            Some(_) => Err(self.nccl.error(call, answer, comm).into()),
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        // Better a leak than memory that is freed under who writes to it: a device, or a formation that was never aborted.
        self.keep_started();
        std::mem::forget(std::mem::take(&mut self.kept));
        std::mem::forget(std::mem::take(&mut self.child));
        std::mem::forget(std::mem::take(&mut self.lent));
    }
}
