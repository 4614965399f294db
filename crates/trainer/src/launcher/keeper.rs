//! The thread that keeps a launcher's place in its world while the program is busy, and agrees with the others when the
//! world is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use reknit_collectives::{Broken, ControlWord, Group};
use reknit_membership::world::Place;
use reknit_membership::{Generation, Rank, Step};

use super::{Desk, Over, SHARED_MAX, Wish, World, holding};
use crate::hub::{Hub, ToProgram, lock};
use crate::session::{Directive, Session};

/// How often it looks whether it has overslept something. Everything that counts wakes it.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How far the world has come that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its barrier has opened, and the program has not asked yet.
    Open,
    /// The program has it.
    Given,
    /// All members know what was shared.
    Shared,
}

pub(super) struct Keeper {
    hub: Arc<Hub>,
    desk: Arc<Desk>,
    inbox: Receiver<ToProgram>,
    group: Option<Group>,
    running: Option<(Generation, Stage)>,
    /// Whether the previous rank has begun a collective of this world's: it wants it to end.
    ahead: Arc<AtomicBool>,
    /// The world in which this member's part is done.
    finished: Option<Generation>,
}

impl Keeper {
    pub(super) fn new(hub: Arc<Hub>, desk: Arc<Desk>, inbox: Receiver<ToProgram>) -> Keeper {
        Keeper { hub, desk, inbox, group: None, running: None, ahead: Arc::default(), finished: None }
    }

    pub(super) fn run(mut self) {
        loop {
            let wish = lock(&self.desk.state).wish.clone();
            if wish == Wish::Gone {
                return;
            }
            let acted = match self.hub.look(Session::directive) {
                Directive::Over(end) => {
                    lock(&self.desk.state).end.get_or_insert(end);
                    self.desk.changed.notify_all();
                    self.group = None;
                    self.running = None;
                    false
                }
                Directive::Run { place, .. } => self.runs(&place, wish),
                Directive::Wait => self.rests(&wish),
                // All members hold the same nothing.
                Directive::Restore(_) => {
                    let why = "the coordinator has a state for a member that has none".to_owned();
                    self.hub.bring(|session| session.machine_failed(why));
                    true
                }
            };
            if acted {
                continue;
            }
            match self.inbox.recv_timeout(LOOK_EVERY) {
                // Nobody has state to ask for.
                Ok(ToProgram::Wake | ToProgram::Serve(_)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// There is no world, or not yet. Says whether that may have changed something.
    fn rests(&mut self, wish: &Wish) -> bool {
        if self.running.take().is_some() {
            self.broke_off();
        }
        match wish {
            Wish::World if !self.hub.look(Session::is_at_rest) => {
                self.hub.bring(|session| session.at_rest(holding()));
                true
            }
            Wish::Finish => {
                self.looks_whether_others_go_on();
                false
            }
            Wish::World | Wish::Share(_) | Wish::Nothing | Wish::Gone => false,
        }
    }

    /// Who is done waits for the others to be done too, not for another world: if there is to be one, it is without this
    /// member.
    fn looks_whether_others_go_on(&self) {
        let world = self.hub.look(|session| session.place().map(|place| place.generation));
        if self.ahead.load(Ordering::Relaxed) || world != self.finished {
            lock(&self.desk.state).others_go_on = true;
            self.desk.changed.notify_all();
        }
    }

    /// Whoever waits for what was to be shared waits no longer.
    fn broke_off(&self) {
        let mut state = lock(&self.desk.state);
        if let Wish::Share(_) = state.wish {
            state.wish = Wish::Nothing;
        }
        state.shared = Some(Err(Over));
        self.desk.changed.notify_all();
    }

    fn runs(&mut self, place: &Place, wish: Wish) -> bool {
        let generation = place.generation;
        let stage = match self.running {
            Some((running, stage)) if running == generation => stage,
            _ => return self.opens(generation),
        };
        match (wish, stage) {
            (Wish::World, Stage::Open) => {
                self.give(place);
                true
            }
            (Wish::Share(bytes), Stage::Given) => {
                self.share(generation, place, &bytes);
                true
            }
            (Wish::World, Stage::Given | Stage::Shared) => {
                self.end(generation);
                true
            }
            (Wish::Finish, Stage::Open | Stage::Given | Stage::Shared) => {
                self.finished = Some(generation);
                self.hub.bring(|session| session.finished(generation, Step(0)));
                true
            }
            // Until everybody has what is shared, a world is not ended: the others are in that collective.
            (_, Stage::Shared)
                if self.ahead.load(Ordering::Relaxed) || self.hub.look(Session::boundary_requested) =>
            {
                self.end(generation);
                true
            }
            _ => false,
        }
    }

    fn opens(&mut self, generation: Generation) -> bool {
        if self.running.take().is_some() {
            self.broke_off();
        }
        // The one before is kept until here: its members have all left it by now, and nobody takes its end for a loss.
        self.group = self.hub.take_group(generation);
        if self.group.is_none() {
            // Then a newer world has one, and this one is over.
            self.hub.bring(|session| session.broken(generation, Vec::new()));
            return true;
        }
        self.hub.bring(|session| {
            session.busy();
            Vec::new()
        });
        self.ahead = Arc::default();
        self.running = Some((generation, Stage::Open));
        true
    }

    fn give(&mut self, place: &Place) {
        let Place { generation, rank, size, .. } = *place;
        self.running = Some((generation, Stage::Given));
        let mut state = lock(&self.desk.state);
        state.given = Some(World { generation: generation.0, rank: rank.0, size: size.0 });
        state.unfetched = true;
        state.shared = None;
        state.wish = Wish::Nothing;
        self.desk.changed.notify_all();
    }

    fn share(&mut self, generation: Generation, place: &Place, bytes: &[u8]) {
        // The length in front, and room for the longest: all ranks give as much.
        let mut frame = vec![0; 2 + SHARED_MAX];
        if place.rank == Rank(0) {
            frame[..2].copy_from_slice(&(bytes.len() as u16).to_le_bytes());
            frame[2..2 + bytes.len()].copy_from_slice(bytes);
        }
        let Some(group) = &mut self.group else { return };
        if let Err(broken) = group.broadcast(&mut frame, Rank(0), ControlWord::default()) {
            return self.ring_broke(&broken);
        }
        let len = usize::from(u16::from_le_bytes([frame[0], frame[1]])).min(SHARED_MAX);
        let (hub, ahead) = (Arc::clone(&self.hub), Arc::clone(&self.ahead));
        group.on_neighbour_ahead(move || {
            ahead.store(true, Ordering::Relaxed);
            hub.tell_program(ToProgram::Wake);
        });
        self.running = Some((generation, Stage::Shared));
        // What follows is not ours: this world has done what it is for.
        self.hub.bring(|session| session.committed(generation, Step(0)));
        let mut state = lock(&self.desk.state);
        state.shared = Some(Ok(frame[2..2 + len].to_vec()));
        state.wish = Wish::Nothing;
        self.desk.changed.notify_all();
    }

    /// Agrees with all members that this world is over. Each is woken by the one before it.
    fn end(&mut self, generation: Generation) {
        let Some(group) = &mut self.group else { return };
        match group.barrier(ControlWord::BOUNDARY_REQUESTED) {
            Ok(_) => self.hub.bring(|session| session.boundary(generation, holding())),
            Err(broken) => self.ring_broke(&broken),
        }
    }

    fn ring_broke(&mut self, broken: &Broken) {
        let (generation, suspects) = (broken.generation, broken.suspects.clone());
        self.hub.bring(|session| session.broken(generation, suspects));
    }
}
