//! What operators ask for. Every request is answered once what it changed is saved (rule M-5), and a repeated one is
//! answered again (rule M-10).

use super::{Job, Out, Phase};
use crate::event::{Answer, Effect, Message, Operation, Request};
use crate::ids::{MemberId, MemberName};
use crate::reason::{Closure, Departure, Drain};
use crate::spec::Spec;

/// How many names an answer lists at most.
const KNOWN_MAX: usize = 16;

impl Job {
    pub(super) fn operate(&mut self, request: Request, operation: Operation, out: &mut Out) {
        let answer = match (&self.phase, operation) {
            (Phase::Closed(_), Operation::Close) => Answer::Done,
            (Phase::Closed(closure), _) => Answer::JobClosed(*closure),
            (_, Operation::Drain { name }) => self.with_member(name, |job, member| {
                job.drain(member, Drain { deadline: None, by_notice: false }, out);
            }),
            (_, Operation::Notice { name, deadline }) => self.with_member(name, |job, member| {
                job.drain(member, Drain { deadline: Some(deadline), by_notice: true }, out);
            }),
            (_, Operation::Undrain { name }) => self.with_member(name, |job, member| {
                if job.record.drains.remove(&member).is_some() {
                    out.save();
                    job.try_form(out);
                    job.review(true, out);
                }
            }),
            (_, Operation::Evict { name }) => self.with_member(name, |job, member| {
                out.save();
                job.lose(member, Departure::Evicted, out);
                job.after_loss(out);
            }),
            (_, Operation::Resize { min, max }) => self.resize(min, max, out),
            (Phase::Running(_), Operation::SaveNow) => {
                let generation = self.record.generation;
                for member in self.seated().filter(|member| self.is_reachable(*member)).take(3) {
                    out.tell(member, Message::SaveNow { generation });
                }
                Answer::Done
            }
            (_, Operation::SaveNow) => Answer::NotRunning,
            (_, Operation::Close) => {
                self.record.closing = true;
                out.save();
                match self.phase {
                    Phase::Running(_) => self.review(true, out),
                    Phase::Forming(_) | Phase::Establishing(_) | Phase::Restoring(_) | Phase::Closed(_) => {
                        self.close(Closure::Closed, out);
                    }
                }
                Answer::Done
            }
        };
        out.answer(request, answer);
    }

    fn with_member(&mut self, name: MemberName, act: impl FnOnce(&mut Job, MemberId)) -> Answer {
        match self.named(&name) {
            Some(member) => {
                act(self, member);
                Answer::Done
            }
            None => {
                let known = self.members.values().map(|m| m.name.clone()).take(KNOWN_MAX).collect();
                Answer::NoSuchMember { name, known }
            }
        }
    }

    fn resize(&mut self, min: u32, max: u32, out: &mut Out) -> Answer {
        let spec = match (Spec { min, max, ..self.record.spec }).checked() {
            Ok(spec) => spec,
            Err(why) => return Answer::BadSpec(why),
        };
        if spec != self.record.spec {
            self.record.spec = spec;
            self.resized = true;
            out.save();
            match self.phase {
                Phase::Running(_) => self.review(true, out),
                Phase::Forming(_) => self.try_form(out),
                Phase::Establishing(_) | Phase::Restoring(_) | Phase::Closed(_) => {}
            }
        }
        Answer::Done
    }
}

impl Out {
    fn answer(&mut self, request: Request, answer: Answer) {
        self.then.push(Effect::Answer { request, answer });
    }
}
