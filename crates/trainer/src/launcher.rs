//! A member without a state of its own: a program that starts others, like an agent of torchrun.
//!
//! It takes part in worlds and holds nothing, so nothing is restored and no step is counted. What it needs of a world is its
//! rank, the size, and something that one rank tells the others (where the processes that it starts find each other); and
//! to hear at once when the world is over.
//!
//! ```text
//!   next_world ──► share ──► (its processes run) ──► is_over ──► next_world …  ──► finish
//! ```
//! A world ends for everybody as soon as one member asks for the next one, or a change is due, or a member is lost. It does
//! not end late because some program is busy: a thread of the launcher's own agrees on that with the others (`keeper`).
//!
//! | rule | what is always true |
//! |---|---|
//! | L-1 | A world is given out when every member of it has asked for one, and to all of them. |
//! | L-2 | When a world is to end, every member hears of it by itself, however long its program is busy. |
//! | L-3 | What is shared in a world is the same for all members of it, and never of another world. |
//! | L-4 | Between two changes nothing is said but renewals of the lease. |

mod ask;
mod keeper;
mod options;

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reknit_checkpoint::Digester;
use reknit_membership::holding::Holding;
use reknit_membership::spec::{Shape, Sharding};
use reknit_membership::{Digest, Generation};

use crate::error::TrainError;
use crate::hub::{Hub, Joined, ToLink, ToProgram, lock};
use crate::link;
use crate::session::{Directive, End, Session};

pub use options::LauncherOptions;

use keeper::Keeper;

/// The most bytes that [`Launcher::share`] takes.
pub const SHARED_MAX: usize = 1024;

/// A place in a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    /// Which: it rises by one with each.
    pub generation: u64,
    /// This member's rank. Survivors keep their order from world to world.
    pub rank: u32,
    /// How many members the world has.
    pub size: u32,
}

/// The world was over before everybody had what was to be shared: ask for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the world was over before it began; ask for the next one")]
pub struct Over;

/// What came of waiting for a world.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// A place in a world.
    World(World),
    /// The membership is over, as the end says.
    End(End),
    /// Nothing yet. Ask again: nothing is lost by it.
    NotYet,
}

/// One member.
pub struct Launcher {
    hub: Arc<Hub>,
    desk: Arc<Desk>,
    options: LauncherOptions,
    threads: Vec<JoinHandle<()>>,
}

/// Where the program and the keeper meet.
struct Desk {
    state: Mutex<OnDesk>,
    changed: Condvar,
}

/// What the program wants, and what it got.
struct OnDesk {
    wish: Wish,
    /// The world that was given out last.
    given: Option<World>,
    /// Whether the program has not fetched it yet.
    unfetched: bool,
    /// What was shared in it.
    shared: Option<Result<Vec<u8>, Over>>,
    /// Whether there is to be another world although this member's part is done.
    others_go_on: bool,
    /// How the membership ended.
    end: Option<End>,
}

/// What the program waits for.
#[derive(Debug, Clone, PartialEq)]
enum Wish {
    /// Nothing: it is busy.
    Nothing,
    /// The next world.
    World,
    /// That this be shared, in the world that was given out. Only rank 0's counts.
    Share(Vec<u8>),
    /// The job's end.
    Finish,
    /// To be gone.
    Gone,
}

impl Desk {
    fn wish(&self, wish: Wish) {
        lock(&self.state).wish = wish;
    }

    /// Waits until `look` sees something, at most for so long.
    fn wait<T>(&self, patience: Duration, mut look: impl FnMut(&mut OnDesk) -> Option<T>) -> Option<T> {
        let until = Instant::now() + patience;
        let mut state = lock(&self.state);
        loop {
            if let Some(seen) = look(&mut state) {
                return Some(seen);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Launcher {
    /// Joins a job. Returns at once; [`Launcher::next_world`] says whether the coordinator lets it in.
    ///
    /// # Errors
    /// [`TrainError`] if the data plane cannot listen, or the system gives no thread.
    pub fn join(options: LauncherOptions) -> Result<Launcher, TrainError> {
        let nothing = nothing();
        let shape =
            Shape { tensors: nothing, count: 0, bytes: 0, recipe: nothing, sharding: Sharding::Replicated };
        // There are no checkpoints to look after.
        let Joined { hub, inbox, saves_inbox: _, link } = Hub::join(&options, shape, Some(holding()))?;
        let state = OnDesk {
            wish: Wish::Nothing,
            given: None,
            unfetched: false,
            shared: None,
            others_go_on: false,
            end: None,
        };
        let desk = Arc::new(Desk { state: Mutex::new(state), changed: Condvar::new() });
        let keeper = Keeper::new(Arc::clone(&hub), Arc::clone(&desk), inbox);
        let mut launcher = Launcher { hub, desk, options, threads: vec![link] };
        let thread = std::thread::Builder::new().name("reknit-keeper".to_owned());
        launcher.threads.push(thread.spawn(move || keeper.run())?);
        Ok(launcher)
    }

    /// Waits for a place in the next world, at most for `patience`. If a world is given out at present, that one ends for
    /// all its members.
    ///
    /// # Errors
    /// [`TrainError`] if no coordinator can be reached for too long, or the coordinator refuses this member.
    pub fn next_world(&self, patience: Duration) -> Result<Next, TrainError> {
        {
            let mut state = lock(&self.desk.state);
            // One that came just after this was called last is still to be fetched.
            if !state.unfetched {
                state.wish = Wish::World;
            }
        }
        self.hub.tell_program(ToProgram::Wake);
        let seen = self.desk.wait(patience, |state| match &state.end {
            Some(end) => Some(Next::End(end.clone())),
            None if std::mem::take(&mut state.unfetched) => state.given.map(Next::World),
            None => None,
        });
        match seen {
            Some(Next::End(end)) => end.into_result().map(Next::End),
            Some(next) => Ok(next),
            None => {
                let (apart, never) = (self.hub.apart_for(), self.hub.look(Session::history).is_none());
                let enough = if never { self.options.join_patience } else { self.options.patience };
                if apart > enough {
                    return Err(self.hub.unreachable(&self.options, apart));
                }
                Ok(Next::NotYet)
            }
        }
    }

    /// Gives every member of the world that was given out last what its rank 0 gives here; what the others give is
    /// ignored. All members of a world must call it, once. Returns when all have. `None` if that takes longer than
    /// `patience`: call it again then, with anything.
    ///
    /// # Errors
    /// [`Over`] if the world is over.
    ///
    /// # Panics
    /// If there are more than [`SHARED_MAX`] bytes.
    pub fn share(&self, bytes: &[u8], patience: Duration) -> Result<Option<Vec<u8>>, Over> {
        assert!(bytes.len() <= SHARED_MAX, "at most {SHARED_MAX} bytes can be shared");
        {
            let mut state = lock(&self.desk.state);
            if state.end.is_some() {
                return Err(Over);
            }
            if state.wish == Wish::Nothing && state.shared.is_none() {
                state.wish = Wish::Share(bytes.to_vec());
            }
        }
        self.hub.tell_program(ToProgram::Wake);
        let shared = self.desk.wait(patience, |state| match (&state.shared, &state.end) {
            (Some(shared), _) => Some(shared.clone()),
            (None, Some(_)) => Some(Err(Over)),
            (None, None) => None,
        });
        shared.transpose()
    }

    /// Whether the world that was given out last is over, or is to end: then stop what was started in it, and ask for the
    /// next one. Costs no more than a look.
    pub fn is_over(&self) -> bool {
        let given = lock(&self.desk.state).given;
        self.is_world_over(given)
    }

    /// Waits until the world that was given out last is over, or is to end, at most for `patience`. Says whether it is.
    pub fn wait_until_over(&self, patience: Duration) -> bool {
        self.desk.wait(patience, |state| self.is_world_over(state.given).then_some(())).is_some()
    }

    fn is_world_over(&self, world: Option<World>) -> bool {
        let Some(World { generation, .. }) = world else { return true };
        !self.hub.look(|session| match session.directive() {
            Directive::Run { place, .. } => place.generation == Generation(generation),
            Directive::Wait | Directive::Restore(_) | Directive::Over(_) => false,
        })
    }

    /// How the membership ended, if it has.
    pub fn end(&self) -> Option<End> {
        lock(&self.desk.state).end.clone()
    }

    /// Says that this member's part of the job is done, in the world that was given out last, and waits until every
    /// member's is, at most for `patience`. Returns whether the job is over; false, too, if it goes on without this member,
    /// which should leave then, by being dropped. `None` if neither is known yet: call it again.
    pub fn finish(&self, patience: Duration) -> Option<bool> {
        self.desk.wish(Wish::Finish);
        self.hub.tell_program(ToProgram::Wake);
        self.desk.wait(patience, |state| match &state.end {
            Some(end) => Some(matches!(end, End::Closed(_))),
            None => state.others_go_on.then_some(false),
        })
    }

    /// The machine will be taken in `left`: the next world is formed without this member, and [`Launcher::next_world`]
    /// then says that it is released.
    pub fn notice(&self, left: Duration) {
        self.hub.bring(|session| session.notice(link::now().after(left)));
        self.hub.notice_arrived(Some(left));
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        self.hub.bring(Session::leave);
        self.desk.wish(Wish::Gone);
        self.hub.tell_program(ToProgram::Wake);
        self.hub.say(ToLink::End);
        for thread in self.threads.drain(..) {
            // A panic of its own is its own.
            let _ = thread.join();
        }
        self.hub.close();
    }
}

/// The digest of the state of a member without one. It is not that of an empty training program, for the two have nothing
/// to do in one job.
fn nothing() -> Digest {
    let mut digester = Digester::new();
    digester.update(b"a launcher has no state");
    digester.finish()
}

fn holding() -> Holding {
    Holding::Fresh { digest: nothing() }
}
