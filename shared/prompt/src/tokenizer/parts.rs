//! What a tokenizer is made of, whatever file it came in.

use std::collections::BTreeMap;

use tokenizers::TokenizerBuilder;
use tokenizers::models::bpe::{BPE, Vocab};

use super::marks::Marks;
use super::words::{Step, assemble};
use super::{Bpe, Tokenizer};
use crate::error::PromptError;

/// Most tokens of a vocabulary.
pub const MAX_VOCABULARY: usize = 1 << 19;
/// Longest token, in bytes of its name.
pub const MAX_TOKEN_BYTES: usize = 1024;
/// Most bytes of all names together.
pub const MAX_VOCABULARY_BYTES: usize = 16 << 20;
/// Most merges.
pub const MAX_MERGES: usize = 1 << 20;

/// Tokens that end a generation wherever they are control tokens of the model, whatever its metadata says.
const END_NAMES: [&str; 7] =
    ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "</s>"];

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    /// Stands for what the vocabulary lacks.
    Unknown,
    /// Never made of text.
    Control,
    /// Found in text before it is cut into words.
    UserDefined,
    Unused,
    /// A byte that no other token has.
    Byte,
}

impl Kind {
    /// llama.cpp's numbers (`llama_token_type`).
    pub(super) fn of(number: i64) -> Result<Self, PromptError> {
        Ok(match number {
            0 | 1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            other => {
                return Err(PromptError::Unsupported(format!(
                    "tokenizer.ggml.token_type has a {other}, known are 1 to 6"
                )));
            }
        })
    }
}

/// How a name stands for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's letters for bytes.
    Letters,
    /// SentencePiece: U+2581 for a space, `<0x0A>` for a byte.
    Pieces,
}

/// Before which texts a space is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefix {
    Never,
    /// Before every text between special tokens.
    Each,
    /// Before every text between special tokens that does not begin with a space.
    EachBare,
    /// Before the text that begins everything, if it does not begin with a space.
    FirstBare,
}

/// Everything that decides how text becomes ids.
#[derive(Debug)]
pub(super) struct Parts {
    pub names: Vec<String>,
    pub kinds: Vec<Kind>,
    pub merges: Vec<(String, String)>,
    pub spelling: Spelling,
    pub prefix: Prefix,
    pub steps: Vec<Step>,
    pub ignore_merges: bool,
    pub unknown: Option<u32>,
    pub ends: Vec<u32>,
    pub bos: Option<u32>,
    pub add_bos: bool,
}

fn unsupported<T>(text: String) -> Result<T, PromptError> {
    Err(PromptError::Unsupported(text))
}

/// Refuses vocabularies that cost too much.
pub(super) fn check_names<'a>(
    names: impl Iterator<Item = &'a str>,
    merges: usize,
) -> Result<(), PromptError> {
    let (mut count, mut bytes, mut longest) = (0usize, 0usize, 0);
    for name in names {
        count += 1;
        bytes = bytes.saturating_add(name.len());
        longest = longest.max(name.len());
    }
    for (what, got, limit) in [
        ("tokens", count, MAX_VOCABULARY),
        ("bytes in the names of all tokens", bytes, MAX_VOCABULARY_BYTES),
        ("bytes in the name of a token", longest, MAX_TOKEN_BYTES),
        ("merges", merges, MAX_MERGES),
    ] {
        if got > limit {
            return unsupported(format!("the tokenizer has {got} {what}, the limit is {limit}"));
        }
    }
    if count == 0 { unsupported("the tokenizer has no tokens".into()) } else { Ok(()) }
}

/// GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and up.
pub(super) fn byte_letters() -> BTreeMap<char, u8> {
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

/// The byte that `<0x0A>` stands for.
pub(super) fn byte_piece(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

impl Parts {
    fn bytes_of(&self, id: usize, letters: &BTreeMap<char, u8>) -> Box<[u8]> {
        let name = self.names[id].as_str();
        match (self.kinds[id], self.spelling) {
            (Kind::Control, _) | (Kind::Unknown | Kind::Unused, Spelling::Pieces) => Box::default(),
            (Kind::UserDefined, Spelling::Letters) => name.as_bytes().into(),
            (Kind::Byte, Spelling::Pieces) => byte_piece(name).into_iter().collect(),
            (_, Spelling::Pieces) => name.replace('\u{2581}', " ").into_bytes().into(),
            (_, Spelling::Letters) => {
                let bytes: Option<Vec<u8>> = name.chars().map(|c| letters.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| name.as_bytes().to_vec()).into()
            }
        }
    }

    /// The library's model over the tokens that text can become.
    fn model(&mut self) -> Result<BPE, PromptError> {
        let mut vocabulary = Vocab::default();
        for (id, (name, kind)) in self.names.iter().zip(&self.kinds).enumerate() {
            let unknown = self.unknown == Some(id as u32) && *kind == Kind::Unknown;
            let ordinary = matches!(kind, Kind::Normal | Kind::Byte) || unknown;
            if ordinary && vocabulary.insert(name.clone(), id as u32).is_some() {
                return unsupported(format!("the tokenizer names the token {name:?} twice"));
            }
        }
        for (id, (name, kind)) in self.names.iter().zip(&self.kinds).enumerate() {
            if *kind == Kind::UserDefined {
                vocabulary.entry(name.clone()).or_insert(id as u32);
            }
        }
        // A merge that makes a control token would let text become one. The library refuses names that nobody has.
        let hidden: BTreeMap<&str, ()> = self
            .names
            .iter()
            .filter(|name| !vocabulary.contains_key(*name))
            .map(|name| (name.as_str(), ()))
            .collect();
        let is_hidden = |name: &str| hidden.contains_key(name);
        let merges = std::mem::take(&mut self.merges);
        let merges = merges
            .into_iter()
            .filter(|(l, r)| !is_hidden(l) && !is_hidden(r) && !is_hidden(&format!("{l}{r}")))
            .collect();
        let pieces = self.spelling == Spelling::Pieces;
        let mut builder = BPE::builder()
            .vocab_and_merges(vocabulary, merges)
            .ignore_merges(self.ignore_merges)
            .byte_fallback(pieces)
            .fuse_unk(pieces);
        let unknown = self.unknown.filter(|id| self.kinds.get(*id as usize) == Some(&Kind::Unknown));
        if let Some(name) = unknown.and_then(|id| self.names.get(id as usize)) {
            builder = builder.unk_token(name.clone());
        }
        builder.build().map_err(|e| PromptError::Unsupported(format!("tokenizer: {e}")))
    }

    fn bpe(&mut self) -> Result<Bpe, PromptError> {
        let model = self.model()?;
        let failed = |e: tokenizers::Error| PromptError::Unsupported(format!("tokenizer: {e}"));
        let (normalizer, pre_tokenizer) = assemble(&self.steps).map_err(failed)?;
        TokenizerBuilder::new()
            .with_model(model)
            .with_normalizer(normalizer)
            .with_pre_tokenizer(pre_tokenizer)
            .with_post_processor(None)
            .with_decoder(None)
            .build()
            .map_err(failed)
    }

    fn marks(&self, kinds: &[Kind]) -> Result<Marks, PromptError> {
        // White space at the ends and single letters cannot be told from a message's own.
        let usable = |name: &str| {
            name.chars().nth(1).is_some() && name.trim_matches(crate::template::is_space).len() == name.len()
        };
        let control = kinds.contains(&Kind::Control);
        let found = self.names.iter().zip(&self.kinds).enumerate().filter(|(_, (name, kind))| {
            kinds.contains(kind) && !name.is_empty() && (!control || usable(name))
        });
        let mut marks: Vec<(&str, u32)> = found.map(|(id, (name, _))| (name.as_str(), id as u32)).collect();
        // GGUF has runs of spaces as they occur in text, tokenizer.json as SentencePiece writes them.
        let spaced = |(name, id): &(&str, u32)| {
            let pieces = self.spelling == Spelling::Pieces && !control && name.contains(' ');
            pieces.then(|| (name.replace(' ', "\u{2581}"), *id))
        };
        let underlined: Vec<(String, u32)> = marks.iter().filter_map(spaced).collect();
        marks.extend(underlined.iter().map(|(name, id)| (name.as_str(), *id)));
        Marks::new(&marks)
    }

    fn add_known_ends(&mut self) -> Result<(), PromptError> {
        for (id, (name, kind)) in self.names.iter().zip(&self.kinds).enumerate() {
            if *kind == Kind::Control && END_NAMES.contains(&name.as_str()) {
                self.ends.push(id as u32);
            }
        }
        self.ends.sort_unstable();
        self.ends.dedup();
        match self.ends.last() {
            None => unsupported("the model names no end token".into()),
            Some(last) if *last as usize >= self.names.len() => {
                unsupported(format!("end token {last} is outside the vocabulary"))
            }
            Some(_) => Ok(()),
        }
    }

    /// BLAKE3 over all parts: each text with its length before it.
    fn hash(&self) -> [u8; 32] {
        let mut h = blake3::Hasher::new();
        let mut text = |s: &str| {
            h.update(&(s.len() as u64).to_be_bytes());
            h.update(s.as_bytes());
        };
        text("infera/tokenizer/2");
        text(&format!("{:?} {:?} {} {:?}", self.spelling, self.prefix, self.ignore_merges, self.unknown));
        text(&self.steps.len().to_string());
        self.steps.iter().for_each(|step| text(&step.describe()));
        text(&self.names.len().to_string());
        for (name, kind) in self.names.iter().zip(&self.kinds) {
            text(name);
            text(&format!("{kind:?}"));
        }
        text(&self.merges.len().to_string());
        for (left, right) in &self.merges {
            text(left);
            text(right);
        }
        self.ends.iter().for_each(|e| text(&e.to_string()));
        text(&self.bos.filter(|_| self.add_bos).map_or_else(String::new, |b| b.to_string()));
        h.finalize().into()
    }

    pub(super) fn build(
        mut self,
        hash: impl FnOnce(&Self) -> Option<[u8; 32]>,
    ) -> Result<Tokenizer, PromptError> {
        self.add_known_ends()?;
        let hash = hash(&self).unwrap_or_else(|| self.hash());
        let letters = byte_letters();
        let bpe = self.bpe()?;
        Ok(Tokenizer {
            bpe,
            bytes: (0..self.names.len()).map(|id| self.bytes_of(id, &letters)).collect(),
            control: self.marks(&[Kind::Control, Kind::Unknown])?,
            user_defined: self.marks(&[Kind::UserDefined])?,
            prefix: self.prefix,
            hash,
            names: self.names,
            ends: self.ends,
            bos: self.bos,
            add_bos: self.add_bos,
        })
    }
}
