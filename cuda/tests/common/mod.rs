//! What the tests over the stand-ins share: where these are, and ranks that are processes of their own, told line by line
//! what to do.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

pub(crate) mod process;
mod rank;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use reknit_cuda::{Driver, Nccl};

/// Longer than anything here takes on a busy machine. What is not over by then hangs.
pub(crate) const BOUND: Duration = Duration::from_secs(60);

/// A library that was built beside this test: cargo builds it as a dependency of the tests.
fn library(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let dir = test.parent().unwrap();
    let file = format!("lib{}.so", name.replace('-', "_"));
    let places = [dir.join(&file), dir.parent().unwrap().join(&file)];
    if let Some(found) = places.iter().find(|place| place.exists()) {
        return found.clone();
    }
    let release = (!cfg!(debug_assertions)).then_some("--release");
    let built =
        Command::new(env!("CARGO")).args(["build", "--offline", "-p", name]).args(release).status().unwrap();
    let found = places.into_iter().find(|place| place.exists());
    found.unwrap_or_else(|| panic!("{file} is neither beside {} nor built ({built})", test.display()))
}

pub(crate) fn driver_path() -> PathBuf {
    library("reknit-stand-in-driver")
}

pub(crate) fn nccl_path() -> PathBuf {
    library("reknit-stand-in-nccl")
}

pub(crate) fn driver() -> Driver {
    Driver::load_from(&driver_path()).unwrap()
}

pub(crate) fn nccl() -> Nccl {
    Nccl::load_from(&nccl_path()).unwrap()
}

/// What the stand-ins can be told and asked, beside being a driver and NCCL.
pub(crate) mod control {
    use std::ffi::{CString, c_char};
    use std::mem::ManuallyDrop;

    use libloading::Library;

    /// Never unloaded, or what it was told would be forgotten with it.
    fn library(path: std::path::PathBuf) -> ManuallyDrop<Library> {
        // SAFETY: the initialisers of the stand-ins have nothing to do.
        ManuallyDrop::new(unsafe { Library::new(path).unwrap() })
    }

    /// What is to go wrong from now on, in this process.
    pub(crate) fn set(faults: &str) {
        let library = library(super::nccl_path());
        let text = CString::new(faults).unwrap();
        // SAFETY: the function has this type, and the text ends with a zero.
        unsafe {
            library.get::<unsafe extern "C" fn(*const c_char)>(b"reknit_stand_in_set").unwrap()(text.as_ptr())
        };
    }

    /// What was called, and what was called in the wrong.
    pub(crate) fn report() -> (Vec<String>, Vec<String>) {
        let library = library(super::nccl_path());
        let mut text = vec![0u8; 1 << 20];
        // SAFETY: the function has this type, and there is room for so many bytes.
        let len = unsafe {
            let report =
                library.get::<unsafe extern "C" fn(*mut c_char, usize) -> usize>(b"reknit_stand_in_report");
            report.unwrap()(text.as_mut_ptr().cast(), text.len())
        };
        text.truncate(len);
        let text = String::from_utf8(text).unwrap();
        let (calls, wrong) = text.split_once("\n\n").unwrap();
        let lines = |text: &str| text.lines().map(str::to_owned).collect();
        (lines(calls), lines(wrong))
    }

    /// What has not been given back: contexts, memory, host memory, streams, events, communicators.
    pub(crate) fn alive() -> Vec<i64> {
        let mut counts = [0i64; 5];
        let driver = library(super::driver_path());
        // SAFETY: the function has this type, and there is room for five numbers.
        unsafe {
            driver.get::<unsafe extern "C" fn(*mut i64)>(b"reknit_stand_in_alive").unwrap()(
                counts.as_mut_ptr(),
            );
        };
        let nccl = library(super::nccl_path());
        // SAFETY: the function has this type.
        let handles = unsafe { nccl.get::<extern "C" fn() -> usize>(b"reknit_stand_in_handles").unwrap()() };
        counts.into_iter().chain([handles as i64]).collect()
    }
}
