//! The models that are served follow the registry while the gateway runs.

use std::time::Duration;

use infera_protocol::bytes::Hash32;
use infera_protocol::registry::{Manifest, Registry};
use infera_runtime::network;
use infera_testkit::{TempDir, eventually, model_path};
use serde_json::json;

use crate::support::{Column, MODEL, World, chat, json_of};

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

both!(what_holders_withdraw_is_refused_and_what_was_asked_is_answered, a_model_is_served_when_its_file_comes,);

/// Makes it the registry in force.
fn in_force(world: &World, registry: &Registry, now_ms: i64) {
    let path = |name: &str| world.files.dir.path().join(name);
    let registry = network::replace(&path("models.json"), registry, now_ms).unwrap();
    let registry_hash = registry.hash().unwrap();
    let manifest = network::manifest(&path("network.json")).unwrap();
    network::write_json(&path("network.json"), &Manifest { registry_hash, ..manifest }).unwrap();
}

async fn served(world: &World) -> Vec<String> {
    let models = json_of(world.get("/v1/models", &world.key).await).await;
    models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

async fn a_model_is_served_when_its_file_comes(column: Column) {
    let folder = TempDir::new().unwrap();
    let models = folder.path().to_owned();
    let world = World::with(column, move |config| config.model_folder = Some(models)).await;
    let listed = network::registries(&world.files.dir.path().join("models.json")).unwrap().current().clone();
    let (mut later, mut last) = (listed.models[0].clone(), listed.models[0].clone());
    later.id = "later".into();
    later.weights_root = Hash32([0x22; 32]);
    last.id = "last".into();
    let models = vec![listed.models[0].clone(), later];
    let voted = Registry { models, ..listed };
    in_force(&world, &voted, 1_000);
    // First a part of it, as while it is copied. The third one, whose file is whole, shows when it was read.
    let whole = std::fs::read(model_path()).unwrap();
    std::fs::write(folder.path().join("later.gguf"), &whole[..1_000]).unwrap();
    std::fs::write(folder.path().join("last.gguf"), &whole).unwrap();
    let models = voted.models.iter().cloned().chain([last]).collect();
    in_force(&world, &Registry { models, ..voted }, 2_000);
    eventually(PATIENCE, async || served(&world).await.contains(&"last".to_owned())).await;
    assert_eq!(served(&world).await, ["last", MODEL]);
    std::fs::write(folder.path().join("later.gguf"), &whole).unwrap();
    eventually(PATIENCE, async || served(&world).await.contains(&"later".to_owned())).await;
}

async fn what_holders_withdraw_is_refused_and_what_was_asked_is_answered(column: Column) {
    let mut world = World::new(column).await;
    let registry_path = world.files.dir.path().join("models.json");
    let listed = network::registries(&registry_path).unwrap().current().clone();
    assert_eq!(served(&world).await, [MODEL]);
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    in_force(&world, &Registry { models: Vec::new(), ..listed.clone() }, 1_000);
    eventually(PATIENCE, async || served(&world).await.is_empty()).await;
    let refused = world.send(&chat(json!({}))).await.unwrap();
    assert_eq!(refused.status(), 404);
    assert_eq!(json_of(refused).await["error"]["code"], "model_not_found");
    in_force(&world, &listed, 2_000);
    eventually(PATIENCE, async || served(&world).await == [MODEL]).await;
    world.net.answer(&submitted, "Paris");
    assert_eq!(pending.await.unwrap().status(), 200, "what was asked before is answered");
    assert_eq!(submitted.model, MODEL);
}
