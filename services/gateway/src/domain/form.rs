//! What an answer must look like, how many there are to be, and what is told of their tokens: the fields of a body
//! that are read here are named as OpenAI names them, or as vLLM does where OpenAI has no such thing.

use std::collections::BTreeMap;

use infera_protocol::fingerprint;
use infera_protocol::grammar::{Grammar, GrammarKind, MAX_GRAMMAR_BYTES};
use infera_protocol::sampling::MAX_LOGIT_BIAS;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Refusal;
use super::chat::{Fields, missing, unknown, unsupported};

/// Most answers to one request.
pub const MAX_CHOICES: u32 = 8;
/// Most alternatives that are told of a token: as many as nodes reveal.
pub const MAX_TOP_LOGPROBS: u32 = fingerprint::MAX_ENTRIES as u32;
/// Most texts that an answer may be chosen from.
const MAX_OPTIONS: usize = 256;
/// Longest name of a schema, bytes.
const MAX_NAME: usize = 64;

/// A grammar, and the field that it came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Form {
    /// As `response_format.json_schema.schema`: for errors. Where it came from does not change the request.
    #[serde(skip)]
    pub param: String,
    #[serde(flatten)]
    pub grammar: Grammar,
}

/// `logit_bias`: token ids as strings to numbers.
pub(super) fn logit_bias(fields: &Fields<'_>) -> Result<BTreeMap<u32, f32>, Refusal> {
    let Some(value) = fields.get("logit_bias") else { return Ok(BTreeMap::new()) };
    let map = value
        .as_object()
        .ok_or_else(|| Refusal::kind("logit_bias", "an object of token ids to numbers from -100 to 100"))?;
    if map.len() > MAX_LOGIT_BIAS {
        let message = format!("`logit_bias` must have at most {MAX_LOGIT_BIAS} tokens, got {}", map.len());
        return Err(Refusal::value("logit_bias", message));
    }
    map.iter().map(|(name, value)| bias(name, value)).collect()
}

fn bias(name: &str, value: &Value) -> Result<(u32, f32), Refusal> {
    let shown: String = name.chars().take(20).collect();
    // One spelling each, so that no token is named twice.
    let token = name.parse::<u32>().ok().filter(|token| token.to_string() == name);
    let token = token.ok_or_else(|| {
        let message =
            format!("`logit_bias` must name tokens by their ids, such as \"50256\", got \"{shown}\"");
        Refusal::value("logit_bias", message)
    })?;
    let bias = value.as_f64().ok_or_else(|| Refusal::kind(format!("logit_bias.{shown}"), "a number"))?;
    if !(-100.0..=100.0).contains(&bias) {
        let param = format!("logit_bias.{shown}");
        let message = format!("`{param}` must be from -100 to 100, got {value}");
        return Err(Refusal::value(param, message));
    }
    Ok((token, bias as f32))
}

/// `n`: how many answers.
pub(super) fn choices(fields: &Fields<'_>) -> Result<u32, Refusal> {
    Ok(fields.count("n", MAX_CHOICES)?.unwrap_or(1))
}

/// `logprobs` and `top_logprobs`: `None` if not asked for, else how many alternatives a token.
pub(super) fn logprobs(fields: &Fields<'_>) -> Result<Option<u32>, Refusal> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let Some(value) = fields.get("top_logprobs") else { return Ok(wanted.then_some(0)) };
    if !(value.is_i64() || value.is_u64()) {
        return Err(Refusal::kind("top_logprobs", "an integer"));
    }
    let top = value.as_u64().and_then(|top| u32::try_from(top).ok()).filter(|top| *top <= MAX_TOP_LOGPROBS);
    let top = top.ok_or_else(|| {
        let message = format!(
            "`top_logprobs` must be from 0 to {MAX_TOP_LOGPROBS}, got {value}: nodes reveal that many candidates of each token"
        );
        Refusal::value("top_logprobs", message)
    })?;
    match (wanted, top) {
        (false, 0) => Ok(None),
        (false, _) => Err(Refusal::value("top_logprobs", "`top_logprobs` needs `logprobs` = true")),
        (true, top) => Ok(Some(top)),
    }
}

/// The one field, of all that can, which says what the answer must look like.
pub(super) fn form(fields: &Fields<'_>) -> Result<Option<Form>, Refusal> {
    let mut found: Option<Form> = None;
    for form in [
        response_format(fields)?,
        structured_outputs(fields)?,
        guided(fields, "guided_json", json_schema)?,
        guided(fields, "guided_regex", regex)?,
        guided(fields, "guided_choice", choice)?,
    ]
    .into_iter()
    .flatten()
    {
        if let Some(first) = &found {
            let message =
                format!("`{}` and `{}` exclude each other: send one of them", form.param, first.param);
            return Err(Refusal::value(form.param, message));
        }
        found = Some(form);
    }
    Ok(found)
}

fn guided(
    fields: &Fields<'_>,
    name: &str,
    read: fn(&str, &Value) -> Result<Grammar, Refusal>,
) -> Result<Option<Form>, Refusal> {
    let form = |value| read(name, value).map(|grammar| Form { param: name.to_owned(), grammar });
    fields.get(name).map(form).transpose()
}

fn any_object() -> Grammar {
    Grammar { kind: GrammarKind::JsonSchema, text: json!({ "type": "object" }).to_string() }
}

/// OpenAI's `response_format`.
fn response_format(fields: &Fields<'_>) -> Result<Option<Form>, Refusal> {
    const TYPES: &str = "text, json_object or json_schema";
    let Some(value) = fields.get("response_format") else { return Ok(None) };
    let map = value.as_object().ok_or_else(|| Refusal::kind("response_format", "an object with a type"))?;
    let kind = match map.get("type") {
        None => return Err(missing("response_format.type")),
        Some(kind) => kind.as_str().ok_or_else(|| Refusal::kind("response_format.type", TYPES))?,
    };
    let known: &[&str] = if kind == "json_schema" { &["type", "json_schema"] } else { &["type"] };
    only("response_format", map, known)?;
    match kind {
        "text" => Ok(None),
        "json_object" => Ok(Some(Form { param: "response_format".to_owned(), grammar: any_object() })),
        "json_schema" => named_schema(map.get("json_schema")).map(Some),
        _ => Err(Refusal::value("response_format.type", format!("`response_format.type` must be {TYPES}"))),
    }
}

/// `response_format.json_schema`. Schemas are always kept to, so that `strict` changes nothing.
fn named_schema(value: Option<&Value>) -> Result<Form, Refusal> {
    const AT: &str = "response_format.json_schema";
    let value = value.filter(|value| !value.is_null()).ok_or_else(|| missing(AT))?;
    let map = value.as_object().ok_or_else(|| Refusal::kind(AT, "an object with name and schema"))?;
    only(AT, map, &["name", "description", "schema", "strict"])?;
    let param = format!("{AT}.name");
    let name = match map.get("name") {
        None | Some(Value::Null) => return Err(missing(&param)),
        Some(name) => name.as_str().ok_or_else(|| Refusal::kind(&param, "a string"))?,
    };
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(word) {
        let message = format!("`{param}` must be 1 to {MAX_NAME} of A-Z, a-z, 0-9, _ and -");
        return Err(Refusal::value(param, message));
    }
    for (name, fits, expected) in [
        ("description", Value::is_string as fn(&Value) -> bool, "a string"),
        ("strict", Value::is_boolean, "a boolean"),
    ] {
        if map.get(name).is_some_and(|value| !value.is_null() && !fits(value)) {
            return Err(Refusal::kind(format!("{AT}.{name}"), expected));
        }
    }
    let param = format!("{AT}.schema");
    let grammar = match map.get("schema") {
        None | Some(Value::Null) => any_object(),
        Some(schema) if schema.is_object() => json_schema(&param, schema)?,
        Some(_) => return Err(Refusal::kind(param, "a JSON schema")),
    };
    Ok(Form { param, grammar })
}

/// vLLM's `structured_outputs`: exactly one of its members.
fn structured_outputs(fields: &Fields<'_>) -> Result<Option<Form>, Refusal> {
    const AT: &str = "structured_outputs";
    let Some(value) = fields.get(AT) else { return Ok(None) };
    let map = value.as_object().ok_or_else(|| Refusal::kind(AT, "an object"))?;
    let mut found = None;
    for (name, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        let param = format!("{AT}.{name}");
        let grammar = match name.as_str() {
            "json" => json_schema(&param, value)?,
            "regex" => regex(&param, value)?,
            "choice" => choice(&param, value)?,
            "json_object" => match value.as_bool() {
                Some(true) => any_object(),
                Some(false) => continue,
                None => return Err(Refusal::kind(param, "a boolean")),
            },
            "grammar"
            | "structural_tag"
            | "whitespace_pattern"
            | "disable_fallback"
            | "disable_any_whitespace"
            | "disable_additional_properties" => {
                return Err(unsupported(&param));
            }
            _ => return Err(unknown(&param)),
        };
        if found.is_some() {
            return Err(Refusal::value(
                AT,
                "`structured_outputs` must have one of json, regex, choice, json_object",
            ));
        }
        found = Some(Form { param, grammar });
    }
    Ok(found)
}

fn only(at: &str, map: &Map<String, Value>, known: &[&str]) -> Result<(), Refusal> {
    match map.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(unknown(&format!("{at}.{name}"))),
        None => Ok(()),
    }
}

fn sized(param: &str, kind: GrammarKind, text: String) -> Result<Grammar, Refusal> {
    let bytes = text.len();
    if !(1..=MAX_GRAMMAR_BYTES).contains(&bytes) {
        let message =
            format!("`{param}` must have 1 to {MAX_GRAMMAR_BYTES} bytes, it has {bytes}: make it smaller");
        return Err(Refusal::value(param, message));
    }
    Ok(Grammar { kind, text })
}

/// A schema, or its text as vLLM takes it too.
fn json_schema(param: &str, value: &Value) -> Result<Grammar, Refusal> {
    let text = match value {
        Value::Object(_) => value.to_string(),
        Value::String(text) => text.clone(),
        _ => return Err(Refusal::kind(param, "a JSON schema")),
    };
    sized(param, GrammarKind::JsonSchema, text)
}

fn regex(param: &str, value: &Value) -> Result<Grammar, Refusal> {
    let text = value.as_str().ok_or_else(|| Refusal::kind(param, "a string"))?;
    sized(param, GrammarKind::Regex, text.to_owned())
}

/// One of several texts.
fn choice(param: &str, value: &Value) -> Result<Grammar, Refusal> {
    let expected = format!("a list of 1 to {MAX_OPTIONS} non-empty strings");
    let list = value.as_array().ok_or_else(|| Refusal::kind(param, &expected))?;
    let texts: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(escaped)).collect();
    match texts {
        Some(texts) if (1..=MAX_OPTIONS).contains(&texts.len()) && texts.iter().all(|t| !t.is_empty()) => {
            sized(param, GrammarKind::Regex, format!("(?:{})", texts.join("|")))
        }
        _ => Err(Refusal::kind(param, &expected)),
    }
}

/// A text as a regular expression that matches nothing else.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if c.is_ascii_punctuation() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
#[path = "form_tests.rs"]
mod tests;
