//! The ring of a world, as far as the coordinator does not see it: steps, collectives that some ranks finish and others
//! do not, and how a rank notices that its ring is over.

use std::collections::BTreeMap;

use super::choices::Setting;
use super::model::{Model, Truth, Written};
use super::process::{Halt, Held, Process, Save};
use crate::event::Event;
use crate::holding::Resume;
use crate::ids::{Generation, MemberId, Rank, Step};

impl Model {
    /// The places that hold a rank of the ring of `generation`, if every one of them is still in it.
    pub(super) fn ring(&self, generation: Generation) -> Option<Vec<usize>> {
        let world = self.saved.world.as_ref().filter(|world| world.generation == generation)?;
        let places: Option<Vec<usize>> = world.seats.iter().map(|seat| self.by_id(seat.member)).collect();
        let places = places?;
        let lowest = places.iter().filter_map(|place| self.step_of(&self.processes[*place])).min()?;
        let in_it = |place: &usize| {
            let p = &self.processes[*place];
            // Who has stopped at the end of the collective that the others are in has given them what they need.
            let stopped_ahead = p.generation() == generation
                && p.world
                    .as_ref()
                    .is_some_and(|w| matches!(w.halt, Some(Halt::Boundary { .. } | Halt::Finished { .. })))
                && self.step_of(p) > Some(lowest);
            p.runs(generation) || stopped_ahead
        };
        places.iter().all(in_it).then_some(places)
    }

    /// The ring of `generation`, if all its ranks run and are at one step.
    pub(super) fn even_ring(&self, generation: Generation) -> Option<Vec<usize>> {
        let places = self.ring(generation)?;
        let steps: Vec<_> = places.iter().map(|p| self.step_of(&self.processes[*p])).collect();
        let even = steps.windows(2).all(|two| two[0] == two[1]);
        let run = places.iter().all(|p| self.processes[*p].runs(generation) && !self.processes[*p].hung);
        (even && run).then_some(places)
    }

    pub(super) fn stop_requested(&self, places: &[usize]) -> bool {
        let requested = |p: &usize| self.processes[*p].world.as_ref().is_some_and(|w| w.boundary_requested);
        places.iter().any(requested)
    }

    /// Members of an uneven ring that have yet to finish the collective.
    pub(super) fn committers(&self, generation: Generation) -> Vec<usize> {
        let Some(places) = self.ring(generation) else { return Vec::new() };
        let lowest = places.iter().map(|p| self.step_of(&self.processes[*p])).min().flatten();
        let behind = |p: &usize| {
            let p = &self.processes[*p];
            p.acts() && p.runs(generation) && self.step_of(p) == lowest
        };
        places.into_iter().filter(behind).collect()
    }

    /// The suspects, if `p` is in a ring that no longer works.
    pub(super) fn sees_break(&self, p: &Process) -> Option<Vec<Rank>> {
        let world = p.world.as_ref().filter(|world| world.halt.is_none() && world.seats > 1)?;
        let gone = |(member, _): &&(MemberId, Rank)| match self.by_id(*member).map(|q| &self.processes[q]) {
            None => true,
            // A ring that is being built waits for who hangs; one that runs stalls.
            Some(q) if q.hung && world.go => true,
            Some(q) => match &q.world {
                // It has not heard of any world yet.
                None => false,
                Some(theirs) if theirs.generation == world.generation => match theirs.halt {
                    // It stopped after the collective that this one is in, and gave it all it needs.
                    Some(Halt::Boundary { .. } | Halt::Finished { .. }) => {
                        self.ring(world.generation).is_none()
                    }
                    Some(Halt::Broken { .. } | Halt::Told) => true,
                    None => false,
                },
                Some(theirs) => theirs.generation > world.generation,
            },
        };
        let suspects: Vec<Rank> =
            [world.prev, world.next].iter().filter(gone).map(|(_, rank)| *rank).collect();
        (!suspects.is_empty()).then_some(suspects)
    }

    /// One rank finishes the collective and commits the step.
    pub(super) fn commit(&mut self, place: usize, setting: &Setting) -> Option<Event> {
        let generation = self.processes[place].generation();
        let places = self.ring(generation)?;
        let even = self.even_ring(generation).is_some();
        self.budget.steps -= u8::from(even && self.budget.steps > 0);
        // All ranks find the same control word at the end of one collective.
        let ahead = |p: &&usize| self.step_of(&self.processes[**p]) > self.step_of(&self.processes[place]);
        let stops = match places.iter().find(ahead) {
            Some(first) => self.processes[*first].world.as_ref().is_some_and(|w| w.halt.is_some()),
            None => self.stop_requested(&places),
        };
        let parent = self.processes[place].held.node()?;
        let step = Step(self.truth[parent].step.0 + 1);
        let child = Truth { parent: Some(parent), step, world: generation };
        let node = self.truth.iter().position(|truth| *truth == child).unwrap_or_else(|| {
            self.truth.push(child);
            self.truth.len() - 1
        });
        let p = &mut self.processes[place];
        let Held::At(resume, _) = p.held else { return None };
        p.held = Held::At(Resume { step, ..resume }, node);
        if setting.last_step == Some(step.0) {
            self.halt(place, Halt::Finished { due: true });
        } else if stops {
            self.halt(place, Halt::Boundary { due: true });
        }
        let p = &mut self.processes[place];
        let (member, stream) = (p.id, p.stream);
        let world = p.world.as_mut()?;
        let first = !std::mem::replace(&mut world.stepped, true);
        (first && stream).then_some(Event::FirstStep { member, generation, step })
    }

    pub(super) fn save(&mut self, generation: Generation) {
        self.budget.saves -= 1;
        let places = self.even_ring(generation).unwrap_or_default();
        for place in &places {
            let p = &self.processes[*place];
            let (Some(state), Some(step)) = (p.held.node(), self.step_of(p)) else { continue };
            let (id, key) = (p.id, (generation, step));
            let part = Save { generation, step, state, shard_due: true, manifest: None };
            self.processes[*place].saves.push(part);
            let written = self.written.entry(key).or_insert(Written { state, parts: BTreeMap::new() });
            written.parts.insert(id, false);
        }
    }
}
