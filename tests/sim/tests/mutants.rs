//! Rules that are broken on purpose are seen: each within a hundred seeds, and by the invariant that is there for it.

use std::collections::BTreeSet;

use reknit_sim::mutants::Mutant;
use reknit_sim::seeds::run_all;

/// The invariant that is there for it.
fn seen_by(mutant: Mutant) -> &'static str {
    match mutant {
        Mutant::AckWithoutWriting | Mutant::TellBeforeSaving => "told is stored (M-5)",
        Mutant::ForgetsTheLast => "rising generations (M-2)",
        Mutant::CommitsAfterBreak => "one state per name (M-15)",
        Mutant::AppliesTwice | Mutant::StaleGo => "barrier (M-6)",
        Mutant::ClaimsTooMuch | Mutant::IgnoresRefusal => "liveness (L1)",
        Mutant::ShiftsShares => "samples (design 5)",
        Mutant::LosesParts | Mutant::BlindDigests => "checkpoints (M-14)",
        Mutant::SwapsRanks => "unique world (M-1)",
        Mutant::DeletesKept => "kept checkpoints (M-14)",
        Mutant::ForgetsPromises => "promises (M-10, D-2)",
    }
}

#[test]
fn every_rule_that_is_broken_on_purpose_is_seen() {
    for mutant in <Mutant as clap::ValueEnum>::value_variants() {
        let outcome = run_all(0..100, Some(*mutant), false, |_| {});
        let invariants: BTreeSet<&str> =
            outcome.found.iter().map(|found| found.violation.invariant).collect();
        assert!(invariants.contains(seen_by(*mutant)), "{mutant:?} is seen by {invariants:?} only");
    }
}
