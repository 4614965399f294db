//! Rule M-15: two members that name the same state hold the same bytes.

use std::collections::BTreeMap;

use reknit_membership::holding::Resume;

use super::{Invariant, Seen, demand};
use crate::process::Content;
use crate::sim::Sim;

#[derive(Default)]
pub(super) struct OneStatePerName {
    states: BTreeMap<Resume, Content>,
}

impl OneStatePerName {
    fn named(&mut self, resume: Resume, content: Content, sim: &Sim) -> Result<(), String> {
        if sim.is_tainted() {
            return Ok(());
        }
        let known = *self.states.entry(resume).or_insert(content);
        demand(known.hash == content.hash, || format!("{resume:?} names {known:x?} and {content:x?}"))
    }
}

impl Invariant for OneStatePerName {
    fn name(&self) -> &'static str {
        "one state per name (M-15)"
    }

    fn see(&mut self, seen: &Seen<'_>, sim: &Sim) -> Result<(), String> {
        match seen {
            Seen::Committed { resume, after, .. } => self.named(*resume, *after, sim),
            Seen::TookGo { resume, content, .. } | Seen::Restored { resume, content, .. } => {
                self.named(*resume, *content, sim)
            }
            Seen::RolledBack { found } => {
                self.states.retain(|resume, _| resume.lineage.0 <= found.generation.0);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
