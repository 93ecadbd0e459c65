//! The models that are served follow the registry while the gateway runs.

use std::time::Duration;

use infera_protocol::registry::{Manifest, Registry};
use infera_runtime::network;
use infera_testkit::eventually;
use serde_json::json;

use crate::support::{Column, MODEL, World, chat, json_of};

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

both!(what_holders_withdraw_is_refused_and_what_was_asked_is_answered);

async fn what_holders_withdraw_is_refused_and_what_was_asked_is_answered(column: Column) {
    let mut world = World::new(column).await;
    let path = |name: &str| world.files.dir.path().join(name);
    let (registry_path, manifest_path) = (path("models.json"), path("network.json"));
    let in_force = |registry: &Registry, now_ms: i64| {
        let registry = network::replace(&registry_path, registry, now_ms).unwrap();
        let registry_hash = registry.hash().unwrap();
        let manifest = network::manifest(&manifest_path).unwrap();
        network::write_json(&manifest_path, &Manifest { registry_hash, ..manifest }).unwrap();
    };
    let listed = network::registries(&registry_path).unwrap().current().clone();
    let served_by = (world.client.clone(), world.url("/v1/models"), world.key.clone());
    let served = async || {
        let (client, url, key) = served_by.clone();
        let models = client.get(url).bearer_auth(key).send().await.unwrap();
        json_of(models).await["data"].as_array().unwrap().len()
    };
    assert_eq!(served().await, 1);
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    in_force(&Registry { models: Vec::new(), ..listed.clone() }, 1_000);
    eventually(PATIENCE, async || served().await == 0).await;
    let refused = world.send(&chat(json!({}))).await.unwrap();
    assert_eq!(refused.status(), 404);
    assert_eq!(json_of(refused).await["error"]["code"], "model_not_found");
    in_force(&listed, 2_000);
    eventually(PATIENCE, async || served().await == 1).await;
    world.net.answer(&submitted, "Paris");
    assert_eq!(pending.await.unwrap().status(), 200, "what was asked before is answered");
    assert_eq!(submitted.model, MODEL);
}
