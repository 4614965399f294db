//! Getting from other members what a plan says.

use std::io::Read;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reknit_checkpoint::{ByteRange, Digester, Layout, State, Values, plan, stream};
use reknit_collectives::{AbortHandle, DialError, Purpose, Secret, dial};
use reknit_membership::holding::{Fetch, Moved, Resume};
use reknit_membership::world::Peer;
use reknit_membership::{Digest, Generation, MemberId};

use super::{BLOCK_BYTES, Transfer, TransferRequest, VERDICT_YES};
use crate::hub::lock;
use crate::ring::resolve;

/// How long reaching a source may take.
const DIAL: Duration = Duration::from_secs(10);
/// Ranges that different sources send are cut at multiples of this.
const GRAIN_BYTES: u64 = 1 << 20;
/// How many bytes one thread receives before it looks whether another one has failed.
const BLOCKS_BYTES: usize = 16 << 20;
/// The most that structured values may take on the wire: what the checkpoint crate allows, as text with every byte escaped.
const VALUES_BYTES_MAX: u64 = 8 << 20;

/// Why a state did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("the world is over")]
    Aborted,
    #[error("member {culprit} did not deliver: {why}")]
    Source { culprit: MemberId, why: String },
    /// This process is short of something: no source is to blame.
    #[error("the operating system refuses: {0}")]
    System(std::io::Error),
}

/// Who asks, and for what.
pub(crate) struct Fetching<'a> {
    pub(crate) member: MemberId,
    pub(crate) generation: Generation,
    pub(crate) secret: &'a Secret,
    pub(crate) resume: Resume,
    pub(crate) abort: &'a AbortHandle,
}

/// What one source is to send.
struct Stripe<'a> {
    source: &'a Peer,
    range: ByteRange,
    /// Whether the values come along.
    values: bool,
}

/// Fetches a whole state, striped over all its sources.
pub(crate) fn fetch(
    who: &Fetching<'_>,
    fetch: &Fetch,
    layout: &Layout,
    state: &mut dyn State,
) -> Result<Vec<Moved>, RestoreError> {
    let ranges = plan::stripes(layout.all(), fetch.from.len(), GRAIN_BYTES);
    // One of the sources sends the values along, even if the state has no bytes at all.
    let all = fetch.from.iter().zip(ranges).zip(0..);
    let stripes = all.map(|((source, range), index)| Stripe { source, range, values: index == 0 });
    let stripes: Vec<Stripe<'_>> =
        stripes.filter(|stripe| stripe.values || !stripe.range.is_empty()).collect();
    let ranges: Vec<ByteRange> = stripes.iter().map(|stripe| stripe.range).collect();
    let arrived = match stream::split_mut(state, layout, &ranges) {
        Some(places) => {
            // All sources are asked before the first is read: they fill their buffers meanwhile.
            let asked = stripes.into_iter().zip(places).map(|(stripe, places)| {
                let transfer = ask(who, &stripe)?;
                Ok((stripe, transfer, places))
            });
            receive_together(who, asked.collect::<Result<_, _>>()?)?
        }
        None => {
            // One after the other, so nobody is asked before it is read: no source waits with full buffers for long.
            let one = |stripe: Stripe<'_>| {
                let (transfer, range) = (ask(who, &stripe)?, stripe.range);
                receive(who, stripe, transfer, |take| stream::try_write_range(state, layout, range, take))
            };
            stripes.into_iter().map(one).collect::<Result<_, _>>()?
        }
    };
    let mut moved = Vec::with_capacity(arrived.len());
    for (part, values) in arrived {
        moved.push(part);
        values.into_iter().for_each(|values| state.set_values(values));
    }
    Ok(moved)
}

/// What has arrived from one source: its bytes are where they belong, its values are here.
type Arrived = (Moved, Option<Values>);

/// A stripe that was asked for, and where its bytes belong.
type Placed<'a> = (Stripe<'a>, Transfer<'a>, Vec<&'a mut [u8]>);

/// Receives from all sources at once, each stripe on a thread of its own as far as there are threads to be had.
fn receive_together(who: &Fetching<'_>, stripes: Vec<Placed<'_>>) -> Result<Vec<Arrived>, RestoreError> {
    let more = stripes.len().saturating_sub(1);
    let waiting = Mutex::new(stripes.into_iter());
    let outcome = Mutex::new(Ok(Vec::with_capacity(more + 1)));
    let work = || {
        loop {
            let Some((stripe, transfer, places)) = lock(&waiting).next() else { return };
            let is_over = || lock(&outcome).is_err();
            let fill = |take: &mut Take<'_>| {
                for place in places.into_iter().flat_map(|place| place.chunks_mut(BLOCKS_BYTES)) {
                    if is_over() {
                        // Another source has failed: nothing that still arrives is of use.
                        return Err(RestoreError::Aborted);
                    }
                    take(place)?;
                }
                Ok(())
            };
            let received = receive(who, stripe, transfer, fill);
            let mut outcome = lock(&outcome);
            match (&mut *outcome, received) {
                (Ok(arrived), Ok(more)) => arrived.push(more),
                (Ok(_), Err(why)) => *outcome = Err(why),
                (Err(_), _) => return,
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..more {
            let thread = std::thread::Builder::new().name("reknit-fetch".to_owned());
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn failed(who: &Fetching<'_>, source: &Peer, why: impl ToString) -> RestoreError {
    if who.abort.is_aborted() {
        return RestoreError::Aborted;
    }
    RestoreError::Source { culprit: source.member, why: why.to_string() }
}

fn ask<'a>(who: &Fetching<'a>, stripe: &Stripe<'_>) -> Result<Transfer<'a>, RestoreError> {
    let Stripe { source, range, values } = *stripe;
    let purpose = Purpose::State { member: who.member };
    let deadline = Instant::now() + DIAL;
    let address = resolve(&source.address);
    let stream =
        dial(address, purpose, who.generation, who.secret, deadline, who.abort).map_err(|why| match why {
            DialError::System { source } => RestoreError::System(source),
            why => failed(who, source, why),
        })?;
    let mut transfer = Transfer::new(stream, who.abort).map_err(RestoreError::System)?;
    let request = TransferRequest { resume: who.resume, start: range.start, end: range.end, values };
    transfer.write_all(&request.encode()).map_err(|why| failed(who, source, why))?;
    Ok(transfer)
}

/// Fills one place of the state with what comes next.
type Take<'t> = dyn FnMut(&mut [u8]) -> Result<(), RestoreError> + 't;

/// Receives one stripe. `fill` hands over its places, one after the other.
fn receive(
    who: &Fetching<'_>,
    stripe: Stripe<'_>,
    mut transfer: Transfer<'_>,
    fill: impl FnOnce(&mut Take<'_>) -> Result<(), RestoreError>,
) -> Result<Arrived, RestoreError> {
    let Stripe { source, range, values } = stripe;
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
    fill(&mut |into| {
        for block in into.chunks_mut(BLOCK_BYTES) {
            read(&mut transfer, block)?;
            digester.update(block);
        }
        Ok(())
    })?;
    let mut sent = [0; 16];
    read(&mut transfer, &mut sent)?;
    let values: Option<Values> = match values {
        true => Some(serde_json::from_slice(&values_bytes).map_err(|why| failed(who, source, why))?),
        false => None,
    };
    let moved = Moved {
        from: source.member,
        bytes: range.len() + length,
        sent: Digest(u128::from_le_bytes(sent)),
        got: digester.finish(),
    };
    Ok((moved, values))
}
