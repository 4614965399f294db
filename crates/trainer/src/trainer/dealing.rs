//! Which samples of a step this worker is to compute, and what it has of them already.

use std::sync::Arc;

use reknit_collectives::ControlWord;
use reknit_membership::Generation;
use reknit_membership::world::Place;

use super::Trainer;
use crate::error::Interrupted;
use crate::order::share;
use crate::retry::{Deal, Kept, RECORD_LEN, Record, Stretch, deal, record};

/// What was dealt out at the beginning of a world.
pub(super) struct Dealt {
    generation: Generation,
    /// The step that was dealt out; of the later ones each rank has its usual share.
    step: u64,
    own: Vec<Stretch>,
}

impl Trainer {
    /// The positions of the next step that this worker is to compute.
    ///
    /// # Errors
    /// If the world breaks while its ranks tell each other what they have.
    pub(super) fn own_stretches(&mut self, place: &Place) -> Result<Vec<Stretch>, Interrupted> {
        let (step, batch) = (self.steps_done(), self.options.order.global_batch);
        if self.options.retry_in_place && self.dealt.as_ref().is_none_or(|d| d.generation != place.generation)
        {
            let Deal { keeps, own } = self.deal(place, step, batch)?;
            if !keeps {
                self.kept = None;
            }
            self.dealt = Some(Dealt { generation: place.generation, step, own });
        }
        Ok(match &self.dealt {
            Some(dealt) if dealt.step == step => dealt.own.clone(),
            _ => vec![share(batch, place.size.0, place.rank.0)],
        })
    }

    /// Deals the next step out, by what all ranks have of it.
    fn deal(&mut self, place: &Place, step: u64, batch: u64) -> Result<Deal, Interrupted> {
        let own = match &self.kept {
            Some(kept) if kept.step == step => record(&kept.stretches),
            _ => record(&[]),
        };
        let mut all = vec![0; RECORD_LEN * place.size.0 as usize];
        let Some(group) = self.group(place.generation) else { return Err(Interrupted) };
        match group.all_gather(&own, &mut all, ControlWord::NONE) {
            Ok(_) => {
                let said: &[Record] = all.as_chunks().0;
                Ok(deal(said, batch, place.rank.0))
            }
            Err(broken) => {
                self.ring_broke(&broken);
                Err(Interrupted)
            }
        }
    }

    /// What this worker has of the step already.
    pub(crate) fn kept(&self) -> Option<Arc<Kept>> {
        self.kept.clone()
    }

    pub(crate) fn keep(&mut self, kept: Option<Kept>) {
        self.kept = kept.map(Arc::new);
    }

    pub(crate) fn retries_in_place(&self) -> bool {
        self.options.retry_in_place
    }
}
