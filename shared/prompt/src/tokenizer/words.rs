//! How a text is cut into words before merges are applied: the pre-tokenizers of the families served.

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::PromptError;

/// Llama 3's, from its tokenizer.json.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's, 2.5's and 3's.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral Nemo's ("tekken").
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's, which ByteLevel itself has.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The patterns that a tokenizer.json may name. Others are refused: a pattern can take time exponential in the text.
const PATTERNS: [&str; 4] = [LLAMA3, QWEN2, TEKKEN, GPT2];

/// One step on the way from text to words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Canonical composition.
    Nfc,
    /// Space to U+2581.
    Underline,
    /// Every digit alone.
    Digits,
    /// One of [`PATTERNS`], each match a word.
    Split(&'static str),
    /// Letters for bytes, after a split with [`GPT2`] if true.
    Bytes(bool),
    /// A word ends at each space.
    AtSpaces,
    /// A word begins at each U+2581.
    AtUnderlines,
}

impl Step {
    /// The step that splits by `pattern`.
    pub(super) fn split(pattern: &str) -> Result<Self, PromptError> {
        let known = PATTERNS.into_iter().find(|known| *known == pattern).map(Step::Split);
        known.ok_or_else(|| {
            let pattern: String = pattern.chars().take(200).collect();
            PromptError::Unsupported(format!("pre-tokenizer pattern {pattern:?} is of no family served"))
        })
    }

    /// A text that names the step, for the tokenizer's hash.
    pub(super) fn describe(&self) -> String {
        match self {
            Step::Nfc => "nfc".into(),
            Step::Underline => "underline".into(),
            Step::Digits => "digits".into(),
            Step::Split(pattern) => format!("split {pattern}"),
            Step::Bytes(split) => format!("bytes {split}"),
            Step::AtSpaces => "at spaces".into(),
            Step::AtUnderlines => "at underlines".into(),
        }
    }

    fn normalizer(&self) -> Result<Option<NormalizerWrapper>, tokenizers::Error> {
        Ok(match self {
            Step::Nfc => Some(NormalizerWrapper::NFC(NFC)),
            Step::Underline => {
                let replace = tokenizers::normalizers::Replace::new(" ", "\u{2581}")?;
                Some(NormalizerWrapper::Replace(replace))
            }
            _ => None,
        })
    }

    fn pre_tokenizer(&self) -> Result<Option<PreTokenizerWrapper>, tokenizers::Error> {
        let split = |pattern, behavior| Split::new(pattern, behavior, false).map(PreTokenizerWrapper::Split);
        Ok(Some(match self {
            Step::Nfc | Step::Underline => return Ok(None),
            Step::Digits => PreTokenizerWrapper::Digits(Digits::new(true)),
            Step::Split(pattern) => {
                split(SplitPattern::Regex((*pattern).into()), SplitDelimiterBehavior::Isolated)?
            }
            Step::Bytes(gpt2) => PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, *gpt2)),
            Step::AtSpaces => {
                split(SplitPattern::String(" ".into()), SplitDelimiterBehavior::MergedWithPrevious)?
            }
            Step::AtUnderlines => {
                PreTokenizerWrapper::Metaspace(Metaspace::new('\u{2581}', PrependScheme::Never, true))
            }
        }))
    }
}

/// The library's forms of `steps`.
pub(super) fn assemble(
    steps: &[Step],
) -> Result<(Option<NormalizerWrapper>, Option<PreTokenizerWrapper>), tokenizers::Error> {
    let mut normalizers = Vec::new();
    let mut pre_tokenizers = Vec::new();
    for step in steps {
        normalizers.extend(step.normalizer()?);
        pre_tokenizers.extend(step.pre_tokenizer()?);
    }
    let normalizer = (!normalizers.is_empty())
        .then(|| NormalizerWrapper::Sequence(tokenizers::normalizers::Sequence::new(normalizers)));
    let pre =
        (!pre_tokenizers.is_empty()).then(|| PreTokenizerWrapper::Sequence(Sequence::new(pre_tokenizers)));
    Ok((normalizer, pre))
}

/// What `tokenizer.ggml.pre` stands for.
#[derive(Debug)]
pub(super) struct Family {
    pub steps: Vec<Step>,
    /// A word that is a token as a whole is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// Whether the model wants its first token before a text, where the file does not say.
    pub add_bos: bool,
}

/// The family that a GGUF file names; aliases as llama.cpp (llama-vocab.cpp) has them.
pub(super) fn family(pre: &str) -> Result<Family, PromptError> {
    let (steps, ignore_merges) = match pre {
        "smollm" => (vec![Step::Digits, Step::Bytes(true)], false),
        "gpt-2" | "default" => (vec![Step::Bytes(true)], false),
        "llama-bpe" | "llama3" | "llama-v3" => (vec![Step::Split(LLAMA3), Step::Bytes(false)], true),
        "qwen2" | "deepseek-r1-qwen" => (vec![Step::Nfc, Step::Split(QWEN2), Step::Bytes(false)], false),
        "tekken" => (vec![Step::Split(TEKKEN), Step::Bytes(false)], true),
        other => {
            return Err(PromptError::Unsupported(format!(
                "tokenizer.ggml.pre is {other}, known are smollm, gpt-2, llama-bpe, qwen2 and tekken"
            )));
        }
    };
    Ok(Family { add_bos: ignore_merges, steps, ignore_merges })
}
