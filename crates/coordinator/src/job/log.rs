//! The core's notes as log events. INFO is a change of world; WARN is worth an operator's morning.

use reknit_membership::JobId;
use reknit_membership::reason::{Departure, Note, SaveTrouble};

fn list(items: &[impl std::fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) fn note(job: &JobId, note: &Note) {
    match note {
        Note::Joined { member, name } => tracing::info!(%job, %name, %member, "joined"),
        Note::Departed { member, name, how } => match how {
            Departure::Left | Departure::Drained => tracing::info!(%job, %name, %member, %how, "departed"),
            Departure::Died
            | Departure::Silent
            | Departure::Gone
            | Departure::Unready
            | Departure::Unrestored
            | Departure::StateLost
            | Departure::Stuck
            | Departure::Unreachable
            | Departure::Replaced { .. }
            | Departure::Evicted
            | Departure::Diverged => tracing::warn!(%job, %name, %member, %how, "lost"),
        },
        Note::Formed { generation, size, causes } => {
            tracing::info!(%job, %generation, size, causes = list(causes), "world published");
        }
        Note::Running { generation, resume } => {
            tracing::info!(%job, %generation, step = %resume.step, lineage = %resume.lineage, "world runs");
        }
        Note::BadSource { member, noticed_by } => {
            tracing::warn!(%job, %member, %noticed_by, "state from this member's memory arrived wrong; not used again");
        }
        Note::BadCheckpoint { step, noticed_by } => {
            tracing::warn!(%job, %step, %noticed_by, "this checkpoint could not be loaded");
        }
        Note::Unrestorable { tried } => {
            tracing::error!(%job, tried = list(tried), "no committed checkpoint can be loaded; trying again later");
        }
        Note::Diverged { step, members } => {
            tracing::error!(%job, %step, members = list(members), "ranks hold different states");
        }
        Note::Committed { step, manifest } => tracing::info!(%job, %step, %manifest, "checkpoint committed"),
        Note::SaveFailed(SaveTrouble { step, member }) => {
            tracing::warn!(%job, %step, %member, "a part of a checkpoint could not be written; the member's log says why");
        }
        Note::SaveDropped { step } => tracing::warn!(%job, %step, "checkpoint given up"),
        Note::StoreRolledBack { knew, seen } => {
            tracing::error!(%job, %knew, %seen, "the store has forgotten generations: was it put back from a backup?");
        }
        Note::Closed(closure) => tracing::info!(%job, %closure, "job over"),
    }
}
