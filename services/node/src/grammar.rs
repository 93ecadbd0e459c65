//! Grammars of leases, compiled away from the engine's thread and from the session's.

use std::sync::{Arc, OnceLock};

use infera_grammar::{Matcher, Vocabulary};
use infera_prompt::Tokenizer;
use infera_protocol::grammar::Grammar;

/// The model's tokens, prepared when the first request with a grammar comes.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    end_tokens: Vec<u32>,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
}

impl Grammars {
    pub fn new(tokenizer: Arc<Tokenizer>, end_tokens: Vec<u32>) -> Arc<Self> {
        Arc::new(Self { tokenizer, end_tokens, vocabulary: OnceLock::new() })
    }

    /// A grammar, ready for its first token. Takes up to some 0.1 s.
    ///
    /// # Errors
    /// In words: this node cannot keep to it.
    pub async fn matcher(self: &Arc<Self>, grammar: &Grammar) -> Result<Matcher, String> {
        let (grammars, grammar) = (self.clone(), grammar.clone());
        tokio::task::spawn_blocking(move || grammars.compile(&grammar)).await.map_err(|e| e.to_string())?
    }

    fn compile(&self, grammar: &Grammar) -> Result<Matcher, String> {
        let made = self.vocabulary.get_or_init(|| {
            Vocabulary::new(&self.tokenizer, &self.end_tokens).map_err(|error| error.to_string())
        });
        made.as_ref()
            .map_err(Clone::clone)
            .and_then(|made| made.compile(grammar).map_err(|error| error.to_string()))
    }
}
