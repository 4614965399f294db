//! Getting from other members what a plan says.

use std::io::Read;
use std::io::Write;
use std::time::{Duration, Instant};

use reknit_checkpoint::{ByteRange, Digester, Layout, State, Values, plan, stream};
use reknit_collectives::{AbortHandle, Purpose, Secret, dial};
use reknit_membership::holding::{Fetch, Moved, Resume};
use reknit_membership::world::Peer;
use reknit_membership::{Digest, Generation, MemberId};

use super::{BLOCK_BYTES, Transfer, TransferRequest, VERDICT_YES};
use crate::ring::resolve;

/// How long reaching a source may take.
const DIAL: Duration = Duration::from_secs(10);
/// Ranges that different sources send are cut at multiples of this.
const GRAIN_BYTES: u64 = 1 << 20;
/// The most that structured values may take on the wire. The checkpoint crate's limit is below it.
const VALUES_BYTES_MAX: u64 = 4 << 20;

/// Why a state did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("the world is over")]
    Aborted,
    #[error("member {culprit} did not deliver: {why}")]
    Source { culprit: MemberId, why: String },
}

/// Who asks, and for what.
pub(crate) struct Fetching<'a> {
    pub(crate) member: MemberId,
    pub(crate) generation: Generation,
    pub(crate) secret: &'a Secret,
    pub(crate) resume: Resume,
    pub(crate) abort: &'a AbortHandle,
}

/// Fetches a whole state, striped over all its sources.
pub(crate) fn fetch(
    who: &Fetching<'_>,
    fetch: &Fetch,
    layout: &Layout,
    state: &mut dyn State,
) -> Result<Vec<Moved>, RestoreError> {
    let stripes = plan::stripes(layout.all(), fetch.from.len(), GRAIN_BYTES);
    // All sources are asked before the first is read: they fill their buffers while others are being read.
    let mut transfers = Vec::with_capacity(stripes.len());
    for (index, (source, range)) in fetch.from.iter().zip(stripes).enumerate() {
        // One of them sends the values along, even if the state has no bytes at all.
        let values = index == 0;
        if range.is_empty() && !values {
            continue;
        }
        transfers.push((source, range, values, ask(who, source, range, values)?));
    }
    let mut moved = Vec::with_capacity(transfers.len());
    for (source, range, values, transfer) in transfers {
        moved.push(receive(who, source, range, values, transfer, layout, state)?);
    }
    Ok(moved)
}

fn failed(who: &Fetching<'_>, source: &Peer, why: impl ToString) -> RestoreError {
    if who.abort.is_aborted() {
        return RestoreError::Aborted;
    }
    RestoreError::Source { culprit: source.member, why: why.to_string() }
}

fn ask<'a>(
    who: &Fetching<'a>,
    source: &Peer,
    range: ByteRange,
    values: bool,
) -> Result<Transfer<'a>, RestoreError> {
    let purpose = Purpose::State { member: who.member };
    let deadline = Instant::now() + DIAL;
    let address = resolve(&source.address);
    let stream = dial(address, purpose, who.generation, who.secret, deadline, who.abort)
        .map_err(|why| failed(who, source, why))?;
    let mut transfer = Transfer::new(stream, who.abort).map_err(|why| failed(who, source, why))?;
    let request = TransferRequest { resume: who.resume, start: range.start, end: range.end, values };
    transfer.write_all(&request.encode()).map_err(|why| failed(who, source, why))?;
    Ok(transfer)
}

fn receive(
    who: &Fetching<'_>,
    source: &Peer,
    range: ByteRange,
    values: bool,
    mut transfer: Transfer<'_>,
    layout: &Layout,
    state: &mut dyn State,
) -> Result<Moved, RestoreError> {
    let read = |transfer: &mut Transfer<'_>, into: &mut [u8]| {
        transfer.read_exact(into).map_err(|why| failed(who, source, why))
    };
    let mut verdict = [0];
    read(&mut transfer, &mut verdict)?;
    if verdict[0] != VERDICT_YES {
        return Err(failed(who, source, "it does not hold the state"));
    }
    let mut length = [0; 8];
    read(&mut transfer, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > VALUES_BYTES_MAX || (length > 0 && !values) {
        return Err(failed(who, source, "it sends values of a size that cannot be"));
    }
    let mut digester = Digester::new();
    let mut values_bytes = vec![0; length as usize];
    read(&mut transfer, &mut values_bytes)?;
    digester.update(&values_bytes);
    stream::try_write_range(state, layout, range, |into| {
        for block in into.chunks_mut(BLOCK_BYTES) {
            read(&mut transfer, block)?;
            digester.update(block);
        }
        Ok(())
    })?;
    let mut sent = [0; 16];
    read(&mut transfer, &mut sent)?;
    if values {
        let values: Values = serde_json::from_slice(&values_bytes).map_err(|why| failed(who, source, why))?;
        state.set_values(values);
    }
    Ok(Moved {
        from: source.member,
        bytes: range.len() + length,
        sent: Digest(u128::from_le_bytes(sent)),
        got: digester.finish(),
    })
}
