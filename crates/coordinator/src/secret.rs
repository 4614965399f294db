//! The secrets of a job's generations. One secret per job is drawn at random and saved with its record; those of its
//! generations are derived from it, so that a restarted coordinator tells members the same ones.

use reknit_membership::Generation;
use reknit_proto::rendezvous::SecretBytes;

/// What the secrets of a job's generations are derived from. Never leaves the coordinator and its store.
#[derive(Clone, PartialEq, Eq)]
pub struct JobSecret(SecretBytes);

impl std::fmt::Debug for JobSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobSecret(..)")
    }
}

impl JobSecret {
    /// A new one.
    ///
    /// # Errors
    /// If the operating system gives no randomness.
    pub fn draw() -> Result<JobSecret, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(JobSecret(bytes))
    }

    /// The one that a record was saved with.
    pub fn from_bytes(bytes: SecretBytes) -> JobSecret {
        JobSecret(bytes)
    }

    /// To save it with the record.
    pub fn as_bytes(&self) -> &SecretBytes {
        &self.0
    }

    /// What connections between members of `generation` must prove to know.
    pub fn of(&self, generation: Generation) -> SecretBytes {
        let mut input = *b"reknit data plane of generation \0\0\0\0\0\0\0\0";
        input[32..].copy_from_slice(&generation.0.to_le_bytes());
        *blake3::keyed_hash(&self.0, &input).as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_generation_has_a_secret_of_its_own_that_a_restart_finds_again() {
        let secret = JobSecret::draw().unwrap();
        let again = JobSecret::from_bytes(*secret.as_bytes());
        assert_eq!(secret.of(Generation(1)), again.of(Generation(1)));
        assert_ne!(secret.of(Generation(1)), secret.of(Generation(2)));
        assert_ne!(secret.of(Generation(1)), JobSecret::draw().unwrap().of(Generation(1)));
        assert_eq!(format!("{secret:?}"), "JobSecret(..)");
    }
}
