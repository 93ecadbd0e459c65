//! Streams: verified while they run, and what happens when they are not.

use infera_protocol::request::Finish;
use infera_wire::v1;
use serde_json::{Value, json};

use crate::sse::Sse;
use crate::support::{Column, World, answer, chat, id, json_of, node, prompt, spawn, verified};

both!(
    a_stream_shows_what_a_majority_produced,
    a_stream_without_deltas_is_the_verdicts_text,
    lost_deltas_only_delay,
    usage_comes_if_asked_for,
    a_contradiction_ends_with_an_error,
    another_verified_result_may_extend_the_stream,
    a_fast_stream_says_so,
    a_refusal_at_once_has_its_status,
    a_failure_in_mid_stream_is_an_event,
    silence_is_filled_with_comments,
    a_client_that_leaves_is_noticed,
    a_client_that_can_come_back_is_not_cancelled,
    a_repeat_joins_the_running_stream,
);

fn streamed(change: Value) -> Value {
    let mut body = chat(json!({ "stream": true }));
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

async fn a_stream_shows_what_a_majority_produced(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    assert!(submitted.stream);
    let tokens = answer("Paris is the capital.");
    let n = tokens.len() as u32;
    world.net.deltas(&submitted, &[(1, 1, 0, &tokens[..2]), (1, 2, 0, &[9]), (1, 3, 0, &tokens[..1])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    let head = sse.json().await;
    assert_eq!(
        (&head["object"], &head["choices"][0]["delta"]["role"]),
        (&json!("chat.completion.chunk"), &json!("assistant"))
    );
    assert_eq!(head.get("usage"), None);
    // Two of three have the first token, only one has the second.
    assert_eq!(sse.text().await, prompt().decode(&tokens[..1]));
    world.net.deltas(&submitted, &[(1, 3, 1, &tokens[1..4]), (1, 1, 2, &tokens[2..4])]);
    assert_eq!(sse.text().await, prompt().decode(&tokens[1..2]));
    assert_eq!(sse.text().await, prompt().decode(&tokens[2..4]));
    world.net.deltas(&submitted, &[(1, 1, 4, &tokens[4..]), (1, 3, n, &[5])]);
    world.net.answer(&submitted, "Paris is the capital.");
    assert_eq!(sse.text().await, prompt().decode(&tokens[4..]));
    let last = sse.json().await;
    assert_eq!(
        (&last["choices"][0]["delta"], &last["choices"][0]["finish_reason"]),
        (&json!({}), &json!("stop"))
    );
    assert_eq!(last["infera"]["receipt"], json!(id(&submitted)));
    assert_eq!(
        (&last["infera"]["verdict"], &last["infera"]["similarity"]),
        (&json!("verified"), &json!(1.0))
    );
    assert_eq!(last["infera"]["nodes"], json!([node(2), node(1), node(3)]));
    assert_eq!(sse.rest().await, ["[DONE]"]);
}

async fn a_stream_without_deltas_is_the_verdicts_text(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({ "stop": "cap" })));
    let submitted = world.net.next().await;
    let tokens = prompt().tokenizer().encode("Paris is the cap").unwrap();
    world.net.verified(&submitted, &tokens, v1::Finish::Stop);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    assert_eq!(sse.text().await, "Paris is the ");
    assert_eq!(sse.json().await["choices"][0]["finish_reason"], "stop");
    assert_eq!(sse.rest().await, ["[DONE]"]);
}

async fn lost_deltas_only_delay(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    let tokens = answer("one two three four");
    // The second message of every replica was lost.
    world
        .net
        .deltas(&submitted, &[(1, 1, 0, &tokens[..1]), (1, 2, 0, &tokens[..1]), (1, 3, 0, &tokens[..1])]);
    world
        .net
        .deltas(&submitted, &[(1, 1, 2, &tokens[2..]), (1, 2, 2, &tokens[2..]), (1, 3, 2, &tokens[2..])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    assert_eq!(sse.text().await, "one");
    world.net.answer(&submitted, "one two three four");
    assert_eq!(sse.text().await, " two three four");
    assert_eq!(sse.rest().await.len(), 2);
}

async fn usage_comes_if_asked_for(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({ "stream_options": { "include_usage": true } })));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    let mut sse = Sse::of(pending.await.unwrap()).await;
    for _ in 0..3 {
        let chunk = sse.json().await;
        assert_eq!((chunk.get("usage"), chunk["choices"].as_array().unwrap().len()), (Some(&Value::Null), 1));
    }
    let usage = sse.json().await;
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], answer("Paris").len());
    assert_eq!(sse.rest().await, ["[DONE]"]);
}

async fn a_contradiction_ends_with_an_error(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    let wrong = prompt().tokenizer().encode("Lyon").unwrap();
    world.net.deltas(&submitted, &[(1, 1, 0, &wrong), (1, 2, 0, &wrong)]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    assert_eq!(sse.text().await, "Lyon");
    world.net.answer(&submitted, "Paris");
    let error = sse.json().await;
    assert_eq!(error["error"]["code"], "stream_contradicted");
    assert!(error["error"]["message"].as_str().unwrap().contains(&id(&submitted).to_string()));
    assert!(sse.rest().await.is_empty(), "no [DONE] after an error");
}

async fn another_verified_result_may_extend_the_stream(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    let (first, second) = (answer("Paris."), answer("Paris, France."));
    world.net.deltas(&submitted, &[(1, 1, 0, &second[..2]), (1, 3, 0, &second[..2])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    assert_eq!(sse.text().await, "Paris,");
    let slot = |n: u8, tokens: &[u32]| json!({ "node": node(n), "reveal": { "output": { "tokens": tokens, "finish": Finish::Eos } } });
    let evidence = json!({ "slots": [slot(1, &second), slot(2, &first), slot(3, &second)] });
    let v1::verdict::Outcome::Verified(mut outcome) = verified(&submitted, &first, v1::Finish::Eos) else {
        panic!()
    };
    outcome.evidence = evidence.to_string().into_bytes();
    world.net.verdict(&submitted, v1::verdict::Outcome::Verified(outcome));
    assert_eq!(sse.text().await, " France.");
    let last = sse.json().await;
    assert_eq!(
        (&last["infera"]["delivered_by"], &last["infera"]["nodes"][0]),
        (&json!(node(1)), &json!(node(2)))
    );
    assert_eq!(sse.rest().await, ["[DONE]"]);
}

async fn a_fast_stream_says_so(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({ "infera": { "stream": "fast" } })));
    let submitted = world.net.next().await;
    let tokens = answer("Paris it is");
    world.net.deltas(&submitted, &[(1, 1, 0, &tokens[..1])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    let head = sse.json().await;
    assert_eq!((&head["infera"]["stream"], &head["infera"]["verdict"]), (&json!("fast"), &json!("pending")));
    assert_eq!(sse.text().await, "Paris");
    world.net.answer(&submitted, "Paris it is");
    assert_eq!(sse.text().await, " it is");
    let last = sse.json().await;
    assert_eq!((&last["infera"]["stream"], &last["infera"]["verdict"]), (&json!("fast"), &json!("verified")));
}

async fn a_refusal_at_once_has_its_status(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    world.net.rejected(&submitted, "insufficient_quota");
    let response = pending.await.unwrap();
    // A machine that is too busy for a second has sent the head already.
    if response.status() == 200 {
        let mut sse = Sse::of(response).await;
        sse.json().await;
        assert_eq!(sse.json().await["error"]["code"], "insufficient_quota");
        return;
    }
    assert_eq!(response.status(), 429);
    assert_eq!(json_of(response).await["error"]["code"], "insufficient_quota");
}

async fn a_failure_in_mid_stream_is_an_event(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    let tokens = answer("Paris");
    world.net.deltas(&submitted, &[(1, 1, 0, &tokens), (1, 2, 0, &tokens)]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    assert_eq!(sse.text().await, "Paris");
    world.net.failed(&submitted, "no_quorum");
    assert_eq!(sse.json().await["error"]["code"], "no_quorum");
    assert!(sse.rest().await.is_empty());
}

async fn silence_is_filled_with_comments(column: Column) {
    let mut world = World::with(column, |config| config.heartbeat_secs = 1).await;
    let pending = world.send(&streamed(json!({})));
    let submitted = world.net.next().await;
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    let comment = sse.block().await.unwrap();
    assert!(comment.starts_with(": "), "{comment}");
    world.net.answer(&submitted, "Paris");
    assert_eq!(sse.text().await, "Paris");
}

async fn a_client_that_leaves_is_noticed(column: Column) {
    let mut world = World::with(column, |config| config.heartbeat_secs = 1).await;
    for body in [streamed(json!({})), chat(json!({}))] {
        let pending = world.send(&body);
        let submitted = world.net.next().await;
        if body["stream"] == true {
            let mut sse = Sse::of(pending.await.unwrap()).await;
            sse.json().await;
            drop(sse);
        } else {
            pending.abort();
        }
        let cancelled = world.net.next_cancelled().await;
        assert_eq!(cancelled.request_id, id(&submitted).as_bytes(), "{body}");
    }
}

async fn a_client_that_can_come_back_is_not_cancelled(column: Column) {
    let mut world = World::with(column, |config| config.heartbeat_secs = 1).await;
    let body = streamed(json!({}));
    let pending = spawn(world.post(&body).header("idempotency-key", "k"));
    let submitted = world.net.next().await;
    let mut sse = Sse::of(pending.await.unwrap()).await;
    sse.json().await;
    drop(sse);
    let left = world.post(&chat(json!({}))).header("idempotency-key", "other");
    let second = spawn(left);
    let other = world.net.next().await;
    second.abort();
    world.net.answer(&submitted, "Paris");
    let again = world.post(&body).header("idempotency-key", "k").send().await.unwrap();
    let mut sse = Sse::of(again).await;
    assert_eq!(sse.json().await["id"], format!("chatcmpl-{}", id(&submitted)));
    assert_eq!(sse.text().await, "Paris");
    assert_eq!(sse.rest().await.len(), 2);
    world.net.answer(&other, "later");
    let again = world.post(&chat(json!({}))).header("idempotency-key", "other").send().await.unwrap();
    assert_eq!(json_of(again).await["choices"][0]["message"]["content"], "later");
    assert!(world.net.more().is_empty() && world.net.none_cancelled());
}

async fn a_repeat_joins_the_running_stream(column: Column) {
    let mut world = World::new(column).await;
    let body = streamed(json!({}));
    let first = spawn(world.post(&body).header("idempotency-key", "k"));
    let submitted = world.net.next().await;
    let tokens = answer("one two");
    world.net.deltas(&submitted, &[(1, 1, 0, &tokens[..1]), (1, 2, 0, &tokens[..1])]);
    let mut first = Sse::of(first.await.unwrap()).await;
    first.json().await;
    assert_eq!(first.text().await, "one");
    let mut second = Sse::of(world.post(&body).header("idempotency-key", "k").send().await.unwrap()).await;
    second.json().await;
    assert_eq!(second.text().await, "one");
    world.net.answer(&submitted, "one two");
    for mut sse in [first, second] {
        assert_eq!(sse.text().await, " two");
        assert_eq!(sse.rest().await.len(), 2);
    }
    assert!(world.net.more().is_empty());
}
