//! What a training program tells the library.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::{Listener, SharedMemory};
use reknit_membership::spec::{BadSpec, Spec};
use reknit_membership::{BadName, MemberName};

use crate::credentials::Credentials;
use crate::launcher::LauncherOptions;
use crate::order::DataOrder;

/// A warning that this worker is to leave: the cloud will take its machine, or an operator drains it. The library lets it
/// take part until the next step boundary; [`crate::Trainer::next_step`] then returns no step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// How long its machine can still be expected to live; none if it stays until the worker has left.
    pub left: Option<Duration>,
}

/// Called when a notice arrives, from a thread of the library's own.
pub type NoticeCallback = Arc<dyn Fn(Notice) + Send + Sync>;

/// Where and how often checkpoints are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoints {
    /// The directory, on storage that every worker of the job reaches. Jobs may share it: each has its own within.
    pub dir: PathBuf,
    /// After every so many steps; at least 1.
    pub every: u64,
}

/// How a program joins a job. Made by [`Options::new`]; the rest has defaults.
#[derive(Clone)]
pub struct Options {
    /// What a member says that has no state.
    pub(crate) member: LauncherOptions,
    pub(crate) order: DataOrder,
    pub(crate) steps: Option<u64>,
    pub(crate) checkpoints: Option<Checkpoints>,
    pub(crate) retry_in_place: bool,
}

/// Why [`Options`] make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadOptions {
    /// The job's or the worker's name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The bounds.
    #[error(transparent)]
    Spec(#[from] BadSpec),
    /// No coordinator is named, or one is no URL.
    #[error("a coordinator's address looks like http://HOST:PORT or https://HOST:PORT, not {0:?}")]
    Coordinator(String),
    /// An empty data set or batch.
    #[error("the data set and the global batch must each hold at least one sample")]
    EmptyOrder,
    /// Checkpoints after every zero steps.
    #[error("checkpoints are made after every 1 or more steps")]
    NeverCheckpoints,
}

impl Options {
    /// Joins `job` at a coordinator (`http://HOST:PORT` or `https://HOST:PORT`; several may be separated by commas). The data order says how
    /// many samples there are and how many of them a step uses over all ranks.
    ///
    /// # Errors
    /// [`BadOptions`] if a name or an address is none, or if the order is empty.
    pub fn new(coordinator: &str, job: &str, order: DataOrder) -> Result<Options, BadOptions> {
        let mut member = LauncherOptions::new(coordinator, job)?;
        member.shared_memory = SharedMemory::Offered;
        if order.dataset == 0 || order.global_batch == 0 {
            return Err(BadOptions::EmptyOrder);
        }
        Ok(Options { member, order, steps: None, checkpoints: None, retry_in_place: false })
    }

    /// What is shown to the coordinator, and what it is checked by. By default nothing is shown, whatever the environment
    /// says; [`Credentials::from_env`] has what it says.
    pub fn credentials(mut self, credentials: Credentials) -> Options {
        self.member = self.member.credentials(credentials);
        self
    }

    /// What people call this worker; a live worker of that name is replaced. By default its host and process id.
    ///
    /// # Errors
    /// [`BadOptions::Name`] if it is none.
    pub fn name(mut self, name: &str) -> Result<Options, BadOptions> {
        self.member = self.member.name(name)?;
        Ok(self)
    }

    /// Whether workers that are on one host may share memory, which they do if all of a world are on one and none of them
    /// says no. By default they may. It costs memory as large as what is added at a time, once for all of them.
    #[must_use]
    pub fn share_memory(mut self, share: bool) -> Options {
        self.member.shared_memory = if share { SharedMemory::Offered } else { SharedMemory::Declined };
        self
    }

    /// How many workers a world has at least and at most. The first worker of a job decides.
    ///
    /// # Errors
    /// [`BadOptions::Spec`] if there is no such world.
    pub fn workers(mut self, min: u32, max: u32) -> Result<Options, BadOptions> {
        self.member = self.member.members(min, max)?;
        Ok(self)
    }

    /// The number of workers is a multiple of this. The first worker of a job decides.
    ///
    /// # Errors
    /// [`BadOptions::Spec`] if there is no such world.
    pub fn unit(mut self, unit: u32) -> Result<Options, BadOptions> {
        self.member.spec = Spec { unit, ..self.member.spec }.checked()?;
        Ok(self)
    }

    /// The job is done after this many steps. Without it the program decides.
    pub fn steps(mut self, steps: u64) -> Options {
        self.steps = Some(steps);
        self
    }

    /// Whether a step whose world breaks is not computed anew: what the survivors have computed for it counts, and only the
    /// samples of those who are lost are shared out. By default it is computed anew. All workers of a job must say the same.
    ///
    /// It spares nearly a whole forward and backward pass where a world breaks before or while gradients are added up, for one
    /// small collective per world. What a program has to know:
    /// - all that a step adds up over samples goes into one call of [`all_reduce_mean`], [`all_reduce_means`] or
    ///   [`all_reduce_while`], the loss as one number more, say: a second call in one step is an error. If the world breaks
    ///   in another collective after that, or a worker [fails](crate::Step::fail), what was given in this world is computed
    ///   anew;
    /// - [`samples`] are what is to be computed now, for a step that was interrupted few or none; the mean is over the whole
    ///   step nevertheless. [`covered_samples`] are those that this worker's part of the mean is for.
    ///
    /// [`all_reduce_mean`]: crate::Step::all_reduce_mean
    /// [`all_reduce_means`]: crate::Step::all_reduce_means
    /// [`all_reduce_while`]: crate::Step::all_reduce_while
    /// [`samples`]: crate::Step::samples
    /// [`covered_samples`]: crate::Step::covered_samples
    #[must_use]
    pub fn retry_in_place(mut self, retry: bool) -> Options {
        self.retry_in_place = retry;
        self
    }

    /// Checkpoints go to a directory of this job's in `dir`, after every `every` steps; the newest `keep` are kept.
    ///
    /// # Errors
    /// [`BadOptions`] if `every` or `keep` is zero.
    pub fn checkpoints(
        mut self,
        dir: impl Into<PathBuf>,
        every: u64,
        keep: u32,
    ) -> Result<Options, BadOptions> {
        if every == 0 {
            return Err(BadOptions::NeverCheckpoints);
        }
        self.member.spec = Spec { keep, ..self.member.spec }.checked()?;
        self.checkpoints = Some(Checkpoints { dir: dir.into(), every });
        Ok(self)
    }

    /// Where this worker's data plane listens, and under which address (`HOST:PORT`, or just `HOST`) others reach it, if
    /// that is another one. By default a free port on loopback: for workers on several machines both must be said.
    pub fn listen(mut self, listen: SocketAddr, advertise: Option<String>) -> Options {
        self.member = self.member.listen(listen, advertise);
        self
    }

    /// How long to try to reach a coordinator, at first and later on when there is nothing to do without one.
    pub fn patience(mut self, joining: Duration, later: Duration) -> Options {
        self.member = self.member.patience(joining, later);
        self
    }

    /// Calls `callback`, once and on a thread of its own, when this worker is to leave.
    pub fn on_notice(mut self, callback: impl Fn(Notice) + Send + Sync + 'static) -> Options {
        self.member = self.member.on_notice(callback);
        self
    }
}

/// The coordinators of a list with commas.
pub(crate) fn coordinators(list: &str) -> Result<Vec<String>, BadOptions> {
    let coordinators: Vec<String> = list.split(',').map(|c| c.trim().to_owned()).collect();
    match coordinators.iter().find(|c| !is_url(c)) {
        Some(bad) => Err(BadOptions::Coordinator(bad.clone())),
        None => Ok(coordinators),
    }
}

/// Where others reach a data plane that listens there.
pub(crate) fn advertised(advertise: Option<&str>, listener: &Listener) -> String {
    let own = listener.local_addr();
    match advertise {
        Some(address) => match address.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, own.port()).to_string(),
            Err(_) if address.contains(':') => address.to_owned(),
            Err(_) => format!("{address}:{}", own.port()),
        },
        None => own.to_string(),
    }
}

/// Whether it says how to talk, and to whom.
fn is_url(coordinator: &str) -> bool {
    tonic::transport::Endpoint::from_shared(coordinator.to_owned()).is_ok_and(|endpoint| {
        let uri = endpoint.uri();
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()
    })
}

/// The host's name and the process id: unique enough, and something an operator can find.
pub(crate) fn default_name() -> Result<MemberName, BadName> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let host: String = host.chars().filter(allowed).take(64).collect();
    let host = if host.is_empty() { "worker".to_owned() } else { host };
    MemberName::new(&format!("{host}-{}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: DataOrder = DataOrder { dataset: 10, global_batch: 2, seed: 0 };

    #[test]
    fn options_that_make_no_sense_say_what_is_wrong() {
        let options = || Options::new("http://127.0.0.1:1, http://127.0.0.1:2", "job", ORDER).unwrap();
        assert_eq!(options().member.coordinators, ["http://127.0.0.1:1", "http://127.0.0.1:2"]);
        let bad = |result: Result<Options, BadOptions>| result.err();
        for no_url in ["not a url", "127.0.0.1:7070", "host", "ftp://host", ""] {
            assert_eq!(
                bad(Options::new(no_url, "job", ORDER)),
                Some(BadOptions::Coordinator(no_url.to_owned()))
            );
        }
        assert_eq!(
            bad(Options::new("http://h:1", "a job", ORDER)),
            Some(BadOptions::Name(BadName::BadCharacter { found: ' ' }))
        );
        let empty = DataOrder { dataset: 0, ..ORDER };
        assert_eq!(bad(Options::new("http://h:1", "job", empty)), Some(BadOptions::EmptyOrder));
        assert_eq!(
            bad(options().workers(3, 2)),
            Some(BadOptions::Spec(BadSpec::MinAboveMax { min: 3, max: 2 }))
        );
        assert_eq!(bad(options().checkpoints("x", 0, 1)), Some(BadOptions::NeverCheckpoints));
    }
}
