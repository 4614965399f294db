//! Operators: what they ask for, what they are answered, and what they look at.

use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use reknit_coordinator::job::{Input, JobHandle};
use reknit_membership::event::{Answer, Operation};
use reknit_membership::{MemberName, Status};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use crate::happening::Happening;
use crate::invariants::Seen;
use crate::mutants::Mutant;
use crate::server::WALL;
use crate::sim::{Sim, Stage};

/// Something that was asked for and is not settled.
struct Ask {
    operation: Operation,
    server: usize,
    answer: Option<oneshot::Receiver<Answer>>,
    /// Whether it was answered before, and the answer was lost.
    repeated: bool,
    /// Whether it is asked again until it is done.
    insists: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Operator {
    asks: BTreeMap<u64, Ask>,
    looks: Vec<(usize, oneshot::Receiver<(Status, u32)>)>,
    /// The last status that somebody saw.
    pub(crate) last_status: Option<Status>,
    numbers: u64,
}

/// How often somebody looks at the status.
const LOOKS: u64 = 700;

impl Sim {
    /// An operator asks for something, of their own accord.
    pub(crate) fn operates(&mut self) {
        let names: Vec<usize> = self.present().map(|(key, _)| key).collect();
        let name = match self.rng.pick(&names) {
            Some(process) if !self.rng.chance(50) => self.processes[process].name.clone(),
            _ => MemberName::new("nobody").expect("a plain name"),
        };
        let ranks = u64::from(self.options.ranks());
        let operation = match self.rng.below(12) {
            0 | 1 => Operation::Drain { name },
            2 | 3 => Operation::Undrain { name },
            4 => Operation::Evict { name },
            5 => {
                let left = Duration::from_millis(self.rng.within((50, 20_000)));
                Operation::Notice { name, deadline: self.wall().after(left) }
            }
            6 | 7 => {
                let min = self.rng.within((1, ranks)) as u32;
                let max = self.rng.within((u64::from(min), ranks + 2)) as u32;
                Operation::Resize { min, max }
            }
            8 => Operation::Resize { min: 3, max: 2 },
            _ => Operation::SaveNow,
        };
        self.coverage.hit("an operator asks for something");
        self.asks(operation, false);
    }

    fn wall(&self) -> reknit_membership::Timestamp {
        reknit_membership::Timestamp(WALL.0 + self.now * 1000)
    }

    pub(crate) fn closes_job(&mut self) {
        self.coverage.hit("an operator closes the job");
        self.asks(Operation::Close, true);
    }

    /// An operator puts right what operators have done.
    pub(crate) fn operator_heals(&mut self) {
        self.operator.asks.retain(|_, ask| ask.operation == Operation::Close);
        let (min, max) = (self.options.spec.min, self.options.spec.max);
        self.asks(Operation::Resize { min, max }, true);
        let names: Vec<MemberName> = self.present().map(|(_, p)| p.name.clone()).collect();
        for name in names {
            self.asks(Operation::Undrain { name }, true);
        }
    }

    pub(crate) fn asks(&mut self, operation: Operation, insists: bool) {
        self.operator.numbers += 1;
        let number = self.operator.numbers;
        let ask = Ask { operation, server: 0, answer: None, repeated: false, insists };
        self.operator.asks.insert(number, ask);
        self.asks_again(number);
    }

    /// Asks, unless it is settled or waits for its answer.
    pub(crate) fn asks_again(&mut self, number: u64) {
        let serving: Vec<(usize, JobHandle)> =
            self.servers.iter().filter_map(|server| Some((server.number, server.handle()?))).collect();
        let at = self.rng.below(serving.len() as u64) as usize;
        let Some(ask) = self.operator.asks.get_mut(&number).filter(|ask| ask.answer.is_none()) else {
            return;
        };
        let Some((server, handle)) = serving.get(at) else {
            if ask.insists {
                return self.after(300, Happening::AsksAgain { number });
            }
            self.operator.asks.remove(&number);
            return;
        };
        let (sender, answer) = oneshot::channel();
        let operation = ask.operation.clone();
        ask.answer = Some(answer);
        ask.server = *server;
        self.seen(&Seen::Asked { operation: &operation });
        self.log(130, number, |_| format!("an operator asks c{server} for {operation:?}"));
        if !self.hands(handle, Input::Operate { operation, answer: sender }) {
            self.after(300, Happening::AsksAgain { number });
            if let Some(ask) = self.operator.asks.get_mut(&number) {
                ask.answer = None;
            }
        }
    }

    /// Hands a question to a job's task, if it has room.
    fn hands(&mut self, handle: &JobHandle, input: Input) -> bool {
        self.stirred = true;
        let sending = handle.send(input);
        let mut sending = std::pin::pin!(sending);
        matches!(sending.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
    }

    /// Takes the answers that are there.
    pub(crate) fn hear_answers(&mut self) {
        let numbers: Vec<u64> = self.operator.asks.keys().copied().collect();
        for number in numbers {
            let Some(ask) = self.operator.asks.get_mut(&number) else { continue };
            let Some(waiting) = &mut ask.answer else { continue };
            match waiting.try_recv() {
                Ok(answer) => self.is_answered(number, &answer),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Closed) => {
                    ask.answer = None;
                    self.coverage.hit("an operator's question is lost");
                    self.after(200, Happening::AsksAgain { number });
                }
            }
        }
        let mut is_news = false;
        let mut looks = std::mem::take(&mut self.operator.looks);
        looks.retain_mut(|(_, look)| match look.try_recv() {
            Ok((status, members)) => {
                self.seen(&Seen::Status { status: &status, members });
                self.operator.last_status = Some(status);
                is_news = true;
                false
            }
            Err(TryRecvError::Empty) => true,
            Err(TryRecvError::Closed) => false,
        });
        looks.append(&mut self.operator.looks);
        self.operator.looks = looks;
        if is_news && matches!(self.stage, Stage::Heal | Stage::Finish) {
            self.undrains_who_came_back();
        }
    }

    /// A member that was not there when an operator put things right may still be about to leave.
    fn undrains_who_came_back(&mut self) {
        let members = self.operator.last_status.iter().flat_map(|status| &status.members);
        let asked = self.operator.asks.values().map(|ask| &ask.operation);
        let asked: Vec<&Operation> = asked.collect();
        let leaving: Vec<Operation> = members
            .filter(|member| member.drain.is_some())
            .map(|member| Operation::Undrain { name: member.name.clone() })
            .filter(|undrain| !asked.contains(&undrain))
            .collect();
        for undrain in leaving {
            self.asks(undrain, true);
        }
    }

    fn is_answered(&mut self, number: u64, answer: &Answer) {
        let Some(ask) = self.operator.asks.get_mut(&number) else { return };
        ask.answer = None;
        let (operation, repeated, insists, server) =
            (ask.operation.clone(), ask.repeated, ask.insists, ask.server);
        self.log(131, number, |_| format!("an operator is answered {answer:?} to {operation:?}"));
        if self.options.mutant == Some(Mutant::ForgetsPromises)
            && *answer == Answer::Done
            && self.rng.chance(500)
        {
            self.store_forgets_the_last();
            self.server_crashes(server, true);
        }
        self.seen(&Seen::Answered { operation: &operation, answer, repeated });
        let lost = self.stage == Stage::Chaos && self.rng.chance(self.options.faults.answer_lost);
        let unsettled = insists && *answer == Answer::NotRunning;
        if lost || unsettled {
            self.coverage.hit("an operator asks again");
            if let Some(ask) = self.operator.asks.get_mut(&number) {
                ask.repeated = true;
            }
            return self.within((50, 1_000), Happening::AsksAgain { number });
        }
        self.operator.asks.remove(&number);
    }

    /// A coordinator is dead: whoever asked it hears nothing.
    pub(crate) fn operator_hears_nothing(&mut self, server: usize) {
        let asked =
            self.operator.asks.iter_mut().filter(|(_, ask)| ask.server == server && ask.answer.is_some());
        let numbers: Vec<u64> = asked
            .map(|(number, ask)| {
                ask.answer = None;
                *number
            })
            .collect();
        for number in numbers {
            self.after(400, Happening::AsksAgain { number });
        }
        self.operator.looks.retain(|(asked, _)| *asked != server);
    }

    /// Whether an operator still waits for something.
    pub(crate) fn operator_waits(&self) -> bool {
        !self.operator.asks.is_empty()
    }

    /// Somebody looks at the job.
    pub(crate) fn looks(&mut self) {
        self.after(LOOKS, Happening::Looks);
        let serving: Vec<(usize, JobHandle)> =
            self.servers.iter().filter_map(|server| Some((server.number, server.handle()?))).collect();
        for (server, handle) in serving {
            let (sender, answer) = oneshot::channel();
            if self.hands(&handle, Input::Status { members_max: 100, answer: sender }) {
                self.operator.looks.push((server, answer));
            }
        }
    }
}
