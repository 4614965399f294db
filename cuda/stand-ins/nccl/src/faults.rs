//! What a test wants to go wrong, and what it can ask afterwards.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Settings by name, as in `version=22703,init=hang`.
static FAULTS: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// What was called, in order; and what was called that should not have been.
static CALLS: Mutex<(Vec<String>, Vec<String>)> = Mutex::new((Vec::new(), Vec::new()));

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Replaces all settings.
pub(crate) fn set(text: &str) {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    *lock(&FAULTS) = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
}

pub(crate) fn get(name: &str) -> Option<String> {
    lock(&FAULTS).get(name).cloned()
}

pub(crate) fn is(name: &str, value: &str) -> bool {
    lock(&FAULTS).get(name).is_some_and(|set| set == value)
}

/// Waits for as long as the fault is set: for ever, if a test leaves it.
pub(crate) fn hang_while(name: &str) {
    while is(name, "hang") {
        thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn note(call: &str) {
    lock(&CALLS).0.push(call.to_owned());
}

/// Notes what must never happen.
pub(crate) fn wrong(what: String) {
    lock(&CALLS).1.push(what);
}

/// All that was called, one a line, and after an empty line what was wrong.
pub(crate) fn report() -> String {
    let calls = lock(&CALLS);
    format!("{}\n\n{}", calls.0.join("\n"), calls.1.join("\n"))
}
