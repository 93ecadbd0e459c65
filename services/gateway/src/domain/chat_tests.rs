use super::*;
use proptest::prelude::*;
use serde_json::json;

fn parse(value: &Value) -> Result<ChatRequest, Refusal> {
    ChatRequest::parse(value.to_string().as_bytes())
}

/// A good request with some fields replaced or added.
fn with(change: Value) -> Value {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    let Value::Object(change) = change else { panic!("an object") };
    body.as_object_mut().unwrap().extend(change);
    body
}

#[test]
fn a_bare_request_has_openais_defaults() {
    let chat = parse(&with(json!({}))).unwrap();
    assert_eq!(chat.messages, [Message::new("user", "hi")]);
    assert_eq!(chat.sampling, SamplingParams::default());
    assert_eq!(
        (chat.max_tokens, chat.seed, chat.stream, chat.fast, chat.bid_micro),
        (None, None, false, false, 0)
    );
}

#[test]
fn everything_that_is_served_is_read() {
    let chat = parse(&with(json!({
        "messages": [
            { "role": "developer", "content": "be brief" },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": "c", "refusal": null, "annotations": [], "tool_calls": null },
        ],
        "temperature": 0, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "frequency_penalty": 1, "presence_penalty": -1,
        "max_completion_tokens": 7, "stop": "END", "seed": -1, "stream": true,
        "stream_options": { "include_usage": true }, "infera": { "stream": "fast", "bid_micro": 12 },
        "user": "u", "metadata": {}, "store": false, "service_tier": "auto", "n": 1, "logprobs": false, "tools": [],
        "response_format": { "type": "text" }, "logit_bias": null,
    })))
    .unwrap();
    let roles: Vec<_> = chat.messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
    assert_eq!(roles, [("system", "be brief"), ("user", "ab"), ("assistant", "c")]);
    assert_eq!(chat.sampling, SamplingParams::new(0.0, 0.5, 5, 0.1, 1.0, -1.0).unwrap());
    assert_eq!((chat.max_tokens, chat.stop, chat.seed), (Some(7), vec!["END".to_owned()], Some(u64::MAX)));
    assert!(chat.stream && chat.include_usage && chat.fast);
    assert_eq!(chat.bid_micro, 12);
}

#[test]
fn what_is_wrong_is_named() {
    for (change, code, param) in [
        (json!({ "messages": [] }), "invalid_value", "messages"),
        (json!({ "messages": null }), "missing_required_parameter", "messages"),
        (json!({ "messages": "hi" }), "invalid_type", "messages"),
        (json!({ "messages": ["hi"] }), "invalid_type", "messages[0]"),
        (json!({ "messages": [{ "content": "x" }] }), "missing_required_parameter", "messages[0].role"),
        (json!({ "messages": [{ "role": "king", "content": "x" }] }), "invalid_value", "messages[0].role"),
        (
            json!({ "messages": [{ "role": "tool", "content": "x" }] }),
            "unsupported_value",
            "messages[0].role",
        ),
        (json!({ "messages": [{ "role": "user" }] }), "missing_required_parameter", "messages[0].content"),
        (json!({ "messages": [{ "role": "user", "content": 5 }] }), "invalid_type", "messages[0].content"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }] }),
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "x", "name": "bob" }] }),
            "unsupported_parameter",
            "messages[0].name",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "x", "y": 1 }] }),
            "unknown_parameter",
            "messages[0].y",
        ),
        (json!({ "model": null }), "missing_required_parameter", "model"),
        (json!({ "model": 7 }), "invalid_type", "model"),
        (json!({ "temperature": "hot" }), "invalid_type", "temperature"),
        (json!({ "temperature": 2.5 }), "invalid_value", "temperature"),
        (json!({ "temperature": 1e300 }), "invalid_value", "temperature"),
        (json!({ "top_p": 0 }), "invalid_value", "top_p"),
        (json!({ "top_k": 65 }), "invalid_value", "top_k"),
        (json!({ "top_k": 1.5 }), "invalid_type", "top_k"),
        (json!({ "min_p": 1.5 }), "invalid_value", "min_p"),
        (json!({ "frequency_penalty": 3 }), "invalid_value", "frequency_penalty"),
        (json!({ "presence_penalty": -3 }), "invalid_value", "presence_penalty"),
        (json!({ "max_tokens": 0 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": -5 }), "invalid_value", "max_tokens"),
        (json!({ "max_tokens": "5" }), "invalid_type", "max_tokens"),
        (json!({ "max_tokens": 5, "max_completion_tokens": 6 }), "invalid_value", "max_tokens"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "invalid_value", "stop"),
        (json!({ "stop": "" }), "invalid_value", "stop"),
        (json!({ "stop": [1] }), "invalid_type", "stop"),
        (json!({ "seed": 1.5 }), "invalid_type", "seed"),
        (json!({ "stream": "yes" }), "invalid_type", "stream"),
        (json!({ "stream_options": { "include_usage": true } }), "invalid_value", "stream_options"),
        (json!({ "stream": true, "stream_options": { "x": 1 } }), "unknown_parameter", "stream_options.x"),
        (json!({ "infera": { "stream": "fast" } }), "invalid_value", "infera.stream"),
        (json!({ "infera": { "speed": 1 } }), "unknown_parameter", "infera.speed"),
        (json!({ "infera": { "bid_micro": -1 } }), "invalid_value", "infera.bid_micro"),
        (json!({ "infera": [] }), "invalid_type", "infera"),
        (json!({ "user": 5 }), "invalid_type", "user"),
        (json!({ "tools": [{ "type": "function" }] }), "unsupported_parameter", "tools"),
        (json!({ "functions": [{}] }), "unsupported_parameter", "functions"),
        (json!({ "audio": {} }), "unsupported_parameter", "audio"),
        (json!({ "modalities": ["text", "audio"] }), "unsupported_parameter", "modalities"),
        (json!({ "prediction": {} }), "unsupported_parameter", "prediction"),
        (json!({ "reasoning_effort": "low" }), "unsupported_parameter", "reasoning_effort"),
        (json!({ "temprature": 1 }), "unknown_parameter", "temprature"),
        (json!({ "nonsense": null }), "unknown_parameter", "nonsense"),
    ] {
        let refusal = parse(&with(change.clone())).expect_err(&change.to_string());
        assert_eq!((refusal.code, refusal.param.as_deref()), (code, Some(param)), "{change}: {refusal}");
        assert!(refusal.message.contains(param), "{change}: the message names the field: {refusal}");
    }
}

#[test]
fn what_is_no_json_is_refused() {
    for body in ["", "{", "[]", "7", "{\"model\": }", "\u{feff}{}"] {
        let refusal = ChatRequest::parse(body.as_bytes()).unwrap_err();
        assert_eq!((refusal.code, refusal.param), ("invalid_json", None), "{body}");
    }
    let deep = format!("{{\"model\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(ChatRequest::parse(deep.as_bytes()).unwrap_err().message.contains("deeper than 32"));
    // Brackets inside a text are text.
    let text = with(json!({ "messages": [{ "role": "user", "content": "[{\\\"".repeat(100) }] }));
    assert!(parse(&text).is_ok());
}

proptest! {
    #[test]
    fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = ChatRequest::parse(&body);
    }

    #[test]
    fn any_text_is_kept_as_it_is(text in ".*") {
        let body = with(json!({ "messages": [{ "role": "user", "content": text }] }));
        prop_assert_eq!(&parse(&body).unwrap().messages[0].content, &text);
    }
}
