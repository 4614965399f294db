//! Giving another member what this one holds.

use std::io::{self, Read, Write};

use reknit_checkpoint::{ByteRange, Digester, Layout, State, stream};
use reknit_collectives::{AbortHandle, StateConnection};

use super::{BLOCK_BYTES, REQUEST_BYTES, Transfer, TransferRequest, VERDICT_NO, VERDICT_YES};
use crate::held::Held;

/// Serves one request. What goes wrong goes wrong for the receiver, which reports it.
pub(crate) fn serve(
    connection: StateConnection,
    held: &Held,
    state: &dyn State,
    layout: &Layout,
    abort: &AbortHandle,
) {
    let member = connection.member;
    if let Err(why) = try_serve(connection, held, state, layout, abort) {
        tracing::debug!(%member, error = %why, "state could not be sent");
    }
}

fn try_serve(
    connection: StateConnection,
    held: &Held,
    state: &dyn State,
    layout: &Layout,
    abort: &AbortHandle,
) -> io::Result<()> {
    let mut transfer = Transfer::new(connection.stream, abort)?;
    let mut bytes = [0; REQUEST_BYTES];
    transfer.read_exact(&mut bytes)?;
    let request = TransferRequest::decode(&bytes);
    let range = ByteRange::new(request.start, request.end);
    if !held.is(request.resume) || request.end < request.start || !layout.holds(range) {
        return transfer.write_all(&[VERDICT_NO]);
    }
    let values = if request.values { serde_json::to_vec(&state.values())? } else { Vec::new() };
    let mut head = vec![VERDICT_YES];
    head.extend_from_slice(&(values.len() as u64).to_le_bytes());
    head.extend_from_slice(&values);
    transfer.write_all(&head)?;
    let mut digester = Digester::new();
    digester.update(&values);
    stream::try_read_range(state, layout, range, |bytes| {
        for block in bytes.chunks(BLOCK_BYTES) {
            digester.update(block);
            transfer.write_all(block)?;
        }
        Ok::<(), io::Error>(())
    })?;
    transfer.write_all(&digester.finish().0.to_le_bytes())
}
