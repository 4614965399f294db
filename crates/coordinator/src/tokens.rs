//! The tokens that are let in, as the hashes that a file lists.
//!
//! ```text
//! # JOBS       HASH
//! @operator    64 hexadecimal digits     all jobs, and the server itself
//! digits       64 hexadecimal digits     the job `digits`
//! vision-*     64 hexadecimal digits     every job whose id begins with `vision-`
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reknit_membership::{BadName, JobId};
use reknit_proto::Token;

use crate::access::Identity;
use crate::reload::Unreadable;

/// What stands for operators in the first column.
pub const OPERATOR: &str = "@operator";

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All jobs, and the server itself.
    Operator,
    /// One job.
    Job(JobId),
    /// All jobs whose ids begin so.
    Prefix(String),
}

impl Scope {
    /// What the first column says.
    ///
    /// # Errors
    /// [`BadName`] if it is neither `@operator` nor the id of a job nor the beginning of one with a `*` behind it.
    pub fn new(text: &str) -> Result<Scope, BadName> {
        if text == OPERATOR {
            return Ok(Scope::Operator);
        }
        match text.strip_suffix('*') {
            Some("") => Ok(Scope::Prefix(String::new())),
            Some(prefix) => Ok(Scope::Prefix(JobId::new(prefix)?.as_str().to_owned())),
            None => Ok(Scope::Job(JobId::new(text)?)),
        }
    }

    /// Whether it reaches a job.
    pub fn covers(&self, job: &JobId) -> bool {
        match self {
            Scope::Operator => true,
            Scope::Job(own) => own == job,
            Scope::Prefix(prefix) => job.as_str().starts_with(prefix),
        }
    }
}

/// Why a list of tokens makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokensError {
    /// The file cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// A line names no jobs.
    #[error("{} line {line}: the first word names no jobs", path.display())]
    Jobs {
        /// The file.
        path: PathBuf,
        /// Which of its lines, from 1.
        line: usize,
        /// What is wrong with it.
        source: BadName,
    },
    /// A line has no hash. What it has instead is not repeated: somebody may have put the token itself there.
    #[error("{} line {line}: a line is JOBS HASH, and the hash has 64 hexadecimal digits", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Which of its lines, from 1.
        line: usize,
    },
    /// It lists none: nobody would be let in.
    #[error("{} lists no token: nobody would be let in", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The hash by which a token is listed.
pub fn hash(token: &Token) -> blake3::Hash {
    blake3::hash(token.reveal().as_bytes())
}

/// A new token.
///
/// # Errors
/// If the operating system gives no randomness.
pub fn draw() -> Result<Token, getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(Token::from_random(bytes))
}

/// The list.
#[derive(Debug)]
pub(crate) struct Tokens(Vec<(Scope, blake3::Hash)>);

impl Tokens {
    /// Reads the list that `path` holds.
    pub(crate) fn parse(path: &Path, contents: &[u8]) -> Result<Tokens, TokensError> {
        let path = || path.to_owned();
        let text = String::from_utf8_lossy(contents);
        let mut listed = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_number = at + 1;
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(jobs) = words.next() else { continue };
            let no_hash = || TokensError::Hash { path: path(), line: line_number };
            let digits = words.next().ok_or_else(no_hash)?;
            if words.next().is_some() {
                return Err(no_hash());
            }
            let hash = blake3::Hash::from_hex(digits).map_err(|_| no_hash())?;
            let scope = Scope::new(jobs).map_err(|source| TokensError::Jobs {
                path: path(),
                line: line_number,
                source,
            })?;
            listed.push((scope, hash));
        }
        if listed.is_empty() {
            return Err(TokensError::Empty { path: path() });
        }
        Ok(Tokens(listed))
    }

    /// Whose token it is, if it is anybody's. All hashes are compared, each in constant time: how long it takes says
    /// nothing of how near a guess was.
    pub(crate) fn identity(&self, token: &Token) -> Option<Identity> {
        let shown = hash(token);
        let scopes: Vec<Scope> =
            self.0.iter().filter(|(_, hash)| *hash == shown).map(|(scope, _)| scope.clone()).collect();
        if scopes.contains(&Scope::Operator) {
            return Some(Identity::Operator);
        }
        (!scopes.is_empty()).then(|| Identity::Jobs(Arc::from(scopes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(name: &str) -> Token {
        Token::new(&format!("a-token-for-tests-{name}")).unwrap()
    }

    fn line(jobs: &str, name: &str) -> String {
        format!("{jobs} {}\n", hash(&token(name)).to_hex())
    }

    fn parse(text: &str) -> Result<Tokens, TokensError> {
        Tokens::parse(Path::new("tokens"), text.as_bytes())
    }

    /// Which of some jobs a token reaches.
    fn reaches(tokens: &Tokens, name: &str) -> Option<Vec<&'static str>> {
        let identity = tokens.identity(&token(name))?;
        let jobs = ["a", "ab", "vision-1", "vision"];
        Some(jobs.into_iter().filter(|job| identity.covers(&JobId::new(job).unwrap())).collect())
    }

    #[test]
    fn d8_a_token_is_good_for_what_its_lines_say_and_nothing_else() {
        let text = [
            "# who may do what\n\n",
            &line("a", "a"),
            &line("a", "a-too"),
            &line("vision-*", "vision").replace('\n', "  # and a remark\n"),
            &line("@operator", "operator"),
            &line("a", "both"),
            &line("vision", "both"),
            &line("*", "all"),
        ]
        .concat();
        let tokens = parse(&text).unwrap();
        assert_eq!(reaches(&tokens, "a"), Some(vec!["a"]));
        assert_eq!(reaches(&tokens, "both"), Some(vec!["a", "vision"]));
        assert_eq!(reaches(&tokens, "vision"), Some(vec!["vision-1"]));
        let all = Some(vec!["a", "ab", "vision-1", "vision"]);
        assert_eq!(reaches(&tokens, "operator"), all);
        assert_eq!(reaches(&tokens, "all"), all);
        assert!(matches!(tokens.identity(&token("all")), Some(Identity::Jobs(_))));
        assert_eq!(reaches(&tokens, "unknown"), None);
    }

    #[test]
    fn d9_a_list_that_makes_no_sense_names_the_line_and_repeats_nothing_of_it() {
        let secret = "the-token-itself-by-mistake";
        let texts = [
            format!("a {secret}"),
            format!("a {secret} b"),
            "a".to_owned(),
            line("a/b", "x"),
            line("@nobody", "x"),
            "# nothing".to_owned(),
        ];
        let whys: Vec<String> = texts.iter().map(|text| parse(text).unwrap_err().to_string()).collect();
        assert!(whys.iter().all(|why| !why.contains(secret)), "{whys:?}");
        assert!(whys[0].contains("tokens line 1") && whys[0].contains("64 hexadecimal"), "{}", whys[0]);
        assert!(whys[3].contains("names no jobs") && whys[4].contains("names no jobs"), "{whys:?}");
        assert!(whys[5].contains("nobody would be let in"), "{}", whys[5]);
    }

    #[test]
    fn d9_what_is_kept_of_a_token_is_its_hash() {
        let drawn = draw().unwrap();
        let listed = Tokens(vec![(Scope::Operator, hash(&drawn))]);
        assert!(!format!("{listed:?} {drawn:?}").contains(drawn.reveal()));
        assert_ne!(draw().unwrap().reveal(), drawn.reveal());
    }
}
