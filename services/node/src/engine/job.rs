//! What the engine is asked, and what it answers.

use infera_grammar::Matcher;
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::request::Finish;
use infera_protocol::sampling::SamplingParams;
use uuid::Uuid;

/// One generation.
#[derive(Debug, Clone)]
pub struct Job {
    /// Names it in [`super::Engine::cancel`].
    pub id: Uuid,
    /// Token ids of the rendered prompt.
    pub prompt: Vec<u32>,
    /// Parameters of the draw.
    pub params: SamplingParams,
    /// At least 1.
    pub max_tokens: u32,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Seed of the draw.
    pub seed: u64,
    /// Tokens that end the generation: the model registry's.
    pub end_tokens: Vec<u32>,
    /// What the answer must look like, at its beginning; made for the same end tokens.
    pub grammar: Option<Matcher>,
}

/// What a job's receiver gets: tokens, then exactly one `Finished` or `Failed`. A cancelled job's channel just closes.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next token. The end token and the token that completes a stop string are tokens like any other.
    Token {
        /// Its id.
        token: u32,
        /// What the engine saw when it drew it.
        fingerprint: Fingerprint,
    },
    /// The generation is complete.
    Finished {
        /// Why it ended.
        finish: Finish,
    },
    /// The generation broke off for a reason of the engine's.
    Failed {
        /// In words.
        reason: String,
    },
}

/// An answer to be scored.
#[derive(Debug, Clone)]
pub struct ScoreJob {
    /// Names it in [`super::Engine::cancel`].
    pub id: Uuid,
    /// Token ids of the rendered prompt.
    pub prompt: Vec<u32>,
    /// The answer's tokens, at least one.
    pub tokens: Vec<u32>,
    /// Parameters of the draw that the answer claims.
    pub params: SamplingParams,
    /// Seed of that draw.
    pub seed: u64,
    /// The grammar of that draw, at its beginning. A token that it does not allow is no candidate, its margin is
    /// infinite, and what follows it is scored without the grammar.
    pub grammar: Option<Matcher>,
}

/// How one token of an answer looks to the scorer.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The answer's token.
    pub token: u32,
    /// Its place among the candidates by `z + T g`, 0 for the one that the scorer draws; `None`: no candidate.
    pub rank: Option<u32>,
    /// [`infera_protocol::margin`], in logits: 0 where the scorer draws the same.
    pub margin: f64,
    /// Log-softmax of the model's logits at the token.
    pub raw_logprob: f32,
    /// What the scorer saw at this place.
    pub fingerprint: Fingerprint,
}
