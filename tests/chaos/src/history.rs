//! What the coordinators wrote down: each record that was sent to the store and what came of it, each that was read,
//! and what members were told.
//!
//! One file per coordinator (`reknit serve --record`), one line of JSON per event, with the time by the machine's
//! monotonic clock. A line is written before a record is sent and after the answer has come. If the second one is
//! missing, the process was killed in between: whether the record was saved is not known then, nor when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A record in the store, as far as a history tells records apart: a digest of its bytes; empty if there is none.
pub type Value = String;

/// Something that was asked of the store about one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The job.
    pub job: String,
    /// Which process asked.
    pub pid: u32,
    /// When it asked.
    pub called_us: u64,
    /// When the answer came, if it did.
    pub returned_us: Option<u64>,
    /// What it asked, and what came of it.
    pub act: Act,
}

/// What was asked of the store, with the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Save a record if the newest one has the revision `expected`; zero: if there is none.
    Save {
        /// The revision that it follows.
        expected: u64,
        /// The record.
        value: Value,
        /// The job's generation in it.
        generation: u64,
        /// The leader that saves it: later leaders have greater ones.
        epoch: u64,
        /// What came of it.
        outcome: Outcome,
    },
    /// Read the newest record.
    Load {
        /// Its revision, zero if there is none.
        revision: u64,
        /// The record.
        value: Value,
        /// The leader that reads it, zero if that is not written down.
        epoch: u64,
    },
}

/// What came of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was saved, and the record has this revision.
    Saved(u64),
    /// In the end it was refused: the newest record had another revision. If it had to be sent more than once, that record
    /// may be this one.
    Conflict,
    /// In the end it was refused: another one leads. If it had to be sent more than once, it may have been saved before.
    NotLeader,
    /// It may have been saved, or be saved later, or never.
    Unknown,
}

/// Something that a member was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tell {
    /// When.
    pub at_us: u64,
    /// By which process.
    pub pid: u32,
    /// In which job.
    pub job: String,
    /// Who was told.
    pub member: String,
    /// What: `world`, `go`, `plan`, `break` and so on.
    pub kind: String,
    /// The generation it is about.
    pub generation: u64,
    /// The revision of the record that was the newest for who told it.
    pub revision: u64,
    /// The leader that told it.
    pub epoch: u64,
}

/// All that the coordinators of one store wrote down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// What was asked of the store, except loads that failed.
    pub operations: Vec<Operation>,
    /// What members were told.
    pub tells: Vec<Tell>,
}

#[derive(Debug, Deserialize)]
struct Line {
    at_us: u64,
    pid: u32,
    #[serde(flatten)]
    event: Event,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Event {
    Save {
        id: u64,
        job: String,
        #[serde(default)]
        expected: Option<u64>,
        value: Value,
        generation: u64,
        #[serde(default)]
        epoch: u64,
    },
    Saved {
        id: u64,
        revision: u64,
    },
    Failed {
        id: u64,
        why: String,
    },
    Load {
        id: u64,
        job: String,
        #[serde(default)]
        epoch: u64,
    },
    Loaded {
        id: u64,
        #[serde(default)]
        revision: Option<u64>,
        #[serde(default)]
        value: Option<Value>,
    },
    Tell {
        job: String,
        member: String,
        kind: String,
        generation: u64,
        #[serde(default)]
        revision: u64,
        #[serde(default)]
        epoch: u64,
    },
    #[serde(other)]
    Other,
}

/// A question that has no answer yet.
struct Asked {
    at_us: u64,
    pid: u32,
    job: String,
    epoch: u64,
    /// What is expected, the record and its generation; nothing for a load.
    save: Option<(u64, Value, u64)>,
}

impl History {
    /// Reads the files of all coordinators.
    ///
    /// # Errors
    /// If one cannot be read or has a line that makes no sense; the text says which.
    pub fn read(files: &[PathBuf]) -> Result<History, String> {
        let mut history = History::default();
        for file in files {
            history.read_file(file)?;
        }
        history.operations.sort_by_key(|operation| operation.called_us);
        history.tells.sort_by_key(|tell| tell.at_us);
        Ok(history)
    }

    fn read_file(&mut self, file: &Path) -> Result<(), String> {
        let text = std::fs::read_to_string(file).map_err(|why| format!("{}: {why}", file.display()))?;
        self.add(&text).map_err(|why| format!("{}: {why}", file.display()))
    }

    /// Adds what one coordinator wrote down, over all its lives.
    ///
    /// # Errors
    /// If a line makes no sense; the text says which.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        let mut open: BTreeMap<(u32, u64), Asked> = BTreeMap::new();
        // Who is killed while it writes may leave part of a line, at the end.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let Line { at_us, pid, event } =
                serde_json::from_str(line).map_err(|why| format!("{line:?}: {why}"))?;
            self.add_event(&mut open, at_us, pid, event).map_err(|why| format!("{line:?}: {why}"))?;
        }
        for asked in open.into_values() {
            self.unanswered(asked);
        }
        Ok(())
    }

    fn add_event(
        &mut self,
        open: &mut BTreeMap<(u32, u64), Asked>,
        at_us: u64,
        pid: u32,
        event: Event,
    ) -> Result<(), String> {
        let mut ask = |id, job, epoch, save| {
            let twice = open.insert((pid, id), Asked { at_us, pid, job, epoch, save }).is_some();
            if twice { Err(format!("the id {id} is in use")) } else { Ok(()) }
        };
        match event {
            Event::Save { id, job, expected, value, generation, epoch } => {
                ask(id, job, epoch, Some((expected.unwrap_or(0), value, generation)))?;
            }
            Event::Load { id, job, epoch } => ask(id, job, epoch, None)?,
            Event::Saved { id, revision } => {
                let asked = open.remove(&(pid, id)).ok_or("nothing was asked")?;
                self.saved(asked, Some(at_us), Outcome::Saved(revision))?;
            }
            Event::Failed { id, why } => {
                let asked = open.remove(&(pid, id)).ok_or("nothing was asked")?;
                match why.as_str() {
                    // A load that failed tells nothing.
                    _ if asked.save.is_none() => {}
                    "not_leader" => self.saved(asked, Some(at_us), Outcome::NotLeader)?,
                    "conflict" => self.saved(asked, Some(at_us), Outcome::Conflict)?,
                    _ => self.unanswered(asked),
                }
            }
            Event::Loaded { id, revision, value } => {
                let Asked { at_us: called_us, pid, job, epoch, save: None } =
                    open.remove(&(pid, id)).ok_or("nothing was asked")?
                else {
                    return Err("a save was asked".to_owned());
                };
                let (revision, value) = (revision.unwrap_or(0), value.unwrap_or_default());
                let act = Act::Load { revision, value, epoch };
                self.operations.push(Operation { job, pid, called_us, returned_us: Some(at_us), act });
            }
            Event::Tell { job, member, kind, generation, revision, epoch } => {
                self.tells.push(Tell { at_us, pid, job, member, kind, generation, revision, epoch });
            }
            Event::Other => {}
        }
        Ok(())
    }

    fn saved(&mut self, asked: Asked, returned_us: Option<u64>, outcome: Outcome) -> Result<(), String> {
        let Asked { at_us, pid, job, epoch, save: Some((expected, value, generation)) } = asked else {
            return Err("a load was asked".to_owned());
        };
        let act = Act::Save { expected, value, generation, epoch, outcome };
        self.operations.push(Operation { job, pid, called_us: at_us, returned_us, act });
        Ok(())
    }

    fn unanswered(&mut self, asked: Asked) {
        if asked.save.is_some() {
            // A save it is, so there is nothing that could be wrong.
            let _ = self.saved(asked, None, Outcome::Unknown);
        }
    }

    /// The same with the times of one process moved: it ran by a clock of its own.
    pub fn move_times(&mut self, pid: u32, by_us: i64) {
        let moved = |at: u64| at.saturating_add_signed(by_us);
        for operation in self.operations.iter_mut().filter(|operation| operation.pid == pid) {
            operation.called_us = moved(operation.called_us);
            operation.returned_us = operation.returned_us.map(moved);
        }
        for tell in self.tells.iter_mut().filter(|tell| tell.pid == pid) {
            tell.at_us = moved(tell.at_us);
        }
        self.operations.sort_by_key(|operation| operation.called_us);
        self.tells.sort_by_key(|tell| tell.at_us);
    }

    /// The jobs that it is about.
    pub fn jobs(&self) -> Vec<String> {
        let mut jobs: Vec<String> = self.operations.iter().map(|operation| operation.job.clone()).collect();
        jobs.extend(self.tells.iter().map(|tell| tell.job.clone()));
        jobs.sort();
        jobs.dedup();
        jobs
    }

    /// How many saves are certain.
    pub fn saves(&self) -> usize {
        let saved =
            |operation: &&Operation| matches!(operation.act, Act::Save { outcome: Outcome::Saved(_), .. });
        self.operations.iter().filter(saved).count()
    }

    /// Of how many saves it is not known whether they were taken.
    pub fn unknown(&self) -> usize {
        let unknown = |operation: &&Operation| match operation.act {
            Act::Save { outcome, .. } => !matches!(outcome, Outcome::Saved(_)),
            Act::Load { .. } => false,
        };
        self.operations.iter().filter(unknown).count()
    }

    /// Whatever is wrong with it, by all that is promised: see [`crate::linear`] and [`crate::told`].
    pub fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<String> = Vec::new();
        for job in self.jobs() {
            let operations: Vec<Operation> =
                self.operations.iter().filter(|operation| operation.job == job).cloned().collect();
            if let Err(why) = crate::linear::check(&operations) {
                complaints.push(format!("job {job}: {why}"));
            }
            let tells: Vec<Tell> = self.tells.iter().filter(|tell| tell.job == job).cloned().collect();
            complaints.extend(
                crate::told::complaints(&operations, &tells).iter().map(|c| format!("job {job}: {c}")),
            );
        }
        complaints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_operations_with_their_outcomes() {
        let text = r#"
{"at_us":10,"pid":1,"op":"load","id":1,"job":"j","epoch":3}
{"at_us":11,"pid":1,"op":"loaded","id":1,"revision":0,"value":""}
{"at_us":20,"pid":1,"op":"save","id":2,"job":"j","expected":0,"value":"aa","generation":1,"epoch":3}
{"at_us":25,"pid":1,"op":"saved","id":2,"revision":7}
{"at_us":26,"pid":1,"op":"tell","job":"j","member":"m","kind":"world","generation":1,"revision":7,"epoch":3}
{"at_us":30,"pid":1,"op":"save","id":3,"job":"j","expected":6,"value":"bb","generation":2,"epoch":3}
{"at_us":31,"pid":1,"op":"failed","id":3,"why":"conflict"}
{"at_us":32,"pid":1,"op":"save","id":4,"job":"j","expected":7,"value":"cc","generation":2,"epoch":3}
{"at_us":33,"pid":1,"op":"failed","id":4,"why":"not_leader"}
{"at_us":34,"pid":1,"op":"leading","epoch":3}
{"at_us":40,"pid":1,"op":"save","id":5,"job":"j","expected":7,"value":"dd","generation":2,"epoch":3}
{"at_us":41,"pid":1,"op":"sa"#;
        let mut history = History::default();
        history.add(text.trim_start()).unwrap();
        let save = |value: &str, expected, generation, outcome| Act::Save {
            expected,
            value: value.to_owned(),
            generation,
            epoch: 3,
            outcome,
        };
        let operation = |called_us, returned_us, act| Operation {
            job: "j".to_owned(),
            pid: 1,
            called_us,
            returned_us,
            act,
        };
        assert_eq!(
            history.operations,
            [
                operation(10, Some(11), Act::Load { revision: 0, value: String::new(), epoch: 3 }),
                operation(20, Some(25), save("aa", 0, 1, Outcome::Saved(7))),
                operation(30, Some(31), save("bb", 6, 2, Outcome::Conflict)),
                operation(32, Some(33), save("cc", 7, 2, Outcome::NotLeader)),
                operation(40, None, save("dd", 7, 2, Outcome::Unknown)),
            ]
        );
        assert_eq!((history.tells.len(), history.tells[0].revision, history.saves()), (1, 7, 1));
        assert_eq!(history.complaints(), Vec::<String>::new());
        history.move_times(1, -10);
        assert_eq!((history.operations[0].called_us, history.tells[0].at_us), (0, 16));
    }

    #[test]
    fn an_answer_to_nothing_and_a_line_that_is_none_are_refused() {
        let mut history = History::default();
        let refused = |why: Result<(), String>| why.unwrap_err();
        assert!(
            refused(history.add("{\"at_us\":1,\"pid\":1,\"op\":\"saved\",\"id\":9,\"revision\":1}\n"))
                .contains("nothing was asked")
        );
        assert!(refused(history.add("nonsense\n")).contains("nonsense"));
    }
}
