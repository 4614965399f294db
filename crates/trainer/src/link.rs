//! The member's stream to its coordinator, on a thread of its own: renewals go out however busy the program is, and a
//! coordinator that is gone is looked for until it is back.

use std::sync::Arc;
use std::time::Duration;

use reknit_membership::{JobId, Timestamp};
use reknit_proto::rendezvous::{self, Introduction};
use reknit_proto::v1;
use reknit_proto::v1::rendezvous_client::RendezvousClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::credentials::{Credentials, CredentialsError, TlsTrouble};
use crate::hub::{Hub, ToLink};
use crate::order::mix;

/// How long one attempt to reach a coordinator may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// The pause before the next attempt is drawn from zero up to this much, which doubles with each …
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
/// … up to this.
const BACKOFF_MAX: Duration = Duration::from_millis(250);
/// How often a silent connection is asked whether it still is one, at the most: a coordinator that is stopped, or cut off,
/// must be given up soon enough to find the one that leads after it while that one still waits.
const KEEPALIVE_MIN: Duration = Duration::from_secs(1);
/// How many of a member's renewals fit into [`BACKOFF_MAX`] for a small job; the pause grows with how seldom members of a
/// large one renew, so that ten thousand of them do not knock at once.
const BACKOFF_PER_RENEWAL: f64 = 0.4;
/// Messages that may wait for the network: there are never more than a few.
const OUTBOUND: usize = 64;

/// How long a member that leaves waits for the coordinator to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

type Sender = mpsc::Sender<v1::MemberMessage>;

/// Whom the link is to.
pub(crate) struct Target {
    pub(crate) coordinators: Vec<String>,
    pub(crate) credentials: Credentials,
    pub(crate) job: JobId,
}

/// Why a stream ended.
enum Ended {
    /// The coordinator, or the way to it, is gone; or a new introduction is due. With what is known of why.
    Gone(String),
    /// Another coordinator leads: this one.
    Elsewhere(String),
    /// One of the two does not trust the other. Who has never been in is told at once: somebody has to put it right. Who
    /// has been in waits for that, for certificates are replaced while programs run.
    Distrust(String),
    /// The coordinator will not have this member, and trying again will not help.
    Rejected(String),
    /// The program is done with it.
    Done,
}

/// The link's life.
pub(crate) fn run(hub: Arc<Hub>, to: Target, inbox: mpsc::UnboundedReceiver<ToLink>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(live(&hub, &to, inbox)),
        Err(why) => hub.bring(|session| session.rejected(format!("no event loop for the link: {why}"))),
    }
}

async fn live(hub: &Arc<Hub>, to: &Target, mut inbox: mpsc::UnboundedReceiver<ToLink>) {
    let mut attempt = 0u32;
    // Whether it was said that there is none, since there last was one.
    let mut said = false;
    let mut was_ever_up = false;
    // How many have rejected this member one after the other.
    let mut rejections = 0;
    let mut jitter = hub.look(|session| session.member().0);
    // Where it was sent by the one that it asked last.
    let mut sent_to: Option<String> = None;
    // Where it was attached last: it is asked again first, after what may only have been a broken connection.
    let mut home = 0;
    loop {
        let listed = &to.coordinators[(home + attempt as usize) % to.coordinators.len()];
        let is_sent = sent_to.is_some();
        let coordinator = &sent_to.take().unwrap_or_else(|| listed.clone());
        let ended = attend(hub, coordinator, to, &mut inbox).await;
        let was_up = hub.look(super::session::Session::is_attached);
        was_ever_up |= was_up;
        let is_rejected = matches!(ended, Ended::Rejected(_));
        match ended {
            Ended::Done => return hub.disconnected("the program is done".to_owned()),
            Ended::Elsewhere(leader) => {
                hub.disconnected(format!("{coordinator} does not lead; {leader} does"));
                // One that sends on is followed once; it may know as little as the one before.
                if !is_sent && &leader != coordinator && reknit_proto::may_be_sent(coordinator, &leader) {
                    sent_to = Some(leader);
                    continue;
                }
            }
            // Who has been in does not go for one coordinator's word: another one may know better (its list of tokens may be
            // newer, its release able to read the record).
            Ended::Rejected(why) if !was_ever_up || rejections + 1 >= to.coordinators.len() => {
                return reject(hub, why);
            }
            Ended::Distrust(why) if !was_ever_up => return reject(hub, why),
            Ended::Rejected(why) | Ended::Gone(why) | Ended::Distrust(why) => {
                let is_over = hub.look(|session| session.end().is_some());
                said &= !was_up;
                if !is_over && !std::mem::replace(&mut said, true) {
                    tracing::warn!(%coordinator, %why, "no coordinator; training goes on while its world holds");
                }
                hub.disconnected(why);
            }
        }
        if hub.look(|session| session.end().is_some()) {
            // There is nothing to come back for, however long the program takes to drop its trainer.
            end_of(&mut inbox).await;
            return;
        }
        rejections = if is_rejected { rejections + 1 } else { 0 };
        if was_up {
            home = to.coordinators.iter().position(|listed| listed == coordinator).unwrap_or(home);
            attempt = 0;
        } else {
            attempt = attempt.saturating_add(1);
        }
        jitter = mix(jitter);
        // Each of them is asked once before the pause grows.
        let round = attempt / to.coordinators.len() as u32;
        let longest =
            hub.look(super::session::Session::renew_every).mul_f64(BACKOFF_PER_RENEWAL).max(BACKOFF_MAX);
        let most = (BACKOFF_FIRST * 2u32.saturating_pow(round.min(8))).min(longest);
        let pause = most.mul_f64((jitter >> 11) as f64 / (1u64 << 53) as f64);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = end_of(&mut inbox) => return,
        }
    }
}

fn reject(hub: &Arc<Hub>, why: String) {
    hub.disconnected(why.clone());
    hub.bring(|session| session.rejected(why));
}

/// Drops what is to be said while there is nobody to hear it (the session says again what still matters), until the
/// program is done.
async fn end_of(inbox: &mut mpsc::UnboundedReceiver<ToLink>) {
    loop {
        match inbox.recv().await {
            Some(ToLink::End) | None => return,
            Some(ToLink::Say(_) | ToLink::Reconnect) => {}
        }
    }
}

/// One stream, from its introduction to its end.
async fn attend(
    hub: &Arc<Hub>,
    coordinator: &str,
    to: &Target,
    inbox: &mut mpsc::UnboundedReceiver<ToLink>,
) -> Ended {
    let began = tokio::select! {
        began = begin(hub, coordinator, to) => began,
        () = end_of(inbox) => return Ended::Done,
    };
    let (sender, mut inbound) = match began {
        Ok(stream) => stream,
        Err(ended) => return ended,
    };
    let mut renew_at = tokio::time::Instant::now() + hub.look(super::session::Session::renew_every);
    loop {
        tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => match rendezvous::told(message) {
                    Ok(told) => hub.told(told),
                    Err(why) => return Ended::Rejected(format!("the coordinator does not speak our protocol: {why}")),
                },
                Ok(None) => return gone("it ended the stream"),
                Err(status) => return ended_by(&status),
            },
            to_say = inbox.recv() => match to_say {
                Some(ToLink::Say(event)) => {
                    if say(&sender, &event).await.is_err() {
                        return gone("it takes nothing any more");
                    }
                }
                Some(ToLink::Reconnect) => return gone("this worker comes back as a new member"),
                Some(ToLink::End) | None => {
                    // What was said last is on its way before the stream ends.
                    drop(sender);
                    let farewell = async { while let Ok(Some(_)) = inbound.message().await {} };
                    let _ = tokio::time::timeout(FAREWELL, farewell).await;
                    return Ended::Done;
                }
            },
            () = tokio::time::sleep_until(renew_at) => {
                let renewal = hub.look(super::session::Session::renewal);
                if say(&sender, &renewal).await.is_err() {
                    return gone("it takes nothing any more");
                }
                renew_at = tokio::time::Instant::now() + hub.look(super::session::Session::renew_every);
            }
        }
    }
}

async fn begin(
    hub: &Arc<Hub>,
    coordinator: &str,
    to: &Target,
) -> Result<(Sender, Streaming<v1::CoordinatorMessage>), Ended> {
    let keepalive = hub.look(super::session::Session::renew_every).max(KEEPALIVE_MIN);
    let senseless = |why: CredentialsError| Ended::Distrust(format!("{} ({})", why.text(), why.hint()));
    let endpoint = to
        .credentials
        .endpoint(coordinator)
        .map_err(senseless)?
        .connect_timeout(CONNECT_PATIENCE)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(keepalive)
        .keep_alive_while_idle(true);
    let channel = tokio::time::timeout(CONNECT_PATIENCE * 2, endpoint.connect())
        .await
        .map_err(|_| gone("no connection in time"))?
        .map_err(|why| distrust(&why).unwrap_or_else(|| gone(root(&why))))?;
    let (sender, receiver) = mpsc::channel(OUTBOUND);
    let introduction = hub.look(|session| Introduction {
        job: to.job.clone(),
        member: session.member(),
        join: session.join(),
    });
    sender.send(rendezvous::from_introduction(&introduction)).await.map_err(|_| gone("no stream"))?;
    let authorization = to.credentials.authorization().map_err(senseless)?;
    let mut client = RendezvousClient::with_interceptor(channel, authorization);
    let attended = client.attend(ReceiverStream::new(receiver));
    match tokio::time::timeout(CONNECT_PATIENCE, attended).await {
        Ok(Ok(response)) => Ok((sender, response.into_inner())),
        Ok(Err(status)) => Err(ended_by(&status)),
        Err(_) => Err(gone(format!("no answer within {CONNECT_PATIENCE:?}"))),
    }
}

async fn say(sender: &Sender, event: &reknit_membership::Event) -> Result<(), ()> {
    match rendezvous::from_event(event, now()) {
        Some(message) => sender.send(message).await.map_err(|_| ()),
        None => Ok(()),
    }
}

/// Only the time left until a deadline travels, so any clock will do.
pub(crate) fn now() -> Timestamp {
    let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp::default().after(wall)
}

fn gone(why: impl ToString) -> Ended {
    Ended::Gone(why.to_string())
}

/// What lies at the bottom of an error: what is above it only says that there was one.
fn root(why: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(why), |why| why.source()).last().unwrap_or(why).to_string()
}

/// What stands between the two that people have to put right, if that is what it is.
fn distrust(why: &(dyn std::error::Error + 'static)) -> Option<Ended> {
    let trouble = TlsTrouble::of(why)?;
    let text = format!("{trouble} ({})", trouble.hint());
    Some(if trouble.is_certain() { Ended::Distrust(text) } else { Ended::Gone(text) })
}

fn ended_by(status: &tonic::Status) -> Ended {
    if let Some(distrust) = distrust(status) {
        return distrust;
    }
    match status.code() {
        // Trying again with the same token will not help.
        Code::Unauthenticated | Code::PermissionDenied => Ended::Rejected(status.message().to_owned()),
        Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented | Code::DataLoss => {
            Ended::Rejected(status.message().to_owned())
        }
        _ => match status.metadata().get(reknit_proto::LEADER_KEY).and_then(|leader| leader.to_str().ok()) {
            Some(leader) if !leader.is_empty() => Ended::Elsewhere(leader.to_owned()),
            Some(_) | None => gone(root(status)),
        },
    }
}
