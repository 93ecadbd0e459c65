//! Text to token ids: byte-level BPE and SentencePiece BPE, from GGUF metadata or `tokenizer.json`.

mod from_gguf;
mod from_json;
mod marks;
mod parts;
mod spm;
mod words;

use std::path::Path;

use tokenizers::PreTokenizerWrapper;
use tokenizers::models::bpe::BPE;

use crate::error::PromptError;
use crate::gguf::Gguf;
pub(crate) use from_json::Beside;
pub use marks::MAX_MARK_BYTES;
pub(crate) use marks::Marks;
use parts::Prefix;
pub use parts::{MAX_MERGES, MAX_TOKEN_BYTES, MAX_VOCABULARY, MAX_VOCABULARY_BYTES};

type Bpe = tokenizers::TokenizerImpl<
    BPE,
    tokenizers::NormalizerWrapper,
    PreTokenizerWrapper,
    tokenizers::PostProcessorWrapper,
    tokenizers::DecoderWrapper,
>;

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: Bpe,
    /// What each token adds to the text; nothing for control tokens.
    bytes: Vec<Box<[u8]>>,
    control: Marks,
    user_defined: Marks,
    prefix: Prefix,
    names: Vec<String>,
    ends: Vec<u32>,
    bos: Option<u32>,
    add_bos: bool,
    hash: [u8; 32],
}

impl Tokenizer {
    /// The tokenizer of the GGUF file at `path`.
    ///
    /// # Errors
    /// The file is no GGUF, or its tokenizer is of a kind that this crate does not build.
    pub fn from_gguf(path: &Path) -> Result<Self, PromptError> {
        Self::new(&Gguf::open(path)?)
    }

    /// The tokenizer that a header describes.
    ///
    /// # Errors
    /// See [`Tokenizer::from_gguf`].
    pub fn new(gguf: &Gguf) -> Result<Self, PromptError> {
        from_gguf::build(gguf)
    }

    pub(crate) fn from_json(json: &[u8], beside: &Beside) -> Result<Self, PromptError> {
        from_json::build(json, beside)
    }

    /// Ids of `text` in which nothing is a control token: `<|im_end|>` becomes the tokens of its letters.
    ///
    /// As in llama.cpp and transformers, a byte that the vocabulary lacks is left out (SmolLM2 lacks six control
    /// characters and the bytes of planes 4 to 11).
    ///
    /// # Errors
    /// The tokenizer library failed.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let mut ids = Vec::new();
        self.encode_into(text, true, &mut ids)?;
        Ok(ids)
    }

    /// `first`: whether `text` begins everything, which decides about SentencePiece's space before it.
    pub(crate) fn encode_into(
        &self,
        mut text: &str,
        mut first: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), PromptError> {
        while let Some((start, end, token)) = self.user_defined.first(text) {
            self.encode_words(&text[..start], first, ids)?;
            ids.push(token);
            text = &text[end..];
            first = false;
        }
        self.encode_words(text, first, ids)
    }

    fn encode_words(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        if text.is_empty() {
            return Ok(());
        }
        let bare = !text.starts_with([' ', '\u{2581}']);
        let spaced = match self.prefix {
            Prefix::Never => false,
            Prefix::Each => true,
            Prefix::EachBare => bare,
            Prefix::FirstBare => first && bare,
        };
        let encoding = if spaced {
            self.bpe.encode_fast(format!("\u{2581}{text}"), false)
        } else {
            self.bpe.encode_fast(text, false)
        };
        ids.extend_from_slice(encoding.map_err(|e| PromptError::Tokenize(e.to_string()))?.get_ids());
        Ok(())
    }

    pub(crate) fn control(&self) -> &Marks {
        &self.control
    }

    /// The bytes that a token adds to the text: none for control tokens and for ids outside the vocabulary.
    #[must_use]
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], |b| b)
    }

    /// A token as the vocabulary writes it.
    #[must_use]
    pub fn name(&self, token: u32) -> Option<&str> {
        self.names.get(token as usize).map(String::as_str)
    }

    /// Number of token ids.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.names.len()
    }

    /// Tokens that end a generation, ascending.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.ends
    }

    /// The token that the model wants before every text, if any.
    #[must_use]
    pub fn leading_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }

    pub(crate) fn bos_name(&self) -> Option<&str> {
        self.bos.and_then(|b| self.name(b))
    }

    /// BLAKE3 over vocabulary, token types, merges, pre-tokenizer and end tokens.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }
}
