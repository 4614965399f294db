//! What two members say before a connection is theirs: fixed sizes, four messages, no IO here.
//!
//! ```text
//! dialler                                              listener
//!   Hello   magic, version, purpose, generation,  ──►  (holds it if it has not heard of the generation yet)
//!           claimed ranks or member, nonce
//!                                                 ◄──  Answer   refused(why), or nonce
//!   Proof   keyed hash of Hello and both nonces   ──►
//!                                                 ◄──  Verdict  refused(why), or the listener's own proof
//!   the connection is the callers'                     the connection is in the door's queue
//! ```
//! The dialler proves first: somebody who only scans ports learns nothing that depends on the secret. The secret itself
//! never travels. What follows on the connection is neither encrypted nor signed: the secret keeps strangers and
//! stale generations out, not somebody who can rewrite packets on the way.

use std::fmt;

use reknit_membership::ids::{Generation, MemberId, Rank};

use crate::secret::{Nonce, Proof};

/// Two magic numbers, so that a connection that TCP made with itself is not taken for an answer.
const HELLO_MAGIC: [u8; 4] = *b"rkD1";
const ANSWER_MAGIC: [u8; 4] = *b"rkA1";
const VERSION: u16 = 3;

/// How many bytes each message takes.
pub(crate) const HELLO_BYTES: usize = 40;
pub(crate) const ANSWER_BYTES: usize = 24;
pub(crate) const VERDICT_BYTES: usize = 40;

/// What a connection is for, and who its dialler claims to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The ring.
    Ring {
        /// The dialler's rank.
        from: Rank,
        /// The rank it means to reach: the next one. An address may be another member's by now.
        to: Rank,
    },
    /// Fetching state from a member that has it.
    State {
        /// The dialler.
        member: MemberId,
    },
}

/// Why a listener turned a connection away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefuseReason {
    /// The two sides run different versions of the protocol.
    WrongVersion,
    /// The listener has not opened this generation, not even after a while.
    UnknownGeneration,
    /// The listener is past this generation.
    GenerationOver,
    /// The dialler does not know the generation's secret.
    BadProof,
    /// The listener holds as many connections as it may.
    Busy,
    /// The listener is not the rank that the dialler takes it for, or the dialler not the one before it, or it has the
    /// connection of that one already.
    WrongNeighbour,
}

impl RefuseReason {
    const ALL: [RefuseReason; 6] = [
        RefuseReason::WrongVersion,
        RefuseReason::UnknownGeneration,
        RefuseReason::GenerationOver,
        RefuseReason::BadProof,
        RefuseReason::Busy,
        RefuseReason::WrongNeighbour,
    ];

    /// Whether the same request may succeed a little later.
    pub fn is_retryable(self) -> bool {
        match self {
            RefuseReason::UnknownGeneration | RefuseReason::Busy => true,
            RefuseReason::WrongVersion
            | RefuseReason::GenerationOver
            | RefuseReason::BadProof
            | RefuseReason::WrongNeighbour => false,
        }
    }

    fn code(self) -> u8 {
        match self {
            RefuseReason::WrongVersion => 1,
            RefuseReason::UnknownGeneration => 2,
            RefuseReason::GenerationOver => 3,
            RefuseReason::BadProof => 4,
            RefuseReason::Busy => 5,
            RefuseReason::WrongNeighbour => 6,
        }
    }

    fn from_code(code: u8) -> Option<RefuseReason> {
        RefuseReason::ALL.into_iter().find(|reason| reason.code() == code)
    }
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RefuseReason::WrongVersion => "it speaks another version of the protocol",
            RefuseReason::UnknownGeneration => "it has not opened this generation",
            RefuseReason::GenerationOver => "it is past this generation",
            RefuseReason::BadProof => "it found our proof of the generation's secret wrong",
            RefuseReason::Busy => "it holds as many connections as it may",
            RefuseReason::WrongNeighbour => {
                "it is not our next rank in this generation, or has its neighbour already"
            }
        })
    }
}

/// The first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) purpose: Purpose,
    pub(crate) generation: Generation,
    pub(crate) nonce: Nonce,
}

/// What is wrong with a first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadHello {
    /// Whoever sends it does not mean us.
    Foreign,
    /// One of us, of another version.
    WrongVersion,
}

impl Hello {
    /// ```text
    /// 0 magic "rkD1" | 4 version | 6 kind | 7 zero | 8 generation | 16 from, to: four bytes each, or member | 24 nonce
    /// ```
    pub(crate) fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let (kind, claim) = match self.purpose {
            Purpose::Ring { from, to } => (1, u64::from(from.0) | u64::from(to.0) << 32),
            Purpose::State { member } => (2, member.0),
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&HELLO_MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = kind;
        bytes[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&claim.to_le_bytes());
        bytes[24..].copy_from_slice(&self.nonce);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, BadHello> {
        if !starts_like_ours(bytes) {
            return Err(BadHello::Foreign);
        }
        if bytes[4..6] != VERSION.to_le_bytes() {
            return Err(BadHello::WrongVersion);
        }
        let eight = |at| u64::from_le_bytes(*bytes[at..].first_chunk().expect("the hello is longer"));
        let purpose = match (bytes[6], bytes[7]) {
            (1, 0) => Purpose::Ring { from: Rank(eight(16) as u32), to: Rank((eight(16) >> 32) as u32) },
            (2, 0) => Purpose::State { member: MemberId(eight(16)) },
            _ => return Err(BadHello::Foreign),
        };
        let nonce = *bytes[24..].first_chunk().expect("the hello is longer");
        Ok(Hello { purpose, generation: Generation(eight(8)), nonce })
    }
}

/// Whether what has come so far may still become a hello.
pub(crate) fn starts_like_ours(bytes: &[u8]) -> bool {
    bytes.iter().zip(HELLO_MAGIC).all(|(byte, magic)| *byte == magic)
}

/// The second message. Its layout is the same in every version, so that versions can refuse each other in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Refused(RefuseReason),
    Challenge(Nonce),
}

impl Answer {
    /// ```text
    /// 0 magic "rkA1" | 4 version | 6 zero, or why refused | 7 zero | 8 nonce
    /// ```
    pub(crate) fn to_bytes(self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..4].copy_from_slice(&ANSWER_MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        match self {
            Answer::Refused(reason) => bytes[6] = reason.code(),
            Answer::Challenge(nonce) => bytes[8..].copy_from_slice(&nonce),
        }
        bytes
    }

    /// The answer, or nothing if it is not one of ours.
    pub(crate) fn from_bytes(bytes: &[u8; ANSWER_BYTES]) -> Option<Answer> {
        match (bytes.starts_with(&ANSWER_MAGIC), bytes[6]) {
            (true, 0) => Some(Answer::Challenge(*bytes[8..].first_chunk().expect("the answer is longer"))),
            (true, code) => RefuseReason::from_code(code).map(Answer::Refused),
            (false, _) => None,
        }
    }
}

/// The fourth message; the third is nothing but the dialler's [`Proof`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Refused(RefuseReason),
    Accepted(Proof),
}

impl Verdict {
    /// ```text
    /// 0 zero, or why refused | 1 zeros | 8 the listener's proof
    /// ```
    pub(crate) fn to_bytes(self) -> [u8; VERDICT_BYTES] {
        let mut bytes = [0; VERDICT_BYTES];
        match self {
            Verdict::Refused(reason) => bytes[0] = reason.code(),
            Verdict::Accepted(proof) => bytes[8..].copy_from_slice(proof.as_bytes()),
        }
        bytes
    }

    /// The verdict, or nothing if it is not one of ours.
    pub(crate) fn from_bytes(bytes: &[u8; VERDICT_BYTES]) -> Option<Verdict> {
        match bytes[0] {
            0 => Some(Verdict::Accepted(Proof::from_bytes(
                *bytes[8..].first_chunk().expect("the verdict is longer"),
            ))),
            code => RefuseReason::from_code(code).map(Verdict::Refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello {
        purpose: Purpose::State { member: MemberId(0x0123_4567_89ab_cdef) },
        generation: Generation(42),
        nonce: [9; 16],
    };

    #[test]
    fn every_message_says_itself_again() {
        let ring = Hello { purpose: Purpose::Ring { from: Rank(u32::MAX), to: Rank(3) }, ..HELLO };
        assert_eq!(Hello::from_bytes(&HELLO.to_bytes()), Ok(HELLO));
        assert_eq!(Hello::from_bytes(&ring.to_bytes()), Ok(ring));
        let answers = RefuseReason::ALL.map(Answer::Refused);
        for answer in answers.into_iter().chain([Answer::Challenge([7; 16])]) {
            assert_eq!(Answer::from_bytes(&answer.to_bytes()), Some(answer));
        }
        let verdicts = RefuseReason::ALL.map(Verdict::Refused);
        for verdict in verdicts.into_iter().chain([Verdict::Accepted(Proof::from_bytes([5; 32]))]) {
            assert_eq!(Verdict::from_bytes(&verdict.to_bytes()), Some(verdict));
        }
    }

    #[test]
    fn a_foreign_hello_is_told_from_one_of_another_version() {
        let mut other_version = HELLO.to_bytes();
        other_version[4] += 1;
        assert_eq!(Hello::from_bytes(&other_version), Err(BadHello::WrongVersion));
        let foreign = *b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n\r\n\r";
        assert_eq!(Hello::from_bytes(&foreign), Err(BadHello::Foreign));
        let mut of_no_kind = HELLO.to_bytes();
        of_no_kind[6] = 3;
        assert_eq!(Hello::from_bytes(&of_no_kind), Err(BadHello::Foreign));
    }

    #[test]
    fn a_foreign_start_is_noticed_at_its_first_byte() {
        assert!(starts_like_ours(b"") && starts_like_ours(b"rk") && starts_like_ours(b"rkD1..."));
        assert!(!starts_like_ours(b"G") && !starts_like_ours(b"rkE1"));
    }
}
