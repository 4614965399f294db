//! `reknit token`.

use reknit_coordinator::tokens::{self, OPERATOR, Scope};

use crate::args::Token;
use crate::failure::{Failure, Kind};
use crate::print;

/// The token is data. All that is talked about it can be appended to the list of tokens as it is.
pub(crate) fn token(args: &Token) -> Result<(), Failure> {
    let jobs = args.jobs.as_deref().unwrap_or(OPERATOR);
    Scope::new(jobs).map_err(|why| {
        let error = anyhow::Error::from(why).context(format!("{jobs:?} names no jobs"));
        Failure::new(
            Kind::Usage,
            error,
            "name a job, or the beginning of some jobs' names and a `*`, like 'vision-*'",
        )
    })?;
    let token = tokens::draw().map_err(anyhow::Error::from)?;
    print::talk(format_args!("# a line for the file that `reknit serve --tokens` names"));
    print::talk(format_args!("{jobs} {}", tokens::hash(&token).to_hex()));
    print::data(format_args!("{}", token.reveal()));
    Ok(())
}
