use infera_protocol::grammar::{Grammar, GrammarKind};
use serde_json::{Value, json};

use crate::domain::Refusal;
use crate::domain::chat::ChatRequest;

fn parse(change: &Value) -> Result<ChatRequest, Refusal> {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    ChatRequest::parse(body.to_string().as_bytes())
}

fn schema(text: &str) -> Option<Grammar> {
    Some(Grammar { kind: GrammarKind::JsonSchema, text: text.into() })
}

fn regex(text: &str) -> Option<Grammar> {
    Some(Grammar { kind: GrammarKind::Regex, text: text.into() })
}

#[test]
fn every_way_to_ask_for_a_form_is_read() {
    let object = r#"{"type":"object"}"#;
    for (change, param, grammar) in [
        (json!({}), "", None),
        (json!({ "response_format": null, "guided_json": null, "structured_outputs": null }), "", None),
        (json!({ "response_format": { "type": "text" } }), "", None),
        (json!({ "structured_outputs": {} }), "", None),
        (json!({ "structured_outputs": { "json_object": false, "regex": null } }), "", None),
        (json!({ "response_format": { "type": "json_object" } }), "response_format", schema(object)),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": {
                "name": "x", "description": "d", "strict": true, "schema": { "zebra": 1, "apple": 2 } } } }),
            "response_format.json_schema.schema",
            // In the order of the body: it is the order of the answer.
            schema(r#"{"zebra":1,"apple":2}"#),
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "strict": null } } }),
            "response_format.json_schema.schema",
            schema(object),
        ),
        (json!({ "guided_json": { "type": "object" } }), "guided_json", schema(object)),
        (json!({ "guided_json": object }), "guided_json", schema(object)),
        (json!({ "guided_regex": "a+" }), "guided_regex", regex("a+")),
        (json!({ "guided_choice": ["a.b", "é c"] }), "guided_choice", regex(r"(?:a\.b|é c)")),
        (json!({ "structured_outputs": { "regex": "a+" } }), "structured_outputs.regex", regex("a+")),
        (
            json!({ "structured_outputs": { "choice": ["x", "y"], "json": null } }),
            "structured_outputs.choice",
            regex("(?:x|y)"),
        ),
        (json!({ "structured_outputs": { "json": {} } }), "structured_outputs.json", schema("{}")),
        (
            json!({ "structured_outputs": { "json_object": true } }),
            "structured_outputs.json_object",
            schema(object),
        ),
    ] {
        let form = parse(&change).unwrap_or_else(|e| panic!("{change}: {e}")).form;
        let got = form.map(|form| (form.param, form.grammar));
        assert_eq!(got, grammar.map(|grammar| (param.to_owned(), grammar)), "{change}");
    }
}

#[test]
fn where_a_form_came_from_does_not_change_the_request() {
    let hashed = |change: Value| serde_json::to_string(&parse(&change).unwrap()).unwrap();
    let one = hashed(json!({ "guided_regex": "a+" }));
    assert_eq!(one, hashed(json!({ "structured_outputs": { "regex": "a+" } })));
    assert_ne!(one, hashed(json!({ "guided_regex": "b+" })));
    // What was not asked for leaves no trace, so that repeats of earlier requests are still equal.
    let plain = hashed(json!({}));
    assert_eq!(plain, hashed(json!({ "n": 1, "logprobs": false, "top_logprobs": 0, "logit_bias": {} })));
    for name in ["form", "\"n\"", "logprobs", "logit_bias"] {
        assert!(!plain.contains(name), "{plain}");
    }
}

#[test]
fn bias_choices_and_logprobs_are_read() {
    let chat = parse(
        &json!({ "logit_bias": { "5": -100, "70000": 0.5 }, "n": 8, "logprobs": true, "top_logprobs": 8 }),
    );
    let chat = chat.unwrap();
    assert_eq!(chat.sampling.logit_bias, [(5, -100.0), (70_000, 0.5)].into());
    assert_eq!((chat.n, chat.logprobs), (8, Some(8)));
    assert_eq!(parse(&json!({ "logprobs": true })).unwrap().logprobs, Some(0));
    assert_eq!(parse(&json!({ "logprobs": true, "top_logprobs": null })).unwrap().logprobs, Some(0));
    assert_eq!(parse(&json!({ "top_logprobs": 0 })).unwrap().logprobs, None);
}

#[test]
fn what_is_wrong_is_named() {
    let many: serde_json::Map<String, Value> = (0..301).map(|t| (t.to_string(), json!(1))).collect();
    let large = json!({ "description": "x".repeat(17_000) });
    let format = |value: Value| json!({ "response_format": { "type": "json_schema", "json_schema": value } });
    for (change, code, param) in [
        (json!({ "logit_bias": [] }), "invalid_type", "logit_bias"),
        (json!({ "logit_bias": many }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "x": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "-1": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "007": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "4294967296": 1 } }), "invalid_value", "logit_bias"),
        (json!({ "logit_bias": { "5": "1" } }), "invalid_type", "logit_bias.5"),
        (json!({ "logit_bias": { "5": 101 } }), "invalid_value", "logit_bias.5"),
        (json!({ "n": 0 }), "invalid_value", "n"),
        (json!({ "n": 9 }), "invalid_value", "n"),
        (json!({ "n": -1 }), "invalid_value", "n"),
        (json!({ "n": "1" }), "invalid_type", "n"),
        (json!({ "n": 1.5 }), "invalid_type", "n"),
        (json!({ "logprobs": 1 }), "invalid_type", "logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 9 }), "invalid_value", "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": -1 }), "invalid_value", "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": "3" }), "invalid_type", "top_logprobs"),
        (json!({ "top_logprobs": 3 }), "invalid_value", "top_logprobs"),
        (json!({ "response_format": "json" }), "invalid_type", "response_format"),
        (json!({ "response_format": {} }), "missing_required_parameter", "response_format.type"),
        (json!({ "response_format": { "type": 5 } }), "invalid_type", "response_format.type"),
        (json!({ "response_format": { "type": "xml" } }), "invalid_value", "response_format.type"),
        (
            json!({ "response_format": { "type": "json_object", "json_schema": {} } }),
            "unknown_parameter",
            "response_format.json_schema",
        ),
        (
            json!({ "response_format": { "type": "json_schema" } }),
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (format(json!([])), "invalid_type", "response_format.json_schema"),
        (format(json!({ "schema": {} })), "missing_required_parameter", "response_format.json_schema.name"),
        (format(json!({ "name": 5 })), "invalid_type", "response_format.json_schema.name"),
        (format(json!({ "name": "a b" })), "invalid_value", "response_format.json_schema.name"),
        (format(json!({ "name": "x".repeat(65) })), "invalid_value", "response_format.json_schema.name"),
        (format(json!({ "name": "x", "strict": 1 })), "invalid_type", "response_format.json_schema.strict"),
        (
            format(json!({ "name": "x", "description": 1 })),
            "invalid_type",
            "response_format.json_schema.description",
        ),
        (
            format(json!({ "name": "x", "schema": "{}" })),
            "invalid_type",
            "response_format.json_schema.schema",
        ),
        (format(json!({ "name": "x", "y": 1 })), "unknown_parameter", "response_format.json_schema.y"),
        (
            format(json!({ "name": "x", "schema": large })),
            "invalid_value",
            "response_format.json_schema.schema",
        ),
        (json!({ "guided_json": 5 }), "invalid_type", "guided_json"),
        (json!({ "guided_json": "" }), "invalid_value", "guided_json"),
        (json!({ "guided_regex": ["a"] }), "invalid_type", "guided_regex"),
        (json!({ "guided_regex": "" }), "invalid_value", "guided_regex"),
        (json!({ "guided_regex": "a".repeat(16_385) }), "invalid_value", "guided_regex"),
        (json!({ "guided_choice": [] }), "invalid_type", "guided_choice"),
        (json!({ "guided_choice": ["a", ""] }), "invalid_type", "guided_choice"),
        (json!({ "guided_choice": vec!["a"; 257] }), "invalid_type", "guided_choice"),
        (json!({ "guided_choice": "a" }), "invalid_type", "guided_choice"),
        (json!({ "guided_grammar": "root ::= x" }), "unsupported_parameter", "guided_grammar"),
        (json!({ "structured_outputs": "a" }), "invalid_type", "structured_outputs"),
        (json!({ "structured_outputs": { "x": 1 } }), "unknown_parameter", "structured_outputs.x"),
        (
            json!({ "structured_outputs": { "grammar": "x" } }),
            "unsupported_parameter",
            "structured_outputs.grammar",
        ),
        (
            json!({ "structured_outputs": { "json_object": 1 } }),
            "invalid_type",
            "structured_outputs.json_object",
        ),
        (
            json!({ "structured_outputs": { "regex": "a", "choice": ["a"] } }),
            "invalid_value",
            "structured_outputs",
        ),
        (
            json!({ "response_format": { "type": "json_object" }, "guided_regex": "a" }),
            "invalid_value",
            "guided_regex",
        ),
        (json!({ "repetition_penalty": 1.1 }), "unsupported_parameter", "repetition_penalty"),
    ] {
        let refusal = parse(&change).expect_err(&change.to_string()[..change.to_string().len().min(90)]);
        assert_eq!((refusal.code, refusal.param.as_deref()), (code, Some(param)), "{refusal}");
        assert!(refusal.message.contains(param), "the message names the field: {refusal}");
        assert!(refusal.message.len() < 300, "{refusal}");
    }
}
