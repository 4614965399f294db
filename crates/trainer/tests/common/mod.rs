//! A coordinator in this process, and workers on threads of their own. What only another process can suffer (SIGKILL,
//! SIGSTOP) is tested in `tests/e2e`; here a worker goes by dropping its trainer, wherever it is.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reknit_coordinator::config::StoreConfig;
use reknit_coordinator::server::Exposure;
use reknit_coordinator::{Config, Server};
use reknit_proto::v1;
use reknit_proto::v1::inspect_client::InspectClient;
use reknit_proto::v1::operate_client::OperateClient;
use reknit_trainer::{DataOrder, End, Handle, NamedTensors, Options, ReduceOp, Trainer};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Looks again and again until `look` gives something.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) struct Coordinator {
    url: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    client: Runtime,
}

impl Coordinator {
    pub(crate) fn start() -> Coordinator {
        let (address, bound) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = Runtime::new().unwrap();
            runtime.block_on(async move {
                let listen = "127.0.0.1:0".parse().unwrap();
                let config = Config { listen, store: StoreConfig::Memory, ..Config::default() };
                let server = Server::bind(config, Exposure::Loopback).await.unwrap();
                address.send(format!("http://{}", server.address())).unwrap();
                // Either way it is to end.
                server.run(async { _ = stopped.await }).await.unwrap();
            });
        });
        let client = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Coordinator { url: bound.recv().unwrap(), stop: Some(stop), thread: Some(thread), client }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Says, as an operator, that the cloud will take a member's machine.
    pub(crate) fn notice(&self, job: &str, member: &str, left: Duration) {
        let left_ms = left.as_millis() as u64;
        let request = v1::NoticeRequest { job: job.to_owned(), member: member.to_owned(), left_ms };
        self.client.block_on(async {
            let mut client = OperateClient::connect(self.url.clone()).await.unwrap();
            client.notice(request).await.unwrap();
        });
    }

    /// The members of a job, by name.
    pub(crate) fn members(&self, job: &str) -> BTreeMap<String, v1::MemberStatus> {
        self.status(job).members.into_iter().map(|member| (member.name.clone(), member)).collect()
    }

    /// A job as an operator sees it.
    pub(crate) fn status(&self, job: &str) -> v1::JobStatus {
        let request = v1::StatusRequest { job: job.to_owned(), members_max: 0 };
        self.client.block_on(async {
            let mut client = InspectClient::connect(self.url.clone()).await.unwrap();
            client.status(request).await.unwrap().into_inner()
        })
    }

    /// What members have sent since the start, by kind.
    pub(crate) fn received(&self) -> BTreeMap<String, u64> {
        self.client.block_on(async {
            let mut client = InspectClient::connect(self.url.clone()).await.unwrap();
            client.server(v1::ServerRequest {}).await.unwrap().into_inner().received.into_iter().collect()
        })
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the server's is shown already.
            let _ = thread.join();
        }
    }
}

pub(crate) const ORDER: DataOrder = DataOrder { dataset: 97, global_batch: 12, seed: 5 };

/// Who used which samples in which attempt at a step.
pub(crate) type Used = BTreeMap<(u64, u64), BTreeMap<u32, Vec<u64>>>;

/// What all workers of a test share.
pub(crate) struct Job {
    pub(crate) coordinator: Coordinator,
    /// Steps after which every worker leaves.
    last: AtomicU64,
    /// The highest step that is committed.
    step: AtomicU64,
    used: Mutex<Used>,
    /// The size of the state beyond what is trained, in bytes.
    ballast: usize,
}

/// What became of a worker.
pub(crate) struct Outcome {
    pub(crate) steps: u64,
    pub(crate) sums: [f64; 2],
    pub(crate) ballast_is_sound: bool,
    pub(crate) end: Option<End>,
}

pub(crate) struct Worker {
    thread: JoinHandle<Outcome>,
    pub(crate) handle: Handle,
}

impl Worker {
    pub(crate) fn outcome(self) -> Outcome {
        eventually("a worker to end", || self.thread.is_finished().then_some(()));
        self.thread.join().unwrap()
    }
}

/// The state after so many steps, computed by nobody but this.
pub(crate) fn expected(steps: u64) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for step in 0..steps {
        for position in ORDER.positions(step) {
            let sample = ORDER.sample(position);
            sums[0] += sample as f64;
            sums[1] += (sample * (step + 1)) as f64;
        }
    }
    sums
}

fn ballast(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 13) as u8).collect()
}

impl Job {
    pub(crate) fn new(ballast: usize) -> Arc<Job> {
        Arc::new(Job {
            coordinator: Coordinator::start(),
            last: AtomicU64::new(u64::MAX),
            step: AtomicU64::new(0),
            used: Mutex::default(),
            ballast,
        })
    }

    /// Starts a worker. In the middle of step `falls_at` it drops its trainer, as if it had never done that step.
    pub(crate) fn worker(self: &Arc<Job>, name: &str, falls_at: Option<u64>) -> Worker {
        self.worker_with(name, falls_at, |options| options)
    }

    /// The same, with more options.
    pub(crate) fn worker_with(
        self: &Arc<Job>,
        name: &str,
        falls_at: Option<u64>,
        more: impl FnOnce(Options) -> Options,
    ) -> Worker {
        let options = Options::new(self.coordinator.url(), "job", ORDER).unwrap();
        let options = more(options.name(name).unwrap().workers(1, 8).unwrap());
        let job = Arc::clone(self);
        // The newest worker must not have what only a state from others can bring.
        let first = self.step.load(Ordering::Relaxed) == 0;
        let bytes = if first { ballast(self.ballast) } else { vec![0; self.ballast] };
        let mut state = NamedTensors::new().with_f64("sums", [2], vec![0.0; 2]);
        if self.ballast > 0 {
            state = state.with_u8("ballast", [self.ballast as u64], bytes);
        }
        let mut trainer = Trainer::join(options, &state).unwrap();
        let handle = trainer.handle();
        let thread = std::thread::spawn(move || job.train(&mut trainer, &mut state, falls_at));
        Worker { thread, handle }
    }

    fn train(&self, trainer: &mut Trainer, state: &mut NamedTensors, falls_at: Option<u64>) -> Outcome {
        while let Some(mut step) = trainer.next_step(state).unwrap() {
            let (index, generation, rank) = (step.index(), step.generation(), step.rank());
            let samples: Vec<u64> = step.samples().collect();
            // Whole numbers, so that no order of adding changes a bit.
            let mut sums = [0.0, 0.0];
            for sample in &samples {
                sums[0] += *sample as f64;
                sums[1] += (sample * (index + 1)) as f64;
            }
            if falls_at == Some(index) {
                break;
            }
            if step.all_reduce(&mut sums, ReduceOp::Sum).is_err() {
                continue;
            }
            state.f64_mut("sums").iter_mut().zip(sums).for_each(|(sum, more)| *sum += more);
            step.commit(state);
            self.used.lock().unwrap().entry((index, generation)).or_default().insert(rank, samples);
            self.step.fetch_max(index + 1, Ordering::Relaxed);
            if index + 1 >= self.last.load(Ordering::Relaxed) {
                break;
            }
        }
        let sums = state.f64("sums");
        Outcome {
            steps: trainer.steps_done(),
            sums: [sums[0], sums[1]],
            ballast_is_sound: self.ballast == 0 || state.u8("ballast") == ballast(self.ballast),
            end: trainer.end().cloned(),
        }
    }

    /// Waits until `more` steps are committed from now.
    pub(crate) fn steps(&self, more: u64) {
        let from = self.step.load(Ordering::Relaxed);
        eventually("steps to be committed", || {
            (self.step.load(Ordering::Relaxed) >= from + more).then_some(())
        });
    }

    /// Lets every worker leave after the same step, some way ahead.
    pub(crate) fn ends(&self) {
        // Ranks do their steps together, so all see this long before they get there.
        self.last.store(self.step.load(Ordering::Relaxed) + 1_000, Ordering::Relaxed);
    }

    /// Who used what, by step and generation.
    pub(crate) fn used(&self) -> Used {
        self.used.lock().unwrap().clone()
    }

    /// The newest generation in which a step was committed.
    pub(crate) fn generation(&self) -> u64 {
        self.used().keys().map(|(_, generation)| *generation).max().unwrap_or(0)
    }

    /// The newest generation in which an earlier step was committed.
    pub(crate) fn generation_before(&self, step: u64) -> u64 {
        self.used().range(..(step, 0)).map(|((_, generation), _)| *generation).max().unwrap_or(0)
    }

    /// Waits until the world has changed since `before` and has done some steps.
    pub(crate) fn new_world(&self, before: u64) {
        eventually("another world", || (self.generation() > before).then_some(()));
        self.steps(5);
    }
}
