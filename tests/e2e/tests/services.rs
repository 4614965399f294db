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
    for name in ["restore", "allreduce", "checkpoint"] {
        assert_eq!(bench(name)["bench"], name);
    }
}
