//! The program's side of the library: joining, and the next step.

mod dealing;
mod saving;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reknit_checkpoint::{Digester, Layout, State, prepare_dir, state_digest};
use reknit_collectives::{AbortHandle, BreakReason, Broken, Buffer, ControlWord, Element, Group};
use reknit_membership::holding::{Plan, Resume};
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::world::Place;
use reknit_membership::{Digest, Generation, Lineage, Step as StepNumber};

use crate::error::TrainError;
use crate::held::Held;
use crate::hub::{Hub, Joined, ToLink, ToProgram, ToSaves};
use crate::link;
use crate::options::Options;
use crate::order::DataOrder;
use crate::restore::{Fetching, RestoreError, fetch, serve};
use crate::retry::Kept;
use crate::saves::Saves;
use crate::session::{Directive, End, Session};
use crate::step::Step;

/// How often a program that waits looks whether it has waited too long.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// When a program that waits says so, for the first time …
const SAY_AFTER: Duration = Duration::from_secs(5);
/// … and then again.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// How long a finished program waits for its last checkpoint to be committed.
const LAST_COMMIT: Duration = Duration::from_secs(30);

/// One worker of a job.
pub struct Trainer {
    options: Options,
    hub: Arc<Hub>,
    inbox: Receiver<ToProgram>,
    link: Option<JoinHandle<()>>,
    layout: Layout,
    held: Held,
    /// The ring of the world that is being built or runs.
    group: Option<Group>,
    /// The world whose go was taken.
    running: Option<Generation>,
    state_replaced: bool,
    saves: Option<Saves>,
    /// What the thread for checkpoints will listen to.
    saves_inbox: Option<Receiver<ToSaves>>,
    /// The world in which there is nothing left to do but to have the last step committed, and since when.
    finishing: Option<(Generation, Instant)>,
    /// The world in which a checkpoint of the last step was begun, or could not be.
    last_saved_in: Option<Generation>,
    /// Where gradients are weighted and added, kept from step to step of one world.
    buffer: Box<dyn Any + Send>,
    /// The same, for gradients that are added up bucket by bucket.
    buckets: Box<dyn Any + Send>,
    /// What it has of a step that was interrupted.
    kept: Option<Arc<Kept>>,
    /// What was dealt out in which world, for which step.
    dealt: Option<dealing::Dealt>,
    failure: Option<String>,
    end: Option<End>,
}

/// What other threads of a program can do with its membership.
#[derive(Clone)]
pub struct Handle {
    hub: Arc<Hub>,
}

impl Handle {
    /// The machine will be taken in `left`: the worker leaves at the next step boundary, and nothing is lost.
    pub fn notice(&self, left: Duration) {
        self.hub.bring(|session| session.notice(link::now().after(left)));
        self.hub.notice_arrived(Some(left));
    }

    /// Asks for a checkpoint after the step that is being done, or the one after it. Without a world, or without a
    /// directory for checkpoints, nothing follows.
    pub fn save(&self) {
        self.hub.bring(Session::wishes_save);
    }
}

impl Trainer {
    /// Joins a job. Returns once the coordinator has let this worker in.
    ///
    /// It gets a place only once [`Trainer::next_step`] has been called: what the program does before, like reading its
    /// data, holds nobody up.
    ///
    /// # Errors
    /// [`TrainError`] if the coordinator cannot be reached or refuses, if the data plane cannot listen, if checkpoints
    /// cannot be written there, or if the state makes no sense.
    pub fn join(options: Options, state: &dyn State) -> Result<Trainer, TrainError> {
        let layout = Layout::new(state.tensors())?;
        if let Some(wish) = &options.checkpoints {
            // Where nothing can be made, it is better said before the job has this worker.
            prepare_dir(&wish.dir)
                .map_err(|source| TrainError::CheckpointsDir { dir: wish.dir.clone(), source })?;
        }
        let fresh = state_digest(state, &layout)?;
        let shape = Shape {
            tensors: layout.shape_digest(),
            count: layout.specs().len() as u32,
            bytes: layout.total_bytes(),
            recipe: recipe(&options),
            sharding: Sharding::Replicated,
        };
        let Joined { hub, inbox, saves_inbox, link } = Hub::join(&options.member, shape, None)?;
        let saves_inbox = options.checkpoints.is_some().then_some(saves_inbox);
        let mut trainer = Trainer {
            options,
            hub,
            inbox,
            link: Some(link),
            layout,
            held: Held::Fresh(fresh),
            group: None,
            running: None,
            state_replaced: false,
            saves: None,
            saves_inbox,
            finishing: None,
            last_saved_in: None,
            buffer: Box::new(()),
            buckets: Box::new(()),
            kept: None,
            dealt: None,
            failure: None,
            end: None,
        };
        trainer.wait_until_let_in()?;
        Ok(trainer)
    }

    fn wait_until_let_in(&mut self) -> Result<(), TrainError> {
        let began = Instant::now();
        loop {
            let (attached, end) = self.hub.look(|session| (session.is_attached(), session.end().cloned()));
            match end {
                Some(end) => return self.over(end).map(|_| ()),
                None if attached => return Ok(()),
                None => {}
            }
            if began.elapsed() > self.options.member.join_patience {
                return Err(self.hub.unreachable(&self.options.member, began.elapsed()));
            }
            // Nothing but news of the session can come before a world does; every message is a reason to look again.
            let _ = self.inbox.recv_timeout(LOOK_EVERY);
        }
    }

    /// What other threads can do.
    pub fn handle(&self) -> Handle {
        Handle { hub: Arc::clone(&self.hub) }
    }

    /// How the membership ended, once [`Trainer::next_step`] has returned no step.
    pub fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// How many steps are committed in this worker's memory.
    pub fn steps_done(&self) -> u64 {
        match self.held {
            Held::At(resume) => resume.step.0,
            Held::Fresh(_) | Held::Torn => 0,
        }
    }

    /// The next step to do, waiting for a world if there is none: the library then builds the ring, brings `state` to
    /// the step the world resumes from, and serves it to others. `None` when the job is over for this worker.
    ///
    /// # Errors
    /// [`TrainError`] if the coordinator refuses this worker or cannot be reached for too long while there is nothing
    /// to do without it, or if the program itself is at fault.
    pub fn next_step<S: State + Sync>(&mut self, state: &mut S) -> Result<Option<Step<'_>>, TrainError> {
        loop {
            if let Some(why) = self.failure.clone() {
                return Err(TrainError::Mismatch(why));
            }
            match self.hub.look(Session::directive) {
                Directive::Over(end) => return self.over(end).map(|()| None),
                Directive::Restore(plan) => self.restore(&plan, state),
                Directive::Wait => self.rest(state)?,
                Directive::Run { place, resume } => {
                    if self.running != Some(place.generation) && !self.take_go(place.generation, resume) {
                        continue;
                    }
                    if self.is_last(self.steps_done()) {
                        self.finish(&place, state)?;
                        continue;
                    }
                    let Ok(own) = self.own_stretches(&place) else { continue };
                    let replaced = std::mem::take(&mut self.state_replaced);
                    return Ok(Some(Step::new(self, &place, own, replaced)));
                }
            }
        }
    }

    fn over(&mut self, end: End) -> Result<(), TrainError> {
        tracing::info!(how = ?end, "this worker's membership is over");
        self.group = None;
        self.end = Some(end.clone());
        end.into_result().map(|_| ())
    }

    /// Waits until there is something to do, and serves others meanwhile.
    fn rest<S: State + Sync>(&mut self, state: &S) -> Result<(), TrainError> {
        self.running = None;
        let holding = self.held.holding();
        self.hub.bring(|session| session.at_rest(holding));
        let generation = |hub: &Hub| hub.look(|session| session.place().map(|place| place.generation));
        let resting_in = generation(&self.hub);
        let (held, layout, hub) = (self.held, &self.layout, &self.hub);
        let inbox = &self.inbox;
        let patience = self.options.member.patience;
        let (began, mut say_at) = (Instant::now(), SAY_AFTER);
        // Ends the serving when this rest does.
        let stop = AbortHandle::new();
        let rested = std::thread::scope(|scope| {
            loop {
                if hub.look(Session::directive) != Directive::Wait || generation(hub) != resting_in {
                    stop.abort(BreakReason::Aborted);
                    return Ok(());
                }
                match inbox.recv_timeout(LOOK_EVERY) {
                    Ok(ToProgram::Serve(connection)) => {
                        let stop = &stop;
                        let thread = std::thread::Builder::new().name("reknit-serve".to_owned());
                        let work = move || serve(connection, &held, state, layout, stop);
                        if let Err(why) = thread.spawn_scoped(scope, work) {
                            // The connection ends, and whoever waits for it asks another holder.
                            tracing::warn!(error = %why, "no thread to send state from");
                        }
                    }
                    Ok(ToProgram::Wake) | Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
                if began.elapsed() > say_at {
                    say_at += SAY_EVERY;
                    let (since, apart) = (began.elapsed(), hub.apart_for());
                    let hint = if apart.is_zero() {
                        "`reknit status` says what the job waits for"
                    } else {
                        "no coordinator can be reached"
                    };
                    tracing::warn!(?since, hint, "still waiting for a world that runs");
                }
                if hub.apart_for() > patience {
                    stop.abort(BreakReason::Aborted);
                    return Err(());
                }
            }
        });
        if rested.is_err() {
            return Err(self.hub.unreachable(&self.options.member, self.hub.apart_for()));
        }
        // From here on the program may change its state.
        if self.hub.look(Session::directive) != Directive::Wait {
            self.hub.bring(|session| {
                session.busy();
                Vec::new()
            });
        }
        Ok(())
    }

    /// The barrier has opened. False if the world is over again already.
    fn take_go(&mut self, generation: Generation, resume: Resume) -> bool {
        if self.group(generation).is_none() {
            // The ring was handed over before the world was answered.
            self.group = self.hub.take_group(generation);
        }
        if self.group.is_none() {
            // Then a newer world has one, and this one is over. If not, nobody must wait for what is not there.
            self.hub.bring(|session| session.broken(generation, Vec::new()));
            return false;
        }
        // The go may have come after the rest had ended for another reason: from here on the state changes for sure.
        self.hub.bring(|session| {
            session.busy();
            Vec::new()
        });
        if !self.held.is(resume) {
            // The barrier opens for those that have the state. Whoever has not, whatever has happened to the
            // coordinator's memory of it, must not take part: the world is to be formed anew.
            tracing::error!(%generation, ?resume, held = ?self.held, "told to go without the state to go from");
            self.hub.bring(|session| session.broken(generation, Vec::new()));
            return false;
        }
        self.prepare_saves();
        self.running = Some(generation);
        self.held = Held::At(resume);
        if let (Some(saves), Some(place)) = (&self.saves, self.hub.look(|session| session.place().cloned())) {
            saves.prepare(place.size);
        }
        true
    }

    /// Says that the last step is done, once its checkpoint is committed, and waits for what comes of it.
    fn finish(&mut self, place: &Place, state: &dyn State) -> Result<(), TrainError> {
        let (generation, step) = (place.generation, StepNumber(self.steps_done()));
        let since = match self.finishing {
            Some((world, since)) if world == generation => since,
            _ => self.finishing.insert((generation, Instant::now())).1,
        };
        let waits = self.is_last_to_come(place, step, state) && since.elapsed() < LAST_COMMIT;
        if !waits {
            self.hub.bring(|session| session.finished(generation, step));
        }
        match self.inbox.recv_timeout(LOOK_EVERY) {
            Ok(ToProgram::Wake | ToProgram::Serve(_)) | Err(_) => {}
        }
        if self.hub.apart_for() > self.options.member.patience {
            return Err(self.hub.unreachable(&self.options.member, self.hub.apart_for()));
        }
        Ok(())
    }

    /// Brings the state to where the plan says, and says what became of it.
    fn restore<S: State>(&mut self, plan: &Plan, state: &mut S) {
        let Some((secret, abort)) = self.hub.begin_plan(plan) else { return };
        // Until all of it is there, it is neither the old state nor the new one.
        self.held = Held::Torn;
        self.state_replaced = true;
        // Gradients of another state.
        self.kept = None;
        let member = self.hub.look(Session::member);
        let who = Fetching {
            member,
            generation: plan.generation,
            secret: &secret,
            resume: plan.resume,
            abort: &abort,
        };
        let mut moved = Vec::new();
        for part in &plan.fetch {
            match fetch(&who, part, &self.layout, state) {
                Ok(parts) => moved.extend(parts),
                Err(RestoreError::Aborted) => return,
                Err(RestoreError::System(why)) => {
                    return self.hub.bring(|session| session.machine_failed(why.to_string()));
                }
                Err(RestoreError::Source { culprit, why }) => {
                    tracing::warn!(%culprit, error = %why, "state did not arrive");
                    return self.hub.bring(|session| session.restore_failed(plan, Some(culprit)));
                }
            }
        }
        if let Some(load) = &plan.load
            && let Err(why) = self.load(load, state, &abort)
        {
            tracing::warn!(step = %load.commit.step, error = %why, "a checkpoint could not be loaded");
            return self.hub.bring(|session| session.restore_failed(plan, None));
        }
        // What arrived wrong is said with its digests; the core judges. Until it has, it is no state.
        if moved.iter().all(|part| part.sent == part.got) {
            self.held = Held::At(plan.resume);
        }
        self.hub.bring(|session| session.restored(plan, moved));
    }

    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    pub(crate) fn order(&self) -> DataOrder {
        self.options.order
    }

    pub(crate) fn lineage(&self) -> Lineage {
        match self.held {
            Held::At(resume) => resume.lineage,
            Held::Fresh(_) | Held::Torn => Lineage(0),
        }
    }

    pub(crate) fn set_held(&mut self, held: Held) {
        self.held = held;
    }

    /// Whether a job of so many steps is done.
    pub(crate) fn is_last(&self, steps: u64) -> bool {
        self.options.steps.is_some_and(|all| steps >= all)
    }

    /// What this rank wants the others to know at the next collective.
    pub(crate) fn wishes(&self) -> ControlWord {
        self.hub.look(Session::wishes)
    }

    pub(crate) fn group(&mut self, generation: Generation) -> Option<&mut Group> {
        self.group.as_mut().filter(|group| group.generation() == generation)
    }

    /// The buffer that was kept, if it is one of this generation's group, for such numbers and for as many. All ranks of a
    /// world make the same calls, so all have one or none has.
    pub(crate) fn take_buffer<T: Element>(
        &mut self,
        generation: Generation,
        room: usize,
    ) -> Option<Buffer<T>> {
        let kept = std::mem::replace(&mut self.buffer, Box::new(()));
        let (of, buffer) = *kept.downcast::<(Generation, Buffer<T>)>().ok()?;
        (of == generation && buffer.room() >= room).then_some(buffer)
    }

    pub(crate) fn keep_buffer<T: Element>(&mut self, generation: Generation, buffer: Option<Buffer<T>>) {
        if let Some(buffer) = buffer {
            self.buffer = Box::new((generation, buffer));
        }
    }

    /// The buckets that were kept, if they are of this generation's group, and of so many such numbers.
    pub(crate) fn take_buckets<T: Element>(
        &mut self,
        generation: Generation,
        len: usize,
    ) -> VecDeque<Buffer<T>> {
        let kept = std::mem::replace(&mut self.buckets, Box::new(()));
        match kept.downcast::<((Generation, usize), VecDeque<Buffer<T>>)>().map(|kept| *kept) {
            Ok((of, buckets)) if of == (generation, len) => buckets,
            Ok(_) | Err(_) => VecDeque::new(),
        }
    }

    pub(crate) fn keep_buckets<T: Element>(
        &mut self,
        generation: Generation,
        len: usize,
        buckets: VecDeque<Buffer<T>>,
    ) {
        self.buckets = Box::new(((generation, len), buckets));
    }

    pub(crate) fn ring_broke(&mut self, broken: &Broken) {
        let (generation, suspects) = (broken.generation, broken.suspects.clone());
        self.hub.bring(|session| session.broken(generation, suspects));
    }

    pub(crate) fn fail_for_good(&mut self, why: String) {
        self.failure = Some(why);
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        self.hub.bring(Session::leave);
        self.group = None;
        self.hub.tell_saves(ToSaves::End);
        self.hub.say(ToLink::End);
        if let Some(link) = self.link.take() {
            // It ends within its farewell; a panic of its own is its own.
            let _ = link.join();
        }
        self.hub.close();
    }
}

/// What else all workers must agree on.
fn recipe(options: &Options) -> Digest {
    let DataOrder { dataset, global_batch, seed } = options.order;
    let mut digester = Digester::new();
    // Who makes no checkpoint when the others do would let them wait for its part for ever.
    let every = options.checkpoints.as_ref().map_or(0, |wish| wish.every);
    for number in [dataset, global_batch, seed, options.steps.unwrap_or(u64::MAX), every] {
        digester.update(&number.to_le_bytes());
    }
    if options.retry_in_place {
        // Who does not take part in the dealing would let the others wait.
        digester.update(b"retry in place");
    }
    digester.finish()
}
