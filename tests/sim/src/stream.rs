//! The network between members and coordinators. A stream keeps its order, as TCP does; streams overlap, end late on
//! one side, lose what is on its way when one side dies, and stand still while the way is cut.

use std::collections::VecDeque;

use prost::Message as _;
use reknit_coordinator::job::{ConnectionId, Input};
use reknit_membership::event::Message;
use reknit_membership::{Generation, MemberId};
use reknit_proto::{rendezvous, v1};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::happening::{Happening, ProcessKey, StreamKey, Way};
use crate::invariants::Seen;
use crate::process::{Life, Link};
use crate::queue::Ms;
use crate::server::Handing;
use crate::sim::{Sim, Stage};

/// Something on its way.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Message(Vec<u8>),
    /// The coordinator has let the stream begin.
    Accepted,
    /// The other side's end.
    Ended,
}

/// One direction of a stream.
#[derive(Debug, Default)]
struct Lane {
    items: VecDeque<Item>,
    last_at: Ms,
}

pub(crate) struct Stream {
    pub(crate) process: ProcessKey,
    pub(crate) member: MemberId,
    pub(crate) server: usize,
    /// Which of the coordinator's processes it leads to.
    pub(crate) life: u32,
    up: Lane,
    down: Lane,
    /// Whether the coordinator has seen the member's end.
    pub(crate) up_ended: bool,
    /// Whether the coordinator's end is on its way, or the coordinator is gone.
    down_ended: bool,
    /// It is broken: nothing that is sent from now on arrives.
    severed: bool,
    pub(crate) connection: Option<ConnectionId>,
    /// The generation that the member said it knows, until the coordinator has answered.
    proof: Option<Generation>,
    pub(crate) outbound: Option<mpsc::Receiver<Box<v1::CoordinatorMessage>>>,
    pub(crate) inputs: VecDeque<Input>,
    pub(crate) handing: Option<Handing>,
}

/// How long a member's side of a stream may hear nothing: the link's keepalive, twice.
const KEEPALIVE_MEMBER: (Ms, Ms) = (3_000, 6_000);
/// The same on the coordinator's side.
const KEEPALIVE_SERVER: (Ms, Ms) = (30_000, 60_000);
/// How often something that a cut holds up tries again.
const RETRANSMIT: (Ms, Ms) = (50, 250);

impl Sim {
    /// A new stream, on which the member introduces itself.
    pub(crate) fn open_stream(&mut self, process: ProcessKey, server: usize) -> StreamKey {
        let p = &self.processes[process];
        let introduction = rendezvous::Introduction {
            job: crate::server::job_id(),
            member: p.member(),
            join: p.session.join(),
        };
        let stream = self.streams.len();
        self.streams.push(Stream {
            process,
            member: introduction.member,
            server,
            life: self.servers[server].life,
            up: Lane::default(),
            down: Lane::default(),
            up_ended: false,
            down_ended: false,
            severed: false,
            connection: None,
            proof: introduction.join.history.map(|_| introduction.join.generation),
            outbound: None,
            inputs: VecDeque::new(),
            handing: None,
        });
        self.open_streams.insert(stream);
        self.log(30, stream as u64, |sim| {
            let (member, generation) = (introduction.member, introduction.join.generation);
            format!(
                "{} opens stream {stream} to c{server} as {member:?}, in {generation:?}",
                sim.who(process)
            )
        });
        let bytes = rendezvous::from_introduction(&introduction).encode_to_vec();
        self.send(stream, Way::Up, Item::Message(bytes));
        stream
    }

    /// Puts something on its way. What was put on its way before arrives before.
    pub(crate) fn send(&mut self, stream: StreamKey, way: Way, item: Item) {
        if self.streams[stream].severed {
            return;
        }
        let wait = self.rng.within(self.options.control_ms);
        let now = self.now;
        let lane = self.lane(stream, way);
        lane.items.push_back(item);
        lane.last_at = lane.last_at.max(now + wait);
        let wait = lane.last_at - now;
        self.after(wait, Happening::Arrives { stream, way });
    }

    fn lane(&mut self, stream: StreamKey, way: Way) -> &mut Lane {
        let s = &mut self.streams[stream];
        match way {
            Way::Up => &mut s.up,
            Way::Down => &mut s.down,
        }
    }

    /// Whether a stream works, as far as both sides can know.
    pub(crate) fn is_sound(&self, stream: StreamKey) -> bool {
        let s = &self.streams[stream];
        !s.severed && !s.up_ended && !s.down_ended
    }

    fn is_cut_off(&self, stream: StreamKey, way: Way) -> bool {
        let s = &self.streams[stream];
        self.control_cut(self.processes[s.process].host, s.server, way)
    }

    pub(crate) fn arrives_up(&mut self, stream: StreamKey) {
        if self.is_cut_off(stream, Way::Up) {
            return self.within(RETRANSMIT, Happening::Arrives { stream, way: Way::Up });
        }
        if let Some(item) = self.streams[stream].up.items.pop_front() {
            self.server_hears(stream, item);
        }
    }

    pub(crate) fn arrives_down(&mut self, stream: StreamKey) {
        let process = self.streams[stream].process;
        match self.processes[process].life {
            Life::Gone { .. } => return,
            Life::Stopped => {
                let again = Happening::Arrives { stream, way: Way::Down };
                return self.processes[process].deferred.push(again);
            }
            Life::Runs => {}
        }
        if self.is_cut_off(stream, Way::Down) {
            return self.within(RETRANSMIT, Happening::Arrives { stream, way: Way::Down });
        }
        let Some(item) = self.streams[stream].down.items.pop_front() else { return };
        match (item, self.processes[process].link) {
            (Item::Accepted, Link::Calls(up)) if up == stream => self.link_is_up(process, stream),
            (Item::Message(bytes), Link::Up(up)) if up == stream => self.link_reads(process, &bytes),
            (Item::Ended, Link::Up(up) | Link::Calls(up)) if up == stream => self.link_lost(process),
            (Item::Accepted | Item::Message(_) | Item::Ended, _) => {}
        }
        // There is room again for what waits.
        self.pump_stream(stream);
    }

    fn link_reads(&mut self, process: ProcessKey, bytes: &[u8]) {
        let wire: v1::CoordinatorMessage =
            prost::Message::decode(bytes).expect("a coordinator sends what can be read");
        let told = rendezvous::told(wire).expect("a coordinator sends what makes sense");
        self.log(31, process as u64, |sim| format!("{} is told {}", sim.who(process), short(&told.message)));
        self.member_is_told(process, told);
    }

    /// Moves what the coordinators have said from their queues to the network.
    pub(crate) fn pump_streams(&mut self) {
        let streams: Vec<StreamKey> = self.open_streams.iter().copied().collect();
        for stream in streams {
            if self.streams[stream].handing.is_some() {
                self.pump_inputs(stream);
            }
            self.pump_stream(stream);
            self.close_if_over(stream);
        }
    }

    fn pump_stream(&mut self, stream: StreamKey) {
        if !self.servers[self.streams[stream].server].acts() {
            return;
        }
        loop {
            let window = self.options.window;
            let s = &mut self.streams[stream];
            let Some(outbound) = &mut s.outbound else { return };
            if s.down.items.len() >= window {
                let waiting = outbound.len();
                return self.seen(&Seen::Queued { waiting });
            }
            match outbound.try_recv() {
                Ok(wire) => {
                    let bytes = wire.encode_to_vec();
                    self.is_being_told(stream, &bytes);
                    self.send(stream, Way::Down, Item::Message(bytes));
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => return self.server_ends(stream),
            }
        }
    }

    /// A coordinator tells a member something: from here on it may be known.
    fn is_being_told(&mut self, stream: StreamKey, bytes: &[u8]) {
        let wire: v1::CoordinatorMessage = prost::Message::decode(bytes).expect("it was just encoded");
        let told = rendezvous::told(wire).expect("a coordinator says what makes sense");
        let member = self.streams[stream].member;
        let server = self.streams[stream].server;
        self.log(32, stream as u64, |_| format!("c{server} tells {member:?} {}", short(&told.message)));
        if let Some(generation) = self.streams[stream].proof.take() {
            self.seen(&Seen::Proved { generation });
        }
        self.seen(&Seen::Told { server, member, message: &told.message });
    }

    /// The coordinator ends its side in good order.
    pub(crate) fn server_ends(&mut self, stream: StreamKey) {
        self.streams[stream].outbound = None;
        if !std::mem::replace(&mut self.streams[stream].down_ended, true) {
            self.send(stream, Way::Down, Item::Ended);
        }
    }

    /// Nothing more can come of it on the coordinator's side.
    fn close_if_over(&mut self, stream: StreamKey) {
        let s = &self.streams[stream];
        let over = s.up_ended && s.inputs.is_empty() && s.handing.is_none() && s.outbound.is_none();
        let dead = self.servers[s.server].life != s.life || !self.servers[s.server].up;
        if over || dead {
            self.open_streams.remove(&stream);
        }
    }

    /// The coordinator's process is dead.
    pub(crate) fn server_side_dies(&mut self, stream: StreamKey, silently: bool) {
        // What it had handed to its kernel may still be sent, up to some point.
        self.pump_dying(stream);
        self.loses_the_rest(stream, Way::Down);
        let s = &mut self.streams[stream];
        s.outbound = None;
        s.handing = None;
        s.inputs.clear();
        s.up.items.clear();
        s.up_ended = true;
        let ended = std::mem::replace(&mut s.down_ended, true);
        self.open_streams.remove(&stream);
        if ended {
            return;
        }
        if silently {
            self.coverage.hit("a coordinator is gone without a word");
            self.within(KEEPALIVE_MEMBER, Happening::KeepaliveEnds { stream, side: Way::Down });
        } else {
            self.send(stream, Way::Down, Item::Ended);
        }
    }

    fn pump_dying(&mut self, stream: StreamKey) {
        let window = self.options.window;
        while self.streams[stream].down.items.len() < window {
            let Some(outbound) = &mut self.streams[stream].outbound else { return };
            let Ok(wire) = outbound.try_recv() else { return };
            let bytes = wire.encode_to_vec();
            self.is_being_told(stream, &bytes);
            self.send(stream, Way::Down, Item::Message(bytes));
        }
    }

    /// Whoever sent it is dead: of what is on its way only a first part arrives.
    fn loses_the_rest(&mut self, stream: StreamKey, way: Way) {
        let count = self.lane(stream, way).items.len();
        if count == 0 {
            return;
        }
        let arrive = self.rng.below(count as u64 + 1) as usize;
        let lost = self.lane(stream, way).items.split_off(arrive);
        // That it ends is not lost: sooner or later the other side's kernel tells.
        if lost.iter().any(|item| matches!(item, Item::Ended)) {
            self.lane(stream, way).items.push_back(Item::Ended);
        }
    }

    /// The member's side ends: in good order, or with its process.
    pub(crate) fn member_side_ends(&mut self, stream: StreamKey, life: Life) {
        match life {
            Life::Runs | Life::Stopped => self.send(stream, Way::Up, Item::Ended),
            Life::Gone { silently } => {
                self.loses_the_rest(stream, Way::Up);
                if silently {
                    self.within(KEEPALIVE_SERVER, Happening::KeepaliveEnds { stream, side: Way::Up });
                } else {
                    self.send(stream, Way::Up, Item::Ended);
                }
            }
        }
    }

    /// A stream breaks on both sides, or on one that the other hears of late.
    pub(crate) fn stream_breaks(&mut self, stream: StreamKey) {
        if self.streams[stream].severed {
            return;
        }
        let process = self.streams[stream].process;
        let (member, server) = match self.rng.below(4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        self.log(33, stream as u64, |sim| {
            format!("stream {stream} of {} breaks: member {member}, coordinator {server}", sim.who(process))
        });
        self.coverage.hit("a stream breaks");
        self.loses_the_rest(stream, Way::Up);
        self.loses_the_rest(stream, Way::Down);
        if server && !self.streams[stream].up_ended {
            self.send(stream, Way::Up, Item::Ended);
        } else if !server {
            self.coverage.hit("a coordinator hears late of a stream's end");
            self.within((200, 20_000), Happening::KeepaliveEnds { stream, side: Way::Up });
        }
        if !std::mem::replace(&mut self.streams[stream].down_ended, true) {
            self.streams[stream].outbound = None;
            if member {
                self.send(stream, Way::Down, Item::Ended);
            } else {
                self.within(KEEPALIVE_MEMBER, Happening::KeepaliveEnds { stream, side: Way::Down });
            }
        }
        self.streams[stream].severed = true;
    }

    /// A stream ends at once on both sides.
    pub(crate) fn stream_resets(&mut self, stream: StreamKey) {
        if self.streams[stream].severed {
            return;
        }
        self.log(34, stream as u64, |_| format!("stream {stream} ends"));
        if !self.streams[stream].up_ended {
            self.send(stream, Way::Up, Item::Ended);
        }
        if !std::mem::replace(&mut self.streams[stream].down_ended, true) {
            self.streams[stream].outbound = None;
            self.send(stream, Way::Down, Item::Ended);
        }
        self.streams[stream].severed = true;
    }

    /// One side has heard nothing for so long that it gives up, if it still hears nothing.
    pub(crate) fn keepalive_ends(&mut self, stream: StreamKey, side: Way) {
        let process = self.streams[stream].process;
        let cut = self.is_cut_off(stream, Way::Up) || self.is_cut_off(stream, Way::Down);
        match side {
            Way::Up => {
                let speaks =
                    matches!(self.processes[process].link, Link::Up(up) | Link::Calls(up) if up == stream);
                let there = self.processes[process].is_there() && speaks && !self.streams[stream].severed;
                if (cut || !there) && !self.streams[stream].up_ended {
                    self.server_hears(stream, Item::Ended);
                }
            }
            Way::Down => {
                let dead = self.streams[stream].down_ended;
                let speaks =
                    matches!(self.processes[process].link, Link::Up(up) | Link::Calls(up) if up == stream);
                match self.processes[process].life {
                    Life::Runs if speaks && (cut || dead) => {
                        self.coverage.hit("a member gives a silent stream up");
                        self.link_lost(process);
                    }
                    Life::Stopped => {
                        let again = Happening::KeepaliveEnds { stream, side };
                        self.processes[process].deferred.push(again);
                    }
                    Life::Runs | Life::Gone { .. } => {}
                }
            }
        }
    }

    /// A way was cut: sooner or later both sides of the streams on it notice.
    pub(crate) fn streams_are_cut(&mut self) {
        debug_assert_ne!(self.stage, Stage::Heal, "nothing is cut any more");
        let streams: Vec<StreamKey> = self.open_streams.iter().copied().collect();
        for stream in streams {
            if self.is_cut_off(stream, Way::Up) || self.is_cut_off(stream, Way::Down) {
                self.within(KEEPALIVE_MEMBER, Happening::KeepaliveEnds { stream, side: Way::Down });
                self.within(KEEPALIVE_SERVER, Happening::KeepaliveEnds { stream, side: Way::Up });
            }
        }
    }
}

/// A message in a line.
pub(crate) fn short(message: &Message) -> String {
    match message {
        Message::World(place) => format!(
            "World({:?} {:?}/{} seat {}/{} prev {:?} next {:?})",
            place.generation,
            place.rank,
            place.size,
            place.seat,
            place.seats,
            place.prev.member,
            place.next.member
        ),
        Message::Plan(plan) => {
            let from: Vec<_> =
                plan.fetch.iter().flat_map(|f| f.from.iter().map(|peer| peer.member)).collect();
            let load = plan.load.as_ref().map(|load| load.commit.key());
            format!(
                "Plan({:?} #{} {:?} fetch {from:?} load {load:?})",
                plan.generation, plan.attempt, plan.resume
            )
        }
        Message::Publish { generation, step, shards } => {
            format!("Publish({generation:?} {step:?}, {} parts)", shards.len())
        }
        Message::Committed { kept } => {
            format!("Committed({:?})", kept.iter().map(|commit| commit.key()).collect::<Vec<_>>())
        }
        Message::Attached { .. }
        | Message::Refused(_)
        | Message::Go { .. }
        | Message::Break { .. }
        | Message::Boundary { .. }
        | Message::Serve { .. }
        | Message::SaveNow { .. }
        | Message::SaveGivenUp { .. }
        | Message::Draining { .. }
        | Message::Released
        | Message::Closed(_) => format!("{message:?}"),
    }
}
