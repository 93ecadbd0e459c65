//! Plain answers: what is submitted, what comes back, and every way in which there is no answer.

use infera_protocol::bytes::Hash32;
use infera_runtime::jwt::Claims;
use infera_testkit::eventually;
use infera_wire::{convert, v1};
use serde_json::json;

use crate::support::{Column, DEADLINE, MODEL, WEIGHTS, World, answer, chat, id, json_of, node, prompt};

both!(
    a_question_gets_its_verified_answer,
    parameters_reach_the_nodes,
    every_failure_has_its_error,
    a_stop_string_is_not_shown,
    the_context_limits_what_is_generated,
    a_request_can_be_cancelled,
    models_are_listed,
    a_stopping_gateway_sends_its_clients_away,
    health_and_figures,
);

async fn a_question_gets_its_verified_answer(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    let checked = convert::submitted(&submitted).expect("what is submitted is valid");
    assert_eq!((checked.account.as_str(), checked.model.as_str(), checked.k), ("alice", MODEL, 3));
    assert_eq!(checked.deadline_ms - checked.submitted_at_ms, 120_000);
    assert!(!checked.stream && checked.salt != Hash32::ZERO);
    let request = &checked.request;
    assert_eq!((request.model_root, request.max_tokens), (WEIGHTS, 256));
    let messages = [infera_prompt::Message::new("user", "What is the capital of France?")];
    assert_eq!(request.prompt, prompt().render(&messages).unwrap());
    assert_eq!(request.sampling, infera_protocol::sampling::SamplingParams::default());

    world.net.answer(&submitted, "The capital of France is Paris.");
    let response = pending.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    let body = json_of(response).await;
    let uuid = id(&submitted);
    assert_eq!(body["id"], format!("chatcmpl-{uuid}"));
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert_eq!(body["created"], submitted.submitted_at_ms / 1000);
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(body["choices"][0]["message"]["content"], "The capital of France is Paris.");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let completion = answer("The capital of France is Paris.").len();
    let asked = request.prompt.len();
    let usage = json!({ "prompt_tokens": asked, "completion_tokens": completion, "total_tokens": asked + completion });
    assert_eq!(body["usage"], usage);
    assert_eq!(
        body["infera"],
        json!({
            "receipt": uuid,
            "receipt_url": format!("http://receipts.test/v1/receipts/{uuid}"),
            "verdict": "verified",
            "similarity": 1.0,
            "nodes": [node(2), node(1), node(3)],
            "delivered_by": node(2),
        })
    );
    assert!(world.net.more().is_empty(), "submitted once");
}

async fn parameters_reach_the_nodes(column: Column) {
    let mut world = World::new(column).await;
    let _pending = world.send(&chat(json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "frequency_penalty": 0.25, "presence_penalty": -1,
        "max_completion_tokens": 9, "stop": ["a", "b"], "seed": -2, "user": "u", "infera": { "bid_micro": 3 },
    })));
    let checked = convert::submitted(&world.net.next().await).unwrap();
    let sampling = infera_protocol::sampling::SamplingParams::new(0.5, 0.9, 7, 0.05, 0.25, -1.0).unwrap();
    assert_eq!(checked.request.sampling, sampling);
    assert_eq!((checked.request.max_tokens, checked.request.seed), (9, (-2_i64) as u64));
    assert_eq!((checked.request.stop, checked.bid_micro), (vec!["a".to_owned(), "b".to_owned()], 3));
}

async fn every_failure_has_its_error(column: Column) {
    let mut world = World::new(column).await;
    for (code, status) in
        [("no_quorum", 502), ("deadline", 504), ("cancelled", 499), ("no_nodes", 503), ("overloaded", 503)]
    {
        let pending = world.send(&chat(json!({})));
        let submitted = world.net.next().await;
        world.net.failed(&submitted, code);
        let response = pending.await.unwrap();
        assert_eq!(response.status(), status, "{code}");
        let body = json_of(response).await;
        assert_eq!((&body["error"]["code"], &body["error"]["type"]), (&json!(code), &json!("api_error")));
        assert!(body["error"]["message"].as_str().unwrap().contains("said the test"), "{body}");
    }
    for (code, status, kind) in [
        ("insufficient_quota", 429, "insufficient_quota"),
        ("model_not_found", 404, "invalid_request_error"),
        ("price_overflow", 400, "invalid_request_error"),
    ] {
        let pending = world.send(&chat(json!({})));
        let submitted = world.net.next().await;
        world.net.rejected(&submitted, code);
        let response = pending.await.unwrap();
        assert_eq!(response.status(), status, "{code}");
        let body = json_of(response).await;
        assert_eq!((&body["error"]["code"], &body["error"]["type"]), (&json!(code), &json!(kind)));
    }
}

async fn a_stop_string_is_not_shown(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({ "stop": ["Paris"] })));
    let submitted = world.net.next().await;
    let tokens = prompt().tokenizer().encode("It is Paris").unwrap();
    world.net.verified(&submitted, &tokens, v1::Finish::Stop);
    let body = json_of(pending.await.unwrap()).await;
    assert_eq!(body["choices"][0]["message"]["content"], "It is ");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["completion_tokens"], tokens.len());

    let pending = world.send(&chat(json!({ "max_tokens": 3 })));
    let submitted = world.net.next().await;
    world.net.verified(&submitted, &tokens[..3], v1::Finish::Length);
    assert_eq!(json_of(pending.await.unwrap()).await["choices"][0]["finish_reason"], "length");
}

async fn the_context_limits_what_is_generated(column: Column) {
    let mut world = World::new(column).await;
    let long =
        |words: usize| chat(json!({ "messages": [{ "role": "user", "content": "word ".repeat(words) }] }));
    let _pending = world.send(&long(1_900));
    let request = convert::submitted(&world.net.next().await).unwrap().request;
    assert_eq!(request.prompt.len() as u32 + request.max_tokens, 2_048, "the default is clipped");
    for (body, param) in [
        (long(2_100), "messages"),
        (long(200_000), "messages"),
        (chat(json!({ "max_tokens": 2_040 })), "max_tokens"),
        (chat(json!({ "max_tokens": 9_000 })), "max_tokens"),
    ] {
        let response = world.post(&body).send().await.unwrap();
        assert_eq!(response.status(), 400, "{param}");
        assert_eq!(json_of(response).await["error"]["param"], param);
    }
    assert!(world.net.more().is_empty());
}

async fn a_request_can_be_cancelled(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    let url = world.url(&format!("/v1/requests/chatcmpl-{}", id(&submitted)));
    let status = json_of(world.client.get(&url).bearer_auth(&world.key).send().await.unwrap()).await;
    assert_eq!((&status["status"], &status["object"]), (&json!("open"), &json!("request")));
    let stranger = world.files.key("bob").0;
    for request in [world.client.get(&url), world.client.delete(&url)] {
        let response = request.bearer_auth(&stranger).send().await.unwrap();
        assert_eq!(response.status(), 404, "another account's request is unknown");
    }
    let reader = Claims::new("alice", infera_gateway::keys::AUDIENCE, &["receipts"], 600);
    let reader = world.files.signer.issue(&reader).unwrap();
    let response = world.client.delete(&url).bearer_auth(&reader).send().await.unwrap();
    assert_eq!(response.status(), 403, "who may not ask may not cancel");
    assert_eq!(json_of(response).await["error"]["code"], "insufficient_scope");
    assert!(world.net.none_cancelled());
    for _ in 0..2 {
        let response = world.client.delete(&url).bearer_auth(&world.key).send().await.unwrap();
        assert_eq!(response.status(), 202);
        assert_eq!(json_of(response).await["status"], "cancelling");
    }
    let cancelled = world.net.next_cancelled().await;
    assert_eq!(
        (cancelled.request_id, cancelled.account.as_str()),
        (id(&submitted).as_bytes().to_vec(), "alice")
    );
    world.net.failed(&submitted, "cancelled");
    assert_eq!(pending.await.unwrap().status(), 499);
    let closed = eventually(DEADLINE, async || {
        let response = world.client.delete(&url).bearer_auth(&world.key).send().await.unwrap();
        (response.status() == 200).then_some(response)
    });
    assert_eq!(json_of(closed.await).await["status"], "failed");
    let bad =
        world.client.delete(world.url("/v1/requests/nonsense")).bearer_auth(&world.key).send().await.unwrap();
    assert_eq!(bad.status(), 400);
    assert_eq!(json_of(bad).await["error"]["param"], "id");
}

async fn models_are_listed(column: Column) {
    let world = World::new(column).await;
    let get = |path: &str| world.client.get(world.url(path)).bearer_auth(&world.key).send();
    let list = json_of(get("/v1/models").await.unwrap()).await;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!(MODEL)));
    let one = json_of(get(&format!("/v1/models/{MODEL}")).await.unwrap()).await;
    assert_eq!(one, list["data"][0]);
    assert_eq!((&one["object"], &one["owned_by"]), (&json!("model"), &json!("infera")));
    let unknown = get("/v1/models/org/gpt-99").await.unwrap();
    assert_eq!(unknown.status(), 404);
    assert_eq!(json_of(unknown).await["error"]["code"], "model_not_found");
    assert_eq!(world.client.get(world.url("/v1/models")).send().await.unwrap().status(), 401);
}

async fn a_stopping_gateway_sends_its_clients_away(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    world.gateway.stop().await.unwrap();
    let response = pending.await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(json_of(response).await["error"]["code"], "shutting_down");
    // Its client has no key to come back with, so nobody will read the answer.
    world.start().await;
    assert_eq!(world.net.next_cancelled().await.request_id, id(&submitted).as_bytes());
}

async fn health_and_figures(column: Column) {
    let mut world = World::new(column).await;
    let get = |path: &str| world.client.get(world.url(path)).send();
    assert_eq!(get("/livez").await.unwrap().status(), 200);
    let ready = eventually(DEADLINE, async || {
        let response = get("/readyz").await.unwrap();
        (response.status() == 200).then_some(response)
    });
    let ready = json_of(ready.await).await;
    assert_eq!(ready["checks"], json!({ "bus": "up", "database": "up", "kv": "up" }));
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    pending.await.unwrap();
    let figures = world.client.get(world.url("/metrics")).send().await.unwrap().text().await.unwrap();
    let has = |line: &str| assert!(figures.contains(line), "{line} is in {figures}");
    has(&format!(r#"infera_gateway_requests_total{{gen_ai_request_model="{MODEL}",outcome="verified"}} 1"#));
    has(&format!(
        r#"gen_ai_server_request_duration_seconds_count{{gen_ai_operation_name="chat",gen_ai_request_model="{MODEL}",outcome="verified"}} 1"#
    ));
    has("infera_gateway_waiting 0");
    assert!(!figures.contains("France"), "no prompt in figures");
}
