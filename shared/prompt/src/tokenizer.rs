//! Byte-level BPE as GGUF carries it: text to token ids.

use std::collections::BTreeMap;
use std::path::Path;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{PreTokenizerWrapper, TokenizerBuilder};

use crate::error::PromptError;
use crate::gguf::Gguf;

const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Tokens that end a generation wherever they are control tokens of the model, whatever its metadata says.
const END_NAMES: [&str; 7] =
    ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "</s>"];
const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

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
    names: Vec<String>,
    ends: Vec<u32>,
    bos: Option<u32>,
    add_bos: bool,
    hash: [u8; 32],
}

/// Texts that stand for one token as a whole, longest first.
#[derive(Debug, Default)]
pub(crate) struct Marks(Vec<(String, u32)>);

impl Marks {
    fn of(names: &[&str], kinds: &[i64], kind: i64) -> Self {
        let mut marks: Vec<(String, u32)> = names
            .iter()
            .zip(kinds)
            .enumerate()
            .filter(|(_, (name, k))| **k == kind && !name.is_empty())
            .map(|(id, (name, _))| ((*name).to_owned(), id as u32))
            .collect();
        marks.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        Self(marks)
    }

    /// The longest mark that `text` begins with.
    pub(crate) fn at_start(&self, text: &str) -> Option<(usize, u32)> {
        self.0.iter().find(|(mark, _)| text.starts_with(mark.as_str())).map(|(mark, id)| (mark.len(), *id))
    }

    /// The first mark in `text`: (start, end, token); the longest of those that begin there.
    pub(crate) fn first(&self, text: &str) -> Option<(usize, usize, u32)> {
        let starts: Vec<u8> = self.0.iter().filter_map(|(m, _)| m.bytes().next()).collect();
        if starts.is_empty() {
            return None;
        }
        text.char_indices()
            .filter(|(at, _)| starts.contains(&text.as_bytes()[*at]))
            .find_map(|(at, _)| self.at_start(&text[at..]).map(|(len, id)| (at, at + len, id)))
    }
}

/// GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and up.
pub(crate) fn byte_letters() -> BTreeMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|b| {
            let plain = matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if plain {
                u32::from(b)
            } else {
                next += 1;
                next - 1
            };
            (char::from_u32(code).unwrap_or('\u{FFFD}'), b)
        })
        .collect()
}

fn token_bytes(name: &str, kind: i64, letters: &BTreeMap<char, u8>) -> Box<[u8]> {
    match kind {
        CONTROL => Box::default(),
        USER_DEFINED => name.as_bytes().into(),
        _ => {
            let bytes: Option<Vec<u8>> = name.chars().map(|c| letters.get(&c).copied()).collect();
            bytes.unwrap_or_else(|| name.as_bytes().to_vec()).into()
        }
    }
}

fn pre_tokenizer(pre: &str) -> Result<PreTokenizerWrapper, PromptError> {
    let byte_level = ByteLevel::new(false, true, true);
    match pre {
        "smollm" => Ok(PreTokenizerWrapper::Sequence(Sequence::new(vec![
            PreTokenizerWrapper::Digits(Digits::new(true)),
            PreTokenizerWrapper::ByteLevel(byte_level),
        ]))),
        "gpt-2" | "default" => Ok(PreTokenizerWrapper::ByteLevel(byte_level)),
        other => Err(PromptError::Unsupported(format!(
            "tokenizer.ggml.pre is {other}, known are smollm and gpt-2"
        ))),
    }
}

fn build_bpe(pre: &str, names: &[&str], merges: &[&str]) -> Result<Bpe, PromptError> {
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let pair =
            merge.split_once(' ').ok_or_else(|| PromptError::Unsupported(format!("merge {merge:?}")))?;
        pairs.push((pair.0.to_owned(), pair.1.to_owned()));
    }
    let vocabulary: Vocab =
        names.iter().enumerate().map(|(id, name)| ((*name).to_owned(), id as u32)).collect();
    if vocabulary.len() != names.len() {
        return Err(PromptError::Unsupported("tokenizer.ggml.tokens names a token twice".into()));
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, pairs)
        .build()
        .map_err(|e| PromptError::Unsupported(format!("tokenizer: {e}")))?;
    TokenizerBuilder::new()
        .with_model(bpe)
        .with_normalizer(None)
        .with_pre_tokenizer(Some(pre_tokenizer(pre)?))
        .with_post_processor(None)
        .with_decoder(None)
        .build()
        .map_err(|e| PromptError::Unsupported(format!("tokenizer: {e}")))
}

fn end_tokens(gguf: &Gguf, names: &[&str], kinds: &[i64]) -> Result<Vec<u32>, PromptError> {
    let mut ends: Vec<u32> = Vec::new();
    for key in END_KEYS {
        if gguf.get(key).is_some() {
            ends.push(gguf.u32(key)?);
        }
    }
    for (id, (name, kind)) in names.iter().zip(kinds).enumerate() {
        if *kind == CONTROL && END_NAMES.contains(name) {
            ends.push(id as u32);
        }
    }
    ends.sort_unstable();
    ends.dedup();
    match ends.last() {
        None => Err(PromptError::Unsupported("the model names no end token".into())),
        Some(last) if *last as usize >= names.len() => {
            Err(PromptError::Unsupported(format!("end token {last} is outside the vocabulary")))
        }
        Some(_) => Ok(ends),
    }
}

/// BLAKE3 over everything that decides how text becomes ids: each text with its length before it.
fn hash(
    model: &str,
    pre: &str,
    names: &[&str],
    kinds: &[i64],
    merges: &[&str],
    ends: &[u32],
    bos: Option<u32>,
) -> [u8; 32] {
    let mut h = blake3::Hasher::new();
    let mut text = |s: &str| {
        h.update(&(s.len() as u64).to_be_bytes());
        h.update(s.as_bytes());
    };
    text("infera/tokenizer/1");
    text(model);
    text(pre);
    text(&names.len().to_string());
    for (name, kind) in names.iter().zip(kinds) {
        text(name);
        text(&kind.to_string());
    }
    text(&merges.len().to_string());
    merges.iter().for_each(|m| text(m));
    ends.iter().for_each(|e| text(&e.to_string()));
    text(&bos.map_or_else(String::new, |b| b.to_string()));
    h.finalize().into()
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
        let model = gguf.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            let text = format!("tokenizer.ggml.model is {model}, only gpt2 (byte-level BPE) is built");
            return Err(PromptError::Unsupported(text));
        }
        let pre = gguf.string("tokenizer.ggml.pre").unwrap_or("default");
        let names = gguf.strings("tokenizer.ggml.tokens")?;
        let merges = gguf.strings("tokenizer.ggml.merges")?;
        let kinds = gguf.integers("tokenizer.ggml.token_type")?;
        if kinds.len() != names.len() || names.is_empty() {
            let text = format!("{} token types for {} tokens", kinds.len(), names.len());
            return Err(PromptError::Unsupported(text));
        }
        let add_bos = gguf.get("tokenizer.ggml.add_bos_token") == Some(&crate::gguf::Value::Bool(true));
        let bos = gguf.u32("tokenizer.ggml.bos_token_id").ok().filter(|b| (*b as usize) < names.len());
        let ends = end_tokens(gguf, &names, &kinds)?;
        let letters = byte_letters();
        Ok(Self {
            bpe: build_bpe(pre, &names, &merges)?,
            bytes: names.iter().zip(&kinds).map(|(n, k)| token_bytes(n, *k, &letters)).collect(),
            control: Marks::of(&names, &kinds, CONTROL),
            user_defined: Marks::of(&names, &kinds, USER_DEFINED),
            hash: hash(model, pre, &names, &kinds, &merges, &ends, bos.filter(|_| add_bos)),
            names: names.iter().map(|n| (*n).to_owned()).collect(),
            ends,
            bos,
            add_bos,
        })
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
        self.encode_into(text, &mut ids)?;
        Ok(ids)
    }

    pub(crate) fn encode_into(&self, mut text: &str, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        while let Some((start, end, token)) = self.user_defined.first(text) {
            self.encode_words(&text[..start], ids)?;
            ids.push(token);
            text = &text[end..];
        }
        self.encode_words(text, ids)
    }

    fn encode_words(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding = self.bpe.encode_fast(text, false).map_err(|e| PromptError::Tokenize(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
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

    pub(crate) fn bos_name(&self) -> &str {
        self.bos.and_then(|b| self.name(b)).unwrap_or("")
    }

    /// BLAKE3 over vocabulary, token types, merges, pre-tokenizer and end tokens.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }
}
