//! Keys that are revoked while the gateway runs.

use infera_gateway::keys;
use serde_json::json;

use crate::support::{Column, World, chat, json_of};

both!(a_revoked_key_is_refused_at_once);

async fn a_revoked_key_is_refused_at_once(column: Column) {
    let mut world = World::new(column).await;
    let (key, jti) = world.files.key("alice");
    let models = async || world.client.get(world.url("/v1/models")).bearer_auth(&key).send().await.unwrap();
    assert_eq!(models().await.status(), 200);
    // As the CLI does it: beside the running gateway.
    let db = world.database().await;
    keys::revoke(&db, &jti).await.unwrap();
    keys::revoke(&db, &jti).await.unwrap();
    assert_eq!(keys::revoked(&db).await.unwrap().len(), 1);
    let response = models().await;
    assert_eq!(response.status(), 401);
    assert_eq!(json_of(response).await["error"]["code"], "revoked_api_key");
    // Other keys of the account work.
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    assert_eq!(pending.await.unwrap().status(), 200);
}
