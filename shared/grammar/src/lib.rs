//! Grammars over a model's own tokens: which may follow, and whether an answer keeps to its grammar.
//!
//! ```text
//! Grammar (text, in the request) --Vocabulary::compile--> Matcher --mask--> the draw's candidates
//!                                                           ^------push---- the token drawn
//! ```
//!
//! - The gateway asks [`Vocabulary::admit`] before it takes a request.
//! - A node takes [`Matcher::mask`] before each draw and gives the token to [`Matcher::push`].
//! - The verifier asks [`Matcher::check`] of what was revealed.
//!
//! A token is allowed if its bytes continue the text towards something that the grammar accepts, however the tokenizer
//! would have cut that text. So the set follows from the grammar, the tokens so far and the vocabulary alone. All of
//! it is computed by `llguidance`, whose version is pinned: another one may allow other tokens, and nodes say in their
//! hello which one they have ([`LIBRARY`]).

mod error;
mod schema;

use std::sync::Arc;

use infera_prompt::Tokenizer;
use infera_protocol::grammar::{Grammar, GrammarKind, MAX_GRAMMAR_BYTES};
use infera_protocol::mask::Mask;
use infera_protocol::request::Finish;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, panic_utils};

pub use error::GrammarError;
pub use schema::MAX_SCHEMA_DEPTH;

/// Name and version of what computes the masks.
pub const LIBRARY: &str = "llguidance/1.9.1";

/// Bounds of a compiled grammar and of one step. They count work and not time, so that every machine comes to the same.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2_000,
        // About 20 ms.
        initial_lexer_fuel: 1_000_000,
        // About 14 ms at most a step; typically 0.05.
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        // 1 to 2 KB each.
        max_lexer_states: 20_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// The tokens of a model, prepared for grammars. One a model, some 0.1 s and 20 MB; shared.
pub struct Vocabulary {
    factory: ParserFactory,
    ends: Arc<[u32]>,
    size: usize,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Runs what a library may panic in; its panic becomes an error.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let work = std::panic::AssertUnwindSafe(work);
    panic_utils::catch_unwind(|| Ok(work())).unwrap_or_else(|panic| Err(panic.to_string()))
}

impl Vocabulary {
    /// The tokens of `tokenizer`, of which `end_tokens` end an answer. Blocks for about 0.1 s.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`]: no end token, or tokens that no trie can hold.
    pub fn new(tokenizer: &Tokenizer, end_tokens: &[u32]) -> Result<Self, GrammarError> {
        let size = tokenizer.vocab_size();
        let first = end_tokens.first().copied().ok_or_else(|| error::vocabulary("it has no end token"))?;
        if let Some(end) = end_tokens.iter().find(|end| **end as usize >= size) {
            return Err(error::vocabulary(&format!("end token {end} is not one of its {size} tokens")));
        }
        let count = u32::try_from(size).map_err(|_| error::vocabulary("more than 2^32 tokens"))?;
        let words: Vec<Vec<u8>> = (0..count)
            // What adds no text can be no part of one.
            .map(|token| tokenizer.token_bytes(token).to_vec())
            .collect();
        let factory = caught(|| {
            let trie = TokTrie::from(&TokRxInfo::new(count, first), &words).with_eos_tokens(end_tokens);
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices);
            factory.map_err(|e| e.to_string())
        });
        let mut factory = factory.map_err(|reason| error::vocabulary(&reason))?;
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Self { factory, ends: end_tokens.into(), size })
    }

    /// A matcher at the beginning of an answer. Blocks for 1 to some 100 ms.
    ///
    /// # Errors
    /// [`GrammarError::Refused`]: the text is too long or no grammar of its kind, or what it describes is too large or
    /// not supported.
    pub fn compile(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let bytes = grammar.text.len();
        if !(1..=MAX_GRAMMAR_BYTES).contains(&bytes) {
            let reason = format!("it has {bytes} bytes, allowed are 1 to {MAX_GRAMMAR_BYTES}");
            return Err(GrammarError::Refused(reason));
        }
        let parsed = match grammar.kind {
            GrammarKind::JsonSchema => TopLevelGrammar::from_json_schema(schema::read(&grammar.text)?),
            GrammarKind::Regex => regex(&grammar.text)?,
        };
        let inner = caught(|| {
            let matcher = llguidance::Matcher::new(self.factory.create_parser(parsed));
            matcher.get_error().map_or(Ok(matcher), Err)
        });
        let inner = inner.map_err(|reason| GrammarError::Refused(error::short(&reason)))?;
        Ok(Matcher { inner, ends: self.ends.clone(), size: self.size })
    }

    /// Whether some answer of at least one token keeps to the grammar, as far as its first token tells.
    ///
    /// # Errors
    /// [`GrammarError::Refused`], as [`Vocabulary::compile`]; a grammar that allows nothing, or nothing but the empty
    /// answer, too.
    pub fn admit(&self, grammar: &Grammar) -> Result<(), GrammarError> {
        let mut matcher = self.compile(grammar)?;
        let mask = matcher.mask().map_err(|error| match error {
            GrammarError::Stuck(_) => GrammarError::Refused("no answer can satisfy it".into()),
            other => other,
        })?;
        let ends = self.ends.iter().filter(|end| mask.allows(**end)).count();
        if mask.count() <= ends {
            return Err(GrammarError::Refused("it allows nothing but an empty answer".into()));
        }
        Ok(())
    }

    /// [`Matcher::check`] for one answer.
    ///
    /// # Errors
    /// As there; the errors of [`Vocabulary::compile`].
    pub fn check(&self, grammar: &Grammar, tokens: &[u32], finish: Finish) -> Result<(), GrammarError> {
        self.compile(grammar)?.check(tokens, finish)
    }
}

fn regex(text: &str) -> Result<TopLevelGrammar, GrammarError> {
    if text.bytes().rev().take_while(|b| *b == b'\\').count() % 2 == 1 {
        return Err(GrammarError::Refused("it ends with a lone backslash".into()));
    }
    Ok(TopLevelGrammar::from_regex(text))
}

/// A grammar in the middle of an answer. A clone is independent of its original.
pub struct Matcher {
    inner: llguidance::Matcher,
    ends: Arc<[u32]>,
    size: usize,
}

impl Clone for Matcher {
    fn clone(&self) -> Self {
        Self { inner: self.inner.deep_clone(), ends: self.ends.clone(), size: self.size }
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").finish_non_exhaustive()
    }
}

impl Matcher {
    /// The tokens that may follow, end tokens among them where the answer may end. Typically 50 us.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`]: none may, or the step is beyond its limits.
    pub fn mask(&mut self) -> Result<Mask, GrammarError> {
        let set = self
            .inner
            .compute_mask_or_eos()
            .map_err(|e| GrammarError::Stuck(error::short(&e.to_string())))?;
        Ok(Mask::from_u32_words(set.as_slice(), self.size))
    }

    /// Whether `token` may follow.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`]: the step is beyond its limits.
    pub fn allows(&mut self, token: u32) -> Result<bool, GrammarError> {
        let stuck = |reason: String| GrammarError::Stuck(error::short(&reason));
        if token as usize >= self.size {
            return Ok(false);
        }
        if self.ends.contains(&token) {
            return self.inner.is_accepting().map_err(|e| stuck(e.to_string()));
        }
        Ok(self.inner.validate_tokens(&[token]).map_err(|e| stuck(e.to_string()))? == 1)
    }

    /// Whether `token` is one of those that end an answer.
    #[must_use]
    pub fn ends_with(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// Takes the token that follows, which must be no end token. True once only the end is allowed.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`]: it was not allowed.
    pub fn push(&mut self, token: u32) -> Result<bool, GrammarError> {
        self.inner.consume_token(token).map_err(|e| GrammarError::Stuck(error::short(&e.to_string())))?;
        Ok(self.complete())
    }

    /// Whether only the end is allowed.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.inner.is_stopped() && !self.inner.is_error()
    }

    /// Whether an answer keeps to its grammar from here on: every token was allowed, `Eos` came where the end was,
    /// `Grammar` where only the end was, and nothing came after that.
    ///
    /// # Errors
    /// [`GrammarError::Violated`] with the position of the first token that is wrong; [`GrammarError::Stuck`] where a
    /// step is beyond its limits, which says nothing about the answer.
    pub fn check(mut self, tokens: &[u32], finish: Finish) -> Result<(), GrammarError> {
        let violated = |position, reason| Err(GrammarError::Violated { position, reason });
        let last = tokens.len().saturating_sub(1);
        for (position, token) in tokens.iter().enumerate() {
            if self.complete() {
                return violated(position, "it goes on where the grammar allows only the end");
            }
            if !self.allows(*token)? {
                return violated(position, "the token is not allowed");
            }
            if self.ends.contains(token) {
                return match (position == last, finish) {
                    (true, Finish::Eos) => Ok(()),
                    (true, _) => violated(position, "it ends with an end token and does not say `eos`"),
                    (false, _) => violated(position, "it goes on after an end token"),
                };
            }
            self.push(*token)?;
        }
        match finish {
            Finish::Eos => violated(last, "it says `eos` without an end token"),
            Finish::Grammar if !self.complete() => {
                violated(last, "it says `grammar` where more than the end was allowed")
            }
            Finish::Length if self.complete() => {
                violated(last, "it says `length` where only the end was allowed")
            }
            Finish::Grammar | Finish::Length | Finish::Stop => Ok(()),
        }
    }
}
