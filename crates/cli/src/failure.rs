//! How a command fails: with one line that says what, one `hint:` line that says what to do, and an exit code that says
//! of which kind it is.

use std::process::ExitCode;

use reknit_coordinator::ServeError;
use reknit_coordinator::etcd::EtcdError;
use reknit_coordinator::store::OpenError;
use reknit_coordinator::tokens::TokensError;
use reknit_trainer::credentials::{CredentialsError, TlsTrouble};
use tonic::Code;

use crate::print;

/// What kind of failure it was. The numbers are a promise to scripts; `reknit --help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Failed = 1,
    Usage = 2,
    Unreachable = 3,
    NotFound = 4,
    WrongState = 5,
    InUse = 6,
    NotAllowed = 7,
}

#[derive(Debug)]
pub(crate) struct Failure {
    kind: Kind,
    error: anyhow::Error,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, error: impl Into<anyhow::Error>, hint: impl Into<String>) -> Failure {
        Failure { kind, error: error.into(), hint: Some(hint.into()) }
    }

    pub(crate) fn report(&self) -> ExitCode {
        print::talk(format_args!("error: {:#}", self.error));
        if let Some(hint) = &self.hint {
            print::talk(format_args!("hint: {hint}"));
        }
        ExitCode::from(self.kind as u8)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure { kind: Kind::Failed, error, hint: None }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        anyhow::Error::from(error).into()
    }
}

/// Data that could not be written.
pub(crate) fn output(why: &std::io::Error) -> Failure {
    let error = anyhow::anyhow!("the output cannot be written: {why}");
    Failure::new(Kind::Failed, error, "what was written is not all of it")
}

/// A call that the coordinator answered with an error, or that did not reach it.
pub(crate) fn call(status: &tonic::Status, coordinator: &str) -> Failure {
    if let Some(trouble) = TlsTrouble::of(status) {
        return distrust(trouble, coordinator);
    }
    let error = anyhow::anyhow!("{}", status.message());
    // What the coordinator says has nothing beneath it; what happened on the way to it has.
    if let Some(why) = std::error::Error::source(status) {
        return unreachable(coordinator, anyhow::anyhow!("{}", root(why)));
    }
    let (kind, hint) = match status.code() {
        Code::NotFound => {
            (Kind::NotFound, "`reknit status` lists the jobs, `reknit status JOB` a job's members")
        }
        Code::FailedPrecondition => (Kind::WrongState, "`reknit status JOB` shows what state it is in"),
        Code::Unauthenticated => (
            Kind::NotAllowed,
            "see --token-file and REKNIT_TOKEN_FILE; `reknit help token` says how tokens are made",
        ),
        Code::PermissionDenied => (Kind::NotAllowed, "`reknit status` lists the jobs that this token is for"),
        Code::InvalidArgument => (Kind::Usage, "`reknit help COMMAND` shows what it takes"),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
            (Kind::Failed, "try again in a moment; the coordinator's log says more")
        }
        _ => (Kind::Failed, "the coordinator's log says more"),
    };
    Failure::new(kind, error, hint)
}

pub(crate) fn unreachable(coordinator: &str, error: anyhow::Error) -> Failure {
    if let Some(trouble) = TlsTrouble::of(error.as_ref()) {
        return distrust(trouble, coordinator);
    }
    let hint = "see whether `reknit serve` runs there and is well, or name another coordinator with --coordinator or \
                REKNIT_COORDINATOR; the address of one that speaks TLS begins with https://, of one that does not \
                with http://";
    // What lies between says nothing to whoever reads it.
    let error = anyhow::anyhow!("no coordinator answers at {coordinator}: {}", error.root_cause());
    Failure::new(Kind::Unreachable, error, hint)
}

/// A coordinator that is there, and one of the two does not trust the other.
fn distrust(trouble: TlsTrouble, coordinator: &str) -> Failure {
    let kind = if trouble.is_own() { Kind::NotAllowed } else { Kind::Unreachable };
    Failure::new(kind, anyhow::anyhow!("cannot talk to {coordinator}: {trouble}"), trouble.hint())
}

/// What is to be shown to a coordinator makes no sense.
pub(crate) fn credentials(why: CredentialsError) -> Failure {
    let hint = why.hint();
    Failure::new(Kind::Usage, why, hint)
}

fn root<'e>(why: &'e (dyn std::error::Error + 'static)) -> &'e (dyn std::error::Error + 'static) {
    std::iter::successors(Some(why), |why| why.source()).last().unwrap_or(why)
}

/// A coordinator that cannot serve.
pub(crate) fn serve(why: ServeError) -> Failure {
    let (kind, hint) = match &why {
        ServeError::PortInUse { .. } => {
            (Kind::InUse, "another coordinator may run there already; choose another port with --listen")
        }
        ServeError::Listen { .. } => (Kind::Failed, "choose an address of this machine with --listen"),
        ServeError::NotLoopback { .. } => {
            let hint = "give --tls-cert, --tls-key and --tokens (`reknit certs` and `reknit token` make them), listen on \
                        127.0.0.1, or say --insecure if everybody who can reach it may use it";
            (Kind::Usage, hint)
        }
        ServeError::ListenForTorchrun { .. } => {
            (Kind::Failed, "choose a free address of this machine with --torchelastic")
        }
        ServeError::OpenToAll { .. } => {
            let hint = "name the networks that may connect with --torchelastic-allow (10.0.0.0/8, say), listen on \
                        127.0.0.1, or say --insecure if everybody who can reach it may run code on the agents' machines";
            (Kind::Usage, hint)
        }
        ServeError::Tls(why) => (Kind::Failed, why.hint()),
        ServeError::Tokens(TokensError::Unreadable(_)) => (
            Kind::Failed,
            "name a file that this user may read with --tokens; `reknit token` makes its lines",
        ),
        ServeError::Tokens(_) => (Kind::Failed, "its lines are `JOBS HASH`, as `reknit token` prints them"),
        ServeError::Timing(_) => (Kind::Usage, "choose another --silence"),
        ServeError::Store(OpenError::InUse { .. }) => {
            (Kind::InUse, "stop the other coordinator, or choose another directory with --store")
        }
        ServeError::Store(OpenError::Directory { .. }) => {
            (Kind::Failed, "choose a directory that can be written with --store")
        }
        ServeError::Etcd(why) => match why {
            EtcdError::Unreachable { .. } => (
                Kind::Unreachable,
                "see whether etcd runs there (`etcdctl endpoint status`), and whether it wants etcds://",
            ),
            EtcdError::Denied(_) => (
                Kind::Failed,
                "give a user that may read and write below the prefix, with --etcd-user and --etcd-password-file",
            ),
            EtcdError::Full(_) => (
                Kind::Failed,
                "make room in etcd (`etcdctl compact`, `etcdctl defrag`), then `etcdctl alarm disarm`",
            ),
            EtcdError::TooOld(_) => (Kind::Failed, "use etcd 3.4 or newer"),
            EtcdError::Newer { .. } => (
                Kind::Failed,
                "use a newer release of reknit, or another prefix (--store etcd://HOST:2379/PREFIX)",
            ),
            EtcdError::File { .. } => {
                (Kind::Usage, "see --etcd-ca, --etcd-cert, --etcd-key and --etcd-password-file")
            }
            _ => (Kind::Failed, "etcd's log says more"),
        },
        ServeError::Record { .. } => (Kind::Usage, "choose a file that can be written with --record"),
        ServeError::Store(_) | ServeError::Records(_) => {
            (Kind::Failed, "put the file back from a backup, or begin anew with another directory (--store)")
        }
        _ => (Kind::Failed, "the log above says more"),
    };
    Failure::new(kind, why, hint)
}

/// A command line that is wrong, or a request for help.
pub(crate) fn usage(why: &clap::Error) -> ExitCode {
    // clap knows which of the two it is, and where it goes.
    let _ = why.print();
    if why.use_stderr() { ExitCode::from(Kind::Usage as u8) } else { ExitCode::SUCCESS }
}
