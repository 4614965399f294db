//! The secret of a generation, and proving that one knows it without saying it.

use std::{fmt, io};

use blake3::Hash;
use rustix::rand::{GetRandomFlags, getrandom};

/// What only the members of one generation know: the coordinator draws it at random for every world.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// The secret that consists of these bytes.
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The bytes, to be carried in a world message. They appear in no log and on no data-plane connection.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What `side` answers to the other side's nonce: only who knows the secret can compute it.
    ///
    /// `hello` is all the dialler said, its own nonce included: so a proof is good for one connection, one direction,
    /// one purpose and one claimed identity.
    pub(crate) fn proof(&self, side: Side, hello: &[u8], nonce: &[u8]) -> Proof {
        let label: &[u8] = match side {
            Side::Dialler => b"reknit data plane, dialler\0\0",
            Side::Listener => b"reknit data plane, listener\0",
        };
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(label).update(hello).update(nonce);
        Proof(hasher.finalize())
    }
}

impl PartialEq for Secret {
    /// Takes the same time wherever the two differ.
    fn eq(&self, other: &Secret) -> bool {
        Hash::from_bytes(self.0) == Hash::from_bytes(other.0)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Who proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Dialler,
    Listener,
}

/// An answer to a nonce. Comparing two takes the same time wherever they differ: that is how [`Hash`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Proof(Hash);

impl Proof {
    pub(crate) const BYTES: usize = 32;

    pub(crate) fn from_bytes(bytes: [u8; Proof::BYTES]) -> Proof {
        Proof(Hash::from_bytes(bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; Proof::BYTES] {
        self.0.as_bytes()
    }
}

/// One side's random contribution to a handshake: what makes every proof a new one.
pub(crate) type Nonce = [u8; 16];

/// A nonce that nobody can foresee.
pub(crate) fn fresh_nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    // The kernel hands out so few bytes whole or not at all.
    getrandom(&mut nonce, GetRandomFlags::empty())?;
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed() {
        assert_eq!(format!("{:?}", Secret::new([7; 32])), "Secret(..)");
    }

    #[test]
    fn a_proof_depends_on_everything_it_speaks_for() {
        let secret = Secret::new([7; 32]);
        let proof = secret.proof(Side::Dialler, b"hello", b"nonce");
        assert_eq!(proof, Secret::new([7; 32]).proof(Side::Dialler, b"hello", b"nonce"));
        assert_ne!(proof, Secret::new([8; 32]).proof(Side::Dialler, b"hello", b"nonce"));
        assert_ne!(proof, secret.proof(Side::Listener, b"hello", b"nonce"));
        assert_ne!(proof, secret.proof(Side::Dialler, b"hallo", b"nonce"));
        assert_ne!(proof, secret.proof(Side::Dialler, b"hello", b"nance"));
    }

    #[test]
    fn secrets_are_equal_if_all_bytes_are() {
        assert_eq!(Secret::new([7; 32]), Secret::new([7; 32]));
        let mut other = [7; 32];
        other[31] = 8;
        assert_ne!(Secret::new([7; 32]), Secret::new(other));
    }
}
