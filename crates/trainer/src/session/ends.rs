//! How a membership ends, and how a member that has lost its lease comes back.

use reknit_membership::event::Event;
use reknit_membership::reason::{Departure, Refusal};

use super::{End, Output, Session};

impl Session {
    /// The coordinator cannot be talked to, and trying again will not help.
    pub fn rejected(&mut self, why: String) -> Vec<Output> {
        self.finish(End::Rejected { why })
    }

    /// The program leaves.
    pub fn leave(&mut self) -> Vec<Output> {
        self.goes(End::Left)
    }

    /// The operating system does not give this process what a world needs. Nobody else is to blame, and the others are
    /// not to wait: it leaves.
    pub fn machine_failed(&mut self, why: String) -> Vec<Output> {
        self.goes(End::MachineFailed { why })
    }

    pub(super) fn goes(&mut self, end: End) -> Vec<Output> {
        if self.end.is_some() {
            return Vec::new();
        }
        let mut out = vec![Output::Send(Event::Leave { member: self.member })];
        out.extend(self.finish(end));
        out
    }

    pub(super) fn finish(&mut self, end: End) -> Vec<Output> {
        let mut out = self.drop_worlds();
        self.end.get_or_insert(end);
        out.push(Output::Wake);
        out
    }

    /// Whatever it takes part in, or serves, is over for it.
    pub(super) fn drop_worlds(&mut self) -> Vec<Output> {
        let own = self.world.as_ref().map(|world| world.place.generation);
        let newest = own.max(self.serving.take());
        newest.map(|generation| Output::Abort { generation }).into_iter().collect()
    }

    pub(super) fn refused(&mut self, refusal: Refusal) -> Vec<Output> {
        match refusal {
            Refusal::Departed(how) if how.may_come_back() => self.come_back(),
            // It was a member to the end; only the last word was lost with the stream it was said on.
            Refusal::JobClosed(closure) if self.placed => self.finish(End::Closed(closure)),
            Refusal::Departed(Departure::Drained) if self.placed => self.finish(End::Released),
            Refusal::Departed(_)
            | Refusal::JobClosed(_)
            | Refusal::BadSpec(_)
            | Refusal::BadSlots { .. }
            | Refusal::OtherShape { .. }
            | Refusal::OtherRecipe
            | Refusal::OtherHistory { .. }
            | Refusal::TooManyMembers { .. } => self.finish(End::Refused(refusal)),
        }
    }

    pub(super) fn come_back(&mut self) -> Vec<Output> {
        let mut out = self.drop_worlds();
        self.world = None;
        self.member = (self.next_id)();
        self.attached = false;
        self.saves.clear();
        self.failed_saves.clear();
        self.notice_known = false;
        out.push(Output::Reconnect);
        out.push(Output::Wake);
        out
    }
}
