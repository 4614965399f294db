//! `reknit certs`: an authority for tests, and certificates of it.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose as Purpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use reknit_coordinator::config::TlsFiles;
use reknit_coordinator::tls;

use crate::args::Certs;
use crate::failure::{Failure, Kind};
use crate::print;

/// The name of every authority that is made here: it is how one is taken up again.
const AUTHORITY: &str = "reknit authority for tests";
/// An authority is valid for so many times as long as what it signs.
const AUTHORITY_LIVES: u32 = 10;
/// Certificates are valid since a little before now: clocks differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Names by which a coordinator is reached from its own machine.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// The files that are made, in `dir`.
struct Files {
    ca: Pair,
    coordinator: Pair,
    client: Pair,
}

/// A certificate and its key.
struct Pair {
    cert: PathBuf,
    key: PathBuf,
}

impl Pair {
    fn new(dir: &Path, name: &str) -> Pair {
        Pair { cert: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) }
    }

    /// Those that are there.
    fn there(&self) -> impl Iterator<Item = &Path> {
        [self.cert.as_path(), self.key.as_path()].into_iter().filter(|path| path.exists())
    }
}

pub(crate) fn certs(args: &Certs) -> Result<(), Failure> {
    let dir = &args.dir;
    let files = Files {
        ca: Pair::new(dir, "ca"),
        coordinator: Pair::new(dir, "coordinator"),
        client: Pair::new(dir, "client"),
    };
    let has_authority = match files.ca.there().count() {
        0 => false,
        2 => true,
        _ => {
            let error =
                anyhow::anyhow!("{} has half an authority: ca.pem and ca.key belong together", dir.display());
            return Err(Failure::new(
                Kind::Failed,
                error,
                "put the other file back, or name another directory",
            ));
        }
    };
    if let Some(path) = files.coordinator.there().chain(files.client.there()).next()
        && !args.renew
    {
        let error = anyhow::anyhow!("{} is there already", path.display());
        return Err(Failure::new(
            Kind::Failed,
            error,
            "say --renew to replace it, or name another directory",
        ));
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (ca, issuer) = if has_authority { take_up(&files.ca)? } else { found(&files.ca, args.days)? };

    let names = LOCAL.into_iter().chain(args.hosts.iter().map(String::as_str));
    let both = [Purpose::ServerAuth, Purpose::ClientAuth];
    let coordinator = leaf("reknit coordinator", names, &both, args.days, &issuer)?;
    let client = leaf("reknit client", std::iter::empty(), &both[1..], args.days, &issuer)?;
    check(&files, &ca, &coordinator)?;
    for (pair, (cert, key)) in [(&files.coordinator, &coordinator), (&files.client, &client)] {
        write(&pair.key, &key.serialize_pem(), 0o600, args.renew)?;
        write(&pair.cert, &cert.pem(), 0o644, args.renew)?;
    }
    say_what_next(&files, args);
    Ok(())
}

/// A new authority.
fn found(files: &Pair, days: u32) -> Result<(String, Issuer<'static, KeyPair>)> {
    let key = KeyPair::generate()?;
    let params = authority(days.saturating_mul(AUTHORITY_LIVES))?;
    let cert = params.self_signed(&key)?;
    write(&files.key, &key.serialize_pem(), 0o600, false)?;
    write(&files.cert, &cert.pem(), 0o644, false)?;
    Ok((cert.pem(), Issuer::new(params, key)))
}

/// The authority that is there.
fn take_up(files: &Pair) -> Result<(String, Issuer<'static, KeyPair>)> {
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let cert = read(&files.cert)?;
    let key = KeyPair::from_pem(&read(&files.key)?)
        .with_context(|| format!("{} holds no private key", files.key.display()))?;
    // Its name and its key are all that signing takes.
    Ok((cert, Issuer::new(authority(1)?, key)))
}

fn authority(days: u32) -> Result<CertificateParams> {
    let mut params = named(AUTHORITY, days)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn leaf<'n>(
    name: &str,
    hosts: impl Iterator<Item = &'n str>,
    purposes: &[Purpose],
    days: u32,
    issuer: &Issuer<'_, KeyPair>,
) -> Result<(Certificate, KeyPair), Failure> {
    let hosts: Vec<String> = hosts.map(str::to_owned).collect();
    if let Some(host) = hosts.iter().find(|host| !is_host(host)) {
        let error = anyhow::anyhow!("{host:?} is neither a name nor an IP address");
        return Err(Failure::new(Kind::Usage, error, "--host takes one of the two, without a port"));
    }
    let names = CertificateParams::new(hosts).map_err(anyhow::Error::from)?;
    let mut params = named(name, days)?;
    params.subject_alt_names = names.subject_alt_names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = purposes.to_vec();
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(anyhow::Error::from)?;
    let cert = params.signed_by(&key, issuer).map_err(anyhow::Error::from)?;
    Ok((cert, key))
}

fn is_host(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'*');
    text.parse::<IpAddr>().is_ok() || (!text.is_empty() && text.bytes().all(allowed))
}

/// What every certificate has: a name, and a time.
fn named(name: &str, days: u32) -> Result<CertificateParams> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let at = |since_1970: Duration| date_time_ymd(1970, 1, 1) + since_1970;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = at(now.saturating_sub(CLOCKS_DIFFER));
    params.not_after = at(now + DAY * days);
    Ok(params)
}

/// Nothing is written that a coordinator could not serve with.
fn check(files: &Files, ca: &str, (cert, key): &(Certificate, KeyPair)) -> Result<(), Failure> {
    let own = TlsFiles {
        cert: files.coordinator.cert.clone(),
        key: files.coordinator.key.clone(),
        client_ca: Some(files.ca.cert.clone()),
        ca: None,
    };
    let contents = [cert.pem(), key.serialize_pem(), ca.to_owned()].map(String::into_bytes);
    tls::check(&own, &contents).map_err(|why| {
        let error = anyhow::Error::from(why).context("the authority that is there cannot be used again");
        Failure::new(Kind::Failed, error, "only one that `reknit certs` made can be; name another directory")
    })
}

/// Writes a file whole. One that is there is replaced at once if it is to be, and never otherwise.
fn write(path: &Path, text: &str, mode: u32, replace: bool) -> Result<()> {
    let to = if replace { PathBuf::from(format!("{}.new", path.display())) } else { path.to_owned() };
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .create_new(!replace)
        .truncate(replace)
        .mode(mode)
        .open(&to)
        .with_context(|| format!("cannot write {}", to.display()))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all())?;
    if replace {
        fs::rename(&to, path).with_context(|| format!("cannot replace {}", path.display()))?;
    }
    Ok(())
}

fn say_what_next(files: &Files, args: &Certs) {
    let host = args.hosts.first().map_or("localhost", String::as_str);
    let listen = if args.hosts.is_empty() { "127.0.0.1:7070" } else { "0.0.0.0:7070" };
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let dir = args.dir.display();
    let Files { ca, coordinator, client } = files;
    print::talk(format_args!(
        "{dir} has an authority (ca), a coordinator's certificate and a client's, valid for {} days; whoever has ca.key \
         can make more\n\n\
         serve:   (umask 077; reknit token --operator >{dir}/operator.token 2>>{dir}/tokens)\n         \
         reknit serve --listen {listen} --tls-cert {} --tls-key {} --tls-client-ca {} --tokens {dir}/tokens\n\
         look:    reknit status --coordinator https://{host}:7070 --ca {} --cert {} --key {} --token-file {dir}/operator.token\n\
         workers: REKNIT_COORDINATOR=https://{host}:7070 REKNIT_CA={} REKNIT_CERT={} REKNIT_KEY={} REKNIT_TOKEN_FILE=…",
        args.days,
        coordinator.cert.display(),
        coordinator.key.display(),
        ca.cert.display(),
        ca.cert.display(),
        client.cert.display(),
        client.key.display(),
        ca.cert.display(),
        client.cert.display(),
        client.key.display(),
    ));
}
