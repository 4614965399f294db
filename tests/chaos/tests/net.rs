//! The faults themselves: a cut network is cut in the direction that was asked for, and nobody is told.

use reknit_chaos::fleet::networks;
use reknit_chaos::net::{Net, Node};
use reknit_chaos::probe::{Answer, DATAGRAMS, Probe, Question};
use reknit_e2e::eventually;

const ONE: Node = Node::Worker(0);
const OTHER: Node = Node::Coordinator(0);

struct Pair {
    one: Probe,
    other: Probe,
    net: Net,
}

/// Two nodes; nothing, with a notice, if there can be no networks here.
fn pair() -> Option<Pair> {
    let net = networks(&[ONE, OTHER])?;
    Some(Pair { one: Probe::start(&net, ONE), other: Probe::start(&net, OTHER), net })
}

impl Pair {
    /// Sends a datagram from each to the other, and returns what the other, and the one, have heard when one that is sent
    /// after the network was healed has arrived.
    fn exchange(&mut self, text: &str) -> (Vec<String>, Vec<String>) {
        for text in [text, text] {
            // Twice: who is told that the first has not arrived hears of it with the second.
            self.send(text);
        }
        self.net.heal();
        let last = format!("after {text}");
        let heard = |probe: &mut Probe| match probe.ask_one(Question::Heard) {
            Answer::Heard(texts) => texts,
            other => panic!("{other:?}"),
        };
        eventually("the network to be whole", || {
            self.send(&last);
            let both = (heard(&mut self.other), heard(&mut self.one));
            let arrived = |texts: &[String]| texts.contains(&last);
            if arrived(&both.0) && arrived(&both.1) { Ok(both) } else { Err(format!("{both:?}")) }
        })
    }

    fn send(&mut self, text: &str) {
        let to = |node| format!("{}:{DATAGRAMS}", self.net.address(node));
        let (to_other, to_one) = (to(OTHER), to(ONE));
        for (probe, to) in [(&mut self.one, to_other), (&mut self.other, to_one)] {
            let sent = probe.ask_one(Question::Send { to, text: text.to_owned() });
            assert!(matches!(sent, Answer::Sent), "nobody is told of a cut: {sent:?}");
        }
    }
}

#[test]
fn a_cut_is_silent_and_has_a_direction() {
    let Some(mut pair) = pair() else { return };
    let hears = |(other, one): &(Vec<String>, Vec<String>), text: &str| {
        [other, one].map(|texts| texts.iter().any(|heard| heard == text))
    };
    let both = pair.exchange("whole");
    assert_eq!(hears(&both, "whole"), [true, true]);
    pair.net.cut(ONE, OTHER);
    let both = pair.exchange("one way");
    assert_eq!(hears(&both, "one way"), [false, true]);
    pair.net.cut(OTHER, ONE);
    let both = pair.exchange("the other way");
    assert_eq!(hears(&both, "the other way"), [true, false]);
    pair.net.cut_both_ways(ONE, OTHER);
    let both = pair.exchange("both ways");
    assert_eq!(hears(&both, "both ways"), [false, false]);
}

#[test]
fn nothing_is_left_of_a_network_after_a_panic() {
    let Some(pair) = pair() else { return };
    let holders = pair.net.holders();
    let lives = |id: &u32| std::path::Path::new("/proc").join(id.to_string()).exists();
    assert!(holders.len() == 3 && holders.iter().all(lives));
    let panics = std::thread::spawn(move || {
        let _pair = pair;
        std::panic::resume_unwind(Box::new("a test that fails"));
    });
    assert!(panics.join().is_err());
    assert!(!holders.iter().any(lives));
}
