//! Rule M-11: a job that does not run says what it waits for.

use reknit_membership::Waiting;
use reknit_membership::status::PhaseName;

use super::{Invariant, Seen, demand};
use crate::sim::Sim;

pub(super) struct Waits;

impl Invariant for Waits {
    fn name(&self) -> &'static str {
        "waits (M-11)"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Sim) -> Result<(), String> {
        let Seen::Status { status, members } = seen else { return Ok(()) };
        let at_rest = matches!(status.phase, PhaseName::Running | PhaseName::Closed(_));
        demand(at_rest || status.waiting != Waiting::Nothing, || {
            format!("{:?} waits for nothing", status.phase)
        })?;
        let counted = status.members.len() as u32 == *members;
        demand(counted, || format!("{members} members, {} listed", status.members.len()))
    }
}
