//! The thread that notices a lost neighbour, also while nobody calls a collective.
//!
//! A connection can say that it has ended while bytes that came before are still unread, and those may complete the
//! collective that is running: the neighbour has finished it, and left. So the watcher never interferes with a running
//! collective, which finds out by itself when its bytes end too early. Between collectives it is different. Nobody
//! finishes a collective before everybody has entered it, so a neighbour that is gone before this rank enters the next
//! one cannot have finished it either: nothing is lost by failing that collective at once, whatever is still unread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use reknit_membership::ids::Rank;
use rustix::event::{PollFd, PollFlags};

use crate::abort::Rouse;
use crate::lock;
use crate::neighbours::{ENDED, Neighbours};
use crate::wake::{Wake, poll};

/// What is known of the two connections. Pure: who changes it also shuts them down if told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// Sound, and no collective is running.
    Idle,
    /// Sound, as far as known, and a collective is running.
    Running,
    /// A neighbour is gone; the collective that is running decides for itself whether it can finish.
    RunningOut(Rank),
    /// Shut down; because a neighbour was lost, if there is a rank.
    Down(Option<Rank>),
}

/// Whether the connections are to be shut down, so that the neighbours learn of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Leave,
    ShutDown,
}

/// How a collective ended, as far as the connections are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// It failed; because a neighbour was lost, if there is a rank.
    Failed(Option<Rank>),
}

impl Link {
    /// A collective starts, unless the connections are down.
    fn begin(self) -> Link {
        match self {
            Link::Idle | Link::Running => Link::Running,
            Link::RunningOut(_) | Link::Down(_) => self,
        }
    }

    fn finish(self, outcome: Outcome) -> (Link, Then) {
        match (self, outcome) {
            (Link::Idle | Link::Running, Outcome::Done) => (Link::Idle, Then::Leave),
            (Link::Idle | Link::Running, Outcome::Failed(lost)) => (Link::Down(lost), Then::ShutDown),
            (Link::RunningOut(rank), Outcome::Done | Outcome::Failed(_)) => {
                (Link::Down(Some(rank)), Then::ShutDown)
            }
            (Link::Down(lost), Outcome::Done) => (Link::Down(lost), Then::Leave),
            (Link::Down(lost), Outcome::Failed(late)) => (Link::Down(lost.or(late)), Then::Leave),
        }
    }

    fn lose(self, rank: Rank) -> (Link, Then) {
        match self {
            Link::Idle => (Link::Down(Some(rank)), Then::ShutDown),
            Link::Running => (Link::RunningOut(rank), Then::Leave),
            // The first loss is the one to report; and once it is down, it was this side that ended it.
            Link::RunningOut(_) | Link::Down(_) => (self, Then::Leave),
        }
    }

    fn abort(self) -> (Link, Then) {
        match self {
            Link::Idle | Link::Running => (Link::Down(None), Then::ShutDown),
            Link::RunningOut(rank) => (Link::Down(Some(rank)), Then::ShutDown),
            Link::Down(_) => (self, Then::Leave),
        }
    }

    fn lost(self) -> Option<Rank> {
        match self {
            Link::Idle | Link::Running => None,
            Link::RunningOut(rank) => Some(rank),
            Link::Down(lost) => lost,
        }
    }

    /// Whether there is anything left to notice.
    fn is_sound(self) -> bool {
        match self {
            Link::Idle | Link::Running => true,
            Link::RunningOut(_) | Link::Down(_) => false,
        }
    }
}

type Callback = Box<dyn FnOnce(Rank) + Send>;

/// Watches the connections of one group until it is dropped.
pub(crate) struct Watcher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    neighbours: Arc<Neighbours>,
    /// Readable once the group is aborted.
    aborted: Arc<Wake>,
    /// Wakes the watcher because `state` has changed.
    changed: Wake,
    /// Whether the link is no longer sound, readable without the lock.
    unsound: AtomicBool,
    state: Mutex<State>,
}

struct State {
    link: Link,
    callback: Option<Callback>,
    /// Called when the previous rank has begun a collective that this one has not.
    on_ahead: Option<Box<dyn FnOnce() + Send>>,
    /// Who is to be woken, if it sleeps, when the link is no longer sound.
    sleeper: Option<Arc<dyn Rouse>>,
    ended: bool,
}

impl Watcher {
    pub(crate) fn start(neighbours: Arc<Neighbours>, aborted: Arc<Wake>) -> io::Result<Watcher> {
        let state = State { link: Link::Idle, callback: None, on_ahead: None, sleeper: None, ended: false };
        let (changed, state) = (Wake::new()?, Mutex::new(state));
        let unsound = AtomicBool::new(false);
        let shared = Arc::new(Shared { neighbours, aborted, changed, unsound, state });
        let watched = shared.clone();
        let thread =
            std::thread::Builder::new().name("reknit-watch".to_owned()).spawn(move || watched.watch())?;
        Ok(Watcher { shared, thread: Some(thread) })
    }

    /// Has `callback` called with the neighbour that is lost, once, also if that was before.
    pub(crate) fn on_lost(&self, callback: Callback) {
        lock(&self.shared.state).callback = Some(callback);
        self.shared.changed.signal();
    }

    /// Has `callback` called, once, when the previous rank has begun a collective while none runs here.
    pub(crate) fn on_ahead(&self, callback: Box<dyn FnOnce() + Send>) {
        lock(&self.shared.state).on_ahead = Some(callback);
        self.shared.changed.signal();
    }

    /// Has `sleeper` woken once the link is no longer sound, or now if it is not: for collectives that do not wait at the
    /// connections.
    pub(crate) fn rouse_when_unsound(&self, sleeper: Arc<dyn Rouse>) {
        let mut state = lock(&self.shared.state);
        if !state.link.is_sound() {
            sleeper.rouse();
        }
        state.sleeper = Some(sleeper);
    }

    /// Whether a neighbour is gone, or the connections are down.
    pub(crate) fn is_unsound(&self) -> bool {
        self.shared.unsound.load(Ordering::Acquire)
    }

    /// The neighbour that is lost, if that is why the link is not sound.
    pub(crate) fn lost(&self) -> Option<Rank> {
        lock(&self.shared.state).link.lost()
    }

    /// Says that a collective starts, or else which neighbour was lost, if that is why it cannot.
    pub(crate) fn begin(&self) -> Result<(), Option<Rank>> {
        let mut state = lock(&self.shared.state);
        state.link = state.link.begin();
        match state.link {
            Link::Down(lost) => Err(lost),
            Link::Idle | Link::Running | Link::RunningOut(_) => Ok(()),
        }
    }

    /// Says that the collective is over.
    pub(crate) fn finish(&self, outcome: Outcome) {
        let link = self.shared.change(|link| link.finish(outcome));
        if link.lost().is_some() {
            self.shared.changed.signal();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.changed.signal();
        // A group that is dropped by its own callback cannot wait for the callback to return.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It can only have panicked in the callback, and has said so on its own.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Changes what is known of the connections and shuts them down if that is due. Both under the lock: whoever sees
    /// a connection that this side has ended also sees that it did.
    fn change(&self, change: impl FnOnce(Link) -> (Link, Then)) -> Link {
        let mut state = lock(&self.state);
        let (link, then) = change(state.link);
        state.link = link;
        match then {
            Then::ShutDown => self.neighbours.shut_down(),
            Then::Leave => {}
        }
        if !link.is_sound()
            && !self.unsound.swap(true, Ordering::Release)
            && let Some(sleeper) = &state.sleeper
        {
            sleeper.rouse();
        }
        link
    }

    fn watch(&self) {
        loop {
            let (ended, sound, listens) = {
                let state = lock(&self.state);
                // While a collective runs, what comes is that collective's.
                let listens = state.link == Link::Idle && state.on_ahead.is_some();
                (state.ended, state.link.is_sound(), listens)
            };
            if ended {
                return;
            }
            let came = self.wait(sound, listens);
            let (lost, callback, on_ahead) = {
                let mut state = lock(&self.state);
                let lost = state.link.lost();
                let is_ahead = came && state.link == Link::Idle;
                let on_ahead = if is_ahead { state.on_ahead.take() } else { None };
                (lost, if lost.is_some() { state.callback.take() } else { None }, on_ahead)
            };
            if let Some(on_ahead) = on_ahead {
                on_ahead();
            }
            if let (Some(rank), Some(callback)) = (lost, callback) {
                callback(rank);
            }
        }
    }

    /// Waits for news, of the connections too if they are `sound`, and takes them in. Says whether bytes have come from
    /// the previous rank, if it `listens` for them.
    fn wait(&self, sound: bool, listens: bool) -> bool {
        let Neighbours { next, next_rank, prev, prev_rank } = &*self.neighbours;
        let mut fds = [
            PollFd::new(&self.changed, PollFlags::IN),
            PollFd::new(&self.aborted, PollFlags::IN),
            PollFd::new(prev, if listens { PollFlags::RDHUP | PollFlags::IN } else { PollFlags::RDHUP }),
            PollFd::new(next, PollFlags::RDHUP),
        ];
        let watched = if sound { &mut fds[..] } else { &mut fds[..1] };
        if poll(watched, None).is_err() {
            // The system has no memory for it; it may have some again soon.
            std::thread::park_timeout(Duration::from_millis(10));
            return false;
        }
        let [changed, aborted, prev, next] = fds.map(|fd| fd.revents());
        if !changed.is_empty() {
            self.changed.clear();
        }
        if !aborted.is_empty() {
            self.change(Link::abort);
        }
        for (events, rank) in [(prev, prev_rank), (next, next_rank)] {
            if events.intersects(ENDED) {
                self.change(|link| link.lose(*rank));
            }
        }
        listens && prev.contains(PollFlags::IN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Rank = Rank(1);

    #[test]
    fn a_loss_leaves_the_running_collective_alone_and_ends_everything_after_it() {
        let (link, then) = Link::Idle.begin().lose(ONE);
        assert_eq!((link, then), (Link::RunningOut(ONE), Then::Leave));
        assert_eq!(link.finish(Outcome::Done), (Link::Down(Some(ONE)), Then::ShutDown));
        assert_eq!(Link::Down(Some(ONE)).begin(), Link::Down(Some(ONE)));
    }

    #[test]
    fn a_loss_between_collectives_ends_everything_at_once() {
        assert_eq!(Link::Idle.lose(ONE), (Link::Down(Some(ONE)), Then::ShutDown));
    }

    #[test]
    fn a_connection_that_this_side_ended_is_no_loss() {
        for outcome in [Outcome::Failed(None), Outcome::Failed(Some(ONE))] {
            let (link, then) = Link::Running.finish(outcome);
            assert_eq!(then, Then::ShutDown);
            assert_eq!(link.lose(Rank(2)), (link, Then::Leave));
        }
        let (link, then) = Link::Running.abort();
        assert_eq!((link, then, link.lose(ONE).0.lost()), (Link::Down(None), Then::ShutDown, None));
    }

    #[test]
    fn whatever_happens_down_stays_down_and_is_shut_down_once() {
        let moves: [fn(Link) -> (Link, Then); 6] = [
            |link| (link.begin(), Then::Leave),
            |link| link.finish(Outcome::Done),
            |link| link.finish(Outcome::Failed(None)),
            |link| link.finish(Outcome::Failed(Some(ONE))),
            |link| link.lose(ONE),
            Link::abort,
        ];
        // Every sequence of five moves, whether or not it makes sense.
        for code in 0..moves.len().pow(5) {
            let (mut link, mut shut_downs, mut rest) = (Link::Idle, 0, code);
            for _ in 0..5 {
                let was_down = matches!(link, Link::Down(_));
                let (next, then) = moves[rest % moves.len()](link);
                rest /= moves.len();
                shut_downs += usize::from(then == Then::ShutDown);
                let is_down = matches!(next, Link::Down(_));
                assert!(is_down || !was_down, "{code}: {link:?} -> {next:?}");
                assert_eq!(shut_downs, usize::from(is_down), "{code}: {link:?} -> {next:?}");
                link = next;
            }
        }
    }
}
