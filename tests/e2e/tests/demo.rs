//! The main job, as the README's first command runs it, and the facts that it writes down for others to check.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::time::Duration;

use reknit_e2e::reknit_within;
use serde_json::Value;

/// What each recovery says, and of which kind it is.
const NUMBERS: [&str; 10] = [
    "generation",
    "before",
    "after",
    "detect_ms",
    "agree_ms",
    "rebuild_ms",
    "restore_ms",
    "first_step_ms",
    "total_ms",
    "steps_lost",
];

/// It trains for real, on whatever the machine has: a slow one takes minutes.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn the_demo_lives_through_it_all_and_writes_down_the_facts() {
    let dir = tempfile::tempdir().unwrap();
    let [json, report, stage] = ["facts.json", "report.html", "stage"].map(|name| dir.path().join(name));
    let [to_json, to_report, to_stage] = [&json, &report, &stage].map(|path| path.to_str().unwrap());
    let demo = ["demo", "--json", to_json, "--report", to_report, "--dir", to_stage];
    let ran = reknit_within(PATIENCE, &demo, &[]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);

    let facts: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!((&facts["ok"], &facts["samples_exactly_once"]), (&Value::Bool(true), &Value::Bool(true)));
    assert_eq!(facts["generations_spent_on_coordinator_restart"], 0);
    let [accuracy, undisturbed] =
        ["accuracy", "accuracy_undisturbed"].map(|name| facts[name].as_f64().unwrap());
    assert!(accuracy > 0.9 && undisturbed > 0.9, "{facts}");
    let recoveries = facts["recoveries"].as_array().unwrap();
    for recovery in recoveries {
        for name in NUMBERS {
            assert!(recovery[name].as_f64().is_some_and(|number| number >= 0.0), "{name}: {recovery}");
        }
        assert!(["cause", "source"].iter().all(|name| recovery[*name].is_string()), "{recovery}");
    }
    for cause in ["SIGKILL in an all-reduce", "a replacement joins", "notice of 120 s", "SIGSTOP: a hang"] {
        let its = recoveries.iter().filter(|recovery| recovery["cause"] == cause);
        assert!(its.clone().count() > 0, "{cause}: {facts}");
        assert!(its.clone().all(|recovery| recovery["steps_lost"] == 0), "{cause}: {facts}");
    }
    let last = recoveries.last().unwrap();
    assert!(last["source"].as_str().unwrap().starts_with("checkpoint of step "), "{last}");
    assert!(last["after"].as_u64() < last["before"].as_u64(), "{last}");

    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.contains("<svg") && !page.contains("src=") && !page.contains("href="), "it needs a network");
}
