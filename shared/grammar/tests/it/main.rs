#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

//! Grammars over the real model's tokens.

use std::sync::OnceLock;

use infera_grammar::{GrammarError, LIBRARY, MAX_SCHEMA_DEPTH, Matcher, Vocabulary};
use infera_prompt::Tokenizer;
use infera_protocol::grammar::{Grammar, GrammarKind, MAX_GRAMMAR_BYTES};
use infera_protocol::request::Finish;
use infera_testkit::model_path;
use proptest::prelude::*;
use serde_json::json;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::from_gguf(&model_path()).unwrap())
}

fn vocabulary() -> &'static Vocabulary {
    static VOCABULARY: OnceLock<Vocabulary> = OnceLock::new();
    VOCABULARY.get_or_init(|| Vocabulary::new(tokenizer(), tokenizer().end_tokens()).unwrap())
}

fn regex(text: &str) -> Grammar {
    Grammar { kind: GrammarKind::Regex, text: text.into() }
}

fn schema(value: serde_json::Value) -> Grammar {
    Grammar { kind: GrammarKind::JsonSchema, text: value.to_string() }
}

fn tokens(text: &str) -> Vec<u32> {
    tokenizer().encode(text).unwrap()
}

/// One token for each byte: the cut that no tokenizer makes.
fn bytes(text: &str) -> Vec<u32> {
    let single = |b: u8| (0..tokenizer().vocab_size() as u32).find(|t| tokenizer().token_bytes(*t) == [b]);
    text.bytes().map(|b| single(b).unwrap()).collect()
}

fn end() -> u32 {
    tokenizer().end_tokens()[0]
}

fn after(grammar: &Grammar, text: &str) -> Matcher {
    let mut matcher = vocabulary().compile(grammar).unwrap();
    for token in tokens(text) {
        assert!(matcher.allows(token).unwrap(), "{text}");
        matcher.push(token).unwrap();
    }
    matcher
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let deep = (0..MAX_SCHEMA_DEPTH).fold(json!({}), |inner, _| json!({ "not": inner }));
    for (grammar, reason) in [
        (regex(""), "0 bytes"),
        (regex(&"a".repeat(MAX_GRAMMAR_BYTES + 1)), "16385 bytes"),
        (regex("("), "unclosed group"),
        (regex("a\\"), "lone backslash"),
        (regex("[z-a]"), "invalid"),
        (regex("(?=a)b"), "look-around"),
        (regex("(?:)"), "empty answer"),
        (schema(json!(true)), "must be an object"),
        (schema(json!([])), "must be an object"),
        (Grammar { kind: GrammarKind::JsonSchema, text: "{".into() }, "not JSON"),
        (schema(deep), "levels deep"),
        (schema(json!({ "x-guidance": { "lenient": true } })), "x-guidance"),
        (schema(json!({ "type": "king" })), "king"),
        (schema(json!({ "type": "integer", "minimum": 5, "maximum": 4 })), "nsatisfiable"),
        (schema(json!({ "allOf": [{ "type": "string" }, { "type": "null" }] })), "nsatisfiable"),
        (schema(json!({ "not": { "type": "string" } })), "not"),
        (schema(json!({ "$ref": "https://example.com/schema.json" })), "Only absolute"),
    ] {
        let error = vocabulary().admit(&grammar).expect_err(&grammar.text[..grammar.text.len().min(80)]);
        assert!(matches!(error, GrammarError::Refused(_)), "{error:?}");
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        assert!(error.to_string().len() < 400, "{error}");
    }
}

#[test]
fn what_can_be_used_is_admitted() {
    let tree = json!({ "$ref": "#/$defs/node", "$defs": { "node": {
        "type": "object", "properties": { "children": { "type": "array", "items": { "$ref": "#/$defs/node" } } } } } });
    for grammar in [
        regex("(red|green|blue)"),
        regex(r"\d{4}-\d{2}-\d{2}"),
        regex("a/b\n\"c\""),
        regex("é+"),
        // Large, but nothing of it is unfolded.
        regex("(a{1000}b?){1000}"),
        schema(json!({})),
        schema(json!({ "type": "object" })),
        schema(json!({ "enum": ["a", 1, null, { "b": [] }] })),
        schema(json!({ "type": "array", "items": { "type": "number" }, "maxItems": 3 })),
        schema(json!({ "anyOf": [{ "type": "string", "format": "date" }, { "const": 7 }] })),
        schema(tree),
    ] {
        vocabulary().admit(&grammar).unwrap_or_else(|e| panic!("{grammar:?}: {e}"));
    }
}

#[test]
fn a_mask_holds_what_may_follow_and_nothing_else() {
    let grammar = regex("(red|green|greenish)");
    let mut matcher = after(&grammar, "gre");
    let mask = matcher.mask().unwrap();
    assert_eq!(mask.vocabulary(), tokenizer().vocab_size());
    for token in 0..tokenizer().vocab_size() as u32 {
        let bytes = tokenizer().token_bytes(token);
        let fits = !bytes.is_empty() && b"enish".starts_with(bytes);
        assert_eq!(mask.allows(token), fits, "{:?}", tokenizer().name(token));
        assert_eq!(matcher.allows(token).unwrap(), fits, "{:?}", tokenizer().name(token));
    }
    // An answer that may end, or go on.
    let mut matcher = after(&grammar, "green");
    assert!(!matcher.complete());
    let mask = matcher.mask().unwrap();
    for token in tokenizer().end_tokens() {
        assert!(mask.allows(*token) && matcher.allows(*token).unwrap());
    }
    assert!(!matcher.allows(tokenizer().vocab_size() as u32).unwrap() && !matcher.allows(u32::MAX).unwrap());
    // One that can only end.
    assert!(after(&grammar, "greenish").complete());
    assert!(after(&grammar, "red").complete());
    let mut matcher = after(&grammar, "red");
    let mask = matcher.mask().unwrap();
    assert_eq!(mask.count(), tokenizer().end_tokens().len());
    assert!(matches!(matcher.push(tokens(" no")[0]), Err(GrammarError::Stuck(_))));
}

#[test]
fn a_clone_goes_its_own_way() {
    let grammar = regex("[ab]{6}");
    let mut matcher = after(&grammar, "aa");
    let mut twin = matcher.clone();
    for token in bytes("bbbb") {
        matcher.push(token).unwrap();
    }
    assert!(matcher.complete() && !twin.complete());
    assert!(twin.allows(bytes("a")[0]).unwrap());
}

#[test]
fn an_answer_is_checked_token_by_token() {
    let grammar = schema(json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": { "name": { "type": "string" }, "age": { "type": "integer" } },
    }));
    let open = r#"{"name": "Ada \u00e9", "age": 3"#;
    let whole = format!("{open}6}}");
    let ended = |text: &str| [tokens(text), vec![end()]].concat();
    let check = |tokens: &[u32], finish| vocabulary().check(&grammar, tokens, finish);
    let ok: Result<(), &str> = Ok(());
    for (tokens, finish, expected) in [
        (tokens(r#"{"name": "Ada", "age": 36}"#), Finish::Grammar, ok),
        (bytes(r#"{"name":"Ada","age":36}"#), Finish::Grammar, ok),
        (tokens("{\n  \"name\": \"Ada\",\n  \"age\": 36\n}"), Finish::Grammar, ok),
        (tokens(r#"{"name": "Ada", "ag"#), Finish::Length, ok),
        (tokens(r#"{"name": "Ada"#), Finish::Stop, ok),
        (tokens(r#"{"age": 36"#), Finish::Length, Err("not allowed")),
        (tokens(r#"{"name": 5"#), Finish::Length, Err("not allowed")),
        (tokens(r#"{"name": "Ada", "age": 3.5"#), Finish::Length, Err("not allowed")),
        (tokens("Sure: {}"), Finish::Length, Err("not allowed")),
        (tokens(r#"{"name": "Ada", "age": 36}"#), Finish::Length, Err("only the end was allowed")),
        (tokens(r#"{"name": "Ada", "age": 36"#), Finish::Grammar, Err("more than the end was allowed")),
        (ended(r#"{"name": "Ada", "age": 36}"#), Finish::Eos, Err("goes on where")),
        (ended(r#"{"name": "Ada""#), Finish::Eos, Err("not allowed")),
        (tokens(r#"{"name": "Ada""#), Finish::Eos, Err("without an end token")),
        (tokens(&format!("{whole} ")), Finish::Length, Err("")),
    ] {
        let actual = check(&tokens, finish);
        match (&actual, expected) {
            (Ok(()), Ok(())) => {}
            (Err(GrammarError::Violated { position, reason }), Err(text)) => {
                assert!(*position < tokens.len() && reason.contains(text), "{actual:?}, expected {text}");
            }
            _ => panic!("{:?} {finish:?}: {actual:?}, expected {expected:?}", tokenizer().decode(&tokens)),
        }
    }
    let many = regex("a*");
    assert_eq!(vocabulary().check(&many, &ended("aaa"), Finish::Eos), Ok(()));
    assert_eq!(vocabulary().check(&many, &[end()], Finish::Eos), Ok(()));
    assert!(vocabulary().check(&many, &ended("aaa"), Finish::Grammar).is_err());
    assert!(vocabulary().check(&many, &[ended("aaa"), vec![end()]].concat(), Finish::Eos).is_err());
}

#[test]
fn properties_come_in_the_order_of_the_schema() {
    let text = r#"{"type": "object", "properties": {"zebra": {"const": 1}, "apple": {"const": 2}}, "required": ["zebra", "apple"]}"#;
    let grammar = Grammar { kind: GrammarKind::JsonSchema, text: text.into() };
    let check = |text: &str| vocabulary().check(&grammar, &tokens(text), Finish::Length);
    assert_eq!(check(r#"{"zebra": 1, "apple": 2"#), Ok(()));
    assert!(check(r#"{"apple": 2"#).is_err());
}

#[test]
fn blanks_have_an_end() {
    let grammar = schema(json!({ "type": "object" }));
    let check =
        |n: usize| vocabulary().check(&grammar, &bytes(&format!("{{{}", " ".repeat(n))), Finish::Length);
    assert_eq!(check(20), Ok(()));
    assert!(check(21).is_err());
}

#[test]
fn every_vocabulary_gives_the_same_masks() {
    let other = Vocabulary::new(tokenizer(), tokenizer().end_tokens()).unwrap();
    let grammar =
        schema(json!({ "type": "object", "properties": { "a": { "type": "string", "maxLength": 9 } } }));
    let (mut one, mut two) = (vocabulary().compile(&grammar).unwrap(), other.compile(&grammar).unwrap());
    for token in tokens(r#"{"a": "bcd", "x": [1, {}]}"#) {
        assert_eq!(one.mask().unwrap(), two.mask().unwrap());
        // One looks at every token on its way, the other does not.
        (0..2_000).for_each(|t| _ = one.allows(t).unwrap());
        assert_eq!(one.push(token).unwrap(), two.push(token).unwrap());
    }
}

#[test]
fn a_vocabulary_needs_its_end() {
    assert!(matches!(Vocabulary::new(tokenizer(), &[]), Err(GrammarError::Vocabulary(_))));
    let outside = tokenizer().vocab_size() as u32;
    let error = Vocabulary::new(tokenizer(), &[outside]).unwrap_err().to_string();
    assert!(error.contains(&outside.to_string()), "{error}");
}

/// Masks depend on the library's version, so the name that nodes declare is that of the library that is built in.
#[test]
fn the_library_is_the_one_that_is_named() {
    let lock = include_str!("../../../../Cargo.lock");
    let (name, version) = LIBRARY.split_once('/').unwrap();
    assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"")), "{LIBRARY}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_panics(text in "[a-c(){}|*+?\\[\\]^$\\\\.0-9,/\"&~!<> -]{1,24}") {
        let _ = vocabulary().admit(&regex(&text));
    }

    #[test]
    fn no_schema_panics(
        kind in "(object|array|string|number|integer|null|boolean)", a in any::<i32>(), b in any::<i32>(), text in "\\PC{0,12}",
    ) {
        for value in [
            json!({ "type": kind, "minimum": a, "maximum": b, "minLength": a, "maxItems": b, "pattern": text }),
            json!({ "type": kind, "properties": { (text.clone()): { "const": a } }, "required": [text.clone()] }),
            json!({ (kind.clone()): text.clone(), "enum": [text.clone(), a] }),
        ] {
            let _ = vocabulary().admit(&schema(value));
        }
    }

    /// The mask is the set of what `allows` says, at every step of a random answer.
    #[test]
    fn mask_and_check_agree(picks in prop::collection::vec(any::<u32>(), 1..12)) {
        let grammar = schema(json!({ "type": "array", "items": { "enum": ["ab", "abc", 12, null] } }));
        let mut matcher = vocabulary().compile(&grammar).unwrap();
        let mut drawn = Vec::new();
        let mut finish = Finish::Length;
        for pick in picks {
            let mask = matcher.mask().unwrap();
            let allowed: Vec<u32> = (0..mask.vocabulary() as u32).filter(|t| mask.allows(*t)).collect();
            let token = allowed[pick as usize % allowed.len()];
            prop_assert!(matcher.allows(token).unwrap());
            let stranger = (token + 1 + pick % 1000) % mask.vocabulary() as u32;
            prop_assert_eq!(matcher.allows(stranger).unwrap(), mask.allows(stranger));
            drawn.push(token);
            if tokenizer().end_tokens().contains(&token) {
                finish = Finish::Eos;
                break;
            }
            if matcher.push(token).unwrap() {
                finish = Finish::Grammar;
                break;
            }
        }
        prop_assert_eq!(vocabulary().check(&grammar, &drawn, finish), Ok(()));
    }
}
