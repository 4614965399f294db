//! `reknit serve`.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;

use reknit_coordinator::config::{Config, Limits, StoreConfig, TlsFiles};
use reknit_coordinator::etcd::{EtcdAddress, EtcdCredentials};
use reknit_coordinator::server::{Exposure, Server};
use reknit_coordinator::store::recorded::MonotonicUs;
use reknit_coordinator::torchelastic::TorchElastic;
use reknit_torchelastic::run::{Repair, Repairs};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::{EtcdAccess, ForTorchrun, Serve};
use crate::clock;
use crate::descriptors;
use crate::failure::{self, Failure, Kind};
use crate::print;

pub(crate) fn serve(args: &Serve) -> Result<(), Failure> {
    let tls = args.tls_cert.clone().zip(args.tls_key.clone()).map(|(cert, key)| TlsFiles {
        cert,
        key,
        client_ca: args.tls_client_ca.clone(),
        ca: args.tls_ca.clone(),
    });
    let record = args.record.clone().map(|file| (file, clock::monotonic_us as MonotonicUs));
    let config = Config {
        listen: args.listen,
        store: store(args)?,
        silence: args.silence,
        limits: Limits::default(),
        record,
        tls,
        tokens: args.tokens.clone(),
        torchelastic: torchelastic(&args.torchelastic),
    };
    if args.print_config {
        return print_config(&config, &args.log, args.json);
    }
    log_to_stderr(&args.log)?;
    raise_limit(config.limits.connections);
    let exposure = if args.insecure { Exposure::Insecure } else { Exposure::Loopback };
    let announce = args.announce;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async move {
        let stop = told_to_stop()?;
        let server = Server::bind(config, exposure).await.map_err(failure::serve)?;
        if announce {
            print::data(format_args!("{}", server.address()));
            if let Some(address) = server.torchelastic_address() {
                print::data(format_args!("{address}"));
            }
        }
        server.run(stop).await.map_err(failure::serve)
    })
}

/// Ends when this process is told to stop.
pub(crate) fn told_to_stop() -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupted.recv() => {}
            _ = terminated.recv() => {}
        }
    })
}

/// Shows the log events that `log` names.
pub(crate) fn log_to_stderr(log: &str) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(log).map_err(|why| {
        let error = anyhow::anyhow!("{:?} does not say which log events are shown: {why}", log);
        Failure::new(Kind::Usage, error, "for instance `--log info`, or `--log reknit_coordinator=debug`")
    })?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        // A log that nobody takes any more must not end anything.
        .log_internal_errors(false)
        .init();
    Ok(())
}

fn torchelastic(args: &ForTorchrun) -> Option<TorchElastic> {
    let without = &args.torchelastic_without;
    Some(TorchElastic {
        allow: args.torchelastic_allow.clone(),
        repairs: without.iter().fold(Repairs::default(), |repairs, repair| repairs.without(*repair)),
        advertise: args.torchelastic_advertise.clone(),
        worker_ports: args.torchelastic_worker_ports.clone(),
        ..TorchElastic::at(args.torchelastic?)
    })
}

fn store(args: &Serve) -> Result<StoreConfig, Failure> {
    let address = match EtcdAddress::parse(&args.store) {
        None if args.store == "memory" => return Ok(StoreConfig::Memory),
        None if args.store.contains("://") => {
            let error = anyhow::anyhow!("{:?} is no store", args.store);
            return Err(Failure::new(
                Kind::Usage,
                error,
                "a directory, `memory`, or etcd://HOST:2379/PREFIX",
            ));
        }
        None => return Ok(StoreConfig::Embedded { dir: PathBuf::from(&args.store) }),
        Some(address) => address.map_err(|why| {
            Failure::new(Kind::Usage, why, "name every node with its port, separated by commas")
        })?,
    };
    let advertise = match &args.advertise {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None if args.listen.ip().is_unspecified() || args.listen.port() == 0 => {
            let error =
                anyhow::anyhow!("{} is no address under which others reach this coordinator", args.listen);
            return Err(Failure::new(Kind::Usage, error, "name one with --advertise http://HOST:PORT"));
        }
        None => format!("{}://{}", if args.tls_cert.is_some() { "https" } else { "http" }, args.listen),
    };
    let is_url = advertise.parse::<tonic::codegen::http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && uri.port().is_some()
    });
    if !is_url {
        let error = anyhow::anyhow!("{advertise:?} is no URL of a coordinator");
        return Err(Failure::new(
            Kind::Usage,
            error,
            "write --advertise http://HOST:PORT, or https:// with TLS",
        ));
    }
    if args.lease < Duration::from_secs(1) || args.lease > Duration::from_secs(60) {
        let error = anyhow::anyhow!("a leader's lease of {:?} is out of range", args.lease);
        return Err(Failure::new(
            Kind::Usage,
            error,
            "choose --lease from 1s to 60s; etcd's own minimum is 2s by default",
        ));
    }
    let EtcdAccess { etcd_ca, etcd_cert, etcd_key, etcd_user, etcd_password_file } = &args.etcd;
    let credentials = EtcdCredentials {
        ca: etcd_ca.clone(),
        cert: etcd_cert.clone(),
        key: etcd_key.clone(),
        user: etcd_user.clone(),
        password_file: etcd_password_file.clone(),
    };
    Ok(StoreConfig::Etcd { address, credentials, advertise, lease: args.lease })
}

/// Every connection is a descriptor; what a process starts with is often far less than it may have.
fn raise_limit(connections: usize) {
    match descriptors::raise_limit() {
        Ok(most) if most < connections as u64 => {
            tracing::warn!(
                most,
                connections,
                "this process may have fewer descriptors than connections (ulimit -Hn)"
            );
        }
        Ok(_) => {}
        Err(why) => tracing::warn!(error = %why, "the limit on descriptors stays what it is"),
    }
}

fn print_config(config: &Config, log: &str, json: bool) -> Result<(), Failure> {
    let timing = config.timing().map_err(|why| failure::serve(why.into()))?;
    let Limits {
        connections,
        connections_per_peer,
        first_bytes,
        introduction,
        message_bytes,
        outbound,
        inbound,
        jobs,
        members,
        listed,
        streams_per_connection,
        calls_per_second,
        messages_per_second,
        messages_burst,
        resets_pending,
        resets_local,
    } = config.limits;
    let store = match &config.store {
        StoreConfig::Memory => "memory".to_owned(),
        StoreConfig::Embedded { dir } => dir.display().to_string(),
        StoreConfig::Etcd { address, .. } => address.to_string(),
    };
    let (advertise, lease) = match &config.store {
        StoreConfig::Etcd { advertise, lease, .. } => (Some(advertise), Some(*lease)),
        StoreConfig::Memory | StoreConfig::Embedded { .. } => (None, None),
    };
    let path = |path: Option<&PathBuf>| json!(path.map(|path| path.display().to_string()));
    let tls = |file: fn(&TlsFiles) -> Option<&PathBuf>| path(config.tls.as_ref().and_then(file));
    let ms = |duration: Duration| json!(duration.as_millis() as u64);
    let endpoint = config.torchelastic.as_ref();
    let allow: Vec<String> = endpoint.iter().flat_map(|e| &e.allow).map(ToString::to_string).collect();
    let left_out = |repair: &Repair| endpoint.is_some_and(|e| !e.repairs.has(*repair));
    let without: Vec<&str> = Repair::ALL.iter().filter(|repair| left_out(repair)).map(|r| r.name()).collect();
    let ports = endpoint.and_then(|e| e.worker_ports.as_ref()).map(|p| format!("{}-{}", p.start(), p.end()));
    let settings = [
        ("listen", json!(config.listen)),
        ("store", json!(store)),
        ("advertise", json!(advertise)),
        ("lease_ms", lease.map_or(json!(null), ms)),
        ("log", json!(log)),
        ("tls_cert", tls(|files| Some(&files.cert))),
        ("tls_key", tls(|files| Some(&files.key))),
        ("tls_client_ca", tls(|files| files.client_ca.as_ref())),
        ("tls_ca", tls(|files| files.ca.as_ref())),
        ("tokens", path(config.tokens.as_ref())),
        ("torchelastic", json!(config.torchelastic.as_ref().map(|endpoint| endpoint.listen))),
        ("torchelastic_allow", json!((!allow.is_empty()).then(|| allow.join(",")))),
        ("torchelastic_without", json!((!without.is_empty()).then(|| without.join(",")))),
        ("torchelastic_advertise", json!(config.torchelastic.as_ref().and_then(|e| e.advertise.clone()))),
        ("torchelastic_ports", json!(ports)),
        ("silence_ms", ms(timing.silence)),
        // What follows from it.
        ("settle_ms", ms(timing.settle)),
        ("reattach_ms", ms(timing.reattach)),
        ("takeover_ms", ms(timing.takeover)),
        ("last_call_ms", ms(timing.last_call)),
        ("merge_quiet_ms", ms(timing.merge_quiet)),
        ("merge_max_ms", ms(timing.merge_max)),
        ("establish_ms", ms(timing.establish)),
        ("restore_ms", ms(timing.restore)),
        ("busy_ms", ms(timing.busy)),
        ("retry_ms", ms(timing.retry)),
        ("connections", json!(connections)),
        ("connections_per_peer", json!(connections_per_peer)),
        ("message_bytes", json!(message_bytes)),
        ("outbound", json!(outbound)),
        ("inbound", json!(inbound)),
        ("jobs", json!(jobs)),
        ("members", json!(members)),
        ("listed", json!(listed)),
        ("streams_per_connection", json!(streams_per_connection)),
        ("calls_per_second", json!(calls_per_second)),
        ("messages_per_second", json!(messages_per_second)),
        ("messages_burst", json!(messages_burst)),
        ("resets_pending", json!(resets_pending)),
        ("resets_local", json!(resets_local)),
        ("first_bytes_ms", ms(first_bytes)),
        ("introduction_ms", ms(introduction)),
    ];
    if json {
        let settings: BTreeMap<&str, serde_json::Value> = settings.into_iter().collect();
        print::json(&settings)?;
        return Ok(());
    }
    for (name, value) in settings {
        let value = match value {
            serde_json::Value::String(text) => text,
            serde_json::Value::Null => "none".to_owned(),
            value => value.to_string(),
        };
        print::data(format_args!("{name:<23} {value}"));
    }
    Ok(())
}
