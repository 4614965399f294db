//! What a rank calls, and how it says so at the start of its stream, so that ranks that call different things find out
//! before they add one number to another.

use std::fmt;

use reknit_membership::ids::Rank;

use crate::element::DType;
use crate::reduce::ReduceOp;
use crate::schedule::Pattern;

/// Which collective, over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    /// `all_reduce` or `all_reduce_into`: they may meet.
    AllReduce {
        /// The elements' type.
        dtype: DType,
        /// How they are combined.
        op: ReduceOp,
    },
    /// `reduce_scatter`.
    ReduceScatter {
        /// The elements' type.
        dtype: DType,
        /// How they are combined.
        op: ReduceOp,
    },
    /// `all_gather`.
    AllGather {
        /// The elements' type.
        dtype: DType,
    },
    /// `broadcast`.
    Broadcast {
        /// The elements' type.
        dtype: DType,
        /// Whose elements.
        root: Rank,
    },
    /// `barrier`.
    Barrier,
    /// `buffer`.
    Buffer {
        /// The elements' type.
        dtype: DType,
    },
    /// `all_reduce_buffer` in shared memory; elsewhere it is an `all_reduce`.
    AllReduceBuffer {
        /// The elements' type.
        dtype: DType,
        /// How they are combined.
        op: ReduceOp,
        /// The how-manieth buffer of its group it is, counted from zero.
        buffer: u32,
    },
}

impl CallKind {
    /// In which order its elements move.
    pub(crate) fn pattern(self) -> Pattern {
        match self {
            CallKind::AllReduce { .. } | CallKind::AllReduceBuffer { .. } => Pattern::AllReduce,
            CallKind::ReduceScatter { .. } => Pattern::ReduceScatter,
            CallKind::AllGather { .. } => Pattern::AllGather,
            CallKind::Broadcast { root, .. } => Pattern::Broadcast { root },
            CallKind::Barrier | CallKind::Buffer { .. } => Pattern::Barrier,
        }
    }

    /// How it combines elements, if it does.
    pub(crate) fn op(self) -> Option<ReduceOp> {
        match self {
            CallKind::AllReduce { op, .. }
            | CallKind::ReduceScatter { op, .. }
            | CallKind::AllReduceBuffer { op, .. } => Some(op),
            CallKind::AllGather { .. }
            | CallKind::Broadcast { .. }
            | CallKind::Barrier
            | CallKind::Buffer { .. } => None,
        }
    }
}

/// One call of one collective. All ranks must make the same calls in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The how-manieth collective of its group it is, counted from zero.
    pub sequence: u64,
    /// Which collective.
    pub kind: CallKind,
    /// Over how many elements, all parts together.
    pub count: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Call { sequence, kind, count } = self;
        match kind {
            CallKind::AllReduce { dtype, op } => {
                write!(f, "all_reduce #{sequence} ({op}) of {count} {dtype}")
            }
            CallKind::ReduceScatter { dtype, op } => {
                write!(f, "reduce_scatter #{sequence} ({op}) of {count} {dtype}")
            }
            CallKind::AllGather { dtype } => write!(f, "all_gather #{sequence} of {count} {dtype}"),
            CallKind::Broadcast { dtype, root } => {
                write!(f, "broadcast #{sequence} from rank {root} of {count} {dtype}")
            }
            CallKind::Barrier => write!(f, "barrier #{sequence}"),
            CallKind::Buffer { dtype } => write!(f, "buffer #{sequence} of {count} {dtype}"),
            CallKind::AllReduceBuffer { dtype, op, buffer } => {
                write!(f, "all_reduce_buffer #{sequence} ({op}) of buffer {buffer} of {count} {dtype}")
            }
        }
    }
}

/// How many bytes a header takes.
pub(crate) const HEADER_BYTES: usize = 32;
/// Which of them says that the stream has no control words, which is only so to measure what they cost.
pub(crate) const WORDLESS_AT: usize = 7;
const MAGIC: [u8; 4] = *b"rkC1";

impl Call {
    /// The header with which `rank` starts its stream of this call.
    ///
    /// ```text
    /// 0 magic "rkC1" | 4 kind | 5 dtype | 6 op | 7 zero, or 1 without words | 8 sequence | 16 count | 24 root or buffer | 28 sender's rank
    /// ```
    pub(crate) fn header(&self, rank: Rank) -> [u8; HEADER_BYTES] {
        let (kind, dtype, op, root) = match self.kind {
            CallKind::AllReduce { dtype, op } => (1, dtype.code(), op.code(), 0),
            CallKind::ReduceScatter { dtype, op } => (2, dtype.code(), op.code(), 0),
            CallKind::AllGather { dtype } => (3, dtype.code(), 0, 0),
            CallKind::Broadcast { dtype, root } => (4, dtype.code(), 0, root.0),
            CallKind::Barrier => (5, 0, 0, 0),
            CallKind::Buffer { dtype } => (6, dtype.code(), 0, 0),
            CallKind::AllReduceBuffer { dtype, op, buffer } => (7, dtype.code(), op.code(), buffer),
        };
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&MAGIC);
        header[4..8].copy_from_slice(&[kind, dtype, op, 0]);
        header[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        header[16..24].copy_from_slice(&self.count.to_le_bytes());
        header[24..28].copy_from_slice(&root.to_le_bytes());
        header[28..].copy_from_slice(&rank.0.to_le_bytes());
        header
    }

    /// The call and the sender that a header speaks of, if it is one.
    pub(crate) fn from_header(header: &[u8; HEADER_BYTES]) -> Option<(Call, Rank)> {
        let eight = |at| u64::from_le_bytes(*header[at..].first_chunk().expect("the header is longer"));
        let four = |at| u32::from_le_bytes(*header[at..].first_chunk().expect("the header is longer"));
        let dtype = || DType::from_code(header[5]);
        let op = || ReduceOp::from_code(header[6]);
        let root = Rank(four(24));
        let kind = match header[4] {
            1 => CallKind::AllReduce { dtype: dtype()?, op: op()? },
            2 => CallKind::ReduceScatter { dtype: dtype()?, op: op()? },
            3 => CallKind::AllGather { dtype: dtype()? },
            4 => CallKind::Broadcast { dtype: dtype()?, root },
            5 => CallKind::Barrier,
            6 => CallKind::Buffer { dtype: dtype()? },
            7 => CallKind::AllReduceBuffer { dtype: dtype()?, op: op()?, buffer: four(24) },
            _ => return None,
        };
        let call = Call { sequence: eight(8), kind, count: eight(16) };
        let sender = Rank(four(28));
        // Writing it again finds every byte that has no meaning in this kind of call.
        (call.header(sender) == *header).then_some((call, sender))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls() -> Vec<Call> {
        let mut kinds = vec![CallKind::Barrier];
        for dtype in DType::ALL {
            kinds.push(CallKind::AllGather { dtype });
            kinds.push(CallKind::Broadcast { dtype, root: Rank(7) });
            kinds.push(CallKind::Buffer { dtype });
            for op in ReduceOp::ALL {
                kinds.push(CallKind::AllReduce { dtype, op });
                kinds.push(CallKind::ReduceScatter { dtype, op });
                kinds.push(CallKind::AllReduceBuffer { dtype, op, buffer: 5 });
            }
        }
        kinds.into_iter().map(|kind| Call { sequence: 3, kind, count: 1 << 40 }).collect()
    }

    #[test]
    fn a_header_says_the_call_again_and_no_two_calls_share_one() {
        let mut seen = std::collections::BTreeSet::new();
        for call in calls() {
            let header = call.header(Rank(9));
            assert_eq!(Call::from_header(&header), Some((call, Rank(9))));
            assert!(seen.insert(header), "{call} looks like another call");
        }
    }

    #[test]
    fn a_header_with_one_wrong_byte_is_another_call_or_none() {
        for call in calls() {
            for at in 0..HEADER_BYTES {
                let mut header = call.header(Rank(9));
                header[at] ^= 0x40;
                assert_ne!(Call::from_header(&header), Some((call, Rank(9))), "{call}, byte {at}");
            }
        }
    }

    #[test]
    fn a_call_reads_as_a_sentence() {
        let kind = CallKind::AllReduce { dtype: DType::Bf16, op: ReduceOp::Mean };
        assert_eq!(Call { sequence: 4, kind, count: 9 }.to_string(), "all_reduce #4 (mean) of 9 bf16");
    }
}
