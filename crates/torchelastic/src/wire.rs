//! TCPStore's bytes: what a client may send, and how it is answered.
//!
//! The protocol is that of PyTorch 2.2 and later (`torch/csrc/distributed/c10d/TCPStoreBackend.hpp`, `enum QueryType`); the
//! numbers have never changed since, so one server serves them all. Integers are little-endian. A text is its length as `u64`
//! and its bytes; a list is its length as `u64` and its items. Replies carry no header, and none says that anything failed:
//! who sends what cannot be understood is cut off.

use std::mem::size_of;

/// What a connection must begin with, after the operation's number: a client of PyTorch 2.2 or later sends it first.
pub const MAGIC: u32 = 0x3C85_F7CE;

/// The reply to a wait whose keys are all there.
pub const STOP_WAITING: u8 = 0;
/// The reply to a wait that is taken back.
pub const WAIT_CANCELED: u8 = 1;
/// The replies to whether keys are there.
pub const READY: u8 = 0;
/// Some key is missing.
pub const NOT_READY: u8 = 1;

/// How large a request and its parts may be. The defaults are those of PyTorch's own server, which cuts off whoever goes
/// beyond them; the limit on the whole is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireLimits {
    /// Bytes of a key.
    pub key_bytes: u64,
    /// Bytes of a value.
    pub value_bytes: u64,
    /// Items of a list.
    pub items: u64,
    /// Bytes of a whole request.
    pub request_bytes: usize,
}

impl Default for WireLimits {
    fn default() -> WireLimits {
        WireLimits { key_bytes: 8 << 10, value_bytes: 8 << 20, items: 128 << 10, request_bytes: 64 << 20 }
    }
}

/// One request, as it lies in the buffer that it was received in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// The first message of a connection. No reply.
    Validate {
        /// Must be [`MAGIC`].
        magic: u32,
    },
    /// Replaces a value. No reply.
    Set {
        /// Its key.
        key: &'a [u8],
        /// What it becomes.
        value: &'a [u8],
    },
    /// Replaces a value if it is what is expected. Replies what the value is then.
    CompareSet {
        /// Its key.
        key: &'a [u8],
        /// What it must be; empty stands for a key that is not there, too.
        expected: &'a [u8],
        /// What it becomes.
        desired: &'a [u8],
    },
    /// Replies a value, an empty one for a key that is not there.
    Get {
        /// Its key.
        key: &'a [u8],
    },
    /// Adds to a value, which is a decimal number. Replies the sum.
    Add {
        /// Its key.
        key: &'a [u8],
        /// What to add.
        delta: i64,
    },
    /// Replies whether all keys are there.
    Check {
        /// The keys.
        keys: Keys<'a>,
    },
    /// Replies once all keys are there.
    Wait {
        /// The keys.
        keys: Keys<'a>,
    },
    /// Replies how many keys there are.
    CountKeys,
    /// Removes a key. Replies how many were removed: none or one.
    Delete {
        /// The key.
        key: &'a [u8],
    },
    /// Adds bytes to the end of a value. No reply.
    Append {
        /// Its key.
        key: &'a [u8],
        /// The bytes.
        value: &'a [u8],
    },
    /// Replies several values.
    MultiGet {
        /// Their keys.
        keys: Keys<'a>,
    },
    /// Replaces several values. No reply.
    MultiSet {
        /// Keys and values.
        pairs: Pairs<'a>,
    },
    /// Takes back the wait that the connection has, if it has one. Always replied to.
    CancelWait,
    /// Replies the same number (from 2.5 on).
    Ping {
        /// The number.
        nonce: u32,
    },
    /// Adds a value to the end of a queue. No reply (from 2.8 on, like the next two).
    QueuePush {
        /// The queue's name.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
    },
    /// Takes the first value of a queue. Replies how many there were, and the value if there was one.
    QueuePop {
        /// The queue's name.
        key: &'a [u8],
    },
    /// Replies how many values a queue has.
    QueueLen {
        /// The queue's name.
        key: &'a [u8],
    },
    /// Replies all keys (from 2.10 on).
    ListKeys,
    /// Counts an arrival. Replies once as many have arrived as are expected (from 2.12 on).
    Barrier {
        /// Where the number of arrivals is kept.
        key: &'a [u8],
        /// How many are expected.
        world: i64,
    },
}

/// What the buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// A whole request, and how many bytes it takes.
    Whole(Request<'a>, usize),
    /// The beginning of one: there is no use in looking again before the buffer holds so many bytes.
    Needs(usize),
}

/// Why a client is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRequest {
    /// No operation has this number.
    #[error("operation {0} is not known")]
    UnknownOperation(u8),
    /// A key is longer than it may be.
    #[error("a key of {bytes} bytes; {limit} are allowed")]
    LongKey {
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A value is longer than it may be.
    #[error("a value of {bytes} bytes; {limit} are allowed")]
    LongValue {
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A list has more items than it may have.
    #[error("a list of {items} items; {limit} are allowed")]
    LongList {
        /// How many.
        items: u64,
        /// The limit.
        limit: u64,
    },
    /// A request is longer than it may be.
    #[error("a request of more than {limit} bytes")]
    LongRequest {
        /// The limit.
        limit: usize,
    },
}

/// The request that `buffer` begins with. A request is looked at as a whole or not at all.
///
/// # Errors
/// [`BadRequest`] if it is not one that may be sent.
pub fn parse<'a>(buffer: &'a [u8], limits: &WireLimits) -> Result<Parsed<'a>, BadRequest> {
    let mut reader = Reader { buffer, at: 0, limits };
    let parsed = match reader.request() {
        Ok(request) => Parsed::Whole(request, reader.at),
        Err(Stop::Bad(why)) => return Err(why),
        Err(Stop::Needs(bytes)) => Parsed::Needs(bytes),
    };
    let bytes = match parsed {
        Parsed::Whole(_, bytes) | Parsed::Needs(bytes) => bytes,
    };
    match bytes > limits.request_bytes {
        true => Err(BadRequest::LongRequest { limit: limits.request_bytes }),
        false => Ok(parsed),
    }
}

/// Why a reader goes no further.
enum Stop {
    Needs(usize),
    Bad(BadRequest),
}

struct Reader<'a, 'l> {
    buffer: &'a [u8],
    at: usize,
    limits: &'l WireLimits,
}

impl<'a> Reader<'a, '_> {
    fn request(&mut self) -> Result<Request<'a>, Stop> {
        let [operation] = self.array()?;
        Ok(match operation {
            0 => Request::Validate { magic: u32::from_le_bytes(self.array()?) },
            1 => Request::Set { key: self.key()?, value: self.value()? },
            2 => Request::CompareSet { key: self.key()?, expected: self.value()?, desired: self.value()? },
            3 => Request::Get { key: self.key()? },
            4 => Request::Add { key: self.key()?, delta: i64::from_le_bytes(self.array()?) },
            5 => Request::Check { keys: self.keys()? },
            6 => Request::Wait { keys: self.keys()? },
            7 => Request::CountKeys,
            8 => Request::Delete { key: self.key()? },
            9 => Request::Append { key: self.key()?, value: self.value()? },
            10 => Request::MultiGet { keys: self.keys()? },
            11 => Request::MultiSet { pairs: self.pairs()? },
            12 => Request::CancelWait,
            13 => Request::Ping { nonce: u32::from_le_bytes(self.array()?) },
            14 => Request::QueuePush { key: self.key()?, value: self.value()? },
            15 => Request::QueuePop { key: self.key()? },
            16 => Request::QueueLen { key: self.key()? },
            17 => Request::ListKeys,
            18 => Request::Barrier { key: self.key()?, world: i64::from_le_bytes(self.array()?) },
            unknown => return Err(Stop::Bad(BadRequest::UnknownOperation(unknown))),
        })
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.saturating_add(bytes);
        match self.buffer.get(self.at..end) {
            Some(taken) => {
                self.at = end;
                Ok(taken)
            }
            None => Err(Stop::Needs(end)),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let taken = self.take(N)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    fn number(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_le_bytes)
    }

    fn key(&mut self) -> Result<&'a [u8], Stop> {
        let (bytes, limit) = (self.number()?, self.limits.key_bytes);
        if bytes > limit {
            return Err(Stop::Bad(BadRequest::LongKey { bytes, limit }));
        }
        self.take(bytes as usize)
    }

    fn value(&mut self) -> Result<&'a [u8], Stop> {
        let (bytes, limit) = (self.number()?, self.limits.value_bytes);
        if bytes > limit {
            return Err(Stop::Bad(BadRequest::LongValue { bytes, limit }));
        }
        self.take(bytes as usize)
    }

    /// Reads a list whose items take `least` bytes each at the least. If the list is not all there, more is asked for than
    /// its next item, so that one that comes byte by byte is not gone through again for each of them.
    fn list(
        &mut self,
        least: usize,
        mut item: impl FnMut(&mut Self) -> Result<(), Stop>,
    ) -> Result<(usize, &'a [u8]), Stop> {
        let (items, limit) = (self.number()?, self.limits.items);
        if items > limit {
            return Err(Stop::Bad(BadRequest::LongList { items, limit }));
        }
        let (items, begin) = (items as usize, self.at);
        for done in 0..items {
            item(self).map_err(|stop| match stop {
                Stop::Needs(bytes) => Stop::Needs(bytes + (items - done - 1) * least),
                bad => bad,
            })?;
        }
        Ok((items, &self.buffer[begin..self.at]))
    }

    fn keys(&mut self) -> Result<Keys<'a>, Stop> {
        let (left, rest) = self.list(size_of::<u64>(), |reader| reader.key().map(|_| ()))?;
        Ok(Keys { left, rest })
    }

    fn pairs(&mut self) -> Result<Pairs<'a>, Stop> {
        let (left, rest) = self.list(2 * size_of::<u64>(), |reader| {
            reader.key()?;
            reader.value().map(|_| ())
        })?;
        Ok(Pairs(Keys { left, rest }))
    }
}

/// A list of keys: an iterator over what was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys<'a> {
    left: usize,
    rest: &'a [u8],
}

impl<'a> Keys<'a> {
    /// The one key, if it is one.
    pub fn only(&self) -> Option<&'a [u8]> {
        if self.left == 1 { { *self }.next() } else { None }
    }
}

impl<'a> Iterator for Keys<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        let (length, rest) = self.rest.split_first_chunk()?;
        let (key, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        self.rest = rest;
        Some(key)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Keys<'_> {}

/// A list of keys with values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pairs<'a>(Keys<'a>);

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.0.next()?;
        self.0.left += 1;
        Some((key, self.0.next()?))
    }
}

/// Appends a number to a reply.
pub fn put_number(reply: &mut Vec<u8>, number: i64) {
    reply.extend_from_slice(&number.to_le_bytes());
}

/// Appends a text to a reply.
pub fn put_text(reply: &mut Vec<u8>, text: &[u8]) {
    reply.extend_from_slice(&(text.len() as u64).to_le_bytes());
    reply.extend_from_slice(text);
}

impl<'a> Request<'a> {
    /// The key that it is of, or the first one.
    pub fn first_key(&self) -> Option<&'a [u8]> {
        match *self {
            Request::Set { key, .. }
            | Request::CompareSet { key, .. }
            | Request::Get { key }
            | Request::Add { key, .. }
            | Request::Delete { key }
            | Request::Append { key, .. }
            | Request::QueuePush { key, .. }
            | Request::QueuePop { key }
            | Request::QueueLen { key }
            | Request::Barrier { key, .. } => Some(key),
            Request::Check { mut keys } | Request::Wait { mut keys } | Request::MultiGet { mut keys } => {
                keys.next()
            }
            Request::MultiSet { mut pairs } => pairs.next().map(|(key, _)| key),
            Request::Validate { .. }
            | Request::CountKeys
            | Request::CancelWait
            | Request::Ping { .. }
            | Request::ListKeys => None,
        }
    }

    /// The same of another key, if it is of one key.
    #[must_use]
    pub fn with_key(mut self, name: impl Fn(&'a [u8]) -> &'a [u8]) -> Request<'a> {
        match &mut self {
            Request::Set { key, .. }
            | Request::CompareSet { key, .. }
            | Request::Get { key }
            | Request::Add { key, .. }
            | Request::Delete { key }
            | Request::Append { key, .. }
            | Request::QueuePush { key, .. }
            | Request::QueuePop { key }
            | Request::QueueLen { key }
            | Request::Barrier { key, .. } => *key = name(key),
            Request::Validate { .. }
            | Request::Check { .. }
            | Request::Wait { .. }
            | Request::CountKeys
            | Request::MultiGet { .. }
            | Request::MultiSet { .. }
            | Request::CancelWait
            | Request::Ping { .. }
            | Request::ListKeys => {}
        }
        self
    }
}

impl Request<'_> {
    /// The bytes that a client sends for it.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        match *self {
            Request::Validate { magic } => {
                bytes.push(0);
                bytes.extend_from_slice(&magic.to_le_bytes());
            }
            Request::Set { key, value } => put(bytes, 1, &[key, value]),
            Request::CompareSet { key, expected, desired } => put(bytes, 2, &[key, expected, desired]),
            Request::Get { key } => put(bytes, 3, &[key]),
            Request::Add { key, delta } => {
                put(bytes, 4, &[key]);
                put_number(bytes, delta);
            }
            Request::Check { keys } => put_keys(bytes, 5, keys),
            Request::Wait { keys } => put_keys(bytes, 6, keys),
            Request::CountKeys => bytes.push(7),
            Request::Delete { key } => put(bytes, 8, &[key]),
            Request::Append { key, value } => put(bytes, 9, &[key, value]),
            Request::MultiGet { keys } => put_keys(bytes, 10, keys),
            Request::MultiSet { pairs } => put_keys(bytes, 11, pairs.0),
            Request::CancelWait => bytes.push(12),
            Request::Ping { nonce } => {
                bytes.push(13);
                bytes.extend_from_slice(&nonce.to_le_bytes());
            }
            Request::QueuePush { key, value } => put(bytes, 14, &[key, value]),
            Request::QueuePop { key } => put(bytes, 15, &[key]),
            Request::QueueLen { key } => put(bytes, 16, &[key]),
            Request::ListKeys => bytes.push(17),
            Request::Barrier { key, world } => {
                put(bytes, 18, &[key]);
                put_number(bytes, world);
            }
        }
    }
}

fn put(bytes: &mut Vec<u8>, operation: u8, texts: &[&[u8]]) {
    bytes.push(operation);
    for text in texts {
        put_text(bytes, text);
    }
}

fn put_keys(bytes: &mut Vec<u8>, operation: u8, keys: Keys<'_>) {
    bytes.push(operation);
    bytes.extend_from_slice(&(keys.left as u64).to_le_bytes());
    bytes.extend_from_slice(keys.rest);
}

#[cfg(test)]
#[path = "wire/tests.rs"]
mod tests;
