//! The program's checkpoints: when they are made, and how one is read.

use std::path::PathBuf;
use std::time::Duration;

use reknit_checkpoint::load::{LoadError, Part, load_into, open};
use reknit_checkpoint::{SaveMeta, Stall, State};
use reknit_collectives::AbortHandle;
use reknit_membership::holding::Load;
use reknit_membership::world::Place;
use reknit_membership::{Generation, Rank, Step as StepNumber, WorldSize};

use super::Trainer;
use crate::saves::{self, Saves, explained};
use crate::session::Session;

/// How often it is tried to read a checkpoint from storage that fails …
const LOAD_TRIES: u32 = 4;
/// … and how long is waited before the second time; then longer each time.
const LOAD_AGAIN: Duration = Duration::from_millis(100);

impl Trainer {
    /// Where the job's checkpoints lie, if there are any. Certain once there is a world: only then is it certain which
    /// history the job's record has.
    pub(super) fn checkpoints_dir(&self) -> Option<PathBuf> {
        let wish = self.options.checkpoints.as_ref()?;
        let history = self.hub.look(Session::history).unwrap_or_default();
        Some(saves::directory(&wish.dir, &self.options.member.job, history))
    }

    /// Makes ready for checkpoints. Where they cannot be written now, they may be later: training goes on without.
    pub(super) fn prepare_saves(&mut self) {
        let Some(dir) = self.checkpoints_dir().filter(|_| self.saves.is_none()) else { return };
        let (job, layout) = (self.options.member.job.clone(), self.layout.clone());
        saves::warn_of_others(&dir, &job);
        match Saves::start(&self.hub, dir, job, layout, &mut self.saves_inbox) {
            Ok(saves) => self.saves = Some(saves),
            Err(why) => {
                tracing::warn!(
                    error = explained(&why),
                    hint = why.hint(),
                    "no checkpoints can be made at present"
                );
            }
        }
    }

    /// Whether a checkpoint of the last step is still to be committed. The world that did the step may have broken before
    /// its checkpoint was whole, or have been busy with the one before: then it is made now.
    pub(super) fn is_last_to_come(&mut self, place: &Place, step: StepNumber, state: &dyn State) -> bool {
        let look = |session: &Session| {
            (session.has_commit_of(step), session.awaits_commit(step), session.is_saving_busy())
        };
        let (has_commit, awaits_commit, is_busy) = self.hub.look(look);
        if has_commit || awaits_commit || self.last_saved_in == Some(place.generation) {
            return awaits_commit;
        }
        if !is_busy {
            let meta = self.save_meta(place.generation, place.rank, place.size, step);
            self.save_if_due(meta, false, state);
        }
        self.options.checkpoints.is_some()
    }

    pub(super) fn load(&self, load: &Load, state: &mut dyn State, abort: &AbortHandle) -> Result<(), String> {
        let Some(dir) = self.checkpoints_dir() else {
            return Err("this worker was given no directory of checkpoints".to_owned());
        };
        let commit = &load.commit;
        let mut tries = 1;
        loop {
            let loaded = open(&dir, commit.step, commit.generation, commit.manifest)
                .and_then(|manifest| load_into(&dir, &manifest, Part::All, state));
            match loaded {
                Ok(_) => return Ok(()),
                // What a storage server's hiccup looks like; what is missing or damaged stays so.
                Err(LoadError::Io { .. }) if tries < LOAD_TRIES && !abort.is_aborted() => {
                    std::thread::sleep(LOAD_AGAIN * tries);
                    tries += 1;
                }
                Err(why) => return Err(format!("{}; {}", explained(&why), why.hint())),
            }
        }
    }

    pub(crate) fn save_meta(
        &self,
        generation: Generation,
        rank: Rank,
        world_size: WorldSize,
        step: StepNumber,
    ) -> SaveMeta {
        let (job, lineage) = (self.options.member.job.clone(), self.lineage());
        SaveMeta { job, step, lineage, generation, rank, world_size }
    }

    /// Begins a checkpoint of the state, if one is due after its step.
    pub(crate) fn save_if_due(
        &mut self,
        meta: SaveMeta,
        asked_for: bool,
        state: &dyn State,
    ) -> Option<Stall> {
        let every = self.options.checkpoints.as_ref()?.every;
        let (generation, step) = (meta.generation, meta.step);
        if !asked_for && !step.0.is_multiple_of(every) && !self.is_last(step.0) {
            return None;
        }
        if self.is_last(step.0) {
            self.last_saved_in = Some(generation);
        }
        self.prepare_saves();
        let Some(saves) = &self.saves else {
            self.hub.bring(|session| session.save_failed(generation, step));
            return None;
        };
        // Said first: the part may be on the disk before `begin` returns.
        self.hub.bring(|session| {
            session.save_begins(generation, step);
            Vec::new()
        });
        match saves.begin(meta, state) {
            Ok(stall) => Some(stall),
            Err(why) => {
                tracing::warn!(%step, error = explained(&why), hint = why.hint(), "no checkpoint of this step");
                self.hub.bring(Session::own_save_failed);
                None
            }
        }
    }
}
