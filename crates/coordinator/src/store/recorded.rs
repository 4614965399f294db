//! A store that writes down what is asked of it and what it answers, so that a test can check afterwards whether all
//! coordinators of a cluster together behaved like one (`reknit serve --record FILE`).
//!
//! One JSON object per line, each written by one call, with the machine's monotonic clock, which all its processes share:
//! ```text
//! {"at_us":N,"pid":P,"op":"save","id":K,"job":"J","expected":R,"value":"HEX","generation":G,"epoch":E}
//! {"at_us":N,"pid":P,"op":"saved","id":K,"revision":R}
//! {"at_us":N,"pid":P,"op":"failed","id":K,"why":"conflict"|"not_leader"|"unavailable"|"corrupt"}
//! {"at_us":N,"pid":P,"op":"load","id":K,"job":"J","epoch":E}
//! {"at_us":N,"pid":P,"op":"loaded","id":K,"revision":R,"value":"HEX"}
//! {"at_us":N,"pid":P,"op":"tell","job":"J","member":"M","kind":"world","generation":G,"revision":R,"epoch":E}
//! ```
//! `value` is a digest of the record's bytes; revision 0 with an empty value: there is none.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reknit_membership::event::Message;
use reknit_membership::{Generation, JobId, MemberId};

use super::{Epoch, Pending, Revision, Saved, Store, StoreError};

/// The machine's monotonic clock, in microseconds.
pub type MonotonicUs = fn() -> u64;

/// Where it is written down.
#[derive(Debug)]
pub struct Recorder {
    file: File,
    clock: MonotonicUs,
    ids: AtomicU64,
}

impl Recorder {
    /// Appends to `file`, which is made if it is not there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn open(file: &Path, clock: MonotonicUs) -> std::io::Result<Recorder> {
        let file = File::options().create(true).append(true).open(file)?;
        Ok(Recorder { file, clock, ids: AtomicU64::new(0) })
    }

    fn id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn line(&self, what: &str) {
        let line = format!("{{\"at_us\":{},\"pid\":{},{what}}}\n", (self.clock)(), std::process::id());
        if let Err(why) = (&self.file).write_all(line.as_bytes()) {
            tracing::error!(error = %why, "the record of saves and tells has a gap");
        }
    }

    fn ends(&self, id: u64, result: Result<(Revision, String), &StoreError>, op: &str) {
        match result {
            Ok((revision, value)) => {
                self.line(&format!("\"op\":\"{op}\",\"id\":{id},\"revision\":{}{value}", revision.0));
            }
            Err(why) => {
                let why = match why {
                    StoreError::Conflict => "conflict",
                    StoreError::NotLeader => "not_leader",
                    StoreError::Unavailable(_) => "unavailable",
                    StoreError::Corrupt(_) => "corrupt",
                };
                self.line(&format!("\"op\":\"failed\",\"id\":{id},\"why\":\"{why}\""));
            }
        }
    }

    /// Something was told to a member, when `revision` was what was saved last.
    pub(crate) fn tells(
        &self,
        job: &JobId,
        member: MemberId,
        message: &Message,
        revision: Revision,
        epoch: Epoch,
    ) {
        let (kind, generation) = kind(message);
        let generation = generation.0;
        self.line(&format!(
            "\"op\":\"tell\",\"job\":\"{job}\",\"member\":\"{member}\",\"kind\":\"{kind}\",\"generation\":{generation},\
             \"revision\":{},\"epoch\":{}",
            revision.0, epoch.0
        ));
    }
}

/// What a message is, and which world it is about (zero: none).
fn kind(message: &Message) -> (&'static str, Generation) {
    match message {
        Message::Attached { .. } => ("attached", Generation(0)),
        Message::Refused(_) => ("refused", Generation(0)),
        Message::World(place) => ("world", place.generation),
        Message::Plan(plan) => ("plan", plan.generation),
        Message::Go { generation, .. } => ("go", *generation),
        Message::Break { generation } => ("break", *generation),
        Message::Boundary { generation } => ("boundary", *generation),
        Message::Draining { .. } => ("draining", Generation(0)),
        Message::Serve { generation } => ("serve", *generation),
        Message::SaveGivenUp { generation, .. } => ("save_given_up", *generation),
        Message::SaveNow { generation } => ("save_now", *generation),
        Message::Publish { generation, .. } => ("publish", *generation),
        Message::Committed { .. } => ("committed", Generation(0)),
        Message::Released => ("released", Generation(0)),
        Message::Closed(_) => ("closed", Generation(0)),
    }
}

/// The same store, written down.
pub struct Recorded {
    /// Does the work.
    pub store: Arc<dyn Store>,
    /// Whose saves these are.
    pub epoch: Epoch,
    /// Writes it down.
    pub recorder: Arc<Recorder>,
}

fn digest(value: &[u8]) -> String {
    blake3::hash(value).to_hex()[..16].to_owned()
}

impl Store for Recorded {
    fn describe(&self) -> String {
        self.store.describe()
    }

    fn jobs(&self) -> Pending<'_, Vec<JobId>> {
        self.store.jobs()
    }

    fn load(&self, job: &JobId) -> Pending<'_, Option<Saved>> {
        let job = job.clone();
        Box::pin(async move {
            let id = self.recorder.id();
            let epoch = self.epoch.0;
            self.recorder.line(&format!("\"op\":\"load\",\"id\":{id},\"job\":\"{job}\",\"epoch\":{epoch}"));
            let loaded = self.store.load(&job).await;
            let shown = loaded.as_ref().map(|saved| match saved {
                Some(saved) => (saved.revision, format!(",\"value\":\"{}\"", digest(&saved.value))),
                None => (Revision::default(), ",\"value\":\"\"".to_owned()),
            });
            self.recorder.ends(id, shown, "loaded");
            loaded
        })
    }

    fn save(&self, job: &JobId, expected: Revision, value: Vec<u8>) -> Pending<'_, Revision> {
        let job = job.clone();
        Box::pin(async move {
            let id = self.recorder.id();
            let generation =
                reknit_proto::record::decode(&value).map_or(0, |(record, _)| record.generation.0);
            self.recorder.line(&format!(
                "\"op\":\"save\",\"id\":{id},\"job\":\"{job}\",\"expected\":{},\"value\":\"{}\",\
                 \"generation\":{generation},\"epoch\":{}",
                expected.0,
                digest(&value),
                self.epoch.0
            ));
            let saved = self.store.save(&job, expected, value).await;
            self.recorder.ends(id, saved.as_ref().map(|revision| (*revision, String::new())), "saved");
            saved
        })
    }

    fn remove(&self, job: &JobId, expected: Revision) -> Pending<'_, ()> {
        self.store.remove(job, expected)
    }

    fn transactions(&self) -> u64 {
        self.store.transactions()
    }
}
