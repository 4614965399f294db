//! Which generations are open: shared by the listener, its doors and the thread that accepts.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use reknit_membership::ids::{Generation, Rank, WorldSize};

use crate::door::Room;
use crate::lock;
use crate::secret::Secret;
use crate::wake::Wake;

/// How many generations may be open at once: the current one, the next, and some that are being torn down. Opening
/// another one closes the oldest.
pub(crate) const OPEN_MAX: usize = 8;

#[derive(Debug)]
pub(crate) struct Doors {
    state: Mutex<State>,
    /// Wakes the accepting thread when something changed here.
    pub(crate) changed: Wake,
    waiting_max: usize,
}

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<Generation, Arc<Room>>,
    /// The newest generation that was closed: no older one is worth waiting for.
    over: Option<Generation>,
    stopped: bool,
}

/// What a newcomer of some generation finds.
#[derive(Debug)]
pub(crate) enum Found {
    Open(Arc<Room>),
    NotYet,
    Over,
}

impl Doors {
    pub(crate) fn new(waiting_max: usize) -> io::Result<Doors> {
        Ok(Doors { state: Mutex::default(), changed: Wake::new()?, waiting_max })
    }

    pub(crate) fn open(
        &self,
        generation: Generation,
        secret: Secret,
        seat: Option<(Rank, WorldSize)>,
    ) -> Arc<Room> {
        let room = Arc::new(Room::new(generation, secret, seat, self.waiting_max));
        let mut state = lock(&self.state);
        if let Some(before) = state.open.insert(generation, room.clone()) {
            before.close();
        }
        if state.open.len() > OPEN_MAX
            && let Some((oldest, before)) = state.open.pop_first()
        {
            state.over = state.over.max(Some(oldest));
            before.close();
        }
        drop(state);
        self.changed.signal();
        room
    }

    /// Closes this room; a room that replaced it stays open.
    pub(crate) fn close(&self, room: &Arc<Room>) {
        let mut state = lock(&self.state);
        if state.open.get(&room.generation).is_some_and(|open| Arc::ptr_eq(open, room)) {
            state.open.remove(&room.generation);
            state.over = state.over.max(Some(room.generation));
        }
        drop(state);
        room.close();
        self.changed.signal();
    }

    /// Closes everything for good.
    pub(crate) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopped = true;
        let open = std::mem::take(&mut state.open);
        drop(state);
        open.values().for_each(|room| room.close());
        self.changed.signal();
    }

    pub(crate) fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    pub(crate) fn find(&self, generation: Generation) -> Found {
        let state = lock(&self.state);
        match state.open.get(&generation) {
            Some(room) => Found::Open(room.clone()),
            None if state.over >= Some(generation) => Found::Over,
            None => Found::NotYet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(doors: &Doors, generation: u64) -> &'static str {
        match doors.find(Generation(generation)) {
            Found::Open(_) => "open",
            Found::NotYet => "not yet",
            Found::Over => "over",
        }
    }

    #[test]
    fn a_generation_that_is_over_takes_the_older_ones_with_it_but_not_the_open_ones() {
        let doors = Doors::new(4).unwrap();
        let _three = doors.open(Generation(3), Secret::new([3; 32]), None);
        let five = doors.open(Generation(5), Secret::new([5; 32]), None);
        assert_eq!([3, 4, 5, 6].map(|g| check(&doors, g)), ["open", "not yet", "open", "not yet"]);
        doors.close(&five);
        assert_eq!([3, 4, 5, 6].map(|g| check(&doors, g)), ["open", "over", "over", "not yet"]);
    }

    #[test]
    fn closing_a_room_that_was_replaced_leaves_its_successor_open() {
        let doors = Doors::new(4).unwrap();
        let first = doors.open(Generation(3), Secret::new([3; 32]), None);
        let _second = doors.open(Generation(3), Secret::new([4; 32]), None);
        doors.close(&first);
        assert_eq!(check(&doors, 3), "open");
    }

    #[test]
    fn too_many_open_generations_push_out_the_oldest() {
        let doors = Doors::new(4).unwrap();
        let _rooms: Vec<_> = (1..=OPEN_MAX as u64 + 1)
            .map(|g| doors.open(Generation(g), Secret::new([0; 32]), None))
            .collect();
        assert_eq!([1, 2, 9].map(|g| check(&doors, g)), ["over", "open", "open"]);
    }
}
