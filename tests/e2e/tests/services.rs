//! The gRPC services that tools expect: health and reflection; and the benchmarks, as far as they work and name their
//! figures. How large those are is for `reknit bench` to say.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

use std::collections::BTreeSet;

use reknit_e2e::{Coordinator, reknit};
use serde_json::Value;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const SERVICES: [&str; 3] = ["reknit.v1.Rendezvous", "reknit.v1.Inspect", "reknit.v1.Operate"];

fn with_channel<T>(coordinator: &Coordinator, talk: impl AsyncFnOnce(Channel) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        talk(Channel::from_shared(coordinator.url()).unwrap().connect().await.unwrap()).await
    })
}

#[test]
fn every_service_says_that_it_serves() {
    let coordinator = Coordinator::start();
    with_channel(&coordinator, async |channel| {
        let mut health = HealthClient::new(channel);
        for service in SERVICES.into_iter().chain([""]) {
            let asked = HealthCheckRequest { service: service.to_owned() };
            let status = health.check(asked).await.unwrap().into_inner().status();
            assert_eq!(status, ServingStatus::Serving, "{service:?}");
        }
    });
}

#[test]
fn a_tool_without_our_proto_files_finds_the_services() {
    let coordinator = Coordinator::start();
    let found: BTreeSet<String> = with_channel(&coordinator, async |channel| {
        let mut reflection = ServerReflectionClient::new(channel);
        let list = MessageRequest::ListServices(String::new());
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut answers =
            reflection.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap();
        match answer.message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect()
            }
            other => panic!("{other:?}"),
        }
    });
    for service in SERVICES {
        assert!(found.contains(service), "{service} is not among {found:?}");
    }
}

/// The figures of a benchmark, run only to see that it works.
fn bench(name: &str) -> Value {
    let ran = reknit(&["bench", name, "--quick", "--json"]);
    assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

fn positive(figures: &Value, path: &str) {
    let figure = path.split('.').fold(figures, |figures, key| &figures[key]);
    assert!(figure.as_f64().is_some_and(|figure| figure > 0.0), "{path} is {figure}");
}

#[test]
fn every_benchmark_runs_and_names_its_figures() {
    let recovery = bench("recovery");
    for path in ["loss_to_step_ms.p50", "loss_to_step_ms.p99", "floor_ms", "ratio"] {
        positive(&recovery, path);
    }
    positive(&recovery, "planned_leave_stall_ms.p50");
    positive(&recovery, "join_stall_ms.p50");
    assert_eq!(recovery["steps_lost"], 0, "planned changes lose no step");

    let swarm = bench("swarm");
    for path in ["form_ms", "loss_fanout_ms", "rss_bytes_per_member"] {
        positive(&swarm, path);
    }
    // A quick run may cost less than the kernel's clock tells.
    assert!(swarm["heartbeat_cores"].as_f64().is_some_and(|cores| cores >= 0.0), "{swarm}");
    assert_eq!(bench("steady")["received_per_step"], 0.0);
    for name in ["restore", "allreduce", "collectives", "checkpoint"] {
        assert_eq!(bench(name)["bench"], name);
    }
}

#[test]
fn the_collectives_are_a_table_a_file_of_rows_beside_limits_and_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (json, svg) = (path("figures.json"), path("figures.svg"));
    let ran = reknit(&[
        "bench",
        "collectives",
        "--quick",
        "--worlds",
        "2,3",
        "--sizes",
        "4,64k,1m,1g",
        "--types",
        "f32,bf16",
        "--json",
        &json,
        "--plot",
        &svg,
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("f32, 3 ranks, 64 KiB: reknit tcp"), "{}", ran.stdout);
    let figures: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(figures["bench"], "collectives");
    let rows = figures["rows"].as_array().unwrap();
    let mut seen = BTreeSet::new();
    for row in rows {
        assert_eq!(row["impl"], "reknit", "{row}");
        for path in ["median_us", "algbw_gbs", "busbw_gbs"] {
            positive(row, path);
        }
        let numbers = ["world", "bytes"].map(|key| row[key].as_u64().unwrap());
        let [transport, number] = ["transport", "type"].map(|key| row[key].as_str().unwrap().to_owned());
        assert!(["tcp", "shm", "shm-buffer"].contains(&transport.as_str()), "{row}");
        seen.insert((transport, number, numbers));
    }
    // A quick run leaves the large sizes out.
    assert_eq!((rows.len(), seen.len()), (3 * 2 * 2 * 3, 3 * 2 * 2 * 3), "{seen:?}");
    for limit in [
        "memcpy_gbs",
        "add_gbs",
        "tcp_one_way_gbs",
        "tcp_both_ways_gbs",
        "shm_ping_pong_one_way_us",
        "tcp_round_trip_us",
    ] {
        positive(&figures["limits"], limit);
    }
    let overhead = &figures["overhead_of_elasticity"][0];
    assert_eq!(
        (&overhead["transport"], &overhead["bytes"]),
        (&"tcp".into(), &(1 << 20).into()),
        "{overhead}"
    );
    assert!(overhead["cost_percent"]["p50"].is_f64(), "{overhead}");
    let picture = std::fs::read_to_string(svg).unwrap();
    assert!(
        picture.starts_with("<svg ")
            && picture.ends_with("</svg>\n")
            && picture.contains("reknit shm-buffer")
    );
}

#[test]
fn a_peer_that_is_missing_is_named_with_how_to_install_it() {
    let ran = reknit(&["bench", "collectives", "--quick", "--peers", "--python", "/nowhere/python3"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("/nowhere/python3"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint: ") && ran.stderr.contains("pip install torch"), "{}", ran.stderr);
}
