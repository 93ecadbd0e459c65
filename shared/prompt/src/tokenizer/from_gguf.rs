//! Tokenizers as GGUF carries them.

use super::parts::{Kind, Parts, Prefix, Spelling, check_names};
use super::words::{Step, family};
use super::{Tokenizer, spm};
use crate::error::PromptError;
use crate::gguf::{Gguf, Value};

const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

fn flag(gguf: &Gguf, key: &str, default: bool) -> Result<bool, PromptError> {
    match gguf.get(key) {
        None => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(_) => Err(PromptError::Unsupported(format!("{key} is not true or false"))),
    }
}

fn kinds(gguf: &Gguf, tokens: usize) -> Result<Vec<i64>, PromptError> {
    let kinds = gguf.integers("tokenizer.ggml.token_type")?;
    if kinds.len() != tokens {
        let text = format!("{} token types for {tokens} tokens", kinds.len());
        return Err(PromptError::Unsupported(text));
    }
    Ok(kinds)
}

fn ends(gguf: &Gguf) -> Result<Vec<u32>, PromptError> {
    let keys = END_KEYS.into_iter().filter(|key| gguf.get(key).is_some());
    keys.map(|key| gguf.u32(key).map_err(PromptError::from)).collect()
}

fn id(gguf: &Gguf, key: &str, tokens: usize) -> Option<u32> {
    gguf.u32(key).ok().filter(|id| (*id as usize) < tokens)
}

/// The hash of `gpt2` tokenizers, which registries list: BLAKE3 over each text with its length before it.
fn hash(pre: &str, parts: &Parts, kinds: &[i64], merges: &[&str]) -> [u8; 32] {
    let mut h = blake3::Hasher::new();
    let mut text = |s: &str| {
        h.update(&(s.len() as u64).to_be_bytes());
        h.update(s.as_bytes());
    };
    text("infera/tokenizer/1");
    text("gpt2");
    text(pre);
    text(&parts.names.len().to_string());
    for (name, kind) in parts.names.iter().zip(kinds) {
        text(name);
        text(&kind.to_string());
    }
    text(&merges.len().to_string());
    merges.iter().for_each(|m| text(m));
    parts.ends.iter().for_each(|e| text(&e.to_string()));
    text(&parts.bos.filter(|_| parts.add_bos).map_or_else(String::new, |b| b.to_string()));
    h.finalize().into()
}

fn byte_level(gguf: &Gguf) -> Result<Tokenizer, PromptError> {
    let pre = gguf.string("tokenizer.ggml.pre").unwrap_or("default");
    let family = family(pre)?;
    let names = gguf.strings("tokenizer.ggml.tokens")?;
    let merges = gguf.strings("tokenizer.ggml.merges")?;
    check_names(names.iter().copied(), merges.len())?;
    let kinds = kinds(gguf, names.len())?;
    let pair = |merge: &&str| {
        let pair = merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty());
        pair.map(|(l, r)| (l.to_owned(), r.to_owned()))
            .ok_or_else(|| PromptError::Unsupported(format!("merge {merge:?} is not two tokens")))
    };
    let parts = Parts {
        merges: merges.iter().map(pair).collect::<Result<_, _>>()?,
        kinds: kinds.iter().map(|k| Kind::of(*k)).collect::<Result<_, _>>()?,
        spelling: Spelling::Letters,
        prefix: Prefix::Never,
        steps: family.steps,
        ignore_merges: family.ignore_merges,
        unknown: None,
        ends: ends(gguf)?,
        bos: id(gguf, "tokenizer.ggml.bos_token_id", names.len()),
        add_bos: flag(gguf, "tokenizer.ggml.add_bos_token", family.add_bos)?,
        names: names.into_iter().map(str::to_owned).collect(),
    };
    parts.build(|parts| Some(hash(pre, parts, &kinds, &merges)))
}

/// SentencePiece BPE. Like llama.cpp and like transformers from a GGUF file, a space goes before every text between
/// special tokens where `add_space_prefix` says so.
fn sentence_piece(gguf: &Gguf) -> Result<Tokenizer, PromptError> {
    let names = gguf.strings("tokenizer.ggml.tokens")?;
    check_names(names.iter().copied(), 0)?;
    let kinds = kinds(gguf, names.len())?;
    let kinds: Vec<Kind> = kinds.iter().map(|k| Kind::of(*k)).collect::<Result<_, _>>()?;
    let scores = gguf.floats("tokenizer.ggml.scores")?;
    if scores.len() != names.len() {
        let text = format!("{} scores for {} tokens", scores.len(), names.len());
        return Err(PromptError::Unsupported(text));
    }
    if flag(gguf, "tokenizer.ggml.remove_extra_whitespaces", false)? {
        let text = "tokenizer.ggml.remove_extra_whitespaces is true, only false is built".into();
        return Err(PromptError::Unsupported(text));
    }
    let spelled = |(name, kind): (&&str, &Kind)| match kind {
        Kind::UserDefined => name.replace('\u{2581}', " "),
        _ => (*name).to_owned(),
    };
    let each = flag(gguf, "tokenizer.ggml.add_space_prefix", true)?;
    let tokens = names.len();
    let names: Vec<String> = names.iter().zip(&kinds).map(spelled).collect();
    let unknown = id(gguf, "tokenizer.ggml.unknown_token_id", tokens);
    Parts {
        merges: spm::merges(&names, &kinds, &scores)?,
        spelling: Spelling::Pieces,
        prefix: if each { Prefix::Each } else { Prefix::Never },
        steps: vec![Step::Underline],
        ignore_merges: false,
        unknown: unknown.or_else(|| kinds.iter().position(|k| *k == Kind::Unknown).map(|id| id as u32)),
        ends: ends(gguf)?,
        bos: id(gguf, "tokenizer.ggml.bos_token_id", tokens),
        add_bos: flag(gguf, "tokenizer.ggml.add_bos_token", true)?,
        names,
        kinds,
    }
    .build(|_| None)
}

/// The tokenizer that a header describes.
pub(super) fn build(gguf: &Gguf) -> Result<Tokenizer, PromptError> {
    match gguf.string("tokenizer.ggml.model")? {
        "gpt2" => byte_level(gguf),
        "llama" => sentence_piece(gguf),
        other => Err(PromptError::Unsupported(format!(
            "tokenizer.ggml.model is {other}, known are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
        ))),
    }
}
