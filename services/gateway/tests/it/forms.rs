//! Several answers, log-probabilities, and answers of a given form.

use infera_protocol::grammar::GrammarKind;
use infera_protocol::ids::choice_id;
use infera_protocol::request::choice_seed;
use infera_wire::{convert, v1};
use serde_json::{Value, json};

use crate::sse::Sse;
use crate::support::{Column, World, answer, chat, closed, id, json_of, prompt, spawn};

both!(
    a_grammar_reaches_the_nodes,
    what_no_answer_can_keep_to_is_refused,
    several_answers_are_requests_of_their_own,
    one_failure_of_several_is_the_answer,
    several_answers_are_repeated,
    several_answers_count_as_several_requests,
    several_streams_carry_their_index,
    log_probabilities_come_from_the_verified_result,
    a_stream_tells_them_at_its_end,
);

async fn a_grammar_reaches_the_nodes(column: Column) {
    let mut world = World::new(column).await;
    let text = r#"{"type":"object","properties":{"zebra":{"type":"integer"},"apple":{"type":"null"}}}"#;
    let schema: Value = serde_json::from_str(text).unwrap();
    let pending = world.send(&chat(json!({
        "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } },
        "logit_bias": { "49151": -100, "7": 1.5 },
    })));
    let submitted = world.net.next().await;
    let request = convert::submitted(&submitted).unwrap().request;
    let grammar = request.grammar.unwrap();
    assert_eq!((grammar.kind, grammar.text.as_str()), (GrammarKind::JsonSchema, text), "in its own order");
    assert_eq!(request.sampling.logit_bias, [(7, 1.5), (49_151, -100.0)].into());
    let tokens = prompt().tokenizer().encode(r#"{"zebra": 1, "apple": null}"#).unwrap();
    world.net.verified(&submitted, &tokens, v1::Finish::Grammar);
    let body = json_of(pending.await.unwrap()).await;
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["message"]["content"], r#"{"zebra": 1, "apple": null}"#);

    for (change, kind, text) in [
        (json!({ "guided_regex": "a+" }), GrammarKind::Regex, "a+"),
        (
            json!({ "response_format": { "type": "json_object" } }),
            GrammarKind::JsonSchema,
            r#"{"type":"object"}"#,
        ),
    ] {
        let _pending = world.send(&chat(change));
        let grammar = convert::submitted(&world.net.next().await).unwrap().request.grammar.unwrap();
        assert_eq!((grammar.kind, grammar.text.as_str()), (kind, text));
    }
}

async fn what_no_answer_can_keep_to_is_refused(column: Column) {
    let mut world = World::new(column).await;
    let format = |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } });
    let deep = (0..25).fold(json!({}), |inner, _| json!({ "items": inner }));
    let schema = "response_format.json_schema.schema";
    for (change, param, reason) in [
        (json!({ "guided_regex": "(" }), "guided_regex", "unclosed group"),
        (json!({ "guided_regex": "(?=a)b" }), "guided_regex", "look-around"),
        (json!({ "guided_regex": "(?:)" }), "guided_regex", "empty answer"),
        (json!({ "structured_outputs": { "regex": "a\\" } }), "structured_outputs.regex", "backslash"),
        (json!({ "guided_json": "{" }), "guided_json", "not JSON"),
        (json!({ "guided_json": "[]" }), "guided_json", "must be an object"),
        (format(json!({ "type": "king" })), schema, "king"),
        (format(json!({ "type": "integer", "minimum": 2, "maximum": 1 })), schema, "nsatisfiable"),
        (format(json!({ "not": {} })), schema, "not"),
        (format(json!({ "x-guidance": {} })), schema, "x-guidance"),
        (format(json!({ "$ref": "#/$defs/none" })), schema, ""),
        (format(deep), schema, "levels deep"),
        (json!({ "logit_bias": { "49152": 1 } }), "logit_bias", "0 to 49151"),
    ] {
        let response = world.post(&chat(change.clone())).send().await.unwrap();
        assert_eq!(response.status(), 400, "{change}");
        let body = json_of(response).await;
        let error = &body["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!("invalid_value"), &json!(param)), "{body}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(param) && message.contains(reason), "{message}");
    }
    assert!(world.net.more().is_empty(), "nothing of this is submitted");
}

/// The submissions of one request for several answers, in the order of their indices.
async fn submissions(world: &mut World, n: u32) -> Vec<v1::RequestSubmitted> {
    let mut all = Vec::new();
    for _ in 0..n {
        all.push(world.net.next().await);
    }
    let of = |index: u32| {
        let is = |one: &&v1::RequestSubmitted| {
            let first =
                all.iter().find(|first| (1..n).all(|i| all.iter().any(|o| id(o) == choice_id(id(first), i))));
            id(one) == choice_id(id(first.expect("one of them is the first")), index)
        };
        all.iter().find(is).unwrap().clone()
    };
    (0..n).map(of).collect()
}

async fn several_answers_are_requests_of_their_own(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({ "n": 3, "seed": 42 })));
    let all = submissions(&mut world, 3).await;
    let requests: Vec<_> = all.iter().map(|one| convert::submitted(one).unwrap().request).collect();
    for (index, request) in (0..).zip(&requests) {
        assert_eq!(request.seed, choice_seed(42, index));
        assert_eq!((&request.prompt, request.max_tokens), (&requests[0].prompt, requests[0].max_tokens));
    }
    // The last one's verdict comes first.
    for (one, text) in all.iter().zip(["Paris", "Paris!", "It is Paris"]).rev() {
        world.net.answer(one, text);
    }
    let body = json_of(pending.await.unwrap()).await;
    assert_eq!(body["id"], format!("chatcmpl-{}", id(&all[0])));
    let choices = body["choices"].as_array().unwrap();
    let shown: Vec<_> =
        choices.iter().map(|c| (&c["index"], c["message"]["content"].as_str().unwrap())).collect();
    assert_eq!(shown, [(&json!(0), "Paris"), (&json!(1), "Paris!"), (&json!(2), "It is Paris")]);
    let receipts: Vec<_> =
        body["infera"]["choices"].as_array().unwrap().iter().map(|c| c["receipt"].clone()).collect();
    assert_eq!(receipts, all.iter().map(|one| json!(id(one))).collect::<Vec<_>>());
    assert_eq!(body["infera"]["receipt"], receipts[0]);
    let completion: usize = ["Paris", "Paris!", "It is Paris"].iter().map(|text| answer(text).len()).sum();
    let asked = 3 * requests[0].prompt.len();
    assert_eq!(
        body["usage"],
        json!({ "prompt_tokens": asked, "completion_tokens": completion, "total_tokens": asked + completion })
    );
    assert!(world.net.more().is_empty() && world.net.none_cancelled());
}

async fn one_failure_of_several_is_the_answer(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({ "n": 2 })));
    let all = submissions(&mut world, 2).await;
    world.net.rejected(&all[1], "insufficient_quota");
    let response = pending.await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(json_of(response).await["error"]["code"], "insufficient_quota");
    // The other one is worth nothing alone.
    assert_eq!(world.net.next_cancelled().await.request_id, id(&all[0]).as_bytes());
    assert!(world.net.none_cancelled(), "what is closed is not cancelled");
    // A client that leaves takes all of them back.
    let pending = world.send(&chat(json!({ "n": 2 })));
    let all = submissions(&mut world, 2).await;
    pending.abort();
    let mut cancelled =
        [world.net.next_cancelled().await.request_id, world.net.next_cancelled().await.request_id];
    cancelled.sort();
    let mut expected = [id(&all[0]).as_bytes().to_vec(), id(&all[1]).as_bytes().to_vec()];
    expected.sort();
    assert_eq!(cancelled, expected);
}

async fn several_answers_are_repeated(column: Column) {
    let mut world = World::new(column).await;
    let body = chat(json!({ "n": 2, "logprobs": true }));
    let first = spawn(world.post(&body).header("idempotency-key", "k"));
    let all = submissions(&mut world, 2).await;
    for (one, text) in all.iter().zip(["Paris", "Lyon"]) {
        world.net.answer(one, text);
    }
    let first = json_of(first.await.unwrap()).await;
    for one in &all {
        closed(&world, id(one)).await;
    }
    world.restart().await;
    let second = json_of(world.post(&body).header("idempotency-key", "k").send().await.unwrap()).await;
    assert_eq!(first, second);
    assert_eq!(second["choices"][1]["message"]["content"], "Lyon");
    let other = chat(json!({ "n": 1, "logprobs": true }));
    assert_eq!(world.post(&other).header("idempotency-key", "k").send().await.unwrap().status(), 422);
    assert!(world.net.more().is_empty(), "submitted once");
}

async fn several_answers_count_as_several_requests(column: Column) {
    let world = World::with(column, |config| config.requests_per_minute = 6).await;
    // Counted as one and then as seven more, of which each is in one minute.
    let response = world.post(&chat(json!({ "n": 8 }))).send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(json_of(response).await["error"]["code"], "rate_limit_exceeded");
}

async fn several_streams_carry_their_index(column: Column) {
    let mut world = World::new(column).await;
    let body = json!({ "n": 2, "stream": true, "stream_options": { "include_usage": true } });
    let pending = world.send(&chat(body));
    let all = submissions(&mut world, 2).await;
    let (one, two) = (answer("Paris it is"), answer("Lyon"));
    world.net.deltas(&all[1], &[(1, 1, 0, &two[..1]), (1, 2, 0, &two[..1])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    for index in 0..2 {
        let head = sse.json().await;
        assert_eq!(
            (&head["choices"][0]["index"], &head["choices"][0]["delta"]["role"]),
            (&json!(index), &json!("assistant"))
        );
    }
    let event = sse.json().await;
    assert_eq!(event["choices"][0]["index"], 1);
    world.net.answer(&all[1], "Lyon");
    let mut texts = [String::new(), event["choices"][0]["delta"]["content"].as_str().unwrap().to_owned()];
    let mut ended = Vec::new();
    while ended.len() < 2 {
        let event = sse.json().await;
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        assert!(!ended.contains(&index), "nothing after its end: {event}");
        if choice["finish_reason"] == "stop" {
            assert_eq!(event["infera"]["receipt"], json!(id(&all[index])));
            ended.push(index);
            if ended.len() == 1 {
                world.net.answer(&all[0], "Paris it is");
            }
            continue;
        }
        texts[index].push_str(choice["delta"]["content"].as_str().unwrap());
    }
    assert_eq!((texts, ended), (["Paris it is".to_owned(), "Lyon".to_owned()], vec![1, 0]));
    let usage = sse.json().await;
    assert_eq!(
        (&usage["choices"], &usage["usage"]["completion_tokens"]),
        (&json!([]), &json!(one.len() + two.len()))
    );
    assert_eq!(sse.rest().await, ["[DONE]"]);
}

/// What `logprobs` must be for these tokens, by the fingerprints of the support module.
fn expected(tokens: &[u32], top: usize) -> Value {
    let tokenizer = prompt().tokenizer();
    let entry = |token: u32, logprob: f64| {
        let bytes = tokenizer.token_bytes(token);
        json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
    };
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let end = prompt().end_tokens()[0];
            let name = json!({ "token": tokenizer.name(end), "logprob": -8.0, "bytes": null });
            let all = [entry(token + 1, -0.5), entry(*token, -1.5), name];
            let mut value = entry(*token, -1.5);
            value["top_logprobs"] = all[..top].into();
            value
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

async fn log_probabilities_come_from_the_verified_result(column: Column) {
    let mut world = World::new(column).await;
    let tokens = answer("Paris is nice");
    for top in 0..=3 {
        let pending = world.send(&chat(json!({ "logprobs": true, "top_logprobs": top })));
        let submitted = world.net.next().await;
        world.net.verified(&submitted, &tokens, v1::Finish::Eos);
        let body = json_of(pending.await.unwrap()).await;
        // The end token is no part of the text.
        assert_eq!(body["choices"][0]["logprobs"], expected(&tokens[..tokens.len() - 1], top));
    }
    // What a stop string cuts off is not told.
    let pending = world.send(&chat(json!({ "logprobs": true, "top_logprobs": 1, "stop": " is" })));
    let submitted = world.net.next().await;
    let cut = prompt().tokenizer().encode("Paris is").unwrap();
    world.net.verified(&submitted, &cut, v1::Finish::Stop);
    let body = json_of(pending.await.unwrap()).await;
    assert_eq!(body["choices"][0]["message"]["content"], "Paris");
    assert_eq!(body["choices"][0]["logprobs"], expected(&cut[..1], 1));
    // Not asked for, not told.
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    world.net.verified(&submitted, &tokens, v1::Finish::Eos);
    assert_eq!(json_of(pending.await.unwrap()).await["choices"][0]["logprobs"], Value::Null);
}

async fn a_stream_tells_them_at_its_end(column: Column) {
    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({ "stream": true, "logprobs": true, "top_logprobs": 2 })));
    let submitted = world.net.next().await;
    let tokens = answer("Paris is nice");
    world.net.deltas(&submitted, &[(1, 1, 0, &tokens[..1]), (1, 2, 0, &tokens[..1])]);
    let mut sse = Sse::of(pending.await.unwrap()).await;
    assert_eq!(sse.json().await["choices"][0]["logprobs"], Value::Null);
    assert_eq!(sse.text().await, "Paris");
    world.net.verified(&submitted, &tokens, v1::Finish::Eos);
    assert_eq!(sse.text().await, " is nice");
    let last = sse.json().await;
    assert_eq!(last["choices"][0]["logprobs"], expected(&tokens[..tokens.len() - 1], 2));
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
}
