//! A coordinator that is protected: who is let in, who is not and what they are told, and what is replaced meanwhile.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use reknit_e2e::{Coordinator, Process, Protection, Ran, eventually, reknit};
use reknit_trainer::{Credentials, DataOrder, NamedTensors, Options, TrainError, Trainer};

const ENDLESS: [&str; 6] = ["--min", "1", "--step-ms", "2", "--steps", "1000000"];

/// What a client has in its environment.
type Shown = Vec<(&'static str, String)>;

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// Makes a token, puts it into `NAME.token` and its line into `tokens`.
fn token(dir: &Path, name: &str, jobs: &str) {
    let ran = reknit(&["token", jobs]);
    assert_eq!(ran.code, 0, "{ran:?}");
    std::fs::write(dir.join(format!("{name}.token")), ran.stdout).unwrap();
    let tokens = std::fs::read_to_string(dir.join("tokens")).unwrap_or_default();
    std::fs::write(dir.join("tokens"), tokens + &ran.stderr).unwrap();
}

fn certs(dir: &Path, more: &[&str]) -> Ran {
    let dir = dir.display().to_string();
    reknit(&[&["certs", &dir], more].concat())
}

/// A client with the right certificates and somebody's token.
fn showing(dir: &Path, name: &str) -> Shown {
    vec![
        ("REKNIT_CA", path(dir, "ca.pem")),
        ("REKNIT_CERT", path(dir, "client.pem")),
        ("REKNIT_KEY", path(dir, "client.key")),
        ("REKNIT_TOKEN_FILE", path(dir, &format!("{name}.token"))),
    ]
}

/// The same with another value, or without one.
fn but(shown: &Shown, name: &str, value: Option<String>) -> Shown {
    let mut shown = shown.clone();
    match value {
        Some(value) => {
            shown.iter_mut().filter(|(other, _)| *other == name).for_each(|(_, v)| v.clone_from(&value))
        }
        None => shown.retain(|(other, _)| *other != name),
    }
    shown
}

/// A coordinator that asks for certificates of its authority and for tokens: of an operator, of the job `job` and of
/// the job `other`. Its own clients are the operator.
fn protected() -> Coordinator {
    protected_in(tempfile::tempdir().unwrap())
}

fn protected_in(dir: tempfile::TempDir) -> Coordinator {
    let at = dir.path();
    if !at.join("coordinator.pem").exists() {
        assert_eq!(certs(at, &[]).code, 0);
    }
    token(at, "operator", "@operator");
    token(at, "job", "job");
    token(at, "other", "other");
    let flags = [
        ("--tls-cert", "coordinator.pem"),
        ("--tls-key", "coordinator.key"),
        ("--tls-client-ca", "ca.pem"),
        ("--tokens", "tokens"),
    ];
    let mut serve: Vec<String> =
        flags.into_iter().flat_map(|(flag, name)| [flag.to_owned(), path(at, name)]).collect();
    serve.extend(["--log".to_owned(), "trace".to_owned()]);
    let shown = showing(at, "operator");
    Coordinator::start_protected(dir, "3s", Protection { serve, shown })
}

fn worker(coordinator: &Coordinator, name: &str, args: &[&str]) -> Process {
    coordinator.worker_showing("job", name, args, &showing(coordinator.dir(), "job"))
}

/// The last line of an error says what to do.
fn hint(ran: &Ran) -> &str {
    ran.stderr
        .lines()
        .last()
        .and_then(|line| line.strip_prefix("hint: "))
        .unwrap_or_else(|| panic!("{ran:?}"))
}

#[test]
fn two_workers_train_over_tls_with_certificates_and_tokens_and_no_log_has_the_token() {
    let coordinator = protected();
    let dir = coordinator.dir();
    let bounds = ["--min", "2", "--steps", "150", "--step-ms", "2"];
    let mut workers = ["a", "b"].map(|name| worker(&coordinator, name, &bounds));
    for worker in &mut workers {
        assert!(worker.ended().success(), "{}", worker.log());
    }
    let status = coordinator.status("job").unwrap();
    assert_eq!(status["closure"], "completed at step 150", "{status}");

    // D-9: whatever was logged, at the finest level, or saved, holds neither a token nor a part of one.
    let canaries = ["operator", "job", "other"].map(|name| {
        let token = std::fs::read_to_string(dir.join(format!("{name}.token"))).unwrap();
        token.trim().strip_prefix("reknit-token-").unwrap()[..32].to_owned()
    });
    let logs = ["coordinator.log", "a.log", "b.log", "store/reknit.redb", "tokens"];
    for name in logs {
        let log = String::from_utf8_lossy(&std::fs::read(dir.join(name)).unwrap()).into_owned();
        assert!(!log.is_empty(), "{name}");
        for canary in &canaries {
            assert!(!log.contains(canary), "{name} holds a token");
        }
    }
    assert!(std::fs::read_to_string(dir.join("coordinator.log")).unwrap().contains("TRACE"));
}

#[test]
fn d8_whoever_looks_sees_the_jobs_of_the_token_and_no_others() {
    let coordinator = protected();
    let dir = coordinator.dir();
    let _worker = worker(&coordinator, "a", &ENDLESS);
    coordinator.runs_with("job", 1);
    let listed = |name: &str| {
        let ran = coordinator.reknit_showing(&["status", "--json"], &showing(dir, name));
        let jobs: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        jobs.as_array().unwrap().iter().map(|job| job["job"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(listed("job"), ["job"]);
    assert_eq!(listed("operator"), ["job"]);
    assert!(listed("other").is_empty());
    for verb in
        [&["status", "job"][..], &["drain", "job", "a"], &["close", "job"], &["forget", "no-such-job"]]
    {
        let ran = coordinator.reknit_showing(verb, &showing(dir, "other"));
        assert_eq!(ran.code, 7, "{ran:?}");
        assert!(ran.stderr.contains("this token is not for the job") && !hint(&ran).is_empty(), "{ran:?}");
    }
    coordinator.runs_with("job", 1);
    assert_eq!(coordinator.reknit_showing(&["close", "job"], &showing(dir, "job")).code, 0);
}

/// A certificate like the one that `reknit certs` makes, but for what `change` does to it.
fn leaf(dir: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) -> [String; 2] {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let mut authority = CertificateParams::default();
    authority.distinguished_name = rcgen::DistinguishedName::new();
    authority.distinguished_name.push(rcgen::DnType::CommonName, "reknit authority for tests");
    let issuer = Issuer::new(authority, KeyPair::from_pem(&read("ca.key")).unwrap());
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, &issuer).unwrap();
    std::fs::write(dir.join(format!("{name}.pem")), cert.pem()).unwrap();
    std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    [path(dir, &format!("{name}.pem")), path(dir, &format!("{name}.key"))]
}

/// What a program that embeds the library is told that joins with these credentials.
fn joins(coordinator: &str, shown: &Shown) -> String {
    let file = |name| shown.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into());
    let credentials = Credentials {
        ca: file("REKNIT_CA"),
        cert: file("REKNIT_CERT"),
        key: file("REKNIT_KEY"),
        token: None,
        token_file: file("REKNIT_TOKEN_FILE"),
    };
    let order = DataOrder { dataset: 100, global_batch: 10, seed: 1 };
    let options = Options::new(coordinator, "job", order).unwrap().credentials(credentials);
    let state = NamedTensors::new().with_f32("weights", [3], vec![0.0; 3]);
    let began = Instant::now();
    let joined = Trainer::join(options, &state);
    assert!(began.elapsed() < Duration::from_secs(30), "it does not try for a minute");
    match joined {
        Ok(_) => panic!("it must not be let in"),
        Err(TrainError::Rejected(why)) => why,
        Err(why) => panic!("{why}"),
    }
}

#[test]
fn whoever_is_not_let_in_is_told_at_once_why_and_what_to_do() {
    let coordinator = protected();
    let dir = coordinator.dir();
    let stranger = tempfile::tempdir().unwrap();
    assert_eq!(certs(stranger.path(), &[]).code, 0);
    let good = showing(dir, "job");
    let strange = |name: &str| Some(path(stranger.path(), name));
    let expired = leaf(dir, "expired", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let [expired_cert, expired_key] = expired.map(Some);
    std::fs::write(dir.join("unknown.token"), "a-token-that-nobody-lists").unwrap();
    let with_cert = |cert, key| but(&but(&good, "REKNIT_CERT", cert), "REKNIT_KEY", key);
    // Who shows what; the exit code; what the error says; what the hint names.
    let cases = [
        (
            but(&good, "REKNIT_CA", strange("ca.pem")),
            3,
            "not of an authority that is trusted here",
            "REKNIT_CA",
        ),
        (but(&good, "REKNIT_CA", None), 2, "no authority is named", "--ca"),
        (with_cert(None, None), 7, "asks for a certificate", "--cert"),
        (
            with_cert(strange("client.pem"), strange("client.key")),
            7,
            "does not accept the certificate",
            "expired",
        ),
        (with_cert(expired_cert, expired_key), 7, "does not accept the certificate", "expired"),
        (but(&good, "REKNIT_KEY", None), 2, "only one of them is named", "--key"),
        (but(&good, "REKNIT_TOKEN_FILE", None), 7, "asks for a token", "--token-file"),
        (
            but(&good, "REKNIT_TOKEN_FILE", Some(path(dir, "unknown.token"))),
            7,
            "does not know the token",
            "--token-file",
        ),
        (
            but(&good, "REKNIT_TOKEN_FILE", Some(path(dir, "absent"))),
            2,
            "cannot be read",
            "REKNIT_TOKEN_FILE",
        ),
    ];
    for (shown, code, says, what_to_do) in &cases {
        let ran = coordinator.reknit_showing(&["status", "job"], shown);
        assert_eq!(ran.code, *code, "{ran:?}");
        assert!(ran.stderr.contains(says), "{says}: {ran:?}");
        assert!(hint(&ran).contains(what_to_do), "{what_to_do}: {ran:?}");
        let why = joins(&coordinator.url(), shown);
        assert!(why.contains(says) && why.contains(what_to_do), "{says}: {why}");
    }
    let others = joins(&coordinator.url(), &showing(dir, "other"));
    assert!(others.contains("this token is not for the job job"), "{others}");
    // The same for a program as users write them.
    let mut digits = coordinator.worker_showing("job", "x", &ENDLESS, &showing(dir, "other"));
    assert!(!digits.ended().success());
    assert!(digits.log().contains("this token is not for the job job"), "{}", digits.log());
}

#[test]
fn a_certificate_for_another_name_and_one_that_expires_meanwhile_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    assert_eq!(certs(at, &[]).code, 0);
    let soon =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap() + Duration::from_secs(6);
    leaf(at, "coordinator", |params| params.not_after = rcgen::date_time_ymd(1970, 1, 1) + soon);
    let coordinator = protected_in(dir);
    let expired = eventually("the certificate to expire", || {
        let ran = coordinator.reknit(&["status"]);
        if ran.code == 0 { Err("it has not".to_owned()) } else { Ok(ran) }
    });
    assert_eq!(expired.code, 3, "{expired:?}");
    assert!(expired.stderr.contains("has expired") && hint(&expired).contains("--renew"), "{expired:?}");
    let why = joins(&coordinator.url(), &showing(coordinator.dir(), "job"));
    assert!(why.contains("the coordinator's certificate has expired"), "{why}");

    // An operator does what the hint says; nobody restarts anything.
    assert_eq!(certs(coordinator.dir(), &["--renew"]).code, 0);
    eventually("the renewed certificate", || {
        let ran = coordinator.reknit(&["status"]);
        if ran.code == 0 { Ok(()) } else { Err(ran.stderr) }
    });
    let at = coordinator.dir();
    leaf(at, "coordinator", |params| params.subject_alt_names.clear());
    let nameless = eventually("another certificate", || {
        let ran = coordinator.reknit(&["status"]);
        if ran.code == 0 { Err("it has not changed".to_owned()) } else { Ok(ran) }
    });
    assert!(nameless.stderr.contains("is for another name"), "{nameless:?}");
    assert!(hint(&nameless).contains("--host"), "{nameless:?}");
    let why = joins(&coordinator.url(), &showing(at, "job"));
    assert!(why.contains("is for another name") && why.contains("--host"), "{why}");
}

#[test]
fn d10_certificates_and_tokens_are_replaced_while_workers_run_and_none_of_them_notices() {
    let mut coordinator = protected();
    let dir = coordinator.dir().to_owned();
    let mut workers = ["a", "b"].map(|name| worker(&coordinator, name, &ENDLESS));
    let generation = coordinator.runs_with("job", 2)["generation"].clone();

    // Another authority altogether, and another token for the job; nothing of what there was is good any more.
    for name in ["ca.pem", "ca.key"] {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
    std::fs::remove_file(dir.join("tokens")).unwrap();
    let old_token = std::fs::read_to_string(dir.join("job.token")).unwrap();
    assert_eq!(certs(&dir, &["--renew"]).code, 0);
    token(&dir, "operator", "@operator");
    token(&dir, "job", "job");
    eventually("what is new to count", || {
        let ran = coordinator.reknit(&["status"]);
        if ran.code == 0 { Ok(()) } else { Err(ran.stderr) }
    });
    let now = coordinator.runs_with("job", 2);
    assert_eq!(now["generation"], generation, "running workers are undisturbed");
    std::fs::write(dir.join("old.token"), old_token).unwrap();
    let old = coordinator.reknit_showing(&["status", "job"], &showing(&dir, "old"));
    assert_eq!(old.code, 7, "{old:?}");

    // Those that run read their files again when they have to come back, and then have what is new.
    coordinator.kill();
    coordinator.restart();
    let again = coordinator.runs_with("job", 2);
    let step = again["step"].as_u64().unwrap();
    eventually("training to go on", || {
        let status = coordinator.status("job")?;
        if status["step"].as_u64() > Some(step + 20) { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(workers.iter_mut().all(Process::runs));
}

#[test]
fn a_coordinator_whose_files_make_no_sense_does_not_start_and_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    assert_eq!(certs(at, &[]).code, 0);
    let expired = leaf(at, "expired", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    std::fs::write(at.join("bad-tokens"), "job the-token-itself\n").unwrap();
    let [cert, key, absent] = ["coordinator.pem", "coordinator.key", "absent"].map(|name| path(at, name));
    let client_key = path(at, "client.key");
    let bad_tokens = path(at, "bad-tokens");
    let cases = [
        (vec!["--tls-cert", &absent, "--tls-key", &key], "absent cannot be read", 1),
        (vec!["--tls-cert", &cert, "--tls-key", &client_key], "does not belong to the certificate", 1),
        (vec!["--tls-cert", &expired[0], "--tls-key", &expired[1]], "has expired", 1),
        (vec!["--tls-cert", &cert, "--tls-key", &cert], "holds no private key", 1),
        (vec!["--tokens", &bad_tokens], "line 1: a line is JOBS HASH", 1),
        (vec!["--tokens", &absent], "absent cannot be read", 1),
        (vec!["--listen", "0.0.0.0:0", "--tls-cert", &cert, "--tls-key", &key], "has no tokens", 2),
    ];
    for (flags, says, code) in cases {
        let listen = if flags[0] == "--listen" { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        let ran = reknit(&[&["serve", "--store", "memory"], listen, &flags].concat());
        assert_eq!(ran.code, code, "{ran:?}");
        assert!(ran.stderr.contains(says) && !hint(&ran).is_empty(), "{says}: {ran:?}");
        assert!(!ran.stderr.contains("the-token-itself"), "{ran:?}");
    }
    assert_eq!(reknit(&["serve", "--tls-cert", &cert]).code, 2, "a certificate without its key");
}

#[test]
fn certificates_that_are_there_are_replaced_only_if_asked_and_keys_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let first = certs(at, &["--host", "train.example", "--host", "10.0.0.5"]);
    assert_eq!(first.code, 0, "{first:?}");
    assert!(first.stderr.contains("reknit serve --listen 0.0.0.0:7070 --tls-cert"), "{}", first.stderr);
    assert!(
        first.stderr.contains("reknit status --coordinator https://train.example:7070"),
        "{}",
        first.stderr
    );
    for name in ["ca.key", "coordinator.key", "client.key"] {
        let mode = std::fs::metadata(at.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let read = |name: &str| std::fs::read(at.join(name)).unwrap();
    let (ca, cert) = (read("ca.pem"), read("coordinator.pem"));
    let again = certs(at, &[]);
    assert_eq!(again.code, 1, "{again:?}");
    assert!(again.stderr.contains("is there already") && hint(&again).contains("--renew"), "{again:?}");
    assert_eq!((read("ca.pem"), read("coordinator.pem")), (ca.clone(), cert.clone()));
    assert_eq!(certs(at, &["--renew"]).code, 0);
    assert_eq!(read("ca.pem"), ca, "the authority is used again");
    assert_ne!(read("coordinator.pem"), cert);
    // Another authority's key does not sign for this one.
    let other = tempfile::tempdir().unwrap();
    assert_eq!(certs(other.path(), &[]).code, 0);
    std::fs::copy(other.path().join("ca.key"), at.join("ca.key")).unwrap();
    let mixed = certs(at, &["--renew"]);
    assert_eq!(mixed.code, 1, "{mixed:?}");
    assert!(mixed.stderr.contains("cannot be used again"), "{mixed:?}");
    assert_eq!(certs(at, &["--renew", "--host", "not a name"]).code, 2);
    assert_eq!(reknit(&["token", "no/job"]).code, 2);
}

#[test]
fn one_who_speaks_tls_to_one_who_does_not_is_told_which_address_to_use() {
    let plain = Coordinator::start();
    let secured = protected();
    let shown = showing(secured.dir(), "job");
    let https = format!("https://{}", plain.address());
    let ran = reknit_e2e::reknit_showing(&["status", "--coordinator", &https], &shown);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(hint(&ran).contains("http://"), "{ran:?}");
    let http = format!("http://{}", secured.address());
    let ran = reknit_e2e::reknit_showing(&["status", "--coordinator", &http], &shown);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(hint(&ran).contains("https://"), "{ran:?}");
}
