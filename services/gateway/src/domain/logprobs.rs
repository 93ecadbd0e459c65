//! Fingerprints as OpenAI's log-probabilities.
//!
//! Every node reveals for each token the 8 candidates that came out best in the draw, with the model's own
//! log-probabilities as f16: before temperature, bias, penalties and grammar. At temperature 0 these are the likeliest
//! tokens; above, what the noise favoured. Nothing more is asked of nodes for this.

use infera_prompt::{StopMatcher, Tokenizer};
use infera_protocol::fingerprint::{Entry, Fingerprint};
use serde_json::{Value, json};

use super::outcome::Generation;

/// `logprobs` of a choice: the tokens that its text shows, each with up to `top` alternatives, likeliest first. Null
/// where the fingerprints are not at hand.
pub fn of(tokenizer: &Tokenizer, generation: &Generation, stops: &[String], top: u32) -> Value {
    let prints = match Fingerprint::decode_all(&generation.fingerprints) {
        Ok(prints) if prints.len() == generation.tokens.len() => prints,
        _ => return Value::Null,
    };
    let shown = shown(tokenizer, &generation.tokens, stops);
    let content: Vec<Value> = prints
        .iter()
        .zip(&generation.tokens)
        .take(shown)
        .filter(|(_, token)| !tokenizer.token_bytes(**token).is_empty())
        .filter_map(|(print, token)| {
            print.entries().iter().find(|entry| entry.token == *token).map(|e| (print, e))
        })
        .map(|(print, drawn)| {
            let mut entries = print.entries().to_vec();
            entries.sort_by(|a, b| b.logprob().total_cmp(&a.logprob()).then(a.token.cmp(&b.token)));
            let mut value = entry(tokenizer, drawn);
            value["top_logprobs"] = entries.iter().take(top as usize).map(|e| entry(tokenizer, e)).collect();
            value
        })
        .collect();
    json!({ "content": content, "refusal": null })
}

/// How many of the tokens begin before the first stop string.
fn shown(tokenizer: &Tokenizer, tokens: &[u32], stops: &[String]) -> usize {
    let mut matcher = StopMatcher::new(stops);
    let mut starts = Vec::with_capacity(tokens.len());
    let mut length = 0;
    for token in tokens {
        let bytes = tokenizer.token_bytes(*token);
        starts.push(length);
        length += bytes.len();
        if let Some(cut) = matcher.push(bytes) {
            return starts.iter().filter(|start| **start < cut).count();
        }
    }
    tokens.len()
}

/// A token that adds no text has a name and no bytes.
fn entry(tokenizer: &Tokenizer, entry: &Entry) -> Value {
    let bytes = tokenizer.token_bytes(entry.token);
    let (token, bytes) = if bytes.is_empty() {
        (tokenizer.name(entry.token).unwrap_or_default().to_owned(), Value::Null)
    } else {
        (String::from_utf8_lossy(bytes).into_owned(), json!(bytes))
    };
    json!({ "token": token, "logprob": entry.logprob(), "bytes": bytes })
}
