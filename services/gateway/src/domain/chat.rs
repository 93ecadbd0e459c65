//! `POST /v1/chat/completions`: from JSON to a checked request.
//!
//! A parameter that would change the answer and is not served is refused by name, never ignored.

use infera_prompt::Message;
use infera_protocol::request::{MAX_STOP_BYTES, MAX_STOPS, MAX_TOKENS};
use infera_protocol::sampling::SamplingParams;
use serde::Serialize;
use serde_json::{Map, Value};

use super::Refusal;
use super::form::{self, Form};

/// Deepest nesting of a body; a chat needs six levels.
pub const MAX_DEPTH: usize = 32;
/// Largest tip, 10^-6 INFER per token: no sum over a request's tokens overflows.
pub const MAX_BID_MICRO: u64 = 1_000_000_000_000;

/// What a client asks for. Its JSON (fields in this order) is what repeats with the same
/// `Idempotency-Key` are compared by.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChatRequest {
    pub model: String,
    /// Roles are those of chat templates: `developer` became `system`.
    pub messages: Vec<Message>,
    pub sampling: SamplingParams,
    pub max_tokens: Option<u32>,
    pub stop: Vec<String>,
    pub seed: Option<u64>,
    pub stream: bool,
    pub include_usage: bool,
    /// `infera.stream = "fast"`: relay one replica, unverified until the end.
    pub fast: bool,
    /// Tip per token in 10^-6 INFER.
    pub bid_micro: u64,
    /// Answers, 1 to [`form::MAX_CHOICES`].
    #[serde(skip_serializing_if = "is_one")]
    pub n: u32,
    /// Log-probabilities are asked for, with so many alternatives a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// What the answer must look like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_one(n: &u32) -> bool {
    *n == 1
}

impl ChatRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// [`Refusal`]; the first field that is wrong.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let fields = object(body)?;
        check_names(&fields)?;
        let fields = Fields::of(&fields);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let (fast, bid_micro) = infera(&fields, stream)?;
        Ok(Self {
            model: fields.text("model")?.ok_or_else(|| missing("model"))?,
            messages: messages(&fields)?,
            sampling: sampling(&fields)?,
            max_tokens: max_tokens(&fields)?,
            stop: stop(&fields)?,
            seed: seed(&fields)?,
            stream,
            include_usage: include_usage(&fields, stream)?,
            fast,
            bid_micro,
            n: form::choices(&fields)?,
            logprobs: form::logprobs(&fields)?,
            form: form::form(&fields)?,
        })
    }
}

/// The fields of a body.
pub(super) fn object(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    check_depth(body)?;
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Refusal::json(format!("the body is not JSON: {error}")))?;
    let Value::Object(fields) = value else {
        return Err(Refusal::json("the body must be a JSON object"));
    };
    Ok(fields)
}

pub(super) fn missing(param: &str) -> Refusal {
    Refusal::new("missing_required_parameter", param, format!("`{param}` is required"))
}

pub(super) fn unknown(param: &str) -> Refusal {
    let message = format!("`{param}` is not a parameter of this API; leave it out");
    Refusal::new("unknown_parameter", param, message)
}

/// Counts brackets outside strings, before any parser recurses.
fn check_depth(body: &[u8]) -> Result<(), Refusal> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in body {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(Refusal::json(format!("the body is nested deeper than {MAX_DEPTH} levels")));
        }
    }
    Ok(())
}

/// Parameters that are read here.
const SERVED: [&str; 24] = [
    "model",
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "infera",
    "n",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
];

/// Whether a value has the type of its parameter.
type Fits = fn(&Value) -> bool;

/// Accepted and without effect on the answer: bookkeeping of OpenAI's own service.
const HARMLESS: [(&str, Fits, &str); 7] = [
    ("user", Value::is_string, "a string"),
    ("metadata", Value::is_object, "an object"),
    ("store", Value::is_boolean, "a boolean"),
    ("service_tier", Value::is_string, "a string"),
    ("safety_identifier", Value::is_string, "a string"),
    ("prompt_cache_key", Value::is_string, "a string"),
    ("parallel_tool_calls", Value::is_boolean, "a boolean"),
];

/// Known from OpenAI's API or from other servers, and not served: only values that ask for nothing pass.
const UNSERVED: [&str; 29] = [
    "audio",
    "best_of",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "echo",
    "extra_body",
    "function_call",
    "functions",
    "grammar",
    "guided_grammar",
    "ignore_eos",
    "length_penalty",
    "min_tokens",
    "mirostat",
    "modalities",
    "moderation",
    "prediction",
    "prompt_cache_retention",
    "reasoning_effort",
    "repetition_penalty",
    "stop_token_ids",
    "suffix",
    "tool_choice",
    "tools",
    "top_a",
    "typical_p",
    "verbosity",
    "web_search_options",
];

/// Values of unserved parameters that change nothing.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    let empty =
        |v: &Value| v.as_array().is_some_and(Vec::is_empty) || v.as_object().is_some_and(Map::is_empty);
    match name {
        _ if value.is_null() => true,
        "tools" | "functions" | "stop_token_ids" => empty(value),
        "tool_choice" | "function_call" => matches!(value.as_str(), Some("none" | "auto")),
        "echo" | "ignore_eos" => value == &Value::Bool(false),
        "min_tokens" => value.as_u64() == Some(0),
        "best_of" => value.as_u64() == Some(1),
        "repetition_penalty" | "length_penalty" | "typical_p" => value.as_f64() == Some(1.0),
        "modalities" => value.as_array().is_some_and(|list| list.len() == 1 && list[0] == "text"),
        _ => false,
    }
}

fn check_names(fields: &Map<String, Value>) -> Result<(), Refusal> {
    for (name, value) in fields {
        if SERVED.contains(&name.as_str()) {
            continue;
        }
        if let Some((_, fits, expected)) = HARMLESS.iter().find(|(known, ..)| known == name) {
            if value.is_null() || fits(value) {
                continue;
            }
            return Err(Refusal::kind(name, expected));
        }
        if !UNSERVED.contains(&name.as_str()) {
            return Err(unknown(name));
        }
        if !asks_for_nothing(name, value) {
            return Err(unsupported(name));
        }
    }
    Ok(())
}

pub(super) fn unsupported(param: &str) -> Refusal {
    let message = match param {
        "repetition_penalty" => {
            "`repetition_penalty` is not supported, because nodes could not be compared under it; use \
                                 `frequency_penalty` or `presence_penalty`"
                .to_owned()
        }
        _ => format!(
            "`{param}` is not supported: it would change the answer, so it is not ignored; leave it out"
        ),
    };
    Refusal::new("unsupported_parameter", param, message)
}

/// Reads typed fields; `null` is as good as absent.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn of(map: &'a Map<String, Value>) -> Self {
        Self { map }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, Refusal> {
        self.get(name).map(|v| v.as_bool().ok_or_else(|| Refusal::kind(name, "a boolean"))).transpose()
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<String>, Refusal> {
        let text = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| Refusal::kind(name, "a string"));
        self.get(name).map(text).transpose()
    }

    fn number(&self, name: &str, default: f32) -> Result<f32, Refusal> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_f64().map(|number| number as f32).ok_or_else(|| Refusal::kind(name, "a number"))
    }

    /// An integer from 1 to `max`.
    pub(super) fn count(&self, name: &str, max: u32) -> Result<Option<u32>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        if !(value.is_i64() || value.is_u64()) {
            return Err(Refusal::kind(name, "an integer"));
        }
        match value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=max).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(Refusal::value(name, format!("`{name}` must be from 1 to {max}, got {value}"))),
        }
    }
}

fn sampling(fields: &Fields<'_>) -> Result<SamplingParams, Refusal> {
    let default = SamplingParams::default();
    let top_k = fields.count("top_k", infera_protocol::sampling::MAX_TOP_K)?.unwrap_or(default.top_k);
    let params = SamplingParams::new(
        fields.number("temperature", default.temperature)?,
        fields.number("top_p", default.top_p)?,
        top_k,
        fields.number("min_p", default.min_p)?,
        fields.number("frequency_penalty", default.frequency_penalty)?,
        fields.number("presence_penalty", default.presence_penalty)?,
    )
    .map_err(|error| Refusal::value(error.field, format!("`{}` must be {}", error.field, error.range)))?;
    Ok(SamplingParams { logit_bias: form::logit_bias(fields)?, ..params })
}

fn max_tokens(fields: &Fields<'_>) -> Result<Option<u32>, Refusal> {
    let new = fields.count("max_completion_tokens", MAX_TOKENS)?;
    let old = fields.count("max_tokens", MAX_TOKENS)?;
    match (new, old) {
        (Some(a), Some(b)) if a != b => Err(Refusal::value(
            "max_tokens",
            "`max_tokens` and `max_completion_tokens` differ: send one of them",
        )),
        (new, old) => Ok(new.or(old)),
    }
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, Refusal> {
    let expected = "a string or a list of strings";
    let stops = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .map(|v| v.as_str().map(str::to_owned).ok_or_else(|| Refusal::kind("stop", expected)))
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(Refusal::kind("stop", expected)),
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
        let message =
            format!("`stop` must be at most {MAX_STOPS} non-empty strings of at most {MAX_STOP_BYTES} bytes");
        return Err(Refusal::value("stop", message));
    }
    Ok(stops)
}

/// OpenAI's seeds are signed 64-bit; a negative one keeps its bits.
fn seed(fields: &Fields<'_>) -> Result<Option<u64>, Refusal> {
    let Some(value) = fields.get("seed") else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|n| n as u64));
    seed.map(Some).ok_or_else(|| Refusal::kind("seed", "an integer of 64 bits"))
}

fn include_usage(fields: &Fields<'_>, stream: bool) -> Result<bool, Refusal> {
    let Some(options) = fields.get("stream_options") else { return Ok(false) };
    let map = options.as_object().ok_or_else(|| Refusal::kind("stream_options", "an object"))?;
    if !stream {
        return Err(Refusal::value(
            "stream_options",
            "`stream_options` is only allowed when `stream` is true",
        ));
    }
    let mut include = false;
    for (name, value) in map {
        let param = format!("stream_options.{name}");
        match (name.as_str(), value) {
            (_, Value::Null) | ("include_obfuscation", Value::Bool(false)) => {}
            ("include_usage", Value::Bool(wanted)) => include = *wanted,
            ("include_obfuscation", Value::Bool(true)) => return Err(unsupported(&param)),
            ("include_usage" | "include_obfuscation", _) => return Err(Refusal::kind(param, "a boolean")),
            _ => {
                return Err(unknown(&param));
            }
        }
    }
    Ok(include)
}

/// The `infera` object: how to stream and what to bid.
fn infera(fields: &Fields<'_>, stream: bool) -> Result<(bool, u64), Refusal> {
    let Some(options) = fields.get("infera") else { return Ok((false, 0)) };
    let map = options.as_object().ok_or_else(|| Refusal::kind("infera", "an object"))?;
    let (mut fast, mut bid) = (false, 0);
    for (name, value) in map {
        match name.as_str() {
            "stream" => {
                fast = match value.as_str() {
                    Some("fast") => true,
                    Some("verified") => false,
                    _ => {
                        return Err(Refusal::value(
                            "infera.stream",
                            "`infera.stream` must be fast or verified",
                        ));
                    }
                }
            }
            "bid_micro" => {
                bid = value.as_u64().filter(|bid| *bid <= MAX_BID_MICRO).ok_or_else(|| {
                    let message = format!("`infera.bid_micro` must be an integer from 0 to {MAX_BID_MICRO}");
                    Refusal::value("infera.bid_micro", message)
                })?;
            }
            _ => {
                let param = format!("infera.{name}");
                let message = format!("`{param}` is unknown; known are infera.stream and infera.bid_micro");
                return Err(Refusal::new("unknown_parameter", param, message));
            }
        }
    }
    if fast && !stream {
        return Err(Refusal::value("infera.stream", "`infera.stream` = fast needs `stream` = true"));
    }
    Ok((fast, bid))
}

fn messages(fields: &Fields<'_>) -> Result<Vec<Message>, Refusal> {
    let list = fields.get("messages").ok_or_else(|| missing("messages"))?;
    let list = list.as_array().ok_or_else(|| Refusal::kind("messages", "a list of messages"))?;
    if list.is_empty() {
        return Err(Refusal::value("messages", "`messages` must have at least one message"));
    }
    list.iter().enumerate().map(|(index, value)| message(&format!("messages[{index}]"), value)).collect()
}

fn message(at: &str, value: &Value) -> Result<Message, Refusal> {
    let map = value.as_object().ok_or_else(|| Refusal::kind(at, "an object with role and content"))?;
    let param = format!("{at}.role");
    let role = match map.get("role") {
        None => {
            return Err(missing(&param));
        }
        Some(role) => role.as_str().ok_or_else(|| Refusal::kind(&param, "a string"))?,
    };
    let role = match role {
        "developer" => "system",
        "system" | "user" | "assistant" => role,
        "tool" | "function" => {
            return Err(Refusal::new(
                "unsupported_value",
                &param,
                format!("`{param}` = {role} is not supported: tools are not"),
            ));
        }
        _ => {
            let message = format!("`{param}` must be system, developer, user or assistant");
            return Err(Refusal::value(param, message));
        }
    };
    for (name, value) in map {
        let param = format!("{at}.{name}");
        // Clients send an earlier answer back as they got it, with its empty fields.
        let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        match name.as_str() {
            "role" | "content" => {}
            "refusal" | "annotations" | "audio" | "function_call" | "tool_calls" | "name"
            | "tool_call_id" | "reasoning_content" => {
                if !empty {
                    return Err(unsupported(&param));
                }
            }
            _ => {
                return Err(unknown(&param));
            }
        }
    }
    Ok(Message::new(role, content(&format!("{at}.content"), map.get("content"))?))
}

/// A string, or parts of type text, whose texts are put together.
fn content(at: &str, value: Option<&Value>) -> Result<String, Refusal> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) if !parts.is_empty() => {
            parts.iter().enumerate().map(|(index, value)| part(&format!("{at}[{index}]"), value)).collect()
        }
        None | Some(Value::Null) => Err(missing(at)),
        Some(_) => Err(Refusal::kind(at, "a string or a non-empty list of parts of type text")),
    }
}

fn part(at: &str, value: &Value) -> Result<String, Refusal> {
    let map = value.as_object().ok_or_else(|| Refusal::kind(at, "an object with type and text"))?;
    let kind =
        map.get("type").and_then(Value::as_str).ok_or_else(|| Refusal::kind(format!("{at}.type"), "text"))?;
    if kind != "text" {
        let param = format!("{at}.type");
        let message = format!("`{param}` must be text: the models here read nothing else");
        return Err(Refusal::new("unsupported_value", param, message));
    }
    if let Some(name) = map.keys().find(|name| !matches!(name.as_str(), "type" | "text")) {
        return Err(unknown(&format!("{at}.{name}")));
    }
    let text = map.get("text").and_then(Value::as_str);
    text.map(str::to_owned).ok_or_else(|| Refusal::kind(format!("{at}.text"), "a string"))
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
