//! What the workers wrote down, and what follows from it: which steps count, and whether every sample was used exactly
//! once per pass in them. The format is told in `examples/digits/src/evidence.rs`.
//!
//! A step counts as it was done in the last generation in which any rank finished it: what later generations went on
//! from. If a step was done again, after a loss or from a checkpoint, the earlier attempts do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Which attempt at a step: the step and the generation in which it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Attempt {
    pub(super) step: u64,
    pub(super) generation: u64,
}

/// One rank's finished step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Done {
    pub(super) attempt: Attempt,
    pub(super) at_us: u64,
    pub(super) loss: f64,
}

/// One rank's share of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tried {
    rank: u32,
    size: u32,
    samples: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq)]
enum Line {
    Try { attempt: Attempt, tried: Tried },
    Done(Done),
    Dataset(u64),
    Accuracy(f64),
}

fn parse(line: &str) -> Result<Line> {
    fn next<T: std::str::FromStr>(words: &mut std::str::SplitWhitespace<'_>) -> Option<T> {
        words.next()?.parse().ok()
    }
    fn parsed(line: &str) -> Option<Line> {
        let mut words = line.split_whitespace();
        match words.next()? {
            "try" => {
                let attempt = Attempt { step: next(&mut words)?, generation: next(&mut words)? };
                let (rank, size) = (next(&mut words)?, next(&mut words)?);
                let _at_us: u64 = next(&mut words)?;
                let samples = words.next().unwrap_or_default();
                let samples = samples.split(',').filter(|s| !s.is_empty());
                let samples = samples.map(|s| s.parse().ok()).collect::<Option<Vec<u64>>>()?;
                Some(Line::Try { attempt, tried: Tried { rank, size, samples } })
            }
            "done" => {
                let attempt = Attempt { step: next(&mut words)?, generation: next(&mut words)? };
                Some(Line::Done(Done { attempt, at_us: next(&mut words)?, loss: next(&mut words)? }))
            }
            "dataset" => Some(Line::Dataset(next(&mut words)?)),
            "accuracy" => Some(Line::Accuracy(next(&mut words)?)),
            _ => None,
        }
    }
    parsed(line).with_context(|| format!("a line of evidence that makes no sense: {line:?}"))
}

/// All that the workers of a run wrote down.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    tried: BTreeMap<Attempt, Vec<Tried>>,
    done: Vec<Done>,
    datasets: BTreeSet<u64>,
    accuracies: Vec<f64>,
}

impl Evidence {
    pub(super) fn read_dir(dir: &Path) -> Result<Evidence> {
        let mut evidence = Evidence::default();
        for file in files(dir)? {
            let text =
                std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            evidence.add(&text)?;
        }
        Ok(evidence)
    }

    pub(super) fn add(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            match parse(line)? {
                Line::Try { attempt, tried } => self.tried.entry(attempt).or_default().push(tried),
                Line::Done(done) => self.done.push(done),
                Line::Dataset(length) => {
                    self.datasets.insert(length);
                }
                Line::Accuracy(accuracy) => self.accuracies.push(accuracy),
            }
        }
        Ok(())
    }

    /// The lowest accuracy that any worker measured at the end: all have the same state, so all measure the same.
    pub(super) fn accuracy(&self) -> Option<f64> {
        self.accuracies.iter().copied().reduce(f64::min)
    }

    /// The attempts that count, by step.
    pub(super) fn committed(&self) -> BTreeMap<u64, Attempt> {
        let mut committed: BTreeMap<u64, Attempt> = BTreeMap::new();
        for done in &self.done {
            let attempt = committed.entry(done.attempt.step).or_insert(done.attempt);
            *attempt = (*attempt).max(done.attempt);
        }
        committed
    }

    /// When, and with which loss, each step that counts was first finished by a rank.
    pub(super) fn losses(&self) -> Vec<Done> {
        let committed = self.committed();
        let mut first: BTreeMap<u64, Done> = BTreeMap::new();
        for done in &self.done {
            if committed.get(&done.attempt.step) == Some(&done.attempt) {
                let known = first.entry(done.attempt.step).or_insert(*done);
                if done.at_us < known.at_us {
                    *known = *done;
                }
            }
        }
        first.into_values().collect()
    }

    /// Whether any rank finished this attempt.
    pub(super) fn finished(&self, attempt: Attempt) -> bool {
        self.done.iter().any(|done| done.attempt == attempt)
    }

    /// How many steps any rank had finished in generations before this one.
    pub(super) fn steps_before(&self, generation: u64) -> u64 {
        let before = self.done.iter().filter(|done| done.attempt.generation < generation);
        before.map(|done| done.attempt.step + 1).max().unwrap_or(0)
    }

    /// How many samples the data set has, if all workers agree.
    fn dataset(&self) -> Option<u64> {
        self.datasets.first().copied().filter(|length| self.datasets.len() == 1 && *length > 0)
    }

    /// What is wrong with the use of the samples; nothing if every step up to `steps` counts once, has exactly one share
    /// of each rank, and if in these steps, one after the other, every pass uses each sample of the data set exactly once
    /// (and the pass that the last step breaks off none twice).
    pub(super) fn complaints(&self, steps: u64) -> Vec<String> {
        let Some(dataset) = self.dataset() else {
            return vec![format!("the workers do not agree on the data set's length: {:?}", self.datasets)];
        };
        let mut complaints = Vec::new();
        let committed = self.committed();
        let mut sequence: Vec<u64> = Vec::new();
        for step in 0..steps {
            let Some(attempt) = committed.get(&step) else {
                complaints.push(format!("step {step} was never finished"));
                continue;
            };
            let mut shares: Vec<&Tried> = self.tried.get(attempt).into_iter().flatten().collect();
            shares.sort_by_key(|share| share.rank);
            let size = shares.first().map_or(0, |share| share.size);
            if !shares.iter().map(|share| share.rank).eq(0..size) {
                let (generation, found) = (attempt.generation, shares.len());
                complaints
                    .push(format!("step {step} in generation {generation}: {found} shares of {size} ranks"));
            }
            sequence.extend(shares.iter().flat_map(|share| &share.samples));
        }
        let length = usize::try_from(dataset).unwrap_or(usize::MAX);
        for (pass, samples) in sequence.chunks(length).enumerate() {
            let different = samples.iter().filter(|sample| **sample < dataset).collect::<BTreeSet<_>>().len();
            if different != samples.len() {
                complaints.push(format!("pass {pass} uses {different} samples in {} places", samples.len()));
            }
        }
        complaints.truncate(10);
        complaints
    }

    /// How many whole passes over the data set the committed steps make.
    pub(super) fn passes(&self) -> u64 {
        let committed = self.committed();
        let samples =
            |attempt| self.tried.get(attempt).into_iter().flatten().flat_map(|share| &share.samples);
        let used = committed.values().flat_map(samples).count() as u64;
        self.dataset().map_or(0, |length| used / length)
    }
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !dir.exists() {
        return Ok(files);
    }
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("evidence")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Follows the evidence while it is being written.
pub(super) struct Tail {
    dir: PathBuf,
    read: BTreeMap<PathBuf, u64>,
    done: BTreeMap<String, Done>,
    tried: BTreeMap<String, (Attempt, std::time::Instant)>,
}

impl Tail {
    pub(super) fn new(dir: &Path) -> Tail {
        Tail { dir: dir.to_owned(), read: BTreeMap::new(), done: BTreeMap::new(), tried: BTreeMap::new() }
    }

    /// Reads what has come.
    pub(super) fn read(&mut self) -> Result<()> {
        for path in files(&self.dir)? {
            let at = self.read.entry(path.clone()).or_default();
            let mut file = std::fs::File::open(&path)?;
            file.seek(SeekFrom::Start(*at))?;
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            let Some(end) = text.rfind('\n') else { continue };
            *at += end as u64 + 1;
            let name = path.file_name().and_then(OsStr::to_str).and_then(|name| name.split('.').next());
            let Some(name) = name else { bail!("a file of evidence without a name") };
            for line in text[..end].lines() {
                match parse(line)? {
                    Line::Done(done) => {
                        self.done.insert(name.to_owned(), done);
                    }
                    Line::Try { attempt, .. } => {
                        self.tried.insert(name.to_owned(), (attempt, std::time::Instant::now()));
                    }
                    Line::Dataset(_) | Line::Accuracy(_) => {}
                }
            }
        }
        Ok(())
    }

    /// How many steps the worker that has got farthest has finished, in the newest generation.
    pub(super) fn steps_done(&self) -> u64 {
        self.newest().map_or(0, |done| done.attempt.step + 1)
    }

    fn newest(&self) -> Option<&Done> {
        self.done.values().max_by_key(|done| (done.attempt.generation, done.attempt.step))
    }

    /// The generation in which a step was last finished.
    pub(super) fn generation(&self) -> u64 {
        self.newest().map_or(0, |done| done.attempt.generation)
    }

    pub(super) fn loss(&self) -> f64 {
        self.newest().map_or(0.0, |done| done.loss)
    }

    /// The step that this worker has begun and not finished, and for how long it has been at it.
    pub(super) fn at_work(&self, name: &str) -> Option<(Attempt, std::time::Duration)> {
        let (attempt, since) = self.tried.get(name)?;
        let finished = self.done.get(name).is_some_and(|done| done.attempt >= *attempt);
        (!finished).then(|| (*attempt, since.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run over four samples, two to a step, by two ranks.
    fn run(lines: &[&str]) -> Evidence {
        let mut evidence = Evidence::default();
        evidence.add(&lines.join("\n")).unwrap();
        evidence
    }

    const GOOD: [&str; 9] = [
        "dataset 4",
        "try 0 1 0 2 100 2",
        "try 0 1 1 2 100 0",
        "done 0 1 110 0.5",
        "done 0 1 111 0.5",
        "try 1 1 0 2 120 3",
        "try 1 1 1 2 120 1",
        "done 1 1 130 0.4",
        "accuracy 0.9",
    ];

    #[test]
    fn a_clean_run_has_nothing_to_complain_about() {
        let evidence = run(&GOOD);
        assert_eq!(evidence.complaints(2), Vec::<String>::new());
        assert_eq!(evidence.accuracy(), Some(0.9));
        assert_eq!(evidence.losses().iter().map(|d| d.at_us).collect::<Vec<_>>(), [110, 130]);
    }

    #[test]
    fn an_attempt_that_was_given_up_does_not_count() {
        let mut lines = GOOD.to_vec();
        // Step 1 was begun in generation 1 by both, finished by none, and done again by one rank alone.
        lines.retain(|line| !line.starts_with("done 1"));
        lines.extend(["try 1 2 0 1 140 3,1", "done 1 2 150 0.4"]);
        let evidence = run(&lines);
        assert_eq!(evidence.complaints(2), Vec::<String>::new());
        assert_eq!(evidence.committed()[&1], Attempt { step: 1, generation: 2 });
        assert_eq!(evidence.steps_before(2), 1);
    }

    #[test]
    fn a_missing_step_a_missing_share_and_a_sample_used_twice_are_noticed() {
        assert_eq!(run(&GOOD).complaints(3), ["step 2 was never finished"]);
        let without_share: Vec<&str> = GOOD.iter().copied().filter(|l| *l != "try 1 1 1 2 120 1").collect();
        assert!(run(&without_share).complaints(2)[0].contains("1 shares of 2 ranks"));
        let twice: Vec<&str> =
            GOOD.iter().map(|l| if *l == "try 1 1 1 2 120 1" { "try 1 1 1 2 120 3" } else { l }).collect();
        assert_eq!(run(&twice).complaints(2), ["pass 0 uses 3 samples in 4 places"]);
        let mut others = GOOD.to_vec();
        others.push("dataset 5");
        assert!(run(&others).complaints(2)[0].contains("do not agree"));
    }
}
