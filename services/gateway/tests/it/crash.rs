//! `kill -9` at every step of a request's way through the gateway, as its own process on the cluster's
//! servers: a repeat with the same key gets the answer, and the request is the same one.

use infera_bus::Bus;
use infera_testkit::{Process, cluster, free_port, model_path, unique};
use serde_json::json;

use crate::support::{Column, DEADLINE, Files, MODEL, Net, chat, id, json_of};

#[tokio::test]
async fn before_the_request_is_stored() {
    dies_at("gateway.request.before_commit").await;
}

#[tokio::test]
async fn after_the_request_is_stored() {
    dies_at("gateway.request.after_commit").await;
}

#[tokio::test]
async fn before_the_request_is_published() {
    dies_at("outbox.request.submitted.before_publish").await;
}

#[tokio::test]
async fn after_the_request_is_published() {
    dies_at("outbox.request.submitted.after_publish").await;
}

#[tokio::test]
async fn before_the_verdict_is_stored() {
    dies_at("gateway.verdict.before_commit").await;
}

#[tokio::test]
async fn after_the_verdict_is_stored() {
    dies_at("gateway.verdict.after_commit").await;
}

async fn dies_at(point: &str) {
    let name = unique("gateway");
    let files = Files::new();
    let port = free_port();
    let spec = spec(&files, &name, port);
    let mut net = Net::new(Bus::rabbit(&cluster().amqp_url, &name).await.unwrap()).await;
    let key = files.key("alice").0;
    let client = reqwest::Client::new();
    let url = format!("http://127.0.0.1:{port}/v1/chat/completions");
    let ask = || {
        let request = client.post(&url).bearer_auth(&key).header("idempotency-key", "k");
        let request = request.body(chat(json!({})).to_string());
        tokio::spawn(async move { request.send().await })
    };
    let ready = format!("http://127.0.0.1:{port}/readyz");

    let mut process = spec.clone().env("INFERA_FAIL", format!("{point}=abort")).spawn();
    process.wait_ready(&ready, DEADLINE).await;
    let first = ask();
    let mut seen = Vec::new();
    if point.starts_with("gateway.verdict") {
        seen.push(net.next().await);
        net.answer(&seen[0], "Paris");
    }
    let status = process.wait(DEADLINE).await;
    assert!(!status.success(), "{point} was passed");
    // Before it died the gateway may have answered: the wake-up needs no database.
    let _ = first.await.unwrap();

    let mut process = spec.spawn();
    process.wait_ready(&ready, DEADLINE).await;
    let second = ask();
    if seen.is_empty() {
        seen.push(net.next().await);
        net.answer(&seen[0], "Paris");
    }
    let response = second.await.unwrap().expect("the restarted gateway answers");
    assert_eq!(response.status(), 200, "{point}");
    let body = json_of(response).await;
    assert_eq!(body["choices"][0]["message"]["content"], "Paris", "{point}");
    assert_eq!(body["id"], format!("chatcmpl-{}", id(&seen[0])));
    // It may have been published twice, but always under one id.
    assert!(net.more().iter().all(|again| id(again) == id(&seen[0])), "{point}");
    let third = ask().await.unwrap().unwrap();
    assert_eq!(json_of(third).await, body, "{point}");
    process.terminate();
    assert!(process.wait(DEADLINE).await.success(), "{}", process.log());
    let log = process.log();
    assert!(!log.contains("capital of France") && !log.contains("Paris"), "no prompt or answer in the log");
}

#[tokio::test]
async fn a_wrong_configuration_is_one_sentence() {
    let name = unique("gateway");
    let files = Files::new();
    for (variable, value, names) in [
        ("INFERA_GATEWAY__REPLICAS", "2", "`replicas` must be 3 to 7"),
        ("INFERA_GATEWAY__REPLICCAS", "3", "repliccas"),
        ("INFERA_GATEWAY__JWKS_PATH", "/nowhere.json", "/nowhere.json"),
        ("INFERA_GATEWAY__REGISTRY_PATH", "/nowhere.json", "the registry /nowhere.json"),
        ("INFERA_GATEWAY__HTTP_BIND", "nonsense", "nonsense"),
    ] {
        let mut process = spec(&files, &name, free_port()).env(variable, value).spawn();
        assert!(!process.wait(DEADLINE).await.success(), "{variable}");
        let log = process.log();
        let last = log.trim_end().lines().last().unwrap_or_default();
        assert!(last.starts_with("infera-gateway: ") && last.contains(names), "{variable}: {last}");
    }
}

fn spec(files: &Files, name: &str, port: u16) -> infera_testkit::process::Spec {
    let config = files.config(Column::Cluster, name);
    let common = &config.common;
    let text = format!(
        "http_bind = \"127.0.0.1:{port}\"\ndatabase_url = {:?}\ndatabase_schema = \"{name}\"\nbus_url = {:?}\n\
         bus_prefix = \"{name}\"\nkv_url = {:?}\nmanifest_path = {:?}\nregistry_path = {:?}\njwks_path = {:?}\n\
         poll_ms = 200\n[models]\n{MODEL:?} = {:?}\n",
        common.database_url.expose(),
        common.bus_url.expose(),
        common.kv_url.as_ref().unwrap().expose(),
        common.manifest_path,
        common.registry_path,
        common.jwks_path,
        model_path(),
    );
    let file = files.dir.path().join("gateway.toml");
    std::fs::write(&file, text).unwrap();
    Process::spec(env!("CARGO_BIN_EXE_infera-gateway"), files.dir.path().join("gateway.log")).args([&file])
}
