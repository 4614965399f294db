//! What strikes during the first stage of a run, and the end of all that.

use std::collections::BTreeSet;

use reknit_membership::Step;

use crate::happening::{Happening, ProcessKey, Way};
use crate::process::{Held, Life};
use crate::queue::Ms;
use crate::rng::fold;
use crate::sim::{Sim, Stage};

/// A fault that strikes again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// See [`crate::options::Faults`] for all of them.
    Kill,
    /// A machine is gone without a word.
    PowerOff,
    /// A process is stopped.
    Stop,
    /// A program leaves.
    Leave,
    /// A coordinator is killed.
    ServerCrash,
    /// A coordinator is stopped.
    ServerStop,
    /// Another coordinator takes the job up.
    SecondServer,
    /// A stream breaks.
    Reset,
    /// The way between members and coordinator is cut.
    Partition,
    /// The connection of two neighbours ends.
    LinkReset,
    /// The way between two members is cut.
    LinkCut,
    /// The cloud warns.
    Notice,
    /// An operator asks for something.
    Operate,
    /// An operator closes the job.
    Close,
    /// The store is away.
    StoreOutage,
    /// A bit flips, or a checkpoint is damaged.
    Damage,
}

/// A way that is cut.
#[derive(Debug, Clone)]
pub(crate) enum Cut {
    /// Between these machines and a coordinator (all, if none is named).
    Control { hosts: BTreeSet<usize>, server: Option<usize>, up: bool, down: bool },
    /// Between two machines. One direction is enough: nothing is acknowledged then, and no connection moves either way.
    Data { one: usize, other: usize },
}

impl Sim {
    fn faults_and_pace(&self) -> Vec<(Fault, u32)> {
        let f = &self.options.faults;
        vec![
            (Fault::Kill, f.kill),
            (Fault::PowerOff, f.power_off),
            (Fault::Stop, f.stop),
            (Fault::Leave, f.leave),
            (Fault::ServerCrash, f.server_crash),
            (Fault::ServerStop, f.server_stop),
            (Fault::SecondServer, if self.options.servers > 1 { f.second_server } else { 0 }),
            (Fault::Reset, f.reset),
            (Fault::Partition, f.partition),
            (Fault::LinkReset, f.link_reset),
            (Fault::LinkCut, f.link_cut),
            (Fault::Notice, f.notice),
            (Fault::Operate, f.operate),
            (Fault::Close, f.close),
            (Fault::StoreOutage, f.store_outage),
            (Fault::Damage, if f.damage > 0 || f.flip > 0 { 2_000 } else { 0 }),
        ]
    }

    /// The first of each kind.
    pub(crate) fn begin_faults(&mut self) {
        for (fault, every) in self.faults_and_pace() {
            self.strike_later(fault, every);
        }
    }

    fn strike_later(&mut self, fault: Fault, every: u32) {
        if every > 0 {
            let wait = self.rng.around(u64::from(every));
            self.after(wait, Happening::Strikes { fault });
        }
    }

    pub(crate) fn strikes(&mut self, fault: Fault) {
        if self.stage != Stage::Chaos {
            return;
        }
        if let Some((_, every)) = self.faults_and_pace().into_iter().find(|(other, _)| *other == fault) {
            self.strike_later(fault, every);
        }
        let somebody = self.somebody();
        match (fault, somebody) {
            (Fault::Kill, Some(process)) => {
                self.coverage.hit("a member is killed");
                self.dies(process, false);
            }
            (Fault::PowerOff, Some(process)) => {
                self.coverage.hit("a machine is gone without a word");
                self.dies(process, true);
            }
            (Fault::Stop, Some(process)) => {
                let silence = self.options.timing.silence.as_millis() as Ms;
                let bounds = if self.rng.chance(500) { (5, silence) } else { (silence, silence * 6) };
                let length = self.rng.within(bounds);
                self.stops(process, length);
            }
            (Fault::Leave, Some(process)) => self.leaves(process),
            (Fault::Reset, _) => self.resets(),
            (Fault::LinkReset, Some(process)) => self.resets_link(process),
            (Fault::Notice, Some(process)) => self.is_noticed(process),
            (Fault::ServerCrash, _) => {
                if let Some(server) = self.some_server() {
                    self.coverage.hit("a coordinator dies at any time");
                    self.server_crashes(server, true);
                }
            }
            (Fault::ServerStop, _) => {
                if let Some(server) = self.some_server() {
                    let length = self.rng.within((20, 6_000));
                    self.server_stops(server, length);
                }
            }
            (Fault::SecondServer, _) => self.server_is_succeeded(),
            (Fault::Partition, _) => self.partitions(),
            (Fault::LinkCut, _) => self.cuts_link(),
            (Fault::Operate, _) => self.operates(),
            (Fault::Close, _) => self.closes_job(),
            (Fault::StoreOutage, _) => {
                let length = self.rng.within((100, 8_000));
                self.store_outage(length);
            }
            (Fault::Damage, _) => self.damages(somebody),
            (
                Fault::Kill | Fault::PowerOff | Fault::Stop | Fault::Leave | Fault::LinkReset | Fault::Notice,
                None,
            ) => {}
        }
    }

    fn somebody(&mut self) -> Option<ProcessKey> {
        let there: Vec<ProcessKey> = self.present().map(|(key, _)| key).collect();
        self.rng.pick(&there)
    }

    fn some_server(&mut self) -> Option<usize> {
        let up: Vec<usize> =
            self.servers.iter().filter(|server| server.up).map(|server| server.number).collect();
        self.rng.pick(&up)
    }

    fn resets(&mut self) {
        let up: Vec<usize> = self
            .present()
            .filter_map(|(_, p)| match p.link {
                crate::process::Link::Up(stream) => Some(stream),
                _ => None,
            })
            .collect();
        if let Some(stream) = self.rng.pick(&up) {
            self.stream_breaks(stream);
        }
    }

    fn resets_link(&mut self, process: ProcessKey) {
        let Some(ring) = self.processes[process].ring.as_ref().filter(|ring| ring.formed && !ring.aborted)
        else {
            return;
        };
        let (generation, next) = (ring.generation(), ring.next);
        if let Some(next) = next {
            self.coverage.hit("a connection between neighbours breaks");
            self.after(0, Happening::NeighbourLost { process, generation, neighbour: next });
            self.within((0, 5), Happening::NeighbourLost { process: next, generation, neighbour: process });
        }
    }

    fn is_noticed(&mut self, process: ProcessKey) {
        if self.processes[process].noticed || !self.processes[process].runs() {
            return;
        }
        self.processes[process].noticed = true;
        let left = self.rng.within((100, 30_000));
        let deadline = self.member_clock(process).after(std::time::Duration::from_millis(left));
        self.coverage.hit("the cloud warns");
        self.log(110, process as u64, |sim| format!("{} is warned: {left} ms left", sim.who(process)));
        self.bring(process, |session| session.notice(deadline));
        if self.rng.chance(700) {
            self.after(left, Happening::Takes { process });
        }
    }

    fn cut(&mut self, cut: Cut, length: Ms) {
        let number = self.queue.count();
        self.log(111, number, |_| format!("cut {number} for {length} ms: {cut:?}"));
        self.cuts.insert(number, cut);
        self.streams_are_cut();
        self.after(length, Happening::CutHeals { number });
    }

    fn partitions(&mut self) {
        let mut hosts: BTreeSet<usize> = (0..self.options.hosts).collect();
        if self.rng.chance(600) {
            let share = self.rng.within((100, 700)) as u32;
            hosts.retain(|_| self.rng.chance(share));
        }
        if hosts.is_empty() {
            return;
        }
        let (up, down) = match self.rng.below(4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let server = if self.rng.chance(500) {
            Some(self.rng.below(self.servers.len() as u64) as usize)
        } else {
            None
        };
        self.coverage.hit(if up && down {
            "members are partitioned"
        } else {
            "members are partitioned one way"
        });
        let length = self.rng.within((50, 12_000));
        self.cut(Cut::Control { hosts, server, up, down }, length);
    }

    fn cuts_link(&mut self) {
        let hosts = self.options.hosts as u64;
        if hosts < 2 {
            return;
        }
        let from = self.rng.below(hosts) as usize;
        let to = (from + 1 + self.rng.below(hosts - 1) as usize) % hosts as usize;
        self.coverage.hit("the way between two members is cut");
        let length = self.rng.within((50, 15_000));
        self.cut(Cut::Data { one: from, other: to }, length);
    }

    pub(crate) fn cut_heals(&mut self, number: u64) {
        if self.cuts.remove(&number).is_some() {
            self.log(112, number, |_| format!("cut {number} heals"));
        }
    }

    /// Whether nothing gets from a machine to a coordinator, or back.
    pub(crate) fn control_cut(&self, host: usize, to: usize, way: Way) -> bool {
        self.cuts.values().any(|cut| match cut {
            Cut::Control { hosts, server, up, down } => {
                let this_way = match way {
                    Way::Up => *up,
                    Way::Down => *down,
                };
                this_way && hosts.contains(&host) && server.is_none_or(|server| server == to)
            }
            Cut::Data { .. } => false,
        })
    }

    /// Whether no connection of two members moves.
    pub(crate) fn data_cut(&self, one: ProcessKey, other: ProcessKey) -> bool {
        let (one, other) = (self.processes[one].host, self.processes[other].host);
        self.cuts.values().any(|cut| match cut {
            Cut::Control { .. } => false,
            Cut::Data { one: a, other: b } => (*a, *b) == (one, other) || (*a, *b) == (other, one),
        })
    }

    fn damages(&mut self, somebody: Option<ProcessKey>) {
        if self.rng.chance(self.options.faults.damage)
            && let Some(key) = self.disk.manifests.keys().next_back().copied()
        {
            self.coverage.hit("a checkpoint is damaged");
            self.log(113, key.1.0, |_| format!("the checkpoint {key:?} is damaged"));
            self.disk.damaged.insert(key);
        }
        if let Some(process) = somebody
            && self.rng.chance(self.options.faults.flip)
            && self.processes[process].held != Held::Torn
            && self.processes[process].held.steps_done() > 0
        {
            let now = self.now;
            let p = &mut self.processes[process];
            p.content.hash = fold(&[p.content.hash, now]);
            p.content.flipped = true;
            self.has_flipped = true;
            let p = &self.processes[process];
            let (content, world) = (p.content, p.generation());
            let node = crate::truth::Node { parent: None, step: content.step, world, sampled: true };
            self.truth.note(content.hash, node);
            self.coverage.hit("a bit flips");
            self.log(114, process as u64, |sim| {
                format!("a bit of {} flips: {:x}", sim.who(process), content.hash)
            });
        }
    }

    /// From here on nothing fails any more, and whatever stood still goes on.
    pub(crate) fn heal(&mut self) {
        self.stage = Stage::Heal;
        self.healed_at = self.now;
        self.log(120, 0, |_| "faults end".to_owned());
        self.cuts.clear();
        self.disk.damaged.clear();
        self.store_returns();
        for process in 0..self.processes.len() {
            if self.processes[process].life == Life::Stopped {
                self.continues(process);
            }
        }
        self.one_server();
        for process in 0..self.processes.len() {
            if self.processes[process].noticed {
                // The cloud does what it said it would.
                self.dies(process, false);
            }
        }
        for host in 0..self.options.hosts {
            self.within((10, 500), Happening::Starts { host });
        }
        self.operator_heals();
    }

    /// One coordinator is enough. Of two neither may know what the other saved last: one starts anew.
    fn one_server(&mut self) {
        let mut up: Vec<(u64, usize)> = self
            .servers
            .iter()
            .filter(|server| server.up)
            .map(|server| (server.started, server.number))
            .collect();
        up.sort_unstable();
        let Some((_, last)) = up.pop() else { return self.after(10, Happening::ServerStarts { server: 0 }) };
        for (_, extra) in up {
            self.server_crashes(extra, false);
        }
        if self.servers.len() > 1 {
            return self.server_crashes(last, true);
        }
        let life = self.servers[last].life;
        self.server_continues(last, life);
    }

    /// The highest step that anybody present has.
    pub(crate) fn top_step(&self) -> Step {
        let steps = self.present().filter_map(|(_, p)| Some(p.state()?.step));
        Step(steps.max().unwrap_or_default())
    }
}
