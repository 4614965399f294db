//! The part of many members: as much of a trainer's link as the coordinator can see of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use reknit_membership::event::{Event, Join, Message};
use reknit_membership::holding::{Holding, Resume, Shards};
use reknit_membership::spec::{Shape, Sharding, Spec};
use reknit_membership::world::Place;
use reknit_membership::{Digest, Generation, HistoryId, JobId, MemberId, MemberName, Rank, Timestamp};
use reknit_proto::rendezvous::{self, Introduction};
use reknit_proto::v1;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

use super::super::clock::Mark;
use super::super::company;
use super::super::random::Random;
use crate::descriptors;

/// As in the trainer's link: what the coordinator has to answer is part of what is measured.
const KEEPALIVE: Duration = Duration::from_secs(3);
const OUTBOUND: usize = 64;
/// How many members connect at the same time.
const CONNECTING_MAX: usize = 64;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) coordinator: String,
    pub(super) job: String,
    /// The members' numbers: so many from the first.
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) min: u32,
    pub(super) max: u32,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Order {
    /// Say where one of the members is, drawn by this lot.
    Choose { lot: u64 },
    /// End this member's connection without a word.
    Lose { member: u64 },
    /// Say that the ring broke, on behalf of these members as far as they are here.
    Report { generation: u64, rank: u32, by: [u64; 2] },
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Says {
    /// Every member has said that it joins; the first and the last did so then.
    Joined { first: Mark, last: Mark },
    /// Every member was told to go; the last one then.
    Running { generation: u64, at: Mark },
    /// Every member was told that this world is over, or of a later one; the last one then.
    Told { over: u64, at: Mark },
    /// Where a member is in the ring.
    Place { member: u64, rank: u32, neighbours: [u64; 2] },
}

/// What the members of this process share.
struct Shared {
    setup: Setup,
    job: JobId,
    spec: Spec,
    connecting: Semaphore,
    tally: Mutex<Tally>,
}

/// What the members have been told so far.
#[derive(Default)]
struct Tally {
    members: BTreeMap<MemberId, Seated>,
    joins: Vec<Mark>,
    /// How many members run in a world.
    running: BTreeMap<Generation, usize>,
    /// How many know that a world is over.
    told: BTreeMap<Generation, usize>,
}

impl Tally {
    /// One more member knows that a world is over.
    fn is_told(&mut self, over: Generation) -> Result<()> {
        let told = self.told.entry(over).or_default();
        *told += 1;
        if *told == self.members.len() {
            company::say(&Says::Told { over: over.0, at: Mark::now() })?;
        }
        Ok(())
    }
}

/// A member, as far as orders need it.
struct Seated {
    to_coordinator: mpsc::Sender<v1::MemberMessage>,
    task: Option<AbortHandle>,
    place: Option<Place>,
}

pub(in crate::bench) fn play() -> Result<()> {
    descriptors::raise_limit()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(swarm())
}

async fn swarm() -> Result<()> {
    let setup: Setup = company::setup()?;
    let (job, spec) = (JobId::new(&setup.job)?, Spec { min: setup.min, max: setup.max, unit: 1, keep: 1 });
    let connecting = Semaphore::new(CONNECTING_MAX);
    let shared = Arc::new(Shared { setup, job, spec, connecting, tally: Mutex::default() });
    // Orders are read on a thread of their own, which blocks.
    let (sender, mut orders) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        // The end of this loop drops the sender, and ends the process with it.
        for order in company::orders() {
            if sender.send(order).is_err() {
                return;
            }
        }
    });
    let (failed, mut failure) = mpsc::channel::<anyhow::Error>(1);
    for number in shared.setup.first..shared.setup.first + shared.setup.count {
        let (shared, failed) = (Arc::clone(&shared), failed.clone());
        tokio::spawn(async move {
            if let Err(why) = live(&shared, number).await {
                // One is enough to end the process.
                let _ = failed.try_send(why.context(format!("member {number}")));
            }
        });
    }
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(order) => shared.obey(order?)?,
                None => return Ok(()),
            },
            Some(why) = failure.recv() => return Err(why),
        }
    }
}

/// One member, from its connection to its end.
async fn live(shared: &Arc<Shared>, number: u32) -> Result<()> {
    // A member's id is drawn, so that their order is none.
    let member = MemberId(Random::new(u64::from(number)).next());
    let permit = shared.connecting.acquire().await?;
    let channel = Endpoint::from_shared(shared.setup.coordinator.clone())?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect()
        .await?;
    let (sender, receiver) = mpsc::channel(OUTBOUND);
    let introduction = Introduction { job: shared.job.clone(), member, join: shared.join(number)? };
    sender.send(rendezvous::from_introduction(&introduction)).await?;
    shared.joins(member, sender.clone())?;
    let inbound = RendezvousClient::new(channel).attend(ReceiverStream::new(receiver)).await?.into_inner();
    drop(permit);
    // What an order aborts is this task: dropping it ends the connection as the end of a process would.
    let talking = tokio::spawn(talk(Arc::clone(shared), member, sender, inbound));
    shared.tally().members.entry(member).and_modify(|seated| seated.task = Some(talking.abort_handle()));
    match talking.await {
        Err(why) if why.is_cancelled() => Ok(()),
        ended => ended?,
    }
}

async fn talk(
    shared: Arc<Shared>,
    member: MemberId,
    to_coordinator: mpsc::Sender<v1::MemberMessage>,
    mut inbound: Streaming<v1::CoordinatorMessage>,
) -> Result<()> {
    let mut renew_every = Duration::from_secs(1);
    let mut renew_at = tokio::time::Instant::now() + renew_every;
    let mut generation = Generation(0);
    let mut holding = Holding::Fresh { digest: Digest(1) };
    let mut resume = Resume::default();
    loop {
        let said = tokio::select! {
            message = inbound.message() => {
                let message = message?.context("the coordinator has ended the stream")?;
                match rendezvous::told(message)?.message {
                    Message::Attached { renew_every: every, .. } => {
                        renew_every = every;
                        None
                    }
                    Message::World(place) => {
                        generation = place.generation;
                        renew_every = place.renew_every;
                        shared.is_placed(member, place)?;
                        Some(Event::Ready { member, generation, holding: holding.clone() })
                    }
                    Message::Go { generation: of, resume: from } if of == generation => {
                        resume = from;
                        holding = Holding::State { resume, shards: Shards::Whole };
                        shared.runs(generation)?;
                        Some(Event::FirstStep { member, generation, step: resume.step })
                    }
                    Message::Break { generation } => {
                        shared.is_over(member, generation)?;
                        None
                    }
                    Message::Refused(refusal) => bail!("refused: {refusal}"),
                    _ => None,
                }
            }
            () = tokio::time::sleep_until(renew_at) => {
                Some(Event::Renew { member, generation, step: resume.step })
            }
        };
        if let Some(event) = said {
            let message =
                rendezvous::from_event(&event, Timestamp::default()).context("no member says this")?;
            to_coordinator.send(message).await?;
        }
        let now = tokio::time::Instant::now();
        if renew_at <= now || renew_at > now + renew_every {
            renew_at = now + renew_every;
        }
    }
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        // A panic ends the process.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, number: u32) -> Result<Join> {
        Ok(Join {
            name: MemberName::new(&format!("m{number}"))?,
            slots: 1,
            address: format!("127.0.0.1:{}", 1 + number % 60_000),
            spec: self.spec,
            shape: Shape {
                tensors: Digest(1),
                count: 1,
                bytes: 4,
                recipe: Digest(1),
                sharding: Sharding::Replicated,
            },
            history: None::<HistoryId>,
            generation: Generation(0),
            running: false,
            available: true,
        })
    }

    fn joins(&self, member: MemberId, to_coordinator: mpsc::Sender<v1::MemberMessage>) -> Result<()> {
        let mut tally = self.tally();
        tally.members.insert(member, Seated { to_coordinator, task: None, place: None });
        tally.joins.push(Mark::now());
        if tally.joins.len() == self.setup.count as usize
            && let (Some(first), Some(last)) = (tally.joins.first(), tally.joins.last())
        {
            company::say(&Says::Joined { first: *first, last: *last })?;
        }
        Ok(())
    }

    /// A member has heard of a world, and with it that the one before is over.
    fn is_placed(&self, member: MemberId, place: Place) -> Result<()> {
        let mut tally = self.tally();
        let before = tally.members.get_mut(&member).and_then(|seated| seated.place.replace(place));
        before.map_or(Ok(()), |before| tally.is_told(before.generation))
    }

    /// A member has heard that a world is over.
    fn is_over(&self, member: MemberId, generation: Generation) -> Result<()> {
        let mut tally = self.tally();
        let place = tally.members.get_mut(&member).map(|seated| &mut seated.place);
        // Who has no place any more has heard of it before.
        match place.and_then(|place| place.take_if(|place| place.generation <= generation)) {
            Some(before) => tally.is_told(before.generation),
            None => Ok(()),
        }
    }

    fn runs(&self, generation: Generation) -> Result<()> {
        let mut tally = self.tally();
        let running = tally.running.entry(generation).or_default();
        *running += 1;
        let running = *running;
        if running == tally.members.len() && tally.joins.len() == self.setup.count as usize {
            company::say(&Says::Running { generation: generation.0, at: Mark::now() })?;
        }
        Ok(())
    }

    fn obey(&self, order: Order) -> Result<()> {
        match order {
            Order::Choose { lot } => {
                let tally = self.tally();
                let all: Vec<MemberId> = tally.members.keys().copied().collect();
                let member = Random::new(lot).one_of(&all).context("nobody is left")?;
                let place = tally.members.get(&member).and_then(|seated| seated.place.as_ref());
                let place = place.context("a member without a place")?;
                let neighbours = [place.prev.member.0, place.next.member.0];
                company::say(&Says::Place { member: member.0, rank: place.rank.0, neighbours })
            }
            Order::Lose { member } => {
                let lost = self.tally().members.remove(&MemberId(member));
                lost.and_then(|lost| lost.task).context("no such member")?.abort();
                Ok(())
            }
            Order::Report { generation, rank, by } => {
                for member in by.map(MemberId) {
                    let (generation, suspects) = (Generation(generation), vec![Rank(rank)]);
                    let Some(sender) = self.tally().members.get(&member).map(|m| m.to_coordinator.clone())
                    else {
                        continue;
                    };
                    let event = Event::Broken { member, generation, suspects };
                    let message = rendezvous::from_event(&event, Timestamp::default());
                    sender.try_send(message.context("no member says this")?)?;
                }
                Ok(())
            }
        }
    }
}
