//! Whether members were told what a coordinator may tell: only what is saved, by who may still say it.

use std::collections::BTreeMap;

use crate::history::{Act, Operation, Outcome, Tell};

/// A record of which it is certain that it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    generation: u64,
    epoch: u64,
    /// When it was first certain: its save was answered, or somebody read it.
    since_us: u64,
}

/// The records that are certain to have been saved, by revision.
fn known(operations: &[Operation]) -> BTreeMap<u64, Known> {
    let mut by_value: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for operation in operations {
        // Whatever was said of it: what somebody has read was saved.
        if let Act::Save { value, generation, epoch, .. } = &operation.act {
            by_value.insert(value, (*generation, *epoch));
        }
    }
    let mut known: BTreeMap<u64, Known> = BTreeMap::new();
    for operation in operations {
        let (revision, generation, epoch) = match &operation.act {
            Act::Save { generation, epoch, outcome: Outcome::Saved(revision), .. } => {
                (*revision, *generation, *epoch)
            }
            Act::Save { .. } => continue,
            Act::Load { revision, value, .. } => match by_value.get(value.as_str()) {
                Some((generation, epoch)) => (*revision, *generation, *epoch),
                None => continue,
            },
        };
        let since_us = operation.returned_us.unwrap_or(u64::MAX);
        let entry = known.entry(revision).or_insert(Known { generation, epoch, since_us });
        entry.since_us = entry.since_us.min(since_us);
    }
    known
}

/// What is wrong with what the members of one job were told, and with the generations in its records.
pub fn complaints(operations: &[Operation], tells: &[Tell]) -> Vec<String> {
    let known = known(operations);
    let mut complaints = falling(&known);
    // When each generation was first certain to be saved.
    let mut saved_us: BTreeMap<u64, u64> = BTreeMap::new();
    for record in known.values() {
        let since = saved_us.entry(record.generation).or_insert(record.since_us);
        *since = record.since_us.min(*since);
    }
    for tell in tells.iter().filter(|tell| tell.generation > 0) {
        match saved_us.get(&tell.generation) {
            Some(since_us) if *since_us <= tell.at_us => {}
            Some(since_us) => complaints.push(format!(
                "{} µs before it was certain to be saved, a generation was told: {tell:?}",
                since_us - tell.at_us
            )),
            None => complaints.push(format!("a generation that was never saved was told: {tell:?}")),
        }
        complaints.extend(against_its_record(&known, tell));
    }
    complaints.extend(by_the_deposed(tells));
    complaints
}

/// Generations and epochs never fall from one record to the next.
fn falling(known: &BTreeMap<u64, Known>) -> Vec<String> {
    let pairs = known.iter().zip(known.iter().skip(1));
    let falls = |((_, before), (_, after)): &((&u64, &Known), (&u64, &Known))| {
        after.generation < before.generation || after.epoch < before.epoch
    };
    pairs
        .filter(falls)
        .map(|(before, after)| format!("what was saved falls: {before:?}, then {after:?}"))
        .collect()
}

/// What is told of a world is from the record of that world, and that was saved before. So all who are told of one
/// generation are told of the same world: there is one record in which it begins.
fn against_its_record(known: &BTreeMap<u64, Known>, tell: &Tell) -> Option<String> {
    if tell.revision == 0 {
        return Some(format!("told without a record: {tell:?}"));
    }
    let Some(record) = known.get(&tell.revision) else {
        return Some(format!("told from a record that was never saved: {tell:?}"));
    };
    if record.since_us > tell.at_us {
        return Some(format!("told before its record {record:?} was saved: {tell:?}"));
    }
    let is_of_the_world = matches!(tell.kind.as_str(), "world" | "go" | "plan");
    let is_wrong = if is_of_the_world {
        record.generation != tell.generation
    } else {
        record.generation < tell.generation
    };
    is_wrong.then(|| format!("told from a record of another generation, {record:?}: {tell:?}"))
}

/// Nobody hears of a world from a leader that is none any more, newer than what its successor has published.
fn by_the_deposed(tells: &[Tell]) -> Vec<String> {
    let mut complaints = Vec::new();
    // By leader: the newest generation that it has told so far.
    let mut newest: BTreeMap<u64, u64> = BTreeMap::new();
    for tell in tells {
        let later = newest.range(tell.epoch + 1..).map(|(_, generation)| *generation).max();
        if later.is_some_and(|later| tell.generation > later) {
            complaints.push(format!("told by who does not lead any more: {tell:?}"));
        }
        let own = newest.entry(tell.epoch).or_default();
        *own = (*own).max(tell.generation);
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save(at_us: u64, generation: u64, epoch: u64, outcome: Outcome) -> Operation {
        let value = format!("g{generation}");
        let act = Act::Save { expected: 0, value, generation, epoch, outcome };
        let returned_us = (outcome != Outcome::Unknown).then_some(at_us + 5);
        Operation { job: "j".to_owned(), pid: 1, called_us: at_us, returned_us, act }
    }

    fn load(at_us: u64, revision: u64, generation: u64) -> Operation {
        let act = Act::Load { revision, value: format!("g{generation}"), epoch: 0 };
        Operation { job: "j".to_owned(), pid: 2, called_us: at_us, returned_us: Some(at_us + 5), act }
    }

    fn tell(at_us: u64, kind: &str, generation: u64, revision: u64, epoch: u64) -> Tell {
        let (job, member, kind) = ("j".to_owned(), "m".to_owned(), kind.to_owned());
        Tell { at_us, pid: 1, job, member, kind, generation, revision, epoch }
    }

    #[track_caller]
    fn check(operations: &[Operation], tells: &[Tell], complaint: Option<&str>) {
        let complaints = complaints(operations, tells);
        match complaint {
            None => assert_eq!(complaints, Vec::<String>::new()),
            Some(words) => assert!(complaints.iter().any(|c| c.contains(words)), "{words}: {complaints:?}"),
        }
    }

    #[test]
    fn what_is_saved_may_be_told() {
        let saves = [save(10, 1, 1, Outcome::Saved(7)), save(30, 2, 1, Outcome::Saved(9))];
        let tells = [tell(15, "world", 1, 7, 1), tell(40, "break", 1, 9, 1), tell(41, "world", 2, 9, 1)];
        check(&saves, &tells, None);
    }

    #[test]
    fn a_generation_that_is_told_before_it_is_saved_or_never_saved_is_noticed() {
        let saves = [save(10, 1, 1, Outcome::Saved(7))];
        check(&saves, &[tell(14, "world", 1, 7, 1)], Some("1 µs before"));
        check(&saves, &[tell(20, "world", 2, 7, 1)], Some("never saved"));
        check(&[save(10, 1, 1, Outcome::Unknown)], &[tell(20, "world", 1, 7, 1)], Some("never saved"));
        check(&saves, &[tell(20, "world", 1, 8, 1)], Some("from a record that was never saved"));
        check(&saves, &[tell(20, "world", 1, 0, 1)], Some("without a record"));
    }

    #[test]
    fn who_reads_a_record_knows_that_it_is_saved() {
        let operations = [save(10, 1, 1, Outcome::Unknown), load(20, 7, 1)];
        check(&operations, &[tell(25, "world", 1, 7, 2)], None);
    }

    #[test]
    fn a_world_that_is_told_from_another_worlds_record_is_noticed() {
        let saves = [save(10, 1, 1, Outcome::Saved(7)), save(30, 2, 1, Outcome::Saved(9))];
        check(&saves, &[tell(40, "world", 1, 9, 1)], Some("of another generation"));
        check(&saves, &[tell(40, "boundary", 2, 7, 1)], Some("of another generation"));
    }

    #[test]
    fn generations_and_epochs_that_fall_are_noticed() {
        check(&[save(10, 2, 1, Outcome::Saved(7)), save(30, 1, 1, Outcome::Saved(9))], &[], Some("falls"));
        check(&[save(10, 1, 2, Outcome::Saved(7)), save(30, 2, 1, Outcome::Saved(9))], &[], Some("falls"));
    }

    #[test]
    fn a_leader_of_the_past_may_repeat_itself_but_not_know_better() {
        let saves = [save(10, 1, 1, Outcome::Saved(7)), save(30, 2, 1, Outcome::Saved(9))];
        let old = tell(50, "world", 1, 7, 1);
        check(&saves, &[tell(45, "go", 2, 9, 2), old.clone()], None);
        check(&saves, &[tell(45, "go", 1, 7, 2), tell(50, "world", 2, 9, 1)], Some("does not lead any more"));
    }
}
