//! What the workers wrote down (`examples/digits/src/evidence.rs` tells the format), and what has to be so whatever
//! happens to coordinators, stores and networks while no worker dies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One rank's share of an attempt at a step.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Share {
    worker: String,
    rank: u32,
    size: u32,
    samples: Vec<u64>,
}

/// An attempt that a worker has finished.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Done {
    worker: String,
    step: u64,
    generation: u64,
}

/// All that the workers of a run wrote down.
#[derive(Debug, Default)]
pub struct Evidence {
    dataset: BTreeSet<u64>,
    /// By step and generation.
    shares: BTreeMap<(u64, u64), Vec<Share>>,
    done: Vec<Done>,
}

impl Evidence {
    /// Reads what these workers wrote, each to `NAME.evidence` in a directory.
    ///
    /// # Errors
    /// If a file cannot be read, or has a line that makes no sense; the text says which.
    pub fn read(dir: &Path, workers: &[String]) -> Result<Evidence, String> {
        let mut evidence = Evidence::default();
        for worker in workers {
            let path = dir.join(format!("{worker}.evidence"));
            let text = std::fs::read_to_string(&path).map_err(|why| format!("{}: {why}", path.display()))?;
            evidence.add(worker, &text)?;
        }
        Ok(evidence)
    }

    /// Adds what one worker wrote.
    ///
    /// # Errors
    /// If a line makes no sense.
    pub fn add(&mut self, worker: &str, text: &str) -> Result<(), String> {
        // Who writes at this moment may have written part of a line.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            self.add_line(worker, line).ok_or_else(|| format!("{worker} wrote {line:?}"))?;
        }
        Ok(())
    }

    fn add_line(&mut self, worker: &str, line: &str) -> Option<()> {
        let worker = worker.to_owned();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["dataset", length] => {
                self.dataset.insert(length.parse().ok()?);
            }
            ["try", step, generation, rank, size, _at_us, samples] => {
                let attempt = (step.parse().ok()?, generation.parse().ok()?);
                let samples = samples.split(',').filter(|sample| !sample.is_empty());
                let samples = samples.map(|sample| sample.parse().ok()).collect::<Option<_>>()?;
                let share = Share { worker, rank: rank.parse().ok()?, size: size.parse().ok()?, samples };
                self.shares.entry(attempt).or_default().push(share);
            }
            ["done", step, generation, _at_us, _loss] => {
                let (step, generation) = (step.parse().ok()?, generation.parse().ok()?);
                self.done.push(Done { worker, step, generation });
            }
            ["accuracy", _] => {}
            _ => return None,
        }
        Some(())
    }

    /// How many steps any worker has finished.
    pub fn steps(&self) -> u64 {
        self.done.iter().map(|done| done.step + 1).max().unwrap_or(0)
    }

    /// In which generations each step was finished by somebody.
    fn generations(&self) -> BTreeMap<u64, BTreeSet<u64>> {
        let mut generations: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for done in &self.done {
            generations.entry(done.step).or_default().insert(done.generation);
        }
        generations
    }

    /// What is wrong; at most ten things of each kind. So many steps may have been done again in a later generation: none,
    /// unless every worker that had done them lost its lease.
    pub fn complaints(&self, again_most: usize) -> Vec<String> {
        let once = self.steps_not_once(again_most);
        let kinds = [once, self.generations_falling(), self.worlds_at_once(), self.samples()];
        kinds.into_iter().flat_map(|kind| kind.into_iter().take(10)).collect()
    }

    /// No committed step is lost, and none is committed twice: each is finished in one generation, and by no worker twice.
    fn steps_not_once(&self, again_most: usize) -> Vec<String> {
        let generations = self.generations();
        let missing = (0..self.steps()).filter(|step| !generations.contains_key(step));
        let mut complaints: Vec<String> =
            missing.map(|step| format!("step {step} was finished by nobody, but later ones were")).collect();
        let again: Vec<_> = generations.iter().filter(|(_, several)| several.len() > 1).collect();
        if again.len() > again_most {
            let told = |(step, several): &(&u64, &BTreeSet<u64>)| {
                format!("step {step} was committed in the generations {several:?}")
            };
            complaints.extend(again.iter().map(told));
        }
        let mut by_worker: BTreeSet<(&str, u64, u64)> = BTreeSet::new();
        let twice =
            self.done.iter().filter(|done| !by_worker.insert((&done.worker, done.step, done.generation)));
        complaints.extend(twice.map(|done| format!("{} committed step {} twice", done.worker, done.step)));
        complaints
    }

    /// As steps rise, generations do not fall.
    fn generations_falling(&self) -> Vec<String> {
        let last: Vec<(u64, u64)> =
            self.generations().into_iter().filter_map(|(step, all)| Some((step, *all.last()?))).collect();
        let falls = last.iter().zip(last.iter().skip(1)).filter(|(before, after)| after.1 < before.1);
        falls
            .map(|(before, after)| {
                format!("generations fall from (step, generation) {before:?} to {after:?}")
            })
            .collect()
    }

    /// A generation is one world: one size, and each rank is one worker, and each worker one rank.
    fn worlds_at_once(&self) -> Vec<String> {
        let mut seats: BTreeMap<u64, BTreeSet<(u32, u32, &str)>> = BTreeMap::new();
        for ((_, generation), shares) in &self.shares {
            let of_generation = seats.entry(*generation).or_default();
            of_generation.extend(shares.iter().map(|share| (share.size, share.rank, share.worker.as_str())));
        }
        let mut complaints = Vec::new();
        for (generation, seats) in seats {
            let sizes: BTreeSet<u32> = seats.iter().map(|(size, ..)| *size).collect();
            let ranks: BTreeSet<u32> = seats.iter().map(|(_, rank, _)| *rank).collect();
            let workers: BTreeSet<&str> = seats.iter().map(|(.., worker)| *worker).collect();
            if sizes.len() > 1 || ranks.len() != seats.len() || workers.len() != seats.len() {
                complaints.push(format!("generation {generation} is more than one world: {seats:?}"));
            }
        }
        complaints
    }

    /// In the steps that count, one after the other, every pass over the data set uses each sample exactly once, and the
    /// pass that the last step breaks off none twice.
    fn samples(&self) -> Vec<String> {
        let (Some(dataset), 1) = (self.dataset.first().copied(), self.dataset.len()) else {
            return vec![format!("the workers do not agree on the data set's length: {:?}", self.dataset)];
        };
        let mut complaints = Vec::new();
        let mut sequence: Vec<u64> = Vec::new();
        for (step, generations) in self.generations() {
            let Some(generation) = generations.last() else { continue };
            let mut shares: Vec<&Share> =
                self.shares.get(&(step, *generation)).into_iter().flatten().collect();
            shares.sort_by_key(|share| share.rank);
            let size = shares.first().map_or(0, |share| share.size);
            if !shares.iter().map(|share| share.rank).eq(0..size) {
                let ranks: Vec<u32> = shares.iter().map(|share| share.rank).collect();
                complaints.push(format!("step {step}, generation {generation}: ranks {ranks:?} of {size}"));
            }
            sequence.extend(shares.iter().flat_map(|share| &share.samples));
        }
        for (pass, samples) in sequence.chunks(usize::try_from(dataset).unwrap_or(1).max(1)).enumerate() {
            let different: BTreeSet<u64> =
                samples.iter().copied().filter(|sample| *sample < dataset).collect();
            if different.len() != samples.len() {
                let (different, places) = (different.len(), samples.len());
                complaints.push(format!("pass {pass} uses {different} samples in {places} places"));
            }
        }
        complaints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run over four samples, two to a step, by the workers a and b.
    const GOOD: [(&str, &str); 10] = [
        ("a", "dataset 4"),
        ("b", "dataset 4"),
        ("a", "try 0 1 0 2 100 2"),
        ("b", "try 0 1 1 2 100 0"),
        ("a", "done 0 1 110 0.5"),
        ("b", "done 0 1 111 0.5"),
        ("a", "try 1 2 0 2 120 3"),
        ("b", "try 1 2 1 2 120 1"),
        ("a", "done 1 2 130 0.4"),
        ("b", "done 1 2 130 0.4"),
    ];

    #[track_caller]
    fn check(lines: &[(&str, &str)], complaint: Option<&str>) {
        let mut evidence = Evidence::default();
        for (worker, line) in lines {
            evidence.add(worker, &format!("{line}\n")).unwrap();
        }
        let complaints = evidence.complaints(0);
        match complaint {
            None => assert_eq!(complaints, Vec::<String>::new()),
            Some(words) => assert!(complaints.iter().any(|c| c.contains(words)), "{words}: {complaints:?}"),
        }
    }

    fn and(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        GOOD.iter().chain(more).copied().collect()
    }

    #[test]
    fn a_clean_run_has_nothing_to_complain_about() {
        check(&GOOD, None);
        // An attempt that nobody finished does not count, and who was behind fetched the state of the step.
        check(&and(&[("a", "try 2 2 0 2 140 0"), ("b", "try 2 2 1 2 140 1")]), None);
        check(&GOOD[..GOOD.len() - 1], None);
    }

    #[test]
    fn a_step_that_is_lost_or_committed_twice_is_noticed() {
        check(
            &and(&[("a", "try 1 3 0 1 150 3,1"), ("a", "done 1 3 160 0.4")]),
            Some("committed in the generations"),
        );
        check(&and(&[("a", "done 1 2 160 0.4")]), Some("a committed step 1 twice"));
        check(&and(&[("a", "done 4 2 160 0.4")]), Some("step 2 was finished by nobody"));
    }

    #[test]
    fn as_many_steps_may_be_done_again_as_it_is_said() {
        let mut evidence = Evidence::default();
        let again = [("a", "try 1 3 0 1 150 3,1"), ("a", "done 1 3 160 0.4")];
        for (worker, line) in and(&again) {
            evidence.add(worker, &format!("{line}\n")).unwrap();
        }
        assert_eq!(evidence.complaints(1), Vec::<String>::new());
        assert_eq!(evidence.complaints(0).len(), 1);
    }

    #[test]
    fn generations_that_fall_are_noticed() {
        check(&and(&[("a", "try 2 1 0 1 150 0,1"), ("a", "done 2 1 160 0.4")]), Some("generations fall"));
    }

    #[test]
    fn two_worlds_of_one_generation_are_noticed() {
        check(&and(&[("c", "try 1 2 0 2 150 0")]), Some("more than one world"));
        check(&and(&[("a", "try 2 2 1 2 150 0")]), Some("more than one world"));
        check(&and(&[("a", "try 2 2 0 3 150 0")]), Some("more than one world"));
    }

    #[test]
    fn a_sample_that_is_used_twice_and_a_missing_share_are_noticed() {
        let lines = GOOD
            .map(|(worker, line)| (worker, if line.ends_with("120 1") { "try 1 2 1 2 120 2" } else { line }));
        check(&lines, Some("3 samples in 4 places"));
        let without: Vec<_> = GOOD.iter().copied().filter(|(_, line)| *line != "try 1 2 1 2 120 1").collect();
        check(&without, Some("ranks [0] of 2"));
        check(&and(&[("c", "dataset 5")]), Some("do not agree"));
    }

    #[test]
    fn a_line_that_is_none_is_refused() {
        assert!(Evidence::default().add("a", "done 1\n").is_err());
        assert!(Evidence::default().add("a", "try 0 1 0 2 100 2\ndone 0").is_ok(), "it is being written");
    }
}
