//! The background of a world: builds its ring while the program may still be computing, and then passes on connections
//! of members that want state.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use reknit_collectives::{AbortHandle, Door, FormError, Group, GroupOptions, Place as RingPlace, Secret};
use reknit_membership::world::Place;
use reknit_membership::{Generation, Rank, WorldSize};
use reknit_proto::rendezvous::SecretBytes;

use crate::hub::{Hub, ToProgram};
use crate::saves::explained;

/// How long a ring may take to build. No program is waited for, only the neighbours' libraries: what takes longer is a
/// way between two machines that is blocked, and the coordinator is to hear of it.
const FORM: Duration = Duration::from_secs(30);
/// How long a collective may stand still. It ends sooner, by an abort, when a member is lost; this only catches what
/// nobody notices, so it must outlast the slowest step of any program.
const STALL: Duration = Duration::from_secs(30 * 60);

/// How often the door is looked at to see whether the world is over.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// An address that nobody listens on.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// # Errors
/// If there is no thread for it.
pub(crate) fn form_in_background(
    hub: &Arc<Hub>,
    place: Place,
    secret: SecretBytes,
    abort: AbortHandle,
) -> Result<(), String> {
    // The door opens before anybody else can know that this member knows: whoever dials finds it open.
    let ring_place = RingPlace {
        generation: place.generation,
        rank: Rank(place.seat),
        size: WorldSize(place.seats),
        secret: Secret::new(secret),
        // Resolved by the thread: a name server may be slow.
        next: NOWHERE,
    };
    let door = hub.listener().open_ring(&ring_place);
    let generation = place.generation;
    let keeper = {
        let hub = Arc::clone(hub);
        move || {
            let next = resolve(&place.next.address);
            keep(&hub, &door, &place, &RingPlace { next, ..ring_place }, &abort)
        }
    };
    let thread = std::thread::Builder::new().name(format!("reknit-world-{generation}"));
    thread.spawn(keeper).map(drop).map_err(|why| format!("no thread for the ring: {why}"))
}

fn keep(hub: &Arc<Hub>, door: &Door, place: &Place, ring_place: &RingPlace, abort: &AbortHandle) {
    let generation = place.generation;
    let shared_memory = hub.shared_memory();
    let options = GroupOptions { form: FORM, stall: STALL, shared_memory, ..GroupOptions::default() };
    match Group::form(door, ring_place, &options, abort.clone()) {
        Ok(mut group) => {
            let lost = {
                let hub = Arc::downgrade(hub);
                move |rank| {
                    if let Some(hub) = hub.upgrade() {
                        hub.bring(|session| session.broken(generation, vec![rank]));
                    }
                }
            };
            group.on_neighbour_lost(lost);
            // Handed over before the world is answered: whoever is told to go finds it.
            hub.put_group(group);
            hub.bring(|session| session.formed(generation));
        }
        Err(_) if abort.is_aborted() => return,
        Err(why @ FormError::System { .. }) => {
            return hub.bring(|session| session.machine_failed(explained(&why)));
        }
        Err(why) => {
            tracing::warn!(%generation, error = %why, "the ring could not be built");
            let suspects = why.suspect().map(|rank| member_rank(place, rank)).into_iter().collect();
            hub.bring(|session| session.broken(generation, suspects));
            return;
        }
    }
    pass_on(hub, door, abort);
}

/// Passes on members that want state, until the world is over.
fn pass_on(hub: &Hub, door: &Door, abort: &AbortHandle) {
    while !abort.is_aborted() && !door.is_closed() {
        if let Some(connection) = door.next_state(LOOK_EVERY) {
            hub.tell_program(ToProgram::Serve(connection));
        }
    }
}

/// Lets members of a world in that has no place for this one, and passes them on.
pub(crate) fn serve_in_background(
    hub: &Arc<Hub>,
    generation: Generation,
    secret: SecretBytes,
    abort: AbortHandle,
) {
    let door = hub.listener().open(generation, Secret::new(secret));
    let keeper = {
        let hub = Arc::clone(hub);
        move || pass_on(&hub, &door, &abort)
    };
    let thread = std::thread::Builder::new().name(format!("reknit-serve-{generation}"));
    if let Err(why) = thread.spawn(keeper) {
        tracing::error!(%generation, error = %why, "no thread to serve members of a world with");
    }
}

/// The ring counts members; the world counts the ranks that they bring.
fn member_rank(place: &Place, seat: Rank) -> Rank {
    if seat.0 == (place.seat + 1) % place.seats { place.next.rank } else { place.prev.rank }
}

/// A name that cannot be resolved becomes an address that nobody listens on: dialling it fails and is reported like any
/// other neighbour that cannot be reached.
pub(crate) fn resolve(address: &str) -> SocketAddr {
    address.to_socket_addrs().ok().and_then(|mut all| all.next()).unwrap_or(NOWHERE)
}
