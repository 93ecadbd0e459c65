//! The same key and body are the same request: one charge, one answer, whatever happens in between.

use serde_json::json;

use crate::support::{Column, World, chat, id, json_of, spawn};

both!(
    a_repeat_gets_the_stored_answer,
    repeats_at_the_same_time_wait_for_one_request,
    a_restart_forgets_nothing,
    a_verdict_that_came_while_the_gateway_was_down_is_found,
    keys_belong_to_accounts_and_bodies,
    failures_are_repeated_too,
);

async fn a_repeat_gets_the_stored_answer(column: Column) {
    let mut world = World::new(column).await;
    let body = chat(json!({ "seed": 7 }));
    let first = spawn(world.post(&body).header("idempotency-key", "k1"));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    let first = json_of(first.await.unwrap()).await;
    // Another spelling of the same request.
    let spelled = chat(json!({ "seed": 7, "stream": false, "temperature": 1.0, "tools": null }));
    let second = json_of(world.post(&spelled).header("idempotency-key", "k1").send().await.unwrap()).await;
    assert_eq!(first, second);
    // The same question as a stream is another request.
    let streamed = chat(json!({ "seed": 7, "stream": true }));
    let response = world.post(&streamed).header("idempotency-key", "k1").send().await.unwrap();
    assert_eq!(response.status(), 422);
    assert!(world.net.more().is_empty(), "submitted once");
}

async fn repeats_at_the_same_time_wait_for_one_request(column: Column) {
    let mut world = World::new(column).await;
    let body = chat(json!({}));
    let all: Vec<_> = (0..8).map(|_| spawn(world.post(&body).header("idempotency-key", "k"))).collect();
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    for one in all {
        let response = one.await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(json_of(response).await["id"], format!("chatcmpl-{}", id(&submitted)));
    }
    assert!(world.net.more().is_empty(), "submitted once");
}

async fn a_restart_forgets_nothing(column: Column) {
    let mut world = World::new(column).await;
    let body = chat(json!({ "stop": ["!"] }));
    let first = spawn(world.post(&body).header("idempotency-key", "k"));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    let first = json_of(first.await.unwrap()).await;
    // The client gets its answer as the message comes; what a restart needs is the row, written with it.
    crate::support::closed(&world, id(&submitted)).await;
    world.restart().await;
    let second = json_of(world.post(&body).header("idempotency-key", "k").send().await.unwrap()).await;
    assert_eq!(first, second);
    assert!(world.net.more().is_empty());
}

async fn a_verdict_that_came_while_the_gateway_was_down_is_found(column: Column) {
    let mut world = World::new(column).await;
    let body = chat(json!({}));
    let first = spawn(world.post(&body).header("idempotency-key", "k"));
    let submitted = world.net.next().await;
    world.gateway.stop().await.unwrap();
    assert_eq!(first.await.unwrap().status(), 503);
    world.net.answer(&submitted, "Paris");
    world.start().await;
    // The new replica has another name than the one that the verdict is addressed to.
    let second = json_of(world.post(&body).header("idempotency-key", "k").send().await.unwrap()).await;
    assert_eq!(second["choices"][0]["message"]["content"], "Paris");
    assert_eq!(second["id"], format!("chatcmpl-{}", id(&submitted)));
    assert!(world.net.more().is_empty());
}

async fn keys_belong_to_accounts_and_bodies(column: Column) {
    let mut world = World::new(column).await;
    let first = spawn(world.post(&chat(json!({}))).header("idempotency-key", "k"));
    let alices = world.net.next().await;
    let other = world.post(&chat(json!({ "seed": 1 }))).header("idempotency-key", "k").send().await.unwrap();
    assert_eq!(other.status(), 422);
    let error = json_of(other).await;
    assert_eq!(error["error"]["code"], "idempotency_key_reused");
    assert_eq!(error["error"]["param"], "Idempotency-Key");
    let alice = std::mem::replace(&mut world.key, world.files.key("bob").0);
    let bob = spawn(world.post(&chat(json!({}))).header("idempotency-key", "k"));
    let bobs = world.net.next().await;
    assert_ne!(id(&alices), id(&bobs));
    assert_eq!((alices.account.as_str(), bobs.account.as_str()), ("alice", "bob"));
    world.net.answer(&alices, "for alice");
    world.net.answer(&bobs, "for bob");
    let text = |body: serde_json::Value| body["choices"][0]["message"]["content"].clone();
    assert_eq!(text(json_of(first.await.unwrap()).await), "for alice");
    assert_eq!(text(json_of(bob.await.unwrap()).await), "for bob");
    world.key = alice;
    // Without a key every request is its own.
    let _one = world.send(&chat(json!({})));
    let _two = world.send(&chat(json!({})));
    assert_ne!(id(&world.net.next().await), id(&world.net.next().await));
}

async fn failures_are_repeated_too(column: Column) {
    let mut world = World::new(column).await;
    let first = spawn(world.post(&chat(json!({}))).header("idempotency-key", "k"));
    let submitted = world.net.next().await;
    world.net.rejected(&submitted, "insufficient_quota");
    let first = first.await.unwrap();
    let second = world.post(&chat(json!({}))).header("idempotency-key", "k").send().await.unwrap();
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (429, 429));
    assert_eq!(json_of(first).await, json_of(second).await);
    assert!(world.net.more().is_empty());
}
