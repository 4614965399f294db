//! Who asks, and what they may touch.
//!
//! Every call of the three services passes here first; health and reflection are open to whoever can connect, for they
//! say nothing of any job.

use std::sync::Arc;
use std::time::Instant;

use reknit_membership::JobId;
use reknit_proto::Token;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::listen::Peer;
use crate::reload::Current;
use crate::tokens::{Scope, Tokens};

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// There are no tokens on this server: whoever can connect may do everything.
    Everyone,
    /// Somebody who may do everything.
    Operator,
    /// Somebody to whom only some jobs exist.
    Jobs(Arc<[Scope]>),
}

impl Identity {
    /// Who sent this request.
    pub(crate) fn of<T>(request: &Request<T>) -> Identity {
        // A request that did not pass the guard may touch nothing.
        request.extensions().get().cloned().unwrap_or_else(|| Identity::Jobs(Arc::from([])))
    }

    /// Whether a job is theirs.
    pub(crate) fn covers(&self, job: &JobId) -> bool {
        match self {
            Identity::Everyone | Identity::Operator => true,
            Identity::Jobs(scopes) => scopes.iter().any(|scope| scope.covers(job)),
        }
    }

    /// Whether what concerns the server as a whole is theirs to know.
    pub(crate) fn operates_server(&self) -> bool {
        matches!(self, Identity::Everyone | Identity::Operator)
    }

    /// What a job that is not theirs is answered with. It says nothing of whether there is one.
    pub(crate) fn check(&self, job: &JobId) -> Result<(), Status> {
        if self.covers(job) {
            return Ok(());
        }
        Err(Status::permission_denied(format!(
            "this token is not for the job {job}; use that job's own, or an operator's"
        )))
    }
}

/// What each call passes: it is counted, and gets an [`Identity`].
#[derive(Clone)]
pub(crate) struct Guard {
    tokens: Option<Current<Tokens>>,
}

impl Guard {
    /// Lets in who shows one of these tokens; if there is no list, everybody.
    pub(crate) fn new(tokens: Option<Current<Tokens>>) -> Guard {
        Guard { tokens }
    }

    fn identify(&self, request: &Request<()>) -> Result<Identity, Status> {
        let Some(tokens) = &self.tokens else { return Ok(Identity::Everyone) };
        let shown = Token::shown(request.metadata()).map_err(|why| {
            Status::unauthenticated(format!("what was shown is no token ({why}); {HOW_TO_SHOW}"))
        })?;
        let shown = shown.ok_or_else(|| {
            Status::unauthenticated(format!("this coordinator asks for a token; {HOW_TO_SHOW}"))
        })?;
        tokens.get().identity(&shown).ok_or_else(|| {
            Status::unauthenticated(format!(
                "this coordinator does not know the token that was shown; it may have been replaced; {HOW_TO_SHOW}"
            ))
        })
    }
}

const HOW_TO_SHOW: &str = "name a file that holds it with --token-file or REKNIT_TOKEN_FILE, or set REKNIT_TOKEN; \
                           `reknit token` makes one for the coordinator's --tokens";

impl Interceptor for Guard {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(peer) = request.extensions().get::<Peer>()
            && !peer.may_call(Instant::now())
        {
            return Err(Status::resource_exhausted(
                "this connection makes more calls a second than it may; make fewer, or wait a moment",
            ));
        }
        let identity = self.identify(&request).inspect_err(|why| {
            let peer = request.extensions().get::<Peer>().map(Peer::address);
            tracing::debug!(?peer, why = why.message(), "a call is not let in");
        })?;
        request.extensions_mut().insert(identity);
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d8_a_job_that_is_there_and_one_that_is_not_are_denied_alike_and_who_passed_no_guard_sees_nothing() {
        let own = Identity::Jobs(Arc::from([Scope::new("own").unwrap()]));
        let job = JobId::new("other").unwrap();
        let denied = own.check(&job).unwrap_err();
        assert_eq!(denied.code(), tonic::Code::PermissionDenied);
        assert!(own.check(&JobId::new("own").unwrap()).is_ok());
        let unguarded = Identity::of(&Request::new(()));
        assert!(!unguarded.covers(&job) && !unguarded.operates_server());
    }

    #[test]
    fn without_a_list_of_tokens_everybody_is_let_in() {
        let request = Guard::new(None).call(Request::new(())).unwrap();
        assert_eq!(Identity::of(&request), Identity::Everyone);
    }
}
