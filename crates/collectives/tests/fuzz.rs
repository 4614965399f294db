//! What strangers send to a listener, by seed: nothing that is not a proof gets in, and who has one is not kept out.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use common::{BOUND, Chance, VERSION, hello, listener_with, secret, seed, soon};
use reknit_collectives::{AbortHandle, ListenerOptions, Place, Purpose, dial};
use reknit_membership::ids::{Generation, Rank, WorldSize};

/// The beginning of a handshake as rank 3 of generation 7 says it, with a proof that is none.
fn honest(chance: &mut Chance) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..72).map(|_| chance.next() as u8).collect();
    // All but the nonce and the proof.
    let hello = hello(VERSION, 1 + chance.below(2) as u8, 7, 3 | 4 << 32);
    bytes[..24].copy_from_slice(&hello[..24]);
    bytes
}

fn damaged(chance: &mut Chance) -> Vec<u8> {
    let mut bytes = honest(chance);
    let at = chance.below(bytes.len() as u64) as usize;
    match chance.below(5) {
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes.truncate(at),
        2 => drop(bytes.drain(at..)),
        3 => bytes.extend((0..chance.below(5000)).map(|at| at as u8)),
        _ => bytes[at..].iter_mut().for_each(|byte| *byte = chance.next() as u8),
    }
    bytes
}

#[test]
fn whatever_strangers_send_nobody_gets_in_and_members_do() {
    let seed = seed("whatever_strangers_send");
    let mut chance = Chance(seed);
    // Who names a generation that there is none of is not to be waited for.
    let hold = Duration::from_millis(1);
    let listener = listener_with(ListenerOptions { hold, ..ListenerOptions::default() });
    let (rank, size) = (Rank(4), WorldSize(5));
    let (addr, generation) = (listener.local_addr(), Generation(7));
    let open = || listener.open_ring(&Place { generation, rank, size, secret: secret(), next: addr });
    let mut door = open();
    for round in 0..2000 {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        // It may have been closed in the middle of that.
        let _ = stream.write_all(&damaged(&mut chance));
        let _ = stream.shutdown(Shutdown::Write);
        let mut heard = Vec::new();
        let ended = Read::take(&mut stream, 1000).read_to_end(&mut heard);
        assert!(heard.len() <= 24 + 40, "C-8: seed {seed}, round {round}: {} bytes", heard.len());
        // A verdict that lets in says zero where others say why not.
        assert!(heard.get(24) != Some(&0), "C-8: seed {seed}, round {round}: {heard:?}");
        assert!(
            ended.is_ok() || ended.is_err_and(|why| why.kind() == std::io::ErrorKind::ConnectionReset),
            "C-9: seed {seed}, round {round}: it is not closed"
        );
        if round % 100 == 0 {
            let purpose = Purpose::Ring { from: Rank(3), to: rank };
            let dialled = dial(addr, purpose, generation, &secret(), soon(), &AbortHandle::new());
            assert!(dialled.is_ok(), "C-9: seed {seed}, round {round}: {dialled:?}");
            assert!(door.take_previous(soon(), &AbortHandle::new()).is_ok(), "seed {seed}, round {round}");
            // A door lets its neighbour in once.
            door = open();
        }
    }
}
