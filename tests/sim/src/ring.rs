//! The data plane's connections: doors, dials, rings that stand and break. It does what the collectives crate and the
//! trainer's `ring.rs` do, at the grain of connections.

use reknit_membership::Generation;
use reknit_membership::world::Place;
use reknit_proto::rendezvous::SecretBytes;

use crate::happening::{Happening, ProcessKey};
use crate::process::{Program, Ring, Watch};
use crate::queue::Ms;
use crate::sim::Sim;

/// How soon a door that is not open yet is tried again.
const REDIAL: (Ms, Ms) = (1, 100);
/// How long the door of a world that is over stays open.
const DOOR_CLOSES: (Ms, Ms) = (0, 200);

impl Sim {
    /// `Hub::form`: builds the ring of a world in the background.
    pub(crate) fn forms(&mut self, process: ProcessKey, place: Place, secret: SecretBytes) {
        let generation = place.generation;
        if let Some(old) = self.processes[process].ring.as_ref().map(Ring::generation) {
            self.ring_aborts(process, old);
        }
        let alone = place.seats == 1;
        let ring = Ring {
            place,
            secret,
            next: None,
            prev: None,
            linked: false,
            formed: false,
            aborted: false,
            watch: Watch::Idle,
            lost_early: None,
            call: 0,
        };
        let p = &mut self.processes[process];
        p.ring = Some(ring);
        p.doors.insert(generation, secret);
        let bounds = self.options.data_ms;
        let what = match alone {
            true => Happening::RingStands { process, generation },
            false => Happening::Dials { process, generation },
        };
        self.within(bounds, what);
    }

    /// `Hub::serve`: lets members of a world in that has no place for this one.
    pub(crate) fn serves(&mut self, process: ProcessKey, generation: Generation, secret: SecretBytes) {
        self.coverage.hit("a member serves a world that it has no place in");
        self.stops_serving(process, generation);
        let p = &mut self.processes[process];
        p.serving = Some(generation);
        p.doors.insert(generation, secret);
    }

    fn stops_serving(&mut self, process: ProcessKey, at_most: Generation) {
        let served = self.processes[process].serving.take_if(|served| *served <= at_most);
        if let Some(generation) = served {
            self.within(DOOR_CLOSES, Happening::DoorCloses { process, generation });
        }
    }

    pub(crate) fn dials(&mut self, process: ProcessKey, generation: Generation) {
        let Some(ring) = self.processes[process].ring_of(generation).filter(|ring| !ring.aborted) else {
            return;
        };
        let (secret, address, rank) = (ring.secret, ring.place.next.address.clone(), ring.place.next.rank);
        let again = Happening::Dials { process, generation };
        let Some(target) = self.listener(&address) else {
            // Who does not listen any more is gone.
            self.coverage.hit("a neighbour cannot be dialled");
            return self.ring_fails(process, generation, vec![rank]);
        };
        if self.data_cut(process, target) || !self.processes[target].runs() {
            return self.within(REDIAL, again);
        }
        let other = &self.processes[target];
        match other.doors.get(&generation) {
            Some(theirs) if *theirs == secret => {
                let other = &mut self.processes[target];
                if let Some(theirs) = other.ring_of(generation).filter(|ring| !ring.aborted) {
                    theirs.prev = Some(process);
                    if let Some(ring) = self.processes[process].ring_of(generation) {
                        ring.next = Some(target);
                    }
                    self.stands_if_linked(process, generation);
                    self.stands_if_linked(target, generation);
                } else {
                    self.within(REDIAL, again);
                }
            }
            Some(_) => self.ring_fails(process, generation, vec![rank]),
            None if other.doors_over >= Some(generation) => self.ring_fails(process, generation, vec![rank]),
            None => self.within(REDIAL, again),
        }
    }

    /// The process that listens at `address`, if one does.
    pub(crate) fn listener(&self, address: &str) -> Option<ProcessKey> {
        self.listeners.get(address).copied().filter(|process| self.processes[*process].is_there())
    }

    fn stands_if_linked(&mut self, process: ProcessKey, generation: Generation) {
        let bounds = self.options.data_ms;
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        if ring.next.is_some() && ring.prev.is_some() && !ring.linked && !ring.aborted {
            ring.linked = true;
            self.within(bounds, Happening::RingStands { process, generation });
        }
    }

    /// Both neighbours are connected: the program gets the ring, and the session hears of it.
    pub(crate) fn ring_stands(&mut self, process: ProcessKey, generation: Generation) {
        let Some(ring) = self.processes[process].ring_of(generation).filter(|ring| !ring.aborted) else {
            return;
        };
        ring.formed = true;
        let lost_early = ring.lost_early;
        let p = &mut self.processes[process];
        p.new_group = p.new_group.max(Some(generation));
        self.wakes(process);
        self.log(60, process as u64, |sim| {
            format!("{}: the ring of {generation:?} stands", sim.who(process))
        });
        self.bring(process, |session| session.formed(generation));
        if let Some(neighbour) = lost_early {
            self.neighbour_lost(process, generation, neighbour);
        }
    }

    fn ring_fails(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        suspects: Vec<reknit_membership::Rank>,
    ) {
        self.shuts_down(process, generation);
        self.processes[process].close_door(generation);
        self.log(61, process as u64, |sim| format!("{}: no ring of {generation:?}", sim.who(process)));
        self.bring(process, |session| session.broken(generation, suspects));
    }

    /// `Hub::abort`: the world is over, as the coordinator or the session says.
    pub(crate) fn aborts(&mut self, process: ProcessKey, generation: Generation) {
        self.stops_serving(process, generation);
        let own = self.processes[process].ring.as_ref().map(Ring::generation);
        if let Some(own) = own.filter(|own| *own <= generation) {
            self.ring_aborts(process, own);
        }
    }

    fn ring_aborts(&mut self, process: ProcessKey, generation: Generation) {
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        if std::mem::replace(&mut ring.aborted, true) {
            return;
        }
        let formed = ring.formed;
        self.shuts_down(process, generation);
        if formed {
            self.within(DOOR_CLOSES, Happening::DoorCloses { process, generation });
        } else {
            self.processes[process].close_door(generation);
        }
        if matches!(self.processes[process].program, Program::Reduces(_)) {
            self.collective_aborts(process);
        }
        if matches!(self.processes[process].program, Program::Restores(_)) {
            self.restore_aborts(process, generation);
        }
    }

    /// This side ends its connections, or its kernel does: the neighbours notice.
    pub(crate) fn shuts_down(&mut self, process: ProcessKey, generation: Generation) {
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        ring.watch = Watch::Down;
        let neighbours = [ring.next.take(), ring.prev.take()];
        let bounds = self.options.data_ms;
        for neighbour in neighbours.into_iter().flatten() {
            let lost = Happening::NeighbourLost { process: neighbour, generation, neighbour: process };
            self.within(bounds, lost);
        }
    }

    /// A connection with a neighbour has ended on its side.
    pub(crate) fn neighbour_lost(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        neighbour: ProcessKey,
    ) {
        if self.data_cut(neighbour, process) {
            // The end of the connection is lost on the way like everything else.
            let lost = Happening::NeighbourLost { process, generation, neighbour };
            return self.within(REDIAL, lost);
        }
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        if ring.aborted || (ring.next != Some(neighbour) && ring.prev != Some(neighbour)) {
            return;
        }
        if !ring.formed {
            // It is noticed once the ring stands.
            ring.lost_early.get_or_insert(neighbour);
            return;
        }
        match ring.watch {
            Watch::Idle => {
                self.loss_follows(process, generation, neighbour);
                self.shuts_down(process, generation);
            }
            Watch::Running => {
                ring.watch = Watch::RunningOut(neighbour);
                self.collective_runs_out(process, generation, neighbour);
            }
            Watch::RunningOut(_) | Watch::Down => {}
        }
    }

    /// The watching thread will tell the session.
    pub(crate) fn loss_follows(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        neighbour: ProcessKey,
    ) {
        self.within((0, 2), Happening::LossIsSeen { process, generation, neighbour });
    }

    pub(crate) fn loss_is_seen(
        &mut self,
        process: ProcessKey,
        generation: Generation,
        neighbour: ProcessKey,
    ) {
        let address = self.processes[neighbour].address.clone();
        let Some(ring) = self.processes[process].ring_of(generation) else { return };
        let rank = ring.rank_at(&address);
        self.coverage.hit("a neighbour is lost");
        self.log(62, process as u64, |sim| {
            format!("{} sees {} gone in {generation:?}", sim.who(process), sim.who(neighbour))
        });
        self.bring(process, |session| session.broken(generation, vec![rank]));
    }
}
