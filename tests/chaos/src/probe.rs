//! Questions that are asked from inside a network: the program `reknit-chaos-probe` runs there, and answers what it is
//! asked on its standard input, each question in its own time.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use reknit_e2e::programs;
use serde::{Deserialize, Serialize};

use crate::net::{Net, Node};

/// How long a question may take; who does not answer until then does not answer.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(500);

/// Something to find out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Question {
    /// What a coordinator says of itself.
    Coordinator {
        /// Its URL.
        url: String,
    },
    /// What an HTTP server answers to this.
    Post {
        /// Its address, `HOST:PORT`.
        to: String,
        /// The path.
        path: String,
        /// The body, in JSON.
        body: String,
    },
    /// Send a datagram.
    Send {
        /// To this address.
        to: String,
        /// With this in it.
        text: String,
    },
    /// Which datagrams have come so far, to port [`DATAGRAMS`].
    Heard,
}

/// Where a probe listens for datagrams.
pub const DATAGRAMS: u16 = 7700;

/// What was found out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// Of a coordinator.
    Coordinator(Leadership),
    /// Of an HTTP server: the body.
    Body(String),
    /// A datagram was sent: nobody objected.
    Sent,
    /// These datagrams have come.
    Heard(Vec<String>),
    /// There was no answer, or it was an error.
    Failed(String),
}

/// What a coordinator says of its part among several.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Leadership {
    /// `leading` or `following`.
    pub role: String,
    /// The leader's URL, if it knows.
    pub leader: String,
    /// Rises with each leader.
    pub epoch: u64,
    /// How many transactions it has asked the store for.
    pub store_transactions: u64,
}

impl Leadership {
    /// Whether it leads.
    pub fn leads(&self) -> bool {
        self.role == "leading"
    }
}

/// A question with the number that its answer will have.
#[derive(Debug, Serialize, Deserialize)]
pub struct Numbered<T> {
    /// The number.
    pub number: u64,
    /// What has it.
    pub what: T,
}

/// A probe in a network.
#[derive(Debug)]
pub struct Probe {
    child: Child,
    input: ChildStdin,
    answers: Receiver<Numbered<Answer>>,
    next: u64,
}

impl Probe {
    /// Starts one.
    pub fn start(net: &Net, node: Node) -> Probe {
        let mut child = net
            .command(node, programs().join("reknit-chaos-probe"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let answer = serde_json::from_str(&line).unwrap();
                if sender.send(answer).is_err() {
                    return;
                }
            }
        });
        Probe { child, input, answers, next: 0 }
    }

    /// Asks all of these at once, and waits for all answers.
    pub fn ask(&mut self, questions: Vec<Question>) -> Vec<Answer> {
        let first = self.next;
        let mut answers: Vec<Option<Answer>> = vec![None; questions.len()];
        for what in questions {
            let mut line = serde_json::to_vec(&Numbered { number: self.next, what }).unwrap();
            line.push(b'\n');
            self.input.write_all(&line).unwrap();
            self.next += 1;
        }
        while answers.iter().any(Option::is_none) {
            // It gives up on a question after a while; on a busy machine that may be late.
            let Numbered { number, what } = self.answers.recv_timeout(ANSWER_WITHIN * 20).unwrap();
            answers[usize::try_from(number - first).unwrap()] = Some(what);
        }
        answers.into_iter().flatten().collect()
    }

    /// Asks one thing.
    pub fn ask_one(&mut self, question: Question) -> Answer {
        self.ask(vec![question]).remove(0)
    }

    /// What each of these coordinators says of itself, if it answers.
    pub fn coordinators(&mut self, urls: &[String]) -> Vec<Option<Leadership>> {
        let questions = urls.iter().map(|url| Question::Coordinator { url: url.clone() }).collect();
        let leadership = |answer| if let Answer::Coordinator(says) = answer { Some(says) } else { None };
        self.ask(questions).into_iter().map(leadership).collect()
    }

    /// What an HTTP server answers.
    ///
    /// # Errors
    /// If it does not answer, or with another status than 200.
    pub fn post(&mut self, to: &str, path: &str, body: &str) -> Result<String, String> {
        let (to, path, body) = (to.to_owned(), path.to_owned(), body.to_owned());
        match self.ask_one(Question::Post { to, path, body }) {
            Answer::Body(body) => Ok(body),
            other => Err(format!("{other:?}")),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
