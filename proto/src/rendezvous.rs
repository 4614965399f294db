//! What members and coordinators say to each other, to the wire and back.

use std::time::Duration;

use reknit_membership::event::{Event, Join, Message};
use reknit_membership::holding::{Fetch, Holding, Load, Plan, Shards};
use reknit_membership::reason::Refusal;
use reknit_membership::spec::BadSpec;
use reknit_membership::world::Place;
use reknit_membership::{Generation, HistoryId, JobId, MemberId, Rank, Step, Timestamp, WorldSize};

use crate::v1;
use crate::words::{self, BadMessage, Checked, need, wrong};

/// The secret of one generation's data plane, as it travels in the world message: 32 bytes.
pub type SecretBytes = [u8; 32];

/// The first message of a member's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Introduction {
    /// Which job it joins.
    pub job: JobId,
    /// Who it is.
    pub member: MemberId,
    /// The rest.
    pub join: Join,
}

/// Why a first message does not let its sender in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadIntroduction {
    /// It speaks another version of the protocol.
    #[error(
        "this worker speaks protocol version {theirs}, the coordinator speaks {ours}; \
         run the same release of reknit on both"
    )]
    OtherProtocol {
        /// What the coordinator speaks.
        ours: u32,
        /// What the member speaks.
        theirs: u32,
    },
    /// It is no join.
    #[error("a member's first message must be a join")]
    NotAJoin,
    /// It makes no sense.
    #[error(transparent)]
    Bad(#[from] BadMessage),
}

/// Reads a member's first message.
pub fn introduction(wire: v1::MemberMessage) -> Result<Introduction, BadIntroduction> {
    let Some(v1::member_message::Body::Join(join)) = wire.body else {
        return Err(BadIntroduction::NotAJoin);
    };
    if join.protocol != crate::PROTOCOL {
        return Err(BadIntroduction::OtherProtocol { ours: crate::PROTOCOL, theirs: join.protocol });
    }
    Ok(Introduction {
        job: words::job(&join.job)?,
        member: MemberId(join.member),
        join: Join {
            name: words::name(&join.name)?,
            slots: join.slots,
            address: words::address(join.address)?,
            spec: words::spec(need("spec", join.spec)?),
            shape: words::shape(need("shape", join.shape)?)?,
            history: join.history.map(HistoryId),
            generation: Generation(join.generation),
            running: join.running,
            available: join.available,
        },
    })
}

/// Writes a member's first message.
pub fn from_introduction(introduction: &Introduction) -> v1::MemberMessage {
    let join = &introduction.join;
    let body = v1::member_message::Body::Join(v1::Join {
        protocol: crate::PROTOCOL,
        job: introduction.job.as_str().to_owned(),
        member: introduction.member.0,
        name: join.name.as_str().to_owned(),
        slots: join.slots,
        address: join.address.clone(),
        spec: Some(words::from_spec(join.spec)),
        shape: Some(words::from_shape(join.shape)),
        history: join.history.map(|h| h.0),
        generation: join.generation.0,
        running: join.running,
        available: join.available,
    });
    v1::MemberMessage { body: Some(body) }
}

/// The most suspects, moved parts or shard numbers one message may name.
const LIST_MAX: usize = 65_536;

/// Reads any later message of `member`, which arrived at `now`.
pub fn event(member: MemberId, wire: v1::MemberMessage, now: Timestamp) -> Checked<Event> {
    use v1::member_message::Body;
    Ok(match need("body", wire.body)? {
        Body::Join(_) => return wrong("body", "a second join on one stream"),
        Body::Renew(m) => Event::Renew { member, generation: Generation(m.generation), step: Step(m.step) },
        Body::Available(v1::Available {}) => Event::Available { member },
        Body::Leave(v1::Leave {}) => Event::Leave { member },
        Body::Ready(m) => {
            Event::Ready { member, generation: Generation(m.generation), holding: holding(m.holding)? }
        }
        Body::Restored(m) => {
            if m.moved.len() > LIST_MAX {
                return wrong("moved", "too many parts");
            }
            Event::Restored {
                member,
                generation: Generation(m.generation),
                attempt: m.attempt,
                resume: words::resume(m.resume)?,
                moved: m.moved.into_iter().map(words::moved).collect::<Checked<_>>()?,
            }
        }
        Body::RestoreFailed(m) => Event::RestoreFailed {
            member,
            generation: Generation(m.generation),
            attempt: m.attempt,
            culprit: m.culprit.map(MemberId),
        },
        Body::Broken(m) => {
            if m.suspects.len() > LIST_MAX {
                return wrong("suspects", "too many");
            }
            let suspects = m.suspects.into_iter().map(Rank).collect();
            Event::Broken { member, generation: Generation(m.generation), suspects }
        }
        Body::Boundary(m) => {
            Event::Boundary { member, generation: Generation(m.generation), holding: holding(m.holding)? }
        }
        Body::FirstStep(m) => {
            Event::FirstStep { member, generation: Generation(m.generation), step: Step(m.step) }
        }
        Body::Finished(m) => {
            Event::Finished { member, generation: Generation(m.generation), step: Step(m.step) }
        }
        Body::ShardWritten(m) => Event::ShardWritten {
            member,
            generation: Generation(m.generation),
            step: Step(m.step),
            report: words::shard_report(need("report", m.report)?)?,
        },
        Body::SaveFailed(m) => {
            Event::SaveFailed { member, generation: Generation(m.generation), step: Step(m.step) }
        }
        Body::ManifestWritten(m) => Event::ManifestWritten {
            member,
            generation: Generation(m.generation),
            step: Step(m.step),
            manifest: words::digest(m.manifest)?,
        },
        Body::Notice(m) => Event::Notice { member, deadline: now.after(Duration::from_millis(m.left_ms)) },
    })
}

/// Writes what a member says. `None` for events that no member sends.
pub fn from_event(event: &Event, now: Timestamp) -> Option<v1::MemberMessage> {
    use v1::member_message::Body;
    let body = match event {
        Event::Renew { generation, step, .. } => {
            Body::Renew(v1::Renew { generation: generation.0, step: step.0 })
        }
        Event::Available { .. } => Body::Available(v1::Available {}),
        Event::Leave { .. } => Body::Leave(v1::Leave {}),
        Event::Ready { generation, holding, .. } => {
            Body::Ready(v1::Ready { generation: generation.0, holding: from_holding(holding) })
        }
        Event::Restored { generation, attempt, resume, moved, .. } => Body::Restored(v1::Restored {
            generation: generation.0,
            attempt: *attempt,
            resume: words::from_resume(*resume),
            moved: moved.iter().map(words::from_moved).collect(),
        }),
        Event::RestoreFailed { generation, attempt, culprit, .. } => Body::RestoreFailed(v1::RestoreFailed {
            generation: generation.0,
            attempt: *attempt,
            culprit: culprit.map(|c| c.0),
        }),
        Event::Broken { generation, suspects, .. } => Body::Broken(v1::Broken {
            generation: generation.0,
            suspects: suspects.iter().map(|r| r.0).collect(),
        }),
        Event::Boundary { generation, holding, .. } => {
            Body::Boundary(v1::BoundaryReached { generation: generation.0, holding: from_holding(holding) })
        }
        Event::FirstStep { generation, step, .. } => {
            Body::FirstStep(v1::FirstStep { generation: generation.0, step: step.0 })
        }
        Event::Finished { generation, step, .. } => {
            Body::Finished(v1::Finished { generation: generation.0, step: step.0 })
        }
        Event::ShardWritten { generation, step, report, .. } => Body::ShardWritten(v1::ShardWritten {
            generation: generation.0,
            step: step.0,
            report: Some(words::from_shard_report(report)),
        }),
        Event::SaveFailed { generation, step, .. } => {
            Body::SaveFailed(v1::SaveFailed { generation: generation.0, step: step.0 })
        }
        Event::ManifestWritten { generation, step, manifest, .. } => {
            Body::ManifestWritten(v1::ManifestWritten {
                generation: generation.0,
                step: step.0,
                manifest: words::from_digest(*manifest),
            })
        }
        Event::Notice { deadline, .. } => {
            let left_ms = u64::try_from(deadline.since(now).as_millis()).unwrap_or(u64::MAX);
            Body::Notice(v1::Notice { left_ms })
        }
        Event::Attach { .. }
        | Event::Detached { .. }
        | Event::Operate { .. }
        | Event::Stalled { .. }
        | Event::Tick => return None,
    };
    Some(v1::MemberMessage { body: Some(body) })
}

fn holding(wire: Option<v1::Holding>) -> Checked<Holding> {
    use v1::holding::Holding as Wire;
    Ok(match need("holding", wire.and_then(|h| h.holding))? {
        Wire::Fresh(fresh) => Holding::Fresh { digest: words::digest(fresh.digest)? },
        Wire::Nothing(v1::holding::Nothing {}) => Holding::Nothing,
        Wire::State(state) => {
            if state.shards.len() > LIST_MAX {
                return wrong("shards", "too many");
            }
            let shards =
                if state.whole { Shards::Whole } else { Shards::Only(state.shards.into_iter().collect()) };
            Holding::State { resume: words::resume(state.resume)?, shards }
        }
    })
}

fn from_holding(holding: &Holding) -> Option<v1::Holding> {
    use v1::holding::Holding as Wire;
    let wire = match holding {
        Holding::Fresh { digest } => Wire::Fresh(v1::holding::Fresh { digest: words::from_digest(*digest) }),
        Holding::Nothing => Wire::Nothing(v1::holding::Nothing {}),
        Holding::State { resume, shards } => {
            let (whole, shards) = match shards {
                Shards::Whole => (true, Vec::new()),
                Shards::Only(some) => (false, some.iter().copied().collect()),
            };
            Wire::State(v1::holding::State { resume: words::from_resume(*resume), shards, whole })
        }
    };
    Some(v1::Holding { holding: Some(wire) })
}

/// What a coordinator says, read by a member: the core's message, and the secret of a data plane that it is to take
/// part in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The message.
    pub message: Message,
    /// The secret, with [`Message::World`] and [`Message::Serve`] only.
    pub secret: Option<SecretBytes>,
}

/// Reads what a coordinator says.
pub fn told(wire: v1::CoordinatorMessage) -> Checked<Told> {
    use v1::coordinator_message::Body;
    let mut secret = None;
    let message = match need("body", wire.body)? {
        Body::Attached(m) => Message::Attached {
            history: HistoryId(m.history),
            renew_every: Duration::from_micros(m.renew_every_us),
        },
        Body::Refused(m) => Message::Refused(refusal(m)?),
        Body::World(m) => {
            secret = Some(secret_bytes(&m.secret)?);
            Message::World(Place {
                generation: Generation(m.generation),
                rank: Rank(m.rank),
                slots: m.slots,
                size: WorldSize(m.size),
                seat: m.seat,
                seats: m.seats,
                prev: words::peer(need("prev", m.prev)?)?,
                next: words::peer(need("next", m.next)?)?,
                roster: m.roster,
                renew_every: Duration::from_micros(m.renew_every_us),
            })
        }
        Body::Plan(m) => Message::Plan(Plan {
            generation: Generation(m.generation),
            attempt: m.attempt,
            resume: words::resume(m.resume)?,
            fetch: m
                .fetch
                .into_iter()
                .map(|f| {
                    let from: Vec<_> = f.from.into_iter().map(words::peer).collect::<Checked<_>>()?;
                    if from.is_empty() {
                        return wrong("fetch.from", "names nobody");
                    }
                    Ok(Fetch { shards: f.shards, from })
                })
                .collect::<Checked<_>>()?,
            load: m
                .load
                .map(|l| {
                    Ok::<_, BadMessage>(Load {
                        commit: words::commit(need("commit", l.commit)?)?,
                        shards: l.shards,
                    })
                })
                .transpose()?,
        }),
        Body::Go(m) => Message::Go { generation: Generation(m.generation), resume: words::resume(m.resume)? },
        Body::Break(m) => Message::Break { generation: Generation(m.generation) },
        Body::Boundary(m) => Message::Boundary { generation: Generation(m.generation) },
        Body::Draining(m) => Message::Draining { left: m.left_us.map(Duration::from_micros) },
        Body::Serve(m) => {
            secret = Some(secret_bytes(&m.secret)?);
            Message::Serve { generation: Generation(m.generation) }
        }
        Body::SaveGivenUp(m) => {
            Message::SaveGivenUp { generation: Generation(m.generation), step: Step(m.step) }
        }
        Body::SaveNow(m) => Message::SaveNow { generation: Generation(m.generation) },
        Body::Publish(m) => Message::Publish {
            generation: Generation(m.generation),
            step: Step(m.step),
            shards: m.shards.into_iter().map(words::shard_report).collect::<Checked<_>>()?,
        },
        Body::Committed(m) => {
            Message::Committed { kept: m.kept.into_iter().map(words::commit).collect::<Checked<_>>()? }
        }
        Body::Released(v1::Released {}) => Message::Released,
        Body::Closed(m) => Message::Closed(words::closure(m.closure)?),
    };
    Ok(Told { message, secret })
}

fn secret_bytes(bytes: &[u8]) -> Checked<SecretBytes> {
    bytes.try_into().or_else(|_| wrong("secret", "it must have 32 bytes"))
}

/// Writes what a coordinator says. `secret` gives the secret of a generation; it is asked for only where the message
/// carries one.
pub fn to_member(
    message: &Message,
    secret: impl FnOnce(Generation) -> SecretBytes,
) -> v1::CoordinatorMessage {
    use v1::coordinator_message::Body;
    let body = match message {
        Message::Attached { history, renew_every } => {
            Body::Attached(v1::Attached { history: history.0, renew_every_us: micros(*renew_every) })
        }
        Message::Refused(why) => Body::Refused(from_refusal(why)),
        Message::World(place) => Body::World(v1::World {
            generation: place.generation.0,
            rank: place.rank.0,
            slots: place.slots,
            size: place.size.0,
            seat: place.seat,
            seats: place.seats,
            prev: Some(words::from_peer(&place.prev)),
            next: Some(words::from_peer(&place.next)),
            roster: place.roster,
            renew_every_us: micros(place.renew_every),
            secret: secret(place.generation).to_vec(),
        }),
        Message::Plan(plan) => Body::Plan(v1::Plan {
            generation: plan.generation.0,
            attempt: plan.attempt,
            resume: words::from_resume(plan.resume),
            fetch: plan
                .fetch
                .iter()
                .map(|f| v1::plan::Fetch {
                    shards: f.shards.clone(),
                    from: f.from.iter().map(words::from_peer).collect(),
                })
                .collect(),
            load: plan.load.as_ref().map(|l| v1::plan::Load {
                commit: Some(words::from_commit(&l.commit)),
                shards: l.shards.clone(),
            }),
        }),
        Message::Go { generation, resume } => {
            Body::Go(v1::Go { generation: generation.0, resume: words::from_resume(*resume) })
        }
        Message::Break { generation } => Body::Break(v1::Break { generation: generation.0 }),
        Message::Boundary { generation } => Body::Boundary(v1::BoundaryRequest { generation: generation.0 }),
        Message::Draining { left } => Body::Draining(v1::Draining { left_us: left.map(micros) }),
        Message::Serve { generation } => {
            Body::Serve(v1::Serve { generation: generation.0, secret: secret(*generation).to_vec() })
        }
        Message::SaveGivenUp { generation, step } => {
            Body::SaveGivenUp(v1::SaveGivenUp { generation: generation.0, step: step.0 })
        }
        Message::SaveNow { generation } => Body::SaveNow(v1::SaveNow { generation: generation.0 }),
        Message::Publish { generation, step, shards } => Body::Publish(v1::Publish {
            generation: generation.0,
            step: step.0,
            shards: shards.iter().map(words::from_shard_report).collect(),
        }),
        Message::Committed { kept } => {
            Body::Committed(v1::Committed { kept: kept.iter().map(words::from_commit).collect() })
        }
        Message::Released => Body::Released(v1::Released {}),
        Message::Closed(closure) => Body::Closed(v1::Closed { closure: words::from_closure(*closure) }),
    };
    v1::CoordinatorMessage { body: Some(body) }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn refusal(wire: v1::Refused) -> Checked<Refusal> {
    use v1::refused::{BadSpec as Bad, Kind};
    Ok(match wire.kind() {
        Kind::Unspecified => return wrong("refused.kind", "unknown"),
        Kind::JobClosed => Refusal::JobClosed(words::closure(wire.closure)?),
        Kind::BadSpec => Refusal::BadSpec(match wire.bad_spec() {
            Bad::Unspecified => return wrong("bad_spec", "unknown"),
            Bad::Zero => BadSpec::Zero,
            Bad::MinAboveMax => BadSpec::MinAboveMax { min: wire.number, max: wire.max },
            Bad::NoMultiple => BadSpec::NoMultiple { unit: wire.number },
            Bad::TooMany => BadSpec::TooMany,
        }),
        Kind::BadSlots => Refusal::BadSlots { slots: wire.number },
        Kind::OtherShape => Refusal::OtherShape {
            ours: words::shape(need("ours", wire.ours)?)?,
            theirs: words::shape(need("theirs", wire.theirs)?)?,
        },
        Kind::OtherRecipe => Refusal::OtherRecipe,
        Kind::OtherHistory => {
            Refusal::OtherHistory { ours: HistoryId(wire.our_history), theirs: HistoryId(wire.their_history) }
        }
        Kind::TooManyMembers => Refusal::TooManyMembers { limit: wire.number },
        Kind::Departed => Refusal::Departed(words::departure(wire.departure)?),
    })
}

fn from_refusal(refusal: &Refusal) -> v1::Refused {
    use v1::refused::{BadSpec as Bad, Kind};
    let mut wire = v1::Refused { text: refusal.to_string(), ..v1::Refused::default() };
    let kind = match refusal {
        Refusal::JobClosed(closure) => {
            wire.closure = words::from_closure(*closure);
            Kind::JobClosed
        }
        Refusal::BadSpec(why) => {
            let bad = match why {
                BadSpec::Zero => Bad::Zero,
                BadSpec::MinAboveMax { min, max } => {
                    (wire.number, wire.max) = (*min, *max);
                    Bad::MinAboveMax
                }
                BadSpec::NoMultiple { unit } => {
                    wire.number = *unit;
                    Bad::NoMultiple
                }
                BadSpec::TooMany => Bad::TooMany,
            };
            wire.set_bad_spec(bad);
            Kind::BadSpec
        }
        Refusal::BadSlots { slots } => {
            wire.number = *slots;
            Kind::BadSlots
        }
        Refusal::OtherShape { ours, theirs } => {
            wire.ours = Some(words::from_shape(*ours));
            wire.theirs = Some(words::from_shape(*theirs));
            Kind::OtherShape
        }
        Refusal::OtherRecipe => Kind::OtherRecipe,
        Refusal::OtherHistory { ours, theirs } => {
            (wire.our_history, wire.their_history) = (ours.0, theirs.0);
            Kind::OtherHistory
        }
        Refusal::TooManyMembers { limit } => {
            wire.number = *limit;
            Kind::TooManyMembers
        }
        Refusal::Departed(how) => {
            wire.departure = words::from_departure(*how);
            Kind::Departed
        }
    };
    wire.set_kind(kind);
    wire
}
