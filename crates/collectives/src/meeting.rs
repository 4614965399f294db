//! How the ranks of a world find out, over the ring that they have just formed, whether they share a host, and come by the
//! memory that they share if they do.
//!
//! Each puts a card on the table (an all-gather): which host it is on, and where a segment is that it has made for all. If all
//! are on one host they map the first rank's, and say whether that worked (the control word of a barrier). If it did not
//! for a single one, all go on without.

use std::io;
use std::ops::RangeInclusive;

use reknit_membership::ids::WorldSize;

use crate::host::{Layout, enter, prepare};
use crate::secret::{Nonce, fresh_nonce};
use crate::segment::{Segment, Whereabouts};

/// How many ranks share memory at most; more than any host has use for.
const RANKS_MAX: u32 = 256;

/// How many bytes a card takes.
pub(crate) const CARD_BYTES: usize = 64;
const MAGIC: [u8; 4] = *b"rkS1";

/// How large a window can be. In the smallest there is an element of eight bytes for each rank.
const WINDOWS: RangeInclusive<u32> = 8 * RANKS_MAX..=32 << 20;

/// Whether a rank offers to share memory with others on its host.
///
/// All ranks of a world must say the same of whether they ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SharedMemory {
    /// Ask the others, and share memory if all ranks are on one host and offer to.
    #[default]
    Offered,
    /// Ask the others, but do not share: so that a rank can decline without the others' knowing before.
    Declined,
    /// Do not even ask: a ring over TCP, formed as fast as can be. What [`Group::on_neighbour_ahead`] tells of, only such a ring
    /// knows.
    ///
    /// [`Group::on_neighbour_ahead`]: crate::Group::on_neighbour_ahead
    Unasked,
}

/// What one rank tells the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Card {
    /// Nothing if it does not want to share, or cannot.
    pub(crate) offer: Option<Offer>,
}

/// Which host, and which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    host: [u8; 16],
    window: u32,
    place: Whereabouts,
    nonce: Nonce,
}

impl Card {
    const NOTHING: Card = Card { offer: None };

    /// ```text
    /// 0 magic "rkS1" | 4 one if it offers | 8 window | 12 pid | 16 fd | 20 zeros | 24 host | 40 nonce | 56 zeros
    /// ```
    pub(crate) fn to_bytes(self) -> [u8; CARD_BYTES] {
        let mut bytes = [0; CARD_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        if let Some(Offer { host, window, place, nonce }) = self.offer {
            bytes[4] = 1;
            bytes[8..12].copy_from_slice(&window.to_le_bytes());
            bytes[12..16].copy_from_slice(&place.pid.to_le_bytes());
            bytes[16..20].copy_from_slice(&place.fd.to_le_bytes());
            bytes[24..40].copy_from_slice(&host);
            bytes[40..56].copy_from_slice(&nonce);
        }
        bytes
    }

    /// A card that cannot be read offers nothing.
    pub(crate) fn from_bytes(bytes: &[u8; CARD_BYTES]) -> Card {
        let four = |at| u32::from_le_bytes(*bytes[at..].first_chunk().expect("the card is longer"));
        let sixteen = |at| *bytes[at..].first_chunk::<16>().expect("the card is longer");
        let place = Whereabouts { pid: four(12), fd: four(16) };
        let offer = Offer { host: sixteen(24), window: four(8), place, nonce: sixteen(40) };
        let card = Card { offer: Some(offer) };
        if card.to_bytes() == *bytes { card } else { Card::NOTHING }
    }
}

/// What this rank brings to the table.
#[derive(Debug)]
pub(crate) struct Stake {
    pub(crate) card: Card,
    layout: Layout,
    segment: Option<Segment>,
}

impl Stake {
    /// A card and the memory it speaks of, if this rank offers and the machine lets it.
    pub(crate) fn new(shared_memory: SharedMemory, size: WorldSize, window: usize) -> Stake {
        let layout = Layout::new(size.0 as usize, window);
        let nothing = |_: io::Error| Stake { card: Card::NOTHING, layout, segment: None };
        match shared_memory {
            SharedMemory::Offered if size.0 <= RANKS_MAX => Stake::of(layout, window).unwrap_or_else(nothing),
            _ => Stake { card: Card::NOTHING, layout, segment: None },
        }
    }

    fn of(layout: Layout, window: usize) -> io::Result<Stake> {
        let nonce = fresh_nonce()?;
        let host = host_id()?;
        let segment = prepare(layout, nonce)?;
        let place = segment.whereabouts().ok_or(io::ErrorKind::Other)?;
        let window = u32::try_from(window).map_err(io::Error::other)?;
        let card = Card { offer: Some(Offer { host, window, place, nonce }) };
        Ok(Stake { card, layout, segment: Some(segment) })
    }

    /// The memory that all share, and how it is laid out, now that all cards are on the table: this rank's own if it is the
    /// first. Whether there is to be any, all say alike; whether it can be mapped, each says for itself.
    pub(crate) fn share(self, cards: &[Card], own: usize) -> Option<io::Result<(Segment, Layout)>> {
        let first = agreed(cards)?;
        if let (Some(segment), 0) = (self.segment, own) {
            return Some(Ok((segment, self.layout)));
        }
        // As large as the first rank has it.
        let layout = Layout::new(cards.len(), first.window as usize);
        Some(enter(layout, first.place, first.nonce).map(|segment| (segment, layout)))
    }
}

/// Whose memory all share, if all offer and are on one host.
fn agreed(cards: &[Card]) -> Option<Offer> {
    let first = cards.first()?.offer?;
    let is_fine = WINDOWS.contains(&first.window) && first.window.is_multiple_of(64);
    let is_near = |card: &Card| card.offer.is_some_and(|offer| offer.host == first.host);
    (is_fine && cards.iter().all(is_near)).then_some(first)
}

/// How large a window is, for chunks of that many bytes: half a chunk, so that all that two ranks have to do with it stays in
/// the near caches; and four times as much where ranks wait for a core, so that they do so less often. A multiple of every
/// element's size.
pub(crate) fn window(chunk_bytes: usize, size: WorldSize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let bytes = if size.0 as usize <= cores { chunk_bytes / 2 } else { chunk_bytes * 2 };
    bytes.next_multiple_of(64).clamp(*WINDOWS.start() as usize, *WINDOWS.end() as usize)
}

/// What ranks of one host have in common: the kernel that was booted; the space of process numbers, or they do not see each
/// other in `/proc`; and the network, so that who is cut off from the others' network is not with them in memory either.
fn host_id() -> io::Result<[u8; 16]> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().as_bytes());
    for space in ["/proc/self/ns/pid", "/proc/self/ns/net"] {
        hasher.update(&[0]).update(std::fs::read_link(space)?.as_os_str().as_encoded_bytes());
    }
    Ok(*hasher.finalize().as_bytes().first_chunk().expect("a hash is longer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(host: u8, window: u32, pid: u32) -> Card {
        let place = Whereabouts { pid, fd: 9 };
        Card { offer: Some(Offer { host: [host; 16], window, place, nonce: [3; 16] }) }
    }

    #[test]
    fn a_card_says_itself_again_and_what_is_none_offers_nothing() {
        for card in [card(1, 4096, 77), Card::NOTHING] {
            assert_eq!(Card::from_bytes(&card.to_bytes()), card);
        }
        for at in [0, 4, 5, 20, 60] {
            let mut bytes = card(1, 4096, 77).to_bytes();
            bytes[at] ^= 0x80;
            assert_eq!(Card::from_bytes(&bytes), Card::NOTHING, "byte {at}");
        }
    }

    #[test]
    fn only_ranks_of_one_host_that_all_offer_share_memory() {
        let ours = [card(1, 4096, 7), card(1, 4096, 8)];
        assert_eq!(agreed(&ours).map(|offer| offer.place.pid), Some(7));
        assert_eq!(agreed(&[ours[0], Card::NOTHING]), None);
        assert_eq!(agreed(&[ours[0], card(2, 4096, 8)]), None);
        assert_eq!(agreed(&[card(1, 0, 7), card(1, 0, 8)]), None);
        assert_eq!(agreed(&[card(1, 4097, 7), card(1, 4097, 8)]), None);
        assert_eq!(agreed(&[]), None);
    }

    #[test]
    fn memory_that_is_not_what_the_card_speaks_of_is_not_taken() {
        let stake = || Stake::new(SharedMemory::Offered, WorldSize(2), 4096);
        let first = stake();
        let second = Stake::new(SharedMemory::Offered, WorldSize(2), 8192);
        let mut cards = [first.card, second.card];
        assert!(second.share(&cards, 1).unwrap().is_ok());
        // A process of that number has such memory, but another one's: as on a copy of this machine.
        let offer = cards[0].offer.as_mut().unwrap();
        offer.nonce[0] ^= 1;
        assert!(stake().share(&cards, 1).unwrap().is_err());
        let declined = Stake::new(SharedMemory::Declined, WorldSize(2), 4096);
        assert!(declined.share(&cards, 1).is_some(), "what is agreed upon, the cards say");
    }
}
