//! A rank that is a process of its own: this same test program, started again to run one function of it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::BOUND;
use super::rank;

/// Where a process that is a rank is told what to do.
const VARIABLE: &str = "REKNIT_TEST_RANK";

/// What a test program's function of this name does when it is started as a rank. Otherwise it does nothing.
pub(crate) fn be_a_rank() {
    let Some(path) = std::env::var_os(VARIABLE) else { return };
    let mut stream = UnixStream::connect(path).unwrap();
    let mut told = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut rank = rank::Rank::default();
    while let Some(Ok(line)) = told.next() {
        let answer = rank.obey(&line).replace('\n', " ");
        if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
            break;
        }
    }
    // What hangs in a thread must not keep the process.
    std::process::exit(0);
}

/// A rank's process. It is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    answers: BufReader<UnixStream>,
    told_at: Instant,
}

impl Process {
    /// Starts one, with two devices' worth of defaults: see [`rank::Rank`] for what it can be told.
    pub(crate) fn start() -> Process {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("reknit-cuda-{}-{count}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rank_process", "--nocapture"])
            .env(VARIABLE, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        std::fs::remove_file(&path).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        Process { child, answers: BufReader::new(stream), told_at: Instant::now() }
    }

    /// Tells it something, whose answer comes later.
    pub(crate) fn tell(&mut self, line: &str) {
        self.told_at = Instant::now();
        self.answers.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// The answer to what it was told.
    pub(crate) fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer within the bound of all tests");
        line.trim_end().to_owned()
    }

    /// The answer, and how long it took since it was told.
    pub(crate) fn timed_answer(&mut self) -> (String, Duration) {
        let answer = self.answer();
        (answer, self.told_at.elapsed())
    }

    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }

    /// Whether it has an answer within `patience`.
    pub(crate) fn answers_within(&mut self, patience: Duration) -> Option<String> {
        self.answers.get_mut().set_read_timeout(Some(patience)).unwrap();
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        self.answers.get_mut().set_read_timeout(Some(BOUND)).unwrap();
        read.is_ok().then(|| line.trim_end().to_owned())
    }

    /// Asks, and insists on what is answered.
    pub(crate) fn expect(&mut self, line: &str, answer: &str) {
        assert_eq!(self.ask(line), answer, "{line}");
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends it a signal, by the program of that name.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tells each of them something, then takes the answers of all.
pub(crate) fn together<'a>(told: impl IntoIterator<Item = (&'a mut Process, String)>) -> Vec<String> {
    let mut told: Vec<(&mut Process, String)> = told.into_iter().collect();
    told.iter_mut().for_each(|(process, line)| process.tell(line));
    told.into_iter().map(|(process, _)| process.answer()).collect()
}

/// So many ranks, of one device each and with these settings of deadlines.
pub(crate) fn ranks(count: usize, settings: &str) -> Vec<Process> {
    let mut ranks: Vec<Process> = (0..count).map(|_| Process::start()).collect();
    for rank in &mut ranks {
        rank.expect(&format!("open {settings}"), "ok");
    }
    ranks
}

/// Forms a world of all of these, afresh; the first one makes the id.
pub(crate) fn form_fresh(ranks: &mut [Process], generation: u64) {
    let id = ranks[0].ask("id");
    let size = ranks.len();
    let told = ranks.iter_mut().enumerate();
    let told = told.map(|(rank, process)| (process, format!("form {generation} {size} {rank} fresh {id}")));
    let answers = together(told);
    assert!(answers.iter().all(|answer| answer == "formed"), "generation {generation}: {answers:?}");
}

/// Has all of these reduce, and insists on the sum of `1..=size` in each number.
pub(crate) fn check_sum(ranks: &mut [Process]) {
    let size = ranks.len();
    let told =
        ranks.iter_mut().enumerate().map(|(rank, process)| (process, format!("reduce 1000 {}", rank + 1)));
    let answers = together(told);
    let sum = format!("all {}", size * (size + 1) / 2);
    assert!(answers.iter().all(|answer| *answer == sum), "{answers:?} instead of {sum}");
}

/// Insists that no rank has called anything in the wrong, and gives what each has called.
pub(crate) fn calls(ranks: &mut [Process]) -> Vec<Vec<String>> {
    let report = |rank: &mut Process| {
        rank.expect("wrong", "");
        rank.ask("calls").split(' ').map(str::to_owned).collect()
    };
    ranks.iter_mut().map(report).collect()
}
