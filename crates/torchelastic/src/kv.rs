//! The key-value store that workers and agents meet in: what PyTorch calls a `Store`.
//!
//! It is a function of what is asked of it: it gives the bytes to reply, and who else is to be woken. It behaves as PyTorch's
//! libuv server does, with the differences that `tests/torchelastic/conformance.py` lists.

mod total;

use std::collections::{HashMap, HashSet, VecDeque};

use crate::wire::{self, Keys, Request, put_number, put_text};
use total::Share;
pub use total::Total;

/// Names a connection, as long as it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// How much one store may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLimits {
    /// Keys, queued values and awaited keys, all together.
    pub entries: usize,
    /// Bytes of keys and values.
    pub bytes: usize,
    /// Bytes of one value, however it came to be.
    pub value_bytes: usize,
    /// Bytes of one reply.
    pub reply_bytes: usize,
}

impl Default for KvLimits {
    fn default() -> KvLimits {
        KvLimits { entries: 1 << 20, bytes: 256 << 20, value_bytes: 8 << 20, reply_bytes: 64 << 20 }
    }
}

/// About what an entry takes beside its bytes: its place in a table, and two allocations.
const ENTRY_BYTES: usize = 96;

/// Why a request cannot be carried out: the connection is cut off, for the protocol has no other way to say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KvError {
    /// A value that is to be added to is not a number, or the sum is too large for one.
    #[error("a value that is to be added to is no number")]
    NoNumber,
    /// It would hold more than it may.
    #[error("the store would hold more than it may ({entries} entries, {bytes} bytes)")]
    Full {
        /// The limit on entries.
        entries: usize,
        /// The limit on bytes.
        bytes: usize,
    },
    /// All stores would hold more than they may.
    #[error("the stores would hold more than they may ({bytes} bytes together)")]
    AllFull {
        /// The limit.
        bytes: usize,
    },
    /// A value would be longer than it may.
    #[error("a value of more than {limit} bytes")]
    LongValue {
        /// The limit.
        limit: usize,
    },
    /// The reply would be longer than it may.
    #[error("a reply of more than {limit} bytes")]
    LongReply {
        /// The limit.
        limit: usize,
    },
    /// A connection that has shown what it speaks does so again.
    #[error("a second greeting")]
    Greeting,
}

/// A store, with everybody who waits for something in it.
#[derive(Debug, Default)]
pub struct KvStore {
    limits: KvLimits,
    values: HashMap<Box<[u8]>, Vec<u8>>,
    queues: HashMap<Box<[u8]>, VecDeque<Vec<u8>>>,
    /// Who waits for a key to be there, the first who came first.
    awaited: HashMap<Box<[u8]>, Vec<ConnectionId>>,
    /// Who waits for a barrier to be full.
    gathered: HashMap<Box<[u8]>, Vec<ConnectionId>>,
    /// What each connection waits for.
    waits: HashMap<ConnectionId, Wait>,
    queued: usize,
    awaited_keys: usize,
    bytes: usize,
    share: Share,
    is_for_workers: bool,
}

#[derive(Debug)]
enum Wait {
    Keys(HashSet<Box<[u8]>>),
    Barrier(Box<[u8]>),
}

impl KvStore {
    /// An empty store, with a share in what several may hold.
    pub fn new(limits: KvLimits, total: &Total) -> KvStore {
        KvStore { limits, share: Share::of(total), ..KvStore::default() }
    }

    /// An empty store for the workers of one round.
    ///
    /// PyTorch 2.5 puts the number of an agent's restarts before the keys of its workers. Agents count for themselves, and one whose
    /// workers have failed counts more than one that was told to begin anew: their workers would never meet. In a store that is
    /// emptied at every round that number has no use, and is passed over.
    pub fn for_workers(limits: KvLimits, total: &Total) -> KvStore {
        KvStore { is_for_workers: true, ..KvStore::new(limits, total) }
    }

    /// The name under which a key is kept.
    fn named<'a>(&self, key: &'a [u8]) -> &'a [u8] {
        if self.is_for_workers { without_attempt(key) } else { key }
    }

    /// Carries out what `from` asks. Appends the reply, if there is one, and says whose waits have ended with it: each of
    /// them is sent [`wire::STOP_WAITING`]. Among those may be `from` itself.
    ///
    /// # Errors
    /// [`KvError`] if `from` is to be cut off. Nothing has changed then, but what came first in a list.
    pub fn request(
        &mut self,
        from: ConnectionId,
        request: Request<'_>,
        reply: &mut Vec<u8>,
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), KvError> {
        let done = self.carry_out(from, request, reply, woken);
        self.count();
        done
    }

    fn carry_out(
        &mut self,
        from: ConnectionId,
        request: Request<'_>,
        reply: &mut Vec<u8>,
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), KvError> {
        match request.with_key(|key| self.named(key)) {
            Request::Validate { .. } => return Err(KvError::Greeting),
            Request::Ping { nonce } => reply.extend_from_slice(&nonce.to_le_bytes()),
            Request::Set { key, value } => self.put(key, value.to_vec(), woken)?,
            Request::Append { key, value } => self.append(key, value, woken)?,
            Request::MultiSet { pairs } => {
                for (key, value) in pairs {
                    self.put(self.named(key), value.to_vec(), woken)?;
                }
            }
            Request::CompareSet { key, expected, desired } => {
                let now = self.compare_set(key, expected, desired, woken)?;
                put_text(reply, now);
            }
            Request::Add { key, delta } => put_number(reply, self.add(key, delta, woken)?),
            Request::Get { key } => put_text(reply, self.get(key).unwrap_or_default()),
            Request::MultiGet { keys } => {
                for key in keys {
                    put_text(reply, self.get(self.named(key)).unwrap_or_default());
                    if reply.len() > self.limits.reply_bytes {
                        return Err(KvError::LongReply { limit: self.limits.reply_bytes });
                    }
                }
            }
            Request::Delete { key } => put_number(reply, i64::from(self.take(key))),
            Request::CountKeys => put_number(reply, self.values.len() as i64),
            Request::ListKeys => {
                put_number(reply, self.values.len() as i64);
                for key in self.values.keys() {
                    put_text(reply, key);
                    if reply.len() > self.limits.reply_bytes {
                        return Err(KvError::LongReply { limit: self.limits.reply_bytes });
                    }
                }
            }
            Request::Check { mut keys } => {
                let ready = keys.all(|key| self.is_there(self.named(key)));
                reply.push(if ready { wire::READY } else { wire::NOT_READY });
            }
            Request::Wait { keys } => self.wait(from, keys, reply)?,
            Request::CancelWait => {
                self.end_wait(from);
                reply.push(wire::WAIT_CANCELED);
            }
            Request::QueuePush { key, value } => self.push(key, value, woken)?,
            Request::QueuePop { key } => self.pop(key, reply),
            Request::QueueLen { key } => {
                put_number(reply, self.queues.get(key).map_or(0, VecDeque::len) as i64);
            }
            Request::Barrier { key, world } => self.barrier(from, key, world, reply, woken)?,
        }
        Ok(())
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.values.get(key).map(Vec::as_slice)
    }

    /// Removes the keys and queues of such names.
    pub fn clear(&mut self, which: impl Fn(&[u8]) -> bool) {
        let keys: Vec<Box<[u8]>> = self.values.keys().filter(|key| which(key)).cloned().collect();
        for key in keys {
            self.take(&key);
        }
        let queues: Vec<Box<[u8]>> = self.queues.keys().filter(|name| which(name)).cloned().collect();
        for name in queues {
            let queue = self.queues.remove(&name).unwrap_or_default();
            self.queued -= queue.len();
            self.bytes -= name.len() + queue.iter().map(Vec::len).sum::<usize>();
        }
        self.count();
    }

    /// Replaces a value.
    ///
    /// # Errors
    /// [`KvError::Full`] or [`KvError::AllFull`] if there is no room for it.
    pub fn set(&mut self, key: &[u8], value: &[u8], woken: &mut Vec<ConnectionId>) -> Result<(), KvError> {
        let done = self.put(key, value.to_vec(), woken);
        self.count();
        done
    }

    fn put(&mut self, key: &[u8], value: Vec<u8>, woken: &mut Vec<ConnectionId>) -> Result<(), KvError> {
        match self.values.get(key).map(Vec::len) {
            Some(now) => {
                if value.len() > now {
                    self.may_grow(0, value.len() - now)?;
                }
                self.bytes = self.bytes - now + value.len();
                if let Some(now) = self.values.get_mut(key) {
                    *now = value;
                }
            }
            None => {
                self.grow(1, key.len() + value.len())?;
                self.values.insert(key.into(), value);
                // Who waits for a key does so only as long as it is not there.
                self.wake_all(key, woken);
            }
        }
        Ok(())
    }

    fn append(&mut self, key: &[u8], more: &[u8], woken: &mut Vec<ConnectionId>) -> Result<(), KvError> {
        let Some(now) = self.values.get(key).map(Vec::len) else {
            return self.put(key, more.to_vec(), woken);
        };
        if now + more.len() > self.limits.value_bytes {
            return Err(KvError::LongValue { limit: self.limits.value_bytes });
        }
        self.grow(0, more.len())?;
        if let Some(value) = self.values.get_mut(key) {
            value.extend_from_slice(more);
        }
        Ok(())
    }

    /// What counts towards the limit on entries.
    fn entries(&self) -> usize {
        self.values.len() + self.queued + self.awaited_keys
    }

    /// Counts what it holds now towards what all stores hold.
    fn count(&mut self) {
        self.share.set(self.bytes + ENTRY_BYTES * self.entries());
    }

    /// Whether a value of so many bytes could be stored under a key.
    ///
    /// # Errors
    /// [`KvError::Full`] or [`KvError::AllFull`] if not.
    pub fn check_room(&self, key: &[u8], bytes: usize) -> Result<(), KvError> {
        let entries = usize::from(!self.values.contains_key(key));
        self.may_grow(entries, key.len() + bytes)
    }

    /// Whether it could hold so much more.
    fn may_grow(&self, entries: usize, bytes: usize) -> Result<(), KvError> {
        let (entries, bytes) = (self.entries() + entries, self.bytes + bytes);
        if entries > self.limits.entries || bytes > self.limits.bytes {
            return Err(self.full());
        }
        if !self.share.has_room(bytes + ENTRY_BYTES * entries) {
            return Err(KvError::AllFull { bytes: self.share.limit() });
        }
        Ok(())
    }

    /// Makes room for so much more. The entries are counted where they are put.
    fn grow(&mut self, entries: usize, bytes: usize) -> Result<(), KvError> {
        self.may_grow(entries, bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    fn full(&self) -> KvError {
        KvError::Full { entries: self.limits.entries, bytes: self.limits.bytes }
    }

    /// Removes a key. True if it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.take(key);
        self.count();
        removed
    }

    fn take(&mut self, key: &[u8]) -> bool {
        let removed = self.values.remove(key);
        if let Some(value) = &removed {
            self.bytes -= key.len() + value.len();
        }
        removed.is_some()
    }

    /// Replaces a value if it is what is expected, and returns what it is then.
    fn compare_set<'a>(
        &'a mut self,
        key: &[u8],
        expected: &'a [u8],
        desired: &[u8],
        woken: &mut Vec<ConnectionId>,
    ) -> Result<&'a [u8], KvError> {
        let matches = match self.get(key) {
            Some(now) => now == expected,
            None if expected.is_empty() => true,
            // Nothing is written, and yet what was expected is replied: older clients rely on it.
            None => return Ok(expected),
        };
        if matches {
            self.put(key, desired.to_vec(), woken)?;
        }
        Ok(self.get(key).unwrap_or_default())
    }

    fn add(&mut self, key: &[u8], delta: i64, woken: &mut Vec<ConnectionId>) -> Result<i64, KvError> {
        let now = self.get(key).map_or(Some(0), leading_number).ok_or(KvError::NoNumber)?;
        let sum = now.checked_add(delta).ok_or(KvError::NoNumber)?;
        self.put(key, sum.to_string().into_bytes(), woken)?;
        Ok(sum)
    }

    /// Whether a key or a queue of that name is there.
    fn is_there(&self, key: &[u8]) -> bool {
        self.values.contains_key(key) || self.queues.contains_key(key)
    }

    fn wait(&mut self, from: ConnectionId, keys: Keys<'_>, reply: &mut Vec<u8>) -> Result<(), KvError> {
        // A client has one wait at a time.
        self.end_wait(from);
        if keys.into_iter().all(|key| self.is_there(self.named(key))) {
            reply.push(wire::STOP_WAITING);
            return Ok(());
        }
        let names = keys.map(|key| self.named(key));
        let missing: HashSet<Box<[u8]>> = names.filter(|key| !self.is_there(key)).map(Into::into).collect();
        let bytes: usize = missing.iter().map(|key| key.len()).sum();
        self.may_grow(missing.len(), 0)?;
        // Each is kept twice. What is waited for is little, or somebody means ill.
        if bytes > self.limits.value_bytes / 8 {
            return Err(self.full());
        }
        self.awaited_keys += missing.len();
        for key in &missing {
            self.awaited.entry(key.clone()).or_default().push(from);
        }
        self.waits.insert(from, Wait::Keys(missing));
        Ok(())
    }

    fn push(&mut self, key: &[u8], value: &[u8], woken: &mut Vec<ConnectionId>) -> Result<(), KvError> {
        let is_new = !self.queues.contains_key(key);
        self.grow(1, value.len() + if is_new { key.len() } else { 0 })?;
        self.queued += 1;
        match self.queues.get_mut(key) {
            Some(queue) => queue.push_back(value.to_vec()),
            None => {
                self.queues.insert(key.into(), VecDeque::from([value.to_vec()]));
            }
        }
        // One value is for one.
        if let Some(first) = self.awaited.get(key).and_then(|waiting| waiting.first()).copied() {
            self.strike(first, key);
            self.has_come(first, key, woken);
        }
        Ok(())
    }

    fn pop(&mut self, key: &[u8], reply: &mut Vec<u8>) {
        let Some(queue) = self.queues.get_mut(key) else { return put_number(reply, 0) };
        put_number(reply, queue.len() as i64);
        if let Some(value) = queue.pop_front() {
            put_text(reply, &value);
            self.queued -= 1;
            self.bytes -= value.len();
        }
        if queue.is_empty() {
            self.queues.remove(key);
            self.bytes -= key.len();
        }
    }

    fn barrier(
        &mut self,
        from: ConnectionId,
        key: &[u8],
        world: i64,
        reply: &mut Vec<u8>,
        woken: &mut Vec<ConnectionId>,
    ) -> Result<(), KvError> {
        let arrived = self.add(key, 1, woken)?;
        if arrived >= world {
            reply.push(wire::STOP_WAITING);
            for other in self.gathered.remove(key).unwrap_or_default() {
                self.waits.remove(&other);
                self.awaited_keys -= 1;
                woken.push(other);
            }
            return Ok(());
        }
        self.end_wait(from);
        self.may_grow(1, 0)?;
        self.awaited_keys += 1;
        self.gathered.entry(key.into()).or_default().push(from);
        self.waits.insert(from, Wait::Barrier(key.into()));
        Ok(())
    }

    /// Everybody who waits for this key waits for one less.
    fn wake_all(&mut self, key: &[u8], woken: &mut Vec<ConnectionId>) {
        for waiting in self.awaited.remove(key).unwrap_or_default() {
            self.awaited_keys -= 1;
            self.has_come(waiting, key, woken);
        }
    }

    /// A key that this one waits for is there: if it was the last, its wait has ended.
    fn has_come(&mut self, waiting: ConnectionId, key: &[u8], woken: &mut Vec<ConnectionId>) {
        let Some(Wait::Keys(missing)) = self.waits.get_mut(&waiting) else { return };
        missing.remove(key);
        if missing.is_empty() {
            self.waits.remove(&waiting);
            woken.push(waiting);
        }
    }

    /// Takes a connection from the list of those that wait for a key.
    fn strike(&mut self, waiting: ConnectionId, key: &[u8]) {
        if let Some(all) = self.awaited.get_mut(key) {
            let before = all.len();
            all.retain(|other| *other != waiting);
            self.awaited_keys -= before - all.len();
            if all.is_empty() {
                self.awaited.remove(key);
            }
        }
    }

    /// The connection waits for nothing any more: it took its wait back, or is closed.
    pub fn forget(&mut self, connection: ConnectionId) {
        self.end_wait(connection);
        self.count();
    }

    fn end_wait(&mut self, connection: ConnectionId) {
        match self.waits.remove(&connection) {
            None => {}
            Some(Wait::Keys(keys)) => {
                for key in keys {
                    self.strike(connection, &key);
                }
            }
            Some(Wait::Barrier(key)) => {
                let Some(all) = self.gathered.get_mut(&key) else { return };
                all.retain(|other| *other != connection);
                self.awaited_keys -= 1;
                if all.is_empty() {
                    self.gathered.remove(&key);
                }
            }
        }
    }
}

/// What the keys of workers begin with in PyTorch 2.5, before the number of their agent's restarts.
pub const WORKER_PREFIX: &[u8] = b"//worker/attempt_";

/// A worker's key without the number of its agent's restarts.
fn without_attempt(key: &[u8]) -> &[u8] {
    let Some(rest) = key.strip_prefix(WORKER_PREFIX) else { return key };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    match rest.get(digits) {
        Some(b'/') if digits > 0 => &rest[digits..],
        _ => key,
    }
}

/// The number that a text begins with, as C's `strtoll` reads it: blanks before it and whatever follows it are passed over.
fn leading_number(text: &[u8]) -> Option<i64> {
    let text = text.trim_ascii_start();
    let sign = usize::from(matches!(text.first(), Some(b'+' | b'-')));
    let digits = text[sign..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..sign + digits]).ok()?.parse().ok()
}

#[cfg(test)]
#[path = "kv/tests.rs"]
mod tests;
