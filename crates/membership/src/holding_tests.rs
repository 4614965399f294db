use super::*;
use crate::ids::Timestamp;

/// What a test varies; everything else is as in a world of one-rank members `0..n` that is about to run as generation 9,
/// after worlds 1 to 5 ran: 2 went on at step 10 of 1, 5 at step 20 of 2.
struct Case {
    slots: Vec<u32>,
    held: Vec<Holding>,
    leaving: Vec<Holding>,
    commits: Vec<(u64, u64)>,
    sharding: Sharding,
    distrusted: Vec<u64>,
    unreadable: Vec<(u64, u64)>,
}

fn members(held: &[Holding]) -> Case {
    Case {
        slots: vec![1; held.len()],
        held: held.to_vec(),
        leaving: Vec::new(),
        commits: Vec::new(),
        sharding: Sharding::Replicated,
        distrusted: Vec::new(),
        unreadable: Vec::new(),
    }
}

/// Members without a place have ids from here on.
const OUTSIDE: u64 = 100;

fn commit(generation: u64, step: u64) -> Commit {
    Commit {
        step: Step(step),
        generation: Generation(generation),
        shards: 1,
        manifest: Digest(u128::from(step)),
        at: Timestamp(0),
    }
}

impl Case {
    fn decide(&self) -> Option<Decision> {
        let mut rank = 0;
        let seats = self.slots.iter().zip(0..).map(|(slots, i)| {
            let seat = Seat {
                member: MemberId(i),
                name: crate::ids::MemberName::new(&format!("w{i}")).expect("a plain name"),
                rank: Rank(rank),
                slots: *slots,
                address: format!("h{i}:1"),
            };
            rank += slots;
            seat
        });
        let seats: Vec<Seat> = seats.collect();
        let held = self.held.iter().cloned().zip(0..).map(|(holding, i)| (MemberId(i), holding)).collect();
        let outside = |i| Peer::outside(MemberId(OUTSIDE + i), format!("h{}:1", OUTSIDE + i));
        let leaving: Vec<_> =
            self.leaving.iter().cloned().zip(0..).map(|(holding, i)| (outside(i), holding)).collect();
        let branch = [(1, 10), (2, 20), (5, u64::MAX)].map(|(world, step)| (Lineage(world), Step(step)));
        decide(&Holdings {
            generation: Generation(9),
            seats: &seats,
            held: &held,
            leaving: &leaving,
            lineage: Lineage(5),
            branch: &BTreeMap::from(branch),
            commits: &self.commits.iter().map(|(g, s)| commit(*g, *s)).collect::<Vec<_>>(),
            sharding: self.sharding,
            distrusted: &self.distrusted.iter().map(|id| MemberId(*id)).collect(),
            unreadable: &self.unreadable.iter().map(|(g, s)| (Generation(*g), Step(*s))).collect(),
        })
    }

    /// The decision in one line: what, from where, and who moves what.
    fn check(&self, expected: &str) {
        assert_eq!(self.decide().map_or("nothing".to_owned(), |decision| shown(&decision)), expected);
    }
}

fn shown(decision: &Decision) -> String {
    let mut text = format!("{:?}/{:?} {:?}", decision.resume.lineage, decision.resume.step, decision.source);
    for (member, moves) in &decision.moves {
        for fetch in &moves.fetch {
            let from: Vec<String> = fetch.from.iter().map(|peer| peer.member.0.to_string()).collect();
            let shards = if fetch.shards.is_empty() { String::new() } else { format!("{:?}", fetch.shards) };
            text += &format!(", {}<-{}{shards}", member.0, from.join("|"));
        }
        if let Some(load) = &moves.load {
            let shards = if load.shards.is_empty() { String::new() } else { format!("{:?}", load.shards) };
            text += &format!(", {} loads {}{shards}", member.0, load.commit.step.0);
        }
    }
    text
}

fn at(lineage: u64, step: u64) -> Holding {
    Holding::State { resume: Resume { lineage: Lineage(lineage), step: Step(step) }, shards: Shards::Whole }
}

fn part(lineage: u64, step: u64, shards: &[u32]) -> Holding {
    let shards = Shards::Only(shards.iter().copied().collect());
    Holding::State { resume: Resume { lineage: Lineage(lineage), step: Step(step) }, shards }
}

fn fresh(digest: u128) -> Holding {
    Holding::Fresh { digest: Digest(digest) }
}

#[test]
fn m7_the_highest_step_in_memory_wins_and_only_those_behind_move() {
    members(&[at(5, 30), at(5, 30)]).check("l5/s30 Memory");
    members(&[at(5, 30), at(5, 31)]).check("l5/s31 Memory, 0<-1");
    members(&[fresh(1), at(5, 30), Holding::Nothing]).check("l5/s30 Memory, 0<-1, 2<-1");
}

#[test]
fn a_newer_checkpoint_beats_memory_and_an_older_one_does_not() {
    Case { commits: vec![(5, 30)], ..members(&[at(5, 30), fresh(1)]) }.check("l5/s30 Memory, 1<-0");
    Case { commits: vec![(5, 30)], ..members(&[at(5, 29), fresh(1)]) }
        .check("l5/s30 Checkpoint { step: s30 }, 0 loads 30, 1 loads 30");
    Case { commits: vec![(2, 12), (5, 30)], ..members(&[fresh(1)]) }
        .check("l5/s30 Checkpoint { step: s30 }, 0 loads 30");
}

#[test]
fn m15_one_step_of_the_present_branch_is_one_state_whichever_world_computed_it() {
    // World 2 went on at step 10 of world 1, and world 5 at step 20 of world 2.
    members(&[at(1, 10), at(2, 10)]).check("l5/s10 Memory");
    members(&[at(2, 20), at(5, 20), at(1, 9)]).check("l5/s20 Memory, 2<-0|1");
}

#[test]
fn m15_what_a_world_computed_beyond_the_step_where_the_next_went_on_is_another_branch() {
    members(&[at(1, 11), at(2, 10)]).check("l5/s10 Memory, 0<-1");
    members(&[at(2, 21), at(5, 21)]).check("l5/s21 Memory, 0<-1");
    // World 3 ran, but the present state does not come from it.
    members(&[at(3, 40), at(5, 21)]).check("l5/s21 Memory, 0<-1");
    Case { commits: vec![(2, 12)], ..members(&[at(3, 40), at(2, 21)]) }
        .check("l5/s12 Checkpoint { step: s12 }, 0 loads 12, 1 loads 12");
}

#[test]
fn what_is_newer_than_all_that_the_record_knows_of_counts() {
    // The store was put back: worlds 6 to 8 are forgotten.
    members(&[at(7, 50), at(5, 21)]).check("l7/s50 Memory, 1<-0");
    members(&[at(7, 50), at(6, 50)]).check("l7/s50 Memory, 1<-0");
}

#[test]
fn an_abandoned_branch_is_taken_up_only_if_there_is_nothing_else() {
    members(&[at(3, 40), fresh(1)]).check("l3/s40 AbandonedMemory, 1<-0");
    members(&[at(3, 40), at(2, 40)]).check("l3/s40 AbandonedMemory, 1<-0");
    Case { commits: vec![(1, 5)], ..members(&[at(3, 40), fresh(1)]) }
        .check("l5/s5 Checkpoint { step: s5 }, 0 loads 5, 1 loads 5");
}

#[test]
fn the_lowest_rank_with_an_initial_state_is_the_model() {
    members(&[fresh(1), fresh(1)]).check("l9/s0 Initial");
    members(&[fresh(1), fresh(2), fresh(1)]).check("l9/s0 Initial, 1<-0");
    members(&[Holding::Nothing, fresh(2), fresh(1)]).check("l9/s0 Initial, 0<-1, 2<-1");
    Case { distrusted: vec![0], ..members(&[fresh(1), fresh(2)]) }.check("l9/s0 Initial, 0<-1");
    members(&[Holding::Nothing, Holding::Nothing]).check("nothing");
}

#[test]
fn nobody_starts_over_when_checkpoints_were_committed_but_none_can_be_read() {
    let case = |held: &[Holding]| Case { commits: vec![(2, 12), (5, 30)], ..members(held) };
    let unreadable = vec![(2, 12), (5, 30)];
    Case { unreadable: vec![(5, 30)], ..case(&[fresh(1)]) }
        .check("l5/s12 Checkpoint { step: s12 }, 0 loads 12");
    Case { unreadable: unreadable.clone(), ..case(&[fresh(1), fresh(1)]) }.check("nothing");
    Case { unreadable: unreadable.clone(), ..case(&[at(3, 40), fresh(1)]) }.check("nothing");
    // Memory of the present branch is good, however old.
    Case { unreadable, ..case(&[at(5, 25), fresh(1)]) }.check("l5/s25 Memory, 1<-0");
}

#[test]
fn a_distrusted_holder_is_no_source_and_gets_the_state_anew() {
    Case { distrusted: vec![0], ..members(&[at(5, 30), at(5, 30), fresh(1)]) }
        .check("l5/s30 Memory, 0<-1, 2<-1");
    Case { distrusted: vec![1], ..members(&[at(5, 30), at(5, 31)]) }.check("l5/s30 Memory, 1<-0");
    Case { distrusted: vec![0], commits: vec![(5, 30)], ..members(&[at(5, 31), fresh(1)]) }
        .check("l5/s30 Checkpoint { step: s30 }, 0 loads 30, 1 loads 30");
}

#[test]
fn nobody_starts_over_as_long_as_somebody_distrusted_holds_a_state() {
    Case { distrusted: vec![0], ..members(&[at(5, 31), fresh(1)]) }.check("nothing");
    Case { distrusted: vec![OUTSIDE], leaving: vec![at(5, 31)], ..members(&[fresh(1)]) }.check("nothing");
}

#[test]
fn who_has_no_place_serves_what_it_holds_but_comes_last() {
    Case { leaving: vec![at(5, 31)], ..members(&[at(5, 30), fresh(1)]) }
        .check("l5/s31 Memory, 0<-100, 1<-100");
    Case { leaving: vec![at(5, 30), fresh(1)], ..members(&[at(5, 30), fresh(1), at(5, 30)]) }
        .check("l5/s30 Memory, 1<-2|0|100");
}

#[test]
fn sources_are_spread_and_few() {
    let mut held = vec![at(5, 30); 10];
    held.extend(vec![fresh(1); 3]);
    members(&held).check("l5/s30 Memory, 10<-0|1|2|3|4|5|6|7, 11<-1|2|3|4|5|6|7|8, 12<-2|3|4|5|6|7|8|9");
}

#[test]
fn every_set_of_holders_of_three_shards_is_decided_right() {
    // Three members, each with any subset of the three shards of step 30, and a checkpoint of step 12: exhaustive.
    let subset = |bits: u32| (0..3).filter(|shard| bits & (1 << shard) != 0).collect::<Vec<u32>>();
    for bits in 0..8u32.pow(3) {
        let have = [bits & 7, (bits >> 3) & 7, (bits >> 6) & 7];
        let held: Vec<Holding> = have.iter().map(|bits| part(5, 30, &subset(*bits))).collect();
        let sharding = Sharding::Sharded { count: 3 };
        let decision =
            Case { sharding, commits: vec![(5, 12)], ..members(&held) }.decide().expect("there is a source");
        if have[0] | have[1] | have[2] != 7 {
            assert_eq!(decision.source, Source::Checkpoint { step: Step(12) }, "{have:?}");
            continue;
        }
        assert_eq!((decision.source, decision.resume.step), (Source::Memory, Step(30)), "{have:?}");
        for rank in 0..3u32 {
            // Rank r of three needs shard r; it fetches it if it lacks it, and from everybody who has it.
            let fetch = decision.moves.get(&MemberId(u64::from(rank))).map(|moves| moves.fetch.clone());
            let lacks = have[rank as usize] & (1 << rank) == 0;
            let shards = fetch.iter().flatten().flat_map(|fetch| fetch.shards.clone()).collect::<Vec<_>>();
            assert_eq!(shards, if lacks { vec![rank] } else { vec![] }, "{have:?}");
            let from: BTreeSet<u64> =
                fetch.iter().flatten().flat_map(|f| &f.from).map(|p| p.member.0).collect();
            let holders = (0..3u64).filter(|m| have[*m as usize] & (1 << rank) != 0).collect::<BTreeSet<_>>();
            assert_eq!(from, if lacks { holders } else { BTreeSet::new() }, "{have:?}");
        }
    }
}

#[test]
fn shards_with_the_same_holders_travel_together_and_members_with_more_ranks_need_more() {
    let sharding = Sharding::Sharded { count: 8 };
    let held = [part(5, 30, &[0, 1, 2, 3]), part(5, 30, &[4, 5, 6, 7]), fresh(1)];
    Case { sharding, slots: vec![1, 1, 2], ..members(&held) }
        .check("l5/s30 Memory, 1<-0[2, 3], 2<-1[4, 5, 6, 7]");
    Case { sharding, commits: vec![(5, 40)], slots: vec![1, 1, 2], ..members(&held) }
        .check("l5/s40 Checkpoint { step: s40 }, 0 loads 40[0, 1], 1 loads 40[2, 3], 2 loads 40[4, 5, 6, 7]");
    // Whoever has all of it needs nothing, and serves every shard.
    Case { sharding, ..members(&[at(5, 30), fresh(1)]) }.check("l5/s30 Memory, 1<-0[4, 5, 6, 7]");
}

#[test]
fn every_pair_of_holdings_is_decided_the_same_way_round() {
    // Whoever sits first: the state that comes out is the same, and nobody moves who has it.
    let kinds =
        [at(5, 30), at(5, 31), at(2, 20), at(2, 21), at(3, 50), at(7, 31), fresh(1), Holding::Nothing];
    for commits in [vec![], vec![(5, 30)]] {
        for a in &kinds {
            for b in &kinds {
                let decide = |held: [&Holding; 2]| {
                    Case { commits: commits.clone(), ..members(&held.map(Clone::clone)) }.decide()
                };
                let (one, other) = (decide([a, b]), decide([b, a]));
                let state = |d: &Option<Decision>| d.as_ref().map(|d| (d.resume, d.source));
                assert_eq!(state(&one), state(&other), "{a:?} {b:?}");
                let Some(decision) = one else { continue };
                for (index, holding) in [a, b].into_iter().enumerate() {
                    if let Holding::State { resume, .. } = holding
                        && *resume == decision.resume
                        && matches!(decision.source, Source::Memory | Source::AbandonedMemory)
                    {
                        assert!(!decision.moves.contains_key(&MemberId(index as u64)), "{a:?} {b:?}");
                    }
                }
            }
        }
    }
}
