//! What a rank's process does when it is told to.

use std::thread;
use std::time::Duration;

use reknit_collectives::{AbortHandle, BreakReason, ReduceOp};
use reknit_cuda::{
    Communicator, DeviceBuffer, Driver, FormError, Gpu, Nccl, Options, ReduceError, UniqueId, Way, World,
};
use reknit_membership::ids::{Generation, Rank as RankId, WorldSize};

use super::{BOUND, control, driver, nccl_path};

/// A process's communicator, and what ends it.
#[derive(Default)]
pub(crate) struct Rank {
    communicator: Option<Communicator>,
    gpus: Vec<Gpu>,
    /// Ends the world that there is, or was.
    abort: AbortHandle,
    /// Ends the next one.
    armed: Option<AbortHandle>,
}

fn ms(text: &str) -> Duration {
    Duration::from_millis(text.parse().unwrap())
}

fn abort_in(after: Duration, abort: AbortHandle) -> String {
    thread::spawn(move || {
        thread::sleep(after);
        abort.abort(BreakReason::Aborted);
    });
    "ok".to_owned()
}

fn numbers(text: &str) -> Vec<RankId> {
    text.split(',').map(|number| RankId(number.parse().unwrap())).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn id(text: &str) -> UniqueId {
    let byte = |at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
    UniqueId::new(std::array::from_fn(byte))
}

impl Rank {
    /// `faults ...`, `open [real=1 first=N form=MS revoke=MS abort=MS leave=MS stall=MS devices=N]`, `id`, `grow-id`,
    /// `form GENERATION SIZE RANKS fresh ID | shrink PARENT EXCLUDE | grow PARENT QUORUM ID`, `reduce LEN VALUE`,
    /// `abort-in MS`, `arm MS` (an abort of the next world), `break`, `leave`, `close`, `exit`, `offers`, `calls`, `wrong`, `alive`, `threads`.
    pub(crate) fn obey(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "faults" => {
                control::set(words.get(1).unwrap_or(&""));
                "ok".to_owned()
            }
            "open" => self.open(&words[1..]),
            "id" => self.seed(Communicator::unique_id),
            "grow-id" => self.seed(Communicator::grow_id),
            "form" => self.form(&words[1..]),
            "reduce" => self.reduce(words[1].parse().unwrap(), words[2].parse().unwrap()),
            "abort-in" => abort_in(ms(words[1]), self.abort.clone()),
            "arm" => abort_in(ms(words[1]), self.armed.get_or_insert_default().clone()),
            "break" => {
                self.communicator().break_up(BreakReason::Aborted);
                "ok".to_owned()
            }
            "leave" => format!("{:?}", self.communicator().leave()),
            "close" => {
                self.communicator = None;
                self.gpus.clear();
                "ok".to_owned()
            }
            "exit" => format!("{:?}", self.communicator().exit()),
            "offers" => format!("{:?}", self.communicator().offers()),
            "calls" => control::report().0.join(" "),
            "wrong" => control::report().1.join("; "),
            "alive" => format!("{:?}", control::alive()),
            "threads" => std::fs::read_dir("/proc/self/task").unwrap().count().to_string(),
            other => panic!("{other}"),
        }
    }

    fn communicator(&mut self) -> &mut Communicator {
        self.communicator.as_mut().expect("it was opened")
    }

    fn open(&mut self, settings: &[&str]) -> String {
        let mut options = Options { form: BOUND, stall: BOUND, revoke: BOUND, abort: BOUND, leave: BOUND };
        let (mut first, mut devices, mut real) = (0, 1, false);
        for setting in settings {
            let (name, value) = setting.split_once('=').unwrap();
            match name {
                "form" => options.form = ms(value),
                "stall" => options.stall = ms(value),
                "revoke" => options.revoke = ms(value),
                "abort" => options.abort = ms(value),
                "leave" => options.leave = ms(value),
                "devices" => devices = value.parse().unwrap(),
                "first" => first = value.parse().unwrap(),
                "real" => real = true,
                other => panic!("{other}"),
            }
        }
        let (nccl, driver) = match real {
            true => (Nccl::load(), Driver::load().unwrap()),
            false => (Nccl::load_from(&nccl_path()), driver()),
        };
        let nccl = match nccl {
            Ok(nccl) => nccl,
            Err(missing) => return missing.to_string(),
        };
        self.gpus = (first..first + devices).map(|index| driver.gpu(index).unwrap()).collect();
        self.communicator = Some(Communicator::open(nccl, &self.gpus, options).unwrap());
        "ok".to_owned()
    }

    fn seed<E: std::fmt::Display>(
        &mut self,
        make: impl Fn(&mut Communicator) -> Result<UniqueId, E>,
    ) -> String {
        match make(self.communicator()) {
            Ok(id) => hex(id.as_bytes()),
            Err(error) => error.to_string(),
        }
    }

    fn form(&mut self, words: &[&str]) -> String {
        let generation = |text: &str| Generation(text.parse().unwrap());
        let size = |text: &str| WorldSize(text.parse().unwrap());
        let way = match words[3] {
            "fresh" => Way::Fresh { id: id(words[4]) },
            "shrink" => Way::Shrink { parent: generation(words[4]), exclude: numbers(words[5]) },
            "grow" => Way::Grow { parent: generation(words[4]), quorum: size(words[5]), id: id(words[6]) },
            other => panic!("{other}"),
        };
        let (ranks, size) = (numbers(words[2]), size(words[1]));
        let world = World { generation: generation(words[0]), size, ranks, way };
        let abort = self.armed.take().unwrap_or_default();
        self.abort = abort.clone();
        match self.communicator().form(world, abort) {
            Ok(()) => "formed".to_owned(),
            Err(FormError::Failed { trouble, left, .. }) => format!("failed: {trouble} [{left:?}]"),
            Err(error) => format!("refused: {error}"),
        }
    }

    /// Reduces `len` times `value`, into other memory, and checks that the input is what it was.
    fn reduce(&mut self, len: usize, value: f32) -> String {
        let input: Vec<DeviceBuffer<f32>> = self
            .gpus
            .iter()
            .map(|gpu| DeviceBuffer::from_host(gpu, &vec![value; len], BOUND).unwrap())
            .collect();
        let mut output: Vec<DeviceBuffer<f32>> =
            self.gpus.iter().map(|gpu| DeviceBuffer::undefined(gpu, len).unwrap()).collect();
        let reduced = self.communicator().all_reduce_into(&input, &mut output, ReduceOp::Sum);
        for buffer in &input {
            assert!(
                buffer.to_host(BOUND).unwrap().iter().all(|number| *number == value),
                "the input has changed"
            );
        }
        match reduced {
            Ok(()) => {
                let sums: Vec<f32> =
                    output.iter().flat_map(|buffer| buffer.to_host(BOUND).unwrap()).collect();
                let first = sums[0];
                if sums.iter().all(|sum| *sum == first) { format!("all {first}") } else { "mixed".to_owned() }
            }
            Err(ReduceError::Broken(broken)) => format!("broken: {} [{:?}]", broken.trouble, broken.left),
            Err(error) => error.to_string(),
        }
    }
}
