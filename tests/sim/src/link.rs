//! The link's thread of a member, and the hub: how news reaches the session and what follows is carried out. It does what
//! the trainer's `link.rs` and `hub.rs` do.

use reknit_membership::Timestamp;
use reknit_membership::event::{Event, Message};
use reknit_proto::rendezvous::{self, Told};
use reknit_trainer::session::{Output, Session};

use prost::Message as _;

use crate::happening::{Happening, ProcessKey, StreamKey, Way};
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::process::Link;
use crate::queue::Ms;
use crate::server::WALL;
use crate::sim::Sim;
use crate::stream::Item;

const CONNECT_PATIENCE: Ms = 2_000;
const BACKOFF_FIRST: Ms = 20;
const BACKOFF_MAX: Ms = 250;

impl Sim {
    /// What a member's own wall clock shows. Members' clocks differ from the coordinator's.
    pub(crate) fn member_clock(&self, process: ProcessKey) -> Timestamp {
        Timestamp(WALL.0 + self.now * 1000 + (process as u64 % 5) * 1_000_000)
    }

    /// Brings news to a member's session and carries out what follows.
    pub(crate) fn bring(&mut self, process: ProcessKey, news: impl FnOnce(&mut Session) -> Vec<Output>) {
        for output in news(&mut self.processes[process].session) {
            self.carry_out(process, output);
        }
    }

    fn carry_out(&mut self, process: ProcessKey, output: Output) {
        match output {
            Output::Send(event) => self.say(process, &event),
            Output::Reconnect => self.reconnects(process),
            Output::Form { place, secret } => self.forms(process, place, secret),
            Output::Abort { generation } => self.aborts(process, generation),
            Output::AbandonPlan { generation } => {
                self.coverage.hit("a plan is void before it is carried out");
                self.restore_aborts(process, generation);
            }
            Output::Serve { generation, secret } => self.serves(process, generation, secret),
            Output::Wake => self.wakes(process),
            Output::Publish { generation, step, shards } => {
                self.is_to_publish(process, generation, step, shards)
            }
            Output::SaveGivenUp { generation, step } => self.part_is_given_up(process, generation, step),
            Output::Notice { .. } => self.coverage.hit("a member is told that it is to leave"),
            Output::Committed { kept } => self.hears_of_commits(process, &kept),
        }
    }

    /// Says something to the coordinator; without a stream it is dropped, and the session says it again if it matters.
    fn say(&mut self, process: ProcessKey, event: &Event) {
        let stream = match self.processes[process].link {
            Link::Up(stream) => stream,
            Link::Calls(_) | Link::Pauses | Link::Parts(_) | Link::Over => {
                self.coverage.hit("something is said without a stream");
                return;
            }
        };
        if let Some(wire) = rendezvous::from_event(event, self.member_clock(process)) {
            self.log(40, process as u64, |sim| format!("{} says {event:?}", sim.who(process)));
            self.send(stream, Way::Up, Item::Message(wire.encode_to_vec()));
        }
    }

    pub(crate) fn member_is_told(&mut self, process: ProcessKey, told: Told) {
        match (self.options.mutant, &told.message) {
            (Some(Mutant::IgnoresRefusal), Message::Refused(_) | Message::Break { .. }) => return,
            (Some(Mutant::SwapsRanks), Message::World(place)) if place.seats > 1 && place.seat < 2 => {
                let mut told = told.clone();
                if let Message::World(place) = &mut told.message {
                    place.rank = if place.seat == 0 { place.next.rank } else { place.prev.rank };
                }
                return self.bring_told(process, told);
            }
            (Some(Mutant::StaleGo), Message::World(place)) => {
                let generation = place.generation;
                let stale = self.processes[process].last_go;
                self.bring_told(process, told);
                if let Some(resume) = stale {
                    let message = Message::Go { generation, resume };
                    self.bring_told(process, Told { message, secret: None });
                }
                return;
            }
            _ => {}
        }
        self.bring_told(process, told);
    }

    fn bring_told(&mut self, process: ProcessKey, told: Told) {
        self.notes_told(process, &told.message);
        self.bring(process, |session| session.told(told));
        let p = &mut self.processes[process];
        let member = p.session.member();
        if p.ids.last() != Some(&member) {
            p.ids.push(member);
        }
        self.is_it_over(process);
    }

    fn notes_told(&mut self, process: ProcessKey, message: &Message) {
        match message {
            Message::Go { generation, resume } if self.processes[process].generation() == *generation => {
                self.processes[process].last_go = Some(*resume);
            }
            Message::Refused(_) => self.coverage.hit("a member is refused"),
            Message::Break { .. } => self.coverage.hit("a member is told that its world is over"),
            Message::Go { .. }
            | Message::Attached { .. }
            | Message::World(_)
            | Message::Plan(_)
            | Message::Boundary { .. }
            | Message::SaveNow { .. }
            | Message::Draining { .. }
            | Message::Serve { .. }
            | Message::Publish { .. }
            | Message::SaveGivenUp { .. }
            | Message::Committed { .. }
            | Message::Released
            | Message::Closed(_) => {}
        }
        self.seen(&Seen::Heard { process, message });
    }

    /// The link tries to reach a coordinator.
    pub(crate) fn connects(&mut self, process: ProcessKey, attempt: u64) {
        let p = &self.processes[process];
        if p.connect_turn != attempt || p.link != Link::Pauses {
            return;
        }
        let server = p.attempts as usize % self.servers.len();
        let host = p.host;
        let cut = self.control_cut(host, server, Way::Up) || self.control_cut(host, server, Way::Down);
        if cut {
            // Its attempt stands for one that is never answered.
            self.processes[process].connect_turn += 1;
            let attempt = self.processes[process].connect_turn;
            self.processes[process].attempts += 1;
            return self.after(CONNECT_PATIENCE, Happening::Connects { process, attempt });
        }
        if !self.servers[server].up {
            return self.link_lost(process);
        }
        let stream = self.open_stream(process, server);
        self.processes[process].link = Link::Calls(stream);
        self.after(CONNECT_PATIENCE, Happening::ConnectTimesOut { process, stream });
    }

    pub(crate) fn connect_times_out(&mut self, process: ProcessKey, stream: StreamKey) {
        if self.processes[process].link == Link::Calls(stream) {
            self.coverage.hit("a coordinator does not answer in time");
            self.link_lost(process);
        }
    }

    pub(crate) fn link_is_up(&mut self, process: ProcessKey, stream: StreamKey) {
        self.processes[process].link = Link::Up(stream);
        let wait = self.renew_wait(process);
        self.after(wait, Happening::Renews { process, stream });
    }

    fn renew_wait(&self, process: ProcessKey) -> Ms {
        (self.processes[process].session.renew_every().as_millis() as Ms).max(1)
    }

    pub(crate) fn renews(&mut self, process: ProcessKey, stream: StreamKey) {
        if self.processes[process].link != Link::Up(stream) {
            return;
        }
        let renewal = self.processes[process].session.renewal();
        if let Some(wire) = rendezvous::from_event(&renewal, self.member_clock(process)) {
            self.send(stream, Way::Up, Item::Message(wire.encode_to_vec()));
        }
        let wait = self.renew_wait(process);
        self.after(wait, Happening::Renews { process, stream });
    }

    /// The session wants a new stream, with a new introduction.
    fn reconnects(&mut self, process: ProcessKey) {
        self.coverage.hit("a member comes back as a new one");
        if let Link::Up(_) = self.processes[process].link {
            self.link_lost(process);
        }
    }

    /// There is no stream (any more): after a pause the link tries again.
    pub(crate) fn link_lost(&mut self, process: ProcessKey) {
        let p = &mut self.processes[process];
        let was_up = p.session.is_attached();
        if let Link::Up(stream) | Link::Calls(stream) = p.link
            && !self.streams[stream].up_ended
        {
            self.send(stream, Way::Up, Item::Ended);
        }
        let p = &mut self.processes[process];
        p.session.disconnected();
        if p.session.end().is_some() {
            p.link = Link::Over;
            return;
        }
        p.link = Link::Pauses;
        p.attempts = if was_up { 0 } else { p.attempts.saturating_add(1) };
        p.connect_turn += 1;
        let (attempts, attempt) = (p.attempts, p.connect_turn);
        let most = (BACKOFF_FIRST << attempts.min(8)).min(BACKOFF_MAX);
        let wait = p.rng.within((1, most));
        self.after(wait, Happening::Connects { process, attempt });
    }
}
