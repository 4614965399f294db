use super::*;

/// A generator of numbers for tests: the same seed gives the same ones (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn list(texts: &[&[u8]], per_item: usize) -> Vec<u8> {
    let mut bytes = ((texts.len() / per_item) as u64).to_le_bytes().to_vec();
    for text in texts {
        put_text(&mut bytes, text);
    }
    bytes
}

/// The bytes of every request there is.
fn all() -> Vec<Vec<u8>> {
    let keys = list(&[b"/a", b"", b"/ccc"], 1);
    let pairs = list(&[b"/a", b"1", b"/b", b""], 2);
    let (keys, pairs) = (Keys { left: 3, rest: &keys[8..] }, Pairs(Keys { left: 2, rest: &pairs[8..] }));
    let (key, value) = (&b"/key"[..], &b"a value \0 with any byte \xff"[..]);
    let requests = [
        Request::Validate { magic: MAGIC },
        Request::Set { key, value },
        Request::CompareSet { key, expected: b"", desired: value },
        Request::Get { key },
        Request::Add { key, delta: -3 },
        Request::Check { keys },
        Request::Wait { keys },
        Request::CountKeys,
        Request::Delete { key },
        Request::Append { key, value },
        Request::MultiGet { keys },
        Request::MultiSet { pairs },
        Request::CancelWait,
        Request::Ping { nonce: 0xdead_beef },
        Request::QueuePush { key, value },
        Request::QueuePop { key },
        Request::QueueLen { key },
        Request::ListKeys,
        Request::Barrier { key, world: 4 },
    ];
    let encode = |request: &Request<'_>| {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let parsed = parse(&bytes, &WireLimits::default()).unwrap();
        assert_eq!(parsed, Parsed::Whole(*request, bytes.len()));
        bytes
    };
    requests.iter().map(encode).collect()
}

#[test]
fn e4_every_request_is_read_as_it_was_written_and_no_part_of_one_is_read() {
    for (operation, bytes) in all().iter().enumerate() {
        assert_eq!(usize::from(bytes[0]), operation, "the numbers are the protocol's");
        for cut in 0..bytes.len() {
            match parse(&bytes[..cut], &WireLimits::default()).unwrap() {
                Parsed::Needs(needs) => {
                    assert!(cut < needs && needs <= bytes.len(), "{operation}: {cut}, {needs}")
                }
                Parsed::Whole(request, _) => panic!("{request:?} from {cut} of {} bytes", bytes.len()),
            }
        }
        let mut twice = bytes.clone();
        twice.extend_from_slice(bytes);
        assert!(matches!(parse(&twice, &WireLimits::default()), Ok(Parsed::Whole(_, n)) if n == bytes.len()));
    }
}

#[test]
fn lists_are_read_item_by_item() {
    let bytes = &all()[10];
    let Parsed::Whole(Request::MultiGet { keys }, _) = parse(bytes, &WireLimits::default()).unwrap() else {
        panic!()
    };
    assert_eq!(keys.collect::<Vec<_>>(), [&b"/a"[..], b"", b"/ccc"]);
    let bytes = &all()[11];
    let Parsed::Whole(Request::MultiSet { pairs }, _) = parse(bytes, &WireLimits::default()).unwrap() else {
        panic!()
    };
    assert_eq!(pairs.collect::<Vec<_>>(), [(&b"/a"[..], &b"1"[..]), (b"/b", b"")]);
}

#[test]
fn e7_what_is_too_long_is_refused_before_it_is_there() {
    let limits = WireLimits { key_bytes: 4, value_bytes: 8, items: 2, request_bytes: 64 };
    let with = |operation: u8, numbers: &[u64]| {
        let mut bytes = vec![operation];
        for number in numbers {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        parse(&bytes, &limits).unwrap_err()
    };
    assert_eq!(with(3, &[5]), BadRequest::LongKey { bytes: 5, limit: 4 });
    assert_eq!(with(1, &[0, 9]), BadRequest::LongValue { bytes: 9, limit: 8 });
    assert_eq!(with(6, &[3]), BadRequest::LongList { items: 3, limit: 2 });
    assert_eq!(with(11, &[u64::MAX]), BadRequest::LongList { items: u64::MAX, limit: 2 });
    assert_eq!(parse(&[19], &limits), Err(BadRequest::UnknownOperation(19)));
    let limits = WireLimits { request_bytes: 30, ..WireLimits::default() };
    assert_eq!(parse(&all()[11], &limits), Err(BadRequest::LongRequest { limit: 30 }));
    let many = [&[6][..], &100_u64.to_le_bytes()].concat();
    assert_eq!(
        parse(&many, &limits),
        Err(BadRequest::LongRequest { limit: 30 }),
        "however short its items are"
    );
}

#[test]
fn e4_whatever_bytes_come_they_are_a_request_the_beginning_of_one_or_refused() {
    let seeds = all();
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        bytes.truncate(1 + random.below(bytes.len()));
        match parse(&bytes, &WireLimits::default()) {
            Ok(Parsed::Whole(request, length)) => {
                let mut again = Vec::new();
                request.encode(&mut again);
                assert_eq!(again, bytes[..length], "seed {seed}");
            }
            Ok(Parsed::Needs(needs)) => assert!(needs > bytes.len(), "seed {seed}"),
            Err(_) => {}
        }
    }
}
