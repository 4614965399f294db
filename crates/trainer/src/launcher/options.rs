//! What a launcher tells the library.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::SharedMemory;
use reknit_membership::spec::Spec;
use reknit_membership::{JobId, MemberName};

use crate::credentials::Credentials;
use crate::options::{BadOptions, Notice, NoticeCallback, coordinators, default_name};

/// How a launcher joins a job. Made by [`LauncherOptions::new`]; the rest has defaults.
#[derive(Clone)]
pub struct LauncherOptions {
    pub(crate) coordinators: Vec<String>,
    pub(crate) credentials: Credentials,
    pub(crate) job: JobId,
    pub(crate) name: MemberName,
    pub(crate) spec: Spec,
    pub(crate) listen: SocketAddr,
    pub(crate) advertise: Option<String>,
    pub(crate) join_patience: Duration,
    pub(crate) patience: Duration,
    pub(crate) on_notice: Option<NoticeCallback>,
    /// Launchers exchange a few bytes, and wake each other by messages, of which memory has none.
    pub(crate) shared_memory: SharedMemory,
}

impl LauncherOptions {
    /// Joins `job` at a coordinator (`http://HOST:PORT` or `https://HOST:PORT`; several may be separated by commas).
    ///
    /// # Errors
    /// [`BadOptions`] if a name or an address is none.
    pub fn new(coordinator: &str, job: &str) -> Result<LauncherOptions, BadOptions> {
        Ok(LauncherOptions {
            coordinators: coordinators(coordinator)?,
            credentials: Credentials::default(),
            job: JobId::new(job)?,
            name: default_name()?,
            spec: Spec::default(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            join_patience: Duration::from_secs(60),
            patience: Duration::from_secs(600),
            on_notice: None,
            shared_memory: SharedMemory::Unasked,
        })
    }

    /// What is shown to the coordinator, and what it is checked by.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> LauncherOptions {
        self.credentials = credentials;
        self
    }

    /// What people call this member; a live member of that name is replaced. By default its host and process id.
    ///
    /// # Errors
    /// [`BadOptions::Name`] if it is none.
    pub fn name(mut self, name: &str) -> Result<LauncherOptions, BadOptions> {
        self.name = MemberName::new(name)?;
        Ok(self)
    }

    /// How many members a world has at least and at most. The first member of a job decides.
    ///
    /// # Errors
    /// [`BadOptions::Spec`] if there is no such world.
    pub fn members(mut self, min: u32, max: u32) -> Result<LauncherOptions, BadOptions> {
        self.spec = Spec { min, max, ..self.spec }.checked()?;
        Ok(self)
    }

    /// Where it listens for its neighbours, and under which address (`HOST:PORT`, or just `HOST`) they reach it, if that is
    /// another one. By default a free port on loopback: for members on several machines both must be said.
    #[must_use]
    pub fn listen(mut self, listen: SocketAddr, advertise: Option<String>) -> LauncherOptions {
        self.listen = listen;
        self.advertise = advertise;
        self
    }

    /// How long to try to reach a coordinator, at first and later on when there is nothing to do without one.
    #[must_use]
    pub fn patience(mut self, joining: Duration, later: Duration) -> LauncherOptions {
        self.join_patience = joining;
        self.patience = later;
        self
    }

    /// Calls `callback`, once and on a thread of its own, when this member is to leave.
    #[must_use]
    pub fn on_notice(mut self, callback: impl Fn(Notice) + Send + Sync + 'static) -> LauncherOptions {
        self.on_notice = Some(Arc::new(callback));
        self
    }
}
