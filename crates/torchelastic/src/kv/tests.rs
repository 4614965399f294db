use super::*;
use crate::wire::{Parsed, WireLimits, parse};

const A: ConnectionId = ConnectionId(1);
const B: ConnectionId = ConnectionId(2);
const C: ConnectionId = ConnectionId(3);

/// A store, asked in the protocol's bytes.
struct Asked {
    store: KvStore,
    woken: Vec<ConnectionId>,
}

impl Asked {
    fn new() -> Asked {
        Asked::with(KvLimits::default())
    }

    fn with(limits: KvLimits) -> Asked {
        Asked { store: KvStore::new(limits, &Total::default()), woken: Vec::new() }
    }

    fn try_ask(&mut self, from: ConnectionId, request: &[u8]) -> Result<Vec<u8>, KvError> {
        let Parsed::Whole(request, _) = parse(request, &WireLimits::default()).unwrap() else { panic!() };
        let mut reply = Vec::new();
        self.store.request(from, request, &mut reply, &mut self.woken)?;
        Ok(reply)
    }

    fn ask(&mut self, from: ConnectionId, request: &[u8]) -> Vec<u8> {
        self.try_ask(from, request).unwrap()
    }

    fn set(&mut self, key: &str, value: &str) {
        assert_eq!(self.ask(A, &texts(1, &[key, value])), [], "no reply");
    }

    fn get(&mut self, key: &str) -> String {
        String::from_utf8(text(&self.ask(A, &texts(3, &[key])))).unwrap()
    }

    fn add(&mut self, key: &str, delta: i64) -> Result<i64, KvError> {
        let request = [texts(4, &[key]), delta.to_le_bytes().to_vec()].concat();
        self.try_ask(A, &request).map(|reply| i64::from_le_bytes(reply.try_into().unwrap()))
    }

    fn woken(&mut self) -> Vec<ConnectionId> {
        std::mem::take(&mut self.woken)
    }
}

fn texts(operation: u8, texts: &[&str]) -> Vec<u8> {
    let mut bytes = vec![operation];
    for text in texts {
        put_text(&mut bytes, text.as_bytes());
    }
    bytes
}

fn keys(operation: u8, keys: &[&str]) -> Vec<u8> {
    let mut bytes = vec![operation];
    bytes.extend_from_slice(&(keys.len() as u64).to_le_bytes());
    for key in keys {
        put_text(&mut bytes, key.as_bytes());
    }
    bytes
}

fn barrier(key: &str, world: i64) -> Vec<u8> {
    [texts(18, &[key]), world.to_le_bytes().to_vec()].concat()
}

fn text(reply: &[u8]) -> Vec<u8> {
    let (length, text) = reply.split_first_chunk().unwrap();
    assert_eq!(u64::from_le_bytes(*length), text.len() as u64);
    text.to_vec()
}

fn compare_set(store: &mut Asked, key: &str, expected: &str, desired: &str) -> String {
    String::from_utf8(text(&store.ask(A, &texts(2, &[key, expected, desired])))).unwrap()
}

#[test]
fn a_value_is_what_was_set_last_and_none_is_empty() {
    let mut store = Asked::new();
    assert_eq!(store.get("/k"), "");
    store.set("/k", "one");
    store.set("/k", "two");
    assert_eq!(store.get("/k"), "two");
    store.ask(A, &texts(9, &["/k", "+three"]));
    store.ask(A, &texts(9, &["/new", "begun"]));
    assert_eq!((store.get("/k"), store.get("/new")), ("two+three".to_owned(), "begun".to_owned()));
    assert_eq!(store.ask(A, &[7]), 2_i64.to_le_bytes());
    assert_eq!(store.ask(A, &texts(8, &["/k"])), 1_i64.to_le_bytes());
    assert_eq!(store.ask(A, &texts(8, &["/k"])), 0_i64.to_le_bytes());
    assert_eq!(store.ask(A, &[17]), [&1_i64.to_le_bytes()[..], &texts(0, &["/new"])[1..]].concat());
}

#[test]
fn compare_and_set_replies_what_is_there_and_what_was_expected_where_nothing_is() {
    let mut store = Asked::new();
    assert_eq!(compare_set(&mut store, "/k", "something", "new"), "something");
    assert_eq!(store.get("/k"), "", "and yet nothing was written");
    assert_eq!(compare_set(&mut store, "/k", "", "new"), "new");
    assert_eq!(compare_set(&mut store, "/k", "old", "newer"), "new");
    assert_eq!(compare_set(&mut store, "/k", "new", "newer"), "newer");
    store.set("/empty", "");
    assert_eq!(compare_set(&mut store, "/empty", "", "full"), "full");
}

#[test]
fn a_number_is_read_as_c_reads_it() {
    let mut store = Asked::new();
    assert_eq!(store.add("/n", 0), Ok(0));
    assert_eq!(store.add("/n", -3), Ok(-3));
    assert_eq!(store.get("/n"), "-3");
    for (value, sum) in
        [(" \t7x", Some(8)), ("+5", Some(6)), ("-1", Some(0)), ("x", None), ("", None), ("- 1", None)]
    {
        store.set("/n", value);
        assert_eq!(store.add("/n", 1).ok(), sum, "{value:?}");
    }
    store.set("/n", &i64::MAX.to_string());
    assert_eq!(store.add("/n", 1), Err(KvError::NoNumber));
    assert_eq!(store.get("/n"), i64::MAX.to_string(), "nothing has changed");
}

#[test]
fn who_waits_is_woken_once_when_the_last_of_the_keys_is_there() {
    let mut store = Asked::new();
    assert_eq!(store.ask(B, &keys(6, &[])), [0]);
    assert_eq!(store.ask(B, &keys(5, &["/a"])), [1]);
    assert_eq!(store.ask(B, &keys(6, &["/a", "/b", "/a"])), []);
    assert_eq!(store.ask(C, &keys(6, &["/b"])), []);
    store.set("/b", "");
    assert_eq!(store.woken(), [C]);
    // What goes again does not have to come again.
    store.ask(A, &texts(8, &["/b"]));
    store.set("/a", "");
    assert_eq!(store.woken(), [B]);
    store.set("/a", "again");
    store.set("/b", "again");
    assert_eq!(store.woken(), []);
    assert_eq!(store.ask(B, &keys(5, &["/a", "/b"])), [0]);
}

#[test]
fn every_way_of_making_a_key_wakes() {
    let makes: [fn(&mut Asked); 6] = [
        |store| store.set("/k", "v"),
        |store| drop(store.ask(A, &texts(9, &["/k", "v"]))),
        |store| drop(store.ask(A, &[&[11], &1_u64.to_le_bytes()[..], &texts(0, &["/k", "v"])[1..]].concat())),
        |store| assert_eq!(store.add("/k", 1), Ok(1)),
        |store| drop(compare_set(store, "/k", "", "v")),
        |store| drop(store.ask(A, &texts(14, &["/k", "v"]))),
    ];
    for (i, make) in makes.iter().enumerate() {
        let mut store = Asked::new();
        store.ask(B, &keys(6, &["/k"]));
        make(&mut store);
        assert_eq!(store.woken(), [B], "{i}");
    }
    let mut store = Asked::new();
    store.ask(B, &keys(6, &["/k"]));
    compare_set(&mut store, "/k", "not there", "v");
    assert_eq!(store.woken(), [], "nothing was made");
}

#[test]
fn a_wait_is_taken_back_or_ends_with_its_connection() {
    let mut store = Asked::new();
    store.ask(B, &keys(6, &["/a", "/b"]));
    assert_eq!(store.ask(B, &[12]), [1]);
    assert_eq!(store.ask(B, &[12]), [1], "always replied to");
    store.ask(C, &keys(6, &["/a"]));
    store.store.forget(C);
    store.set("/a", "");
    store.set("/b", "");
    assert_eq!(store.woken(), []);
    assert_eq!((store.store.awaited_keys, store.store.waits.len(), store.store.awaited.len()), (0, 0, 0));
}

#[test]
fn a_queue_gives_its_values_in_order_and_each_to_one() {
    let mut store = Asked::new();
    for waiting in [B, C] {
        store.ask(waiting, &keys(6, &["/q"]));
    }
    store.ask(A, &texts(14, &["/q", "one"]));
    assert_eq!(store.woken(), [B]);
    store.ask(A, &texts(14, &["/q", "two"]));
    assert_eq!(store.woken(), [C]);
    assert_eq!(store.ask(A, &keys(5, &["/q"])), [0], "a queue is there like a key");
    assert_eq!(store.ask(A, &[7]), 0_i64.to_le_bytes(), "and is not counted as one");
    assert_eq!(store.ask(A, &texts(16, &["/q"])), 2_i64.to_le_bytes());
    let one = [&2_i64.to_le_bytes()[..], &texts(0, &["one"])[1..]].concat();
    assert_eq!(store.ask(A, &texts(15, &["/q"])), one);
    store.ask(A, &texts(15, &["/q"]));
    assert_eq!(store.ask(A, &texts(15, &["/q"])), 0_i64.to_le_bytes());
    assert_eq!((store.store.bytes, store.store.queued), (0, 0));
}

#[test]
fn a_barrier_opens_for_all_who_have_come_and_for_whoever_comes_later() {
    let mut store = Asked::new();
    assert_eq!(store.ask(B, &barrier("/b", 3)), []);
    assert_eq!(store.ask(C, &barrier("/b", 3)), []);
    assert_eq!(store.woken(), []);
    assert_eq!(store.ask(A, &barrier("/b", 3)), [0]);
    assert_eq!(store.woken(), [B, C]);
    assert_eq!(store.get("/b"), "3");
    assert_eq!(store.ask(B, &barrier("/b", 3)), [0]);
    // Who gives up has come all the same.
    store.ask(B, &barrier("/other", 2));
    assert_eq!(store.ask(B, &[12]), [1]);
    assert_eq!(store.ask(C, &barrier("/other", 2)), [0]);
    assert_eq!(store.woken(), []);
}

#[test]
fn workers_meet_whatever_number_their_agents_have_counted_to() {
    let mut store =
        Asked { store: KvStore::for_workers(KvLimits::default(), &Total::default()), woken: Vec::new() };
    let (one, other) = ("//worker/attempt_0/default_pg/k", "//worker/attempt_12/default_pg/k");
    assert_eq!(store.ask(B, &keys(6, &[other])), []);
    store.set(one, "v");
    assert_eq!(store.woken(), [B]);
    assert_eq!(store.get(other), "v");
    assert_eq!(store.ask(A, &keys(5, &[one, other])), [0]);
    assert_eq!(store.ask(A, &keys(10, &[other])), store.ask(A, &texts(3, &[one])));
    store.ask(A, &[&[11], &1_u64.to_le_bytes()[..], &texts(0, &[other, "w"])[1..]].concat());
    assert_eq!(store.get(one), "w");
    for else_named in
        ["//worker/attempt_/default_pg/k", "//worker/attempt_1", "/worker/attempt_1/default_pg/k"]
    {
        assert_eq!(store.get(else_named), "");
    }
}

#[test]
fn e7_a_store_holds_no_more_than_it_may() {
    let limits = KvLimits { entries: 4, bytes: 40, value_bytes: 1000, reply_bytes: 30 };
    let full = KvError::Full { entries: 4, bytes: 40 };
    let mut store = Asked::with(limits);
    store.set("/a", "0123456789");
    assert_eq!(store.try_ask(A, &texts(1, &["/b", &"x".repeat(40)])), Err(full));
    assert_eq!(store.try_ask(A, &texts(1, &["/a", &"x".repeat(60)])), Err(full));
    assert_eq!(store.get("/a"), "0123456789", "nothing has changed");
    store.ask(B, &keys(6, &["/x", "/y"]));
    assert_eq!(store.try_ask(C, &keys(6, &["/x", "/y"])), Err(full));
    store.set("/b", "");
    assert_eq!(store.try_ask(A, &texts(1, &["/c", ""])), Err(full));
    assert_eq!(store.try_ask(A, &keys(10, &["/a", "/a"])), Err(KvError::LongReply { limit: 30 }));
    store.store.forget(B);
    store.set("/c", "");
}

#[test]
fn e7_several_stores_hold_no_more_than_they_may_together() {
    let total = Total::new(1000);
    let [mut one, mut other] = [(), ()].map(|()| {
        let store = KvStore::new(KvLimits::default(), &total);
        Asked { store, woken: Vec::new() }
    });
    let full = Err(KvError::AllFull { bytes: 1000 });
    one.set("/a", &"x".repeat(600));
    assert_eq!(other.try_ask(A, &texts(1, &["/a", &"x".repeat(400)])), full);
    other.set("/a", &"x".repeat(110));
    assert_eq!(one.try_ask(A, &texts(9, &["/a", &"x".repeat(200)])), full);
    // Entries count, however short they are: each takes room of its own.
    assert_eq!(one.try_ask(A, &texts(1, &["/b", ""])), full);
    assert_eq!(one.try_ask(B, &keys(6, &["/x"])), full);
    assert_eq!(total.held(), one.store.share.counted + other.store.share.counted);
    // What is given back by one, or goes with it, is for all.
    one.ask(A, &texts(8, &["/a"]));
    other.set("/a", &"x".repeat(800));
    drop(other);
    assert_eq!(total.held(), 0);
    one.set("/a", &"x".repeat(800));
}

#[test]
fn e7_a_value_does_not_grow_beyond_what_one_may_be() {
    let mut store = Asked::with(KvLimits { value_bytes: 10, ..KvLimits::default() });
    store.set("/k", "01234567");
    store.ask(A, &texts(9, &["/k", "89"]));
    assert_eq!(store.try_ask(A, &texts(9, &["/k", "x"])), Err(KvError::LongValue { limit: 10 }));
    assert_eq!(store.get("/k"), "0123456789");
}

#[test]
fn what_is_counted_is_what_is_there_whatever_was_asked() {
    for seed in 0..300_u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let total = Total::new(1600);
        let limits = KvLimits { entries: 12, bytes: 100, value_bytes: 1000, reply_bytes: 1000 };
        let mut store = Asked { store: KvStore::new(limits, &total), woken: Vec::new() };
        for _ in 0..200 {
            let from = ConnectionId(next(4));
            let (key, other) = (format!("/{}", next(5)), format!("/{}", next(5)));
            let value = "v".repeat(next(20) as usize);
            let request = match next(11) {
                0 => texts(1, &[&key, &value]),
                1 => texts(2, &[&key, "", &value]),
                2 => [texts(4, &[&key]), 1_i64.to_le_bytes().to_vec()].concat(),
                3 => keys(6, &[&key, &other]),
                4 => texts(8, &[&key]),
                5 => texts(9, &[&key, &value]),
                6 => vec![12],
                7 => texts(14, &[&key, &value]),
                8 => texts(15, &[&key]),
                9 => barrier(&key, 3),
                _ => {
                    store.store.forget(from);
                    continue;
                }
            };
            // It may be refused; then nothing has changed.
            let _ = store.try_ask(from, &request);
            let own = &store.store;
            assert_eq!(own.share.counted, own.bytes + ENTRY_BYTES * own.entries(), "seed {seed}");
            assert_eq!(total.held(), own.share.counted, "seed {seed}");
            let values: usize = own.values.iter().map(|(key, value)| key.len() + value.len()).sum();
            let queues: usize =
                own.queues.iter().map(|(key, q)| key.len() + q.iter().map(Vec::len).sum::<usize>()).sum();
            assert_eq!(own.bytes, values + queues, "seed {seed}");
            assert_eq!(own.queued, own.queues.values().map(VecDeque::len).sum::<usize>(), "seed {seed}");
            let lists = own.awaited.values().chain(own.gathered.values());
            assert_eq!(own.awaited_keys, lists.map(Vec::len).sum::<usize>(), "seed {seed}");
            let waits = own.waits.values().map(|wait| match wait {
                Wait::Keys(keys) => keys.len(),
                Wait::Barrier(_) => 1,
            });
            assert_eq!(own.awaited_keys, waits.sum::<usize>(), "seed {seed}");
            assert!(
                own.bytes <= 100 && own.values.len() + own.queued + own.awaited_keys <= 12,
                "seed {seed}"
            );
        }
    }
}
