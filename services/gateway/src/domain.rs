//! What the gateway decides, without I/O, clock or randomness.
//!
//! - [`account`]: the bodies by which people sign in and make keys.
//! - [`chat`]: a client's JSON -> a checked [`chat::ChatRequest`], or a [`Refusal`] that names the field.
//! - [`form`]: the part of it that says what the answer must look like, and what is told of its tokens.
//! - [`merge`]: the replicas' deltas -> the tokens that may be emitted (protocol section 9).
//! - [`outcome`]: a closing message -> what the client gets.
//! - [`text`]: tokens -> the text that a client may see, cut at stop strings.
//! - [`logprobs`]: fingerprints -> OpenAI's log-probabilities.
//! - [`answer`]: OpenAI's bodies.

pub mod account;
pub mod answer;
pub mod chat;
pub mod form;
pub mod logprobs;
pub mod merge;
pub mod outcome;
pub mod text;

/// Why a request is refused before anything is done: always the client's to repair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Machine-readable, as `unknown_parameter`.
    pub code: &'static str,
    /// The field, as `messages[0].role`; `None` where the body as a whole is unreadable.
    pub param: Option<String>,
    /// One sentence with the remedy.
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(code: &'static str, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, param: Some(param.into()), message: message.into() }
    }

    pub(crate) fn value(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new("invalid_value", param, message)
    }

    pub(crate) fn kind(param: impl Into<String>, expected: &str) -> Self {
        let param = param.into();
        let message = format!("`{param}` must be {expected}");
        Self::new("invalid_type", param, message)
    }

    pub(crate) fn json(message: impl Into<String>) -> Self {
        Self { code: "invalid_json", param: None, message: message.into() }
    }
}
