//! What one seed is about: the size of the job, the pace of everything, and which faults strike how often.
//!
//! Every class of faults is on or off by the seed ("swarm testing"): a run with all of them at once explores less than
//! many runs with a few, because the one that stops everything hides what the others do.

use std::fmt;
use std::time::Duration;

use reknit_membership::{Spec, Timing};

use crate::mutants::Mutant;
use crate::queue::Ms;
use crate::rng::Rng;

/// All that is drawn before a run begins.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the rest follows from.
    pub seed: u64,
    /// Machines, each with one process at a time.
    pub hosts: usize,
    /// How many of them have a process from the beginning.
    pub started: usize,
    /// Ranks that each machine's process brings.
    pub slots: Vec<u32>,
    /// The bounds of the job.
    pub spec: Spec,
    /// By which the coordinator waits.
    pub timing: Timing,
    /// The job's last step, if it has one.
    pub steps: Option<u64>,
    /// Samples in a step.
    pub batch: u64,
    /// Whether every process starts from a state of its own.
    pub strangers: bool,
    /// Whether a restarted process listens where the one before it did.
    pub fixed_ports: bool,
    /// How long a program computes before its step's first collective.
    pub compute_ms: (Ms, Ms),
    /// Collectives in a step.
    pub collectives: u32,
    /// How long a program takes from the last collective to the commit.
    pub update_ms: (Ms, Ms),
    /// How long a transfer of the state takes.
    pub transfer_ms: (Ms, Ms),
    /// Checkpoints are made after every so many steps.
    pub save_every: Option<u64>,
    /// How long writing a part of one takes.
    pub write_ms: (Ms, Ms),
    /// From a member to the coordinator or back.
    pub control_ms: (Ms, Ms),
    /// Between members.
    pub data_ms: (Ms, Ms),
    /// How long a save of the record takes.
    pub store_ms: (Ms, Ms),
    /// How long a machine stays without a process when the one it had is gone.
    pub restart_ms: (Ms, Ms),
    /// Messages that may wait for one member.
    pub outbound: usize,
    /// Inputs that may wait for the job's task.
    pub inbound: usize,
    /// Messages that a stream takes before the member has read any.
    pub window: usize,
    /// Coordinators that members know.
    pub servers: usize,
    /// Whether one of them leads, and the store takes nothing from any other.
    pub fenced: bool,
    /// How long faults strike.
    pub chaos_ms: Ms,
    /// Whether what must not cost a generation, and what must cost few, is tried when all is well again.
    pub calm: bool,
    /// What strikes.
    pub faults: Faults,
    /// A rule that is broken on purpose.
    pub mutant: Option<Mutant>,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident: $kind:ident $most:expr;)*) => {
        /// How often each fault strikes. `every` is the mean time between two, in milliseconds; `of` the share of a thousand
        /// occasions. Zero: never.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub struct Faults {
            $($(#[$doc])* pub $name: u32,)*
        }

        impl Faults {
            fn drawn(rng: &mut Rng, share_on: u32) -> Faults {
                Faults { $($name: faults!(@$kind rng, share_on, $most),)* }
            }

            fn listed(&self) -> Vec<(&'static str, &'static str, u32)> {
                vec![$((stringify!($name), stringify!($kind), self.$name),)*]
            }
        }
    };
    // The most frequent is `most`, the rarest eight times rarer.
    (@every $rng:ident, $on:ident, $most:expr) => {
        if $rng.chance($on) { $rng.within(($most, $most * 8)) as u32 } else { 0 }
    };
    (@of $rng:ident, $on:ident, $most:expr) => {
        if $rng.chance($on) { $rng.within(($most / 8 + 1, $most)) as u32 } else { 0 }
    };
    (@rarely $rng:ident, $on:ident, $most:expr) => {
        if $rng.chance($on / 4) { $rng.within(($most / 8 + 1, $most)) as u32 } else { 0 }
    };
}

faults! {
    /// A process is killed; its kernel closes what it had open.
    kill: every 2_500;
    /// A machine is gone without a word.
    power_off: every 4_000;
    /// A process is stopped and goes on later.
    stop: every 2_500;
    /// A program leaves of its own accord.
    leave: every 8_000;
    /// The coordinator's process is killed.
    server_crash: every 4_000;
    /// The coordinator's process is stopped and goes on later.
    server_stop: every 5_000;
    /// Another coordinator takes the job up while the first one lives.
    second_server: every 8_000;
    /// A stream ends, on one side or both.
    reset: every 1_200;
    /// Members and coordinator cannot reach each other, in one direction or both.
    partition: every 4_000;
    /// The connection of two neighbours ends.
    link_reset: every 3_000;
    /// Two members cannot reach each other.
    link_cut: every 5_000;
    /// The cloud warns, and takes the machine.
    notice: every 4_000;
    /// An operator asks for something.
    operate: every 2_000;
    /// An operator closes the job.
    close: every 60_000;
    /// The store takes no saves for a while.
    store_outage: every 6_000;
    /// A bit of a member's memory flips.
    flip: rarely 12;
    /// The coordinator dies before a save is carried out.
    crash_before_save: of 60;
    /// The coordinator dies when a save is carried out, before it hears of it.
    crash_after_save: of 60;
    /// The coordinator dies when it has begun to tell of what was saved.
    crash_telling: of 60;
    /// A save fails.
    save_fails: of 120;
    /// A save is carried out, and its answer is lost.
    reply_lost: of 120;
    /// A save's answer is lost, and it is carried out later.
    save_late: of 80;
    /// A save takes long.
    save_slow: of 120;
    /// A restarted coordinator finds an older store.
    rollback: rarely 300;
    /// A restarted coordinator's wall clock shows another time.
    skew: of 500;
    /// A state does not arrive.
    fetch_fails: of 150;
    /// A state arrives wrong.
    wrong_digest: of 100;
    /// A checkpoint cannot be loaded by one member.
    load_fails: of 200;
    /// A part of a checkpoint cannot be written.
    write_fails: of 120;
    /// A checkpoint is damaged after it was written.
    damage: of 120;
    /// A restarted process goes by another name.
    new_name: of 300;
    /// An operator hears no answer and asks again.
    answer_lost: of 300;
    /// A program is much slower than the others.
    straggle: of 30;
}

impl Options {
    /// The options of a seed.
    pub fn drawn(seed: u64) -> Options {
        let mut rng = Rng::new(seed).fork();
        let rng = &mut rng;
        let hosts = rng.within((1, 8)) as usize;
        let (slots, spec) = drawn_size(rng, hosts);
        let slow = rng.chance(250);
        let share_on = [60, 200, 350, 600][rng.below(4) as usize];
        let pace = [(20, 60), (60, 150), (100, 400), (300, 900)][rng.below(4) as usize];
        Options {
            seed,
            hosts,
            started: if rng.chance(700) { hosts } else { rng.within((1, hosts as u64)) as usize },
            slots,
            spec,
            timing: drawn_timing(rng),
            steps: rng.chance(350).then(|| rng.within((5, 120))),
            batch: rng.within((1, 40)),
            strangers: rng.chance(200),
            fixed_ports: rng.chance(300),
            compute_ms: pace,
            collectives: rng.within((1, 2)) as u32,
            update_ms: (0, rng.within((0, 30))),
            transfer_ms: (5, rng.within((10, 1500))),
            save_every: rng.chance(750).then(|| rng.within((1, 12))),
            write_ms: (1, rng.within((5, 2000))),
            control_ms: if slow { (5, 150) } else { (0, rng.within((1, 20))) },
            data_ms: (0, rng.within((1, 15))),
            store_ms: (0, rng.within((0, 12))),
            restart_ms: (100, rng.within((200, 12_000))),
            // Fewer than what one stream is told when it begins would cut every stream off at once.
            outbound: if rng.chance(150) { rng.within((16, 32)) as usize } else { 64 },
            inbound: if rng.chance(150) { rng.within((1, 4)) as usize } else { 1024 },
            window: if rng.chance(200) { rng.within((1, 6)) as usize } else { 1024 },
            servers: if rng.chance(250) { 2 } else { 1 },
            fenced: !seed.is_multiple_of(3),
            chaos_ms: rng.within((4_000, 30_000)),
            calm: rng.chance(400),
            faults: Faults::drawn(rng, share_on),
            mutant: None,
        }
    }

    /// The same, with a rule broken on purpose.
    pub fn with_mutant(self, mutant: Option<Mutant>) -> Options {
        let mut options = Options { mutant, ..self };
        if mutant == Some(Mutant::BlindDigests) {
            // Digests only matter when states differ.
            options.faults.flip = 500;
            options.faults.damage = 0;
            options.save_every = Some(1);
        }
        options
    }

    /// All ranks that there are when every machine has its process.
    pub fn ranks(&self) -> u32 {
        self.slots.iter().sum()
    }

    /// How long it may take, when nothing fails any more, until a world runs undisturbed.
    ///
    /// Everybody comes back; whoever was struck off is struck off for good; what was under way runs out; and a few worlds
    /// may still have to be formed on the way. The times after which the core gives up a member that is alive and renews
    /// its lease are not in it: nobody is that slow any more.
    pub fn heal_ms(&self) -> Ms {
        let t = &self.timing;
        let waits = t.takeover * 3
            + t.silence * 4
            + t.establish * 4
            + t.last_call * 8
            + t.merge_max * 4
            + t.retry * 3;
        let work = self.transfer_ms.1 * 4 + self.write_ms.1 * 2 + self.step_ms() * 12;
        waits.as_millis() as Ms + work + 60_000
    }

    /// How long a step may take.
    pub fn step_ms(&self) -> Ms {
        self.compute_ms.1 + self.update_ms.1 + u64::from(self.collectives) * (self.data_ms.1 * 3 + 10) + 20
    }
}

/// What each machine brings, and bounds that all of them together can meet.
///
/// Machines of different sizes only where all fit: the core takes members as they come and passes over those that do not
/// fit, so that with a tight `max` an early small one can keep a large one out that would have been enough.
fn drawn_size(rng: &mut Rng, hosts: usize) -> (Vec<u32>, Spec) {
    if rng.chance(200) {
        let slots: Vec<u32> = (0..hosts).map(|_| rng.within((1, 3)) as u32).collect();
        let ranks: u32 = slots.iter().sum();
        let min = rng.within((1, u64::from(ranks))) as u32;
        return (
            slots,
            Spec { min, max: ranks + rng.below(3) as u32, unit: 1, keep: rng.within((1, 3)) as u32 },
        );
    }
    (vec![1; hosts], drawn_spec(rng, hosts as u32))
}

fn drawn_spec(rng: &mut Rng, ranks: u32) -> Spec {
    loop {
        let min = rng.within((1, u64::from(ranks))) as u32;
        let max = if rng.chance(500) {
            ranks + rng.below(3) as u32
        } else {
            rng.within((u64::from(min), 24)) as u32
        };
        let unit = if rng.chance(750) { 1 } else { rng.within((2, 3)) as u32 };
        let spec = Spec { min, max, unit, keep: rng.within((1, 3)) as u32 };
        if spec.checked().is_ok() && ranks.min(max) / unit * unit >= min {
            return spec;
        }
    }
}

/// Half of the seeds wait as a user's job does; the others less long, so that what runs out late is seen, too.
fn drawn_timing(rng: &mut Rng) -> Timing {
    let silence = Duration::from_millis(rng.within((400, 3_000)));
    let derived = Timing::derive(silence).expect("a silence within the range");
    if rng.chance(350) {
        return derived;
    }
    let ms = |rng: &mut Rng, low: u64, high: u64| Duration::from_millis(rng.within((low, high)));
    let establish = silence * 3;
    Timing {
        reattach: ms(rng, 100, 300).min(silence),
        takeover: silence.max(ms(rng, 500, 3_000)),
        last_call: ms(rng, 50, 500),
        merge_quiet: ms(rng, 50, 250),
        merge_max: ms(rng, 300, 2_000),
        establish,
        restore: establish * 3,
        busy: establish * 6,
        retry: ms(rng, 1_000, 5_000),
        ..derived
    }
    .checked()
    .expect("the times rise")
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { faults, timing, .. } = self;
        writeln!(f, "seed {}", self.seed)?;
        writeln!(
            f,
            "  {} hosts, {} started, slots {:?}, {:?}",
            self.hosts, self.started, self.slots, self.spec
        )?;
        writeln!(f, "  {timing:?}")?;
        writeln!(
            f,
            "  steps {:?}, batch {}, {} collectives, compute {:?} ms, update {:?} ms, strangers {}, fixed ports {}",
            self.steps,
            self.batch,
            self.collectives,
            self.compute_ms,
            self.update_ms,
            self.strangers,
            self.fixed_ports
        )?;
        writeln!(
            f,
            "  saves every {:?} steps, write {:?} ms, transfer {:?} ms, restart {:?} ms",
            self.save_every, self.write_ms, self.transfer_ms, self.restart_ms
        )?;
        writeln!(
            f,
            "  control {:?} ms, data {:?} ms, store {:?} ms, outbound {}, inbound {}, window {}, servers {}{}",
            self.control_ms,
            self.data_ms,
            self.store_ms,
            self.outbound,
            self.inbound,
            self.window,
            self.servers,
            if self.fenced && self.servers > 1 { ", of which one leads" } else { "" }
        )?;
        write!(f, "  {} ms of faults, calm {}:", self.chaos_ms, self.calm)?;
        for (name, kind, value) in faults.listed().into_iter().filter(|(_, _, value)| *value > 0) {
            match kind {
                "every" => write!(f, " {name} every {value} ms;")?,
                _ => write!(f, " {name} in {value}/1000;")?,
            }
        }
        match self.mutant {
            Some(mutant) => write!(f, "\n  mutant: {mutant:?}"),
            None => Ok(()),
        }
    }
}
