//! Tokenizers as `tokenizer.json` carries them.
//!
//! The file is read with types of our own and not with the library's: those accept more than the families served need
//! (any regular expression among it), and some of what they accept makes them panic.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};

use super::Tokenizer;
use super::parts::{Kind, MAX_MERGES, MAX_VOCABULARY, Parts, Prefix, Spelling, byte_piece, check_names};
use super::words::Step;
use crate::error::PromptError;

/// Most steps of a normalizer or pre-tokenizer.
const MAX_STEPS: usize = 16;

/// At most `MOST` items.
struct Few<T, const MOST: usize>(Vec<T>);

impl<T, const MOST: usize> Default for Few<T, MOST> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

struct FewVisitor<T, const MOST: usize>(std::marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for FewVisitor<T, MOST> {
    type Value = Few<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MOST}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut out = Vec::new();
        while let Some(item) = list.next_element()? {
            if out.len() == MOST {
                return Err(serde::de::Error::custom(format!("a list is longer than {MOST}")));
            }
            out.push(item);
        }
        Ok(Few(out))
    }
}

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Few<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(FewVisitor(std::marker::PhantomData))
    }
}

#[derive(Default)]
struct Vocabulary(Vec<(String, u32)>);

impl<'de> Visitor<'de> for Vocabulary {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tokens to ids")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(entry) = map.next_entry()? {
            if self.0.len() == MAX_VOCABULARY {
                return Err(serde::de::Error::custom(format!("more than {MAX_VOCABULARY} tokens")));
            }
            self.0.push(entry);
        }
        Ok(self)
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

/// `["a", "b"]` or `"a b"`.
struct Merge(String, String);

impl<'de> Visitor<'de> for Merge {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge of two tokens")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self, E> {
        match text.split_once(' ') {
            Some((l, r)) if !l.is_empty() && !r.is_empty() && !r.contains(' ') => {
                Ok(Self(l.into(), r.into()))
            }
            _ => Err(E::custom(format!("merge {text:?} is not two tokens"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self, A::Error> {
        let missing = || serde::de::Error::custom("a merge is not two tokens");
        let (l, r) = (list.next_element()?.ok_or_else(missing)?, list.next_element()?.ok_or_else(missing)?);
        if list.next_element::<serde::de::IgnoredAny>()?.is_some() {
            return Err(missing());
        }
        Ok(Self(l, r))
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self(String::new(), String::new()))
    }
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Pattern {
    #[serde(rename = "String")]
    text: Option<String>,
    #[serde(rename = "Regex")]
    regex: Option<String>,
}

/// A normalizer or a pre-tokenizer.
#[derive(Deserialize)]
struct Stage {
    #[serde(rename = "type")]
    name: String,
    #[serde(default)]
    normalizers: Few<Stage, MAX_STEPS>,
    #[serde(default)]
    pretokenizers: Few<Stage, MAX_STEPS>,
    prepend: Option<String>,
    pattern: Option<Pattern>,
    content: Option<String>,
    behavior: Option<String>,
    invert: Option<bool>,
    add_prefix_space: Option<bool>,
    use_regex: Option<bool>,
    individual_digits: Option<bool>,
    replacement: Option<String>,
    prepend_scheme: Option<String>,
    split: Option<bool>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    name: Option<String>,
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    vocab: Vocabulary,
    #[serde(default)]
    merges: Few<Merge, MAX_MERGES>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Few<Added, MAX_VOCABULARY>,
    normalizer: Option<Stage>,
    pre_tokenizer: Option<Stage>,
    model: Model,
}

/// What the files beside `tokenizer.json` say about its tokens.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    pub ends: Vec<u32>,
    /// Ends given by name.
    pub end_names: Vec<String>,
    pub bos: Option<String>,
    pub add_bos: bool,
    /// Rows of the model's embedding.
    pub vocabulary: Option<u64>,
}

fn unsupported<T>(text: String) -> Result<T, PromptError> {
    Err(PromptError::Unsupported(format!("tokenizer.json: {text}")))
}

#[derive(Default)]
struct Plan {
    steps: Vec<Step>,
    prefix: Option<Prefix>,
    bytes: bool,
}

impl Plan {
    fn normalizer(&mut self, stage: &Stage) -> Result<(), PromptError> {
        let pattern = stage.pattern.as_ref().and_then(|p| p.text.as_deref());
        match (stage.name.as_str(), pattern, stage.content.as_deref()) {
            ("Sequence", ..) => stage.normalizers.0.iter().try_for_each(|s| self.normalizer(s)),
            ("NFC", ..) => self.step(Step::Nfc),
            ("Replace", Some(" "), Some("\u{2581}")) => self.step(Step::Underline),
            ("Prepend", ..) if stage.prepend.as_deref() == Some("\u{2581}") => {
                self.prefix = Some(Prefix::Each);
                Ok(())
            }
            (name, ..) => unsupported(format!("normalizer {name} is of no family served")),
        }
    }

    fn pre_tokenizer(&mut self, stage: &Stage) -> Result<(), PromptError> {
        match stage.name.as_str() {
            "Sequence" => stage.pretokenizers.0.iter().try_for_each(|s| self.pre_tokenizer(s)),
            "Digits" if stage.individual_digits == Some(true) => self.step(Step::Digits),
            "ByteLevel" if stage.add_prefix_space != Some(true) => {
                self.bytes = true;
                self.step(Step::Bytes(stage.use_regex != Some(false)))
            }
            "Split" => self.split(stage),
            "Metaspace" if stage.replacement.as_deref() == Some("\u{2581}") => self.metaspace(stage),
            name => unsupported(format!("pre-tokenizer {name} with these settings is of no family served")),
        }
    }

    fn step(&mut self, step: Step) -> Result<(), PromptError> {
        if self.steps.len() == MAX_STEPS {
            return unsupported(format!("more than {MAX_STEPS} steps"));
        }
        self.steps.push(step);
        Ok(())
    }

    fn split(&mut self, stage: &Stage) -> Result<(), PromptError> {
        let Some(pattern) = &stage.pattern else { return unsupported("Split without a pattern".into()) };
        if stage.invert == Some(true) {
            return unsupported("Split with invert".into());
        }
        let behavior = stage.behavior.as_deref().unwrap_or("");
        match (pattern.regex.as_deref(), pattern.text.as_deref(), behavior) {
            (Some(regex), None, "Isolated") => self.step(Step::split(regex)?),
            (None, Some(" "), "MergedWithPrevious") => self.step(Step::AtSpaces),
            _ => unsupported(format!("Split with behavior {behavior:?} is of no family served")),
        }
    }

    fn metaspace(&mut self, stage: &Stage) -> Result<(), PromptError> {
        let scheme = stage.prepend_scheme.as_deref();
        let scheme = scheme.unwrap_or(if stage.add_prefix_space == Some(false) { "never" } else { "always" });
        self.prefix = Some(match scheme {
            "never" => Prefix::Never,
            "first" => Prefix::FirstBare,
            "always" => Prefix::EachBare,
            other => return unsupported(format!("Metaspace with prepend_scheme {other:?}")),
        });
        self.step(Step::Underline)?;
        if stage.split == Some(false) { Ok(()) } else { self.step(Step::AtUnderlines) }
    }
}

fn check_model(model: &Model) -> Result<(), PromptError> {
    if model.name.as_deref().is_some_and(|name| name != "BPE") {
        return unsupported(format!("model {:?}, only BPE is built", model.name.as_deref().unwrap_or("")));
    }
    if model.dropout.is_some_and(|d| d != 0.0) {
        return unsupported("model.dropout is not 0".into());
    }
    for (key, text) in [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if text.as_deref().is_some_and(|t| !t.is_empty()) {
            return unsupported(format!("model.{key} is set, which no family served has"));
        }
    }
    Ok(())
}

/// Names and kinds by id; ids that nobody has are unused.
fn tokens(file: &File, rows: Option<u64>, pieces: bool) -> Result<(Vec<String>, Vec<Kind>), PromptError> {
    let ids = file.model.vocab.0.iter().map(|(_, id)| *id).chain(file.added_tokens.0.iter().map(|a| a.id));
    let most = u64::from(ids.max().unwrap_or(0)) + 1;
    let size = most.max(rows.unwrap_or(0));
    if size > MAX_VOCABULARY as u64 {
        return unsupported(format!("{size} token ids, the limit is {MAX_VOCABULARY}"));
    }
    let mut names = vec![String::new(); size as usize];
    let mut kinds = vec![Kind::Unused; size as usize];
    for (name, id) in &file.model.vocab.0 {
        let at = *id as usize;
        if kinds[at] != Kind::Unused {
            return unsupported(format!("id {id} is given to {:?} and to {name:?}", names[at]));
        }
        kinds[at] = if pieces && byte_piece(name).is_some() { Kind::Byte } else { Kind::Normal };
        names[at].clone_from(name);
    }
    for added in &file.added_tokens.0 {
        if added.lstrip || added.rstrip || added.single_word {
            let name = &added.content;
            return unsupported(format!(
                "added token {name:?} strips white space, which no family served does"
            ));
        }
        let at = added.id as usize;
        if kinds[at] != Kind::Unused && names[at] != added.content {
            return unsupported(format!("id {at} is given to {:?} and to {:?}", names[at], added.content));
        }
        let unknown = file.model.unk_token.as_ref() == Some(&added.content);
        kinds[at] = match (added.special, unknown) {
            (true, true) => Kind::Unknown,
            (true, false) => Kind::Control,
            (false, _) => Kind::UserDefined,
        };
        names[at].clone_from(&added.content);
    }
    Ok((names, kinds))
}

/// The tokenizer that the text of a `tokenizer.json` describes.
pub(super) fn build(json: &[u8], beside: &Beside) -> Result<Tokenizer, PromptError> {
    let file: File = serde_json::from_slice(json)
        .map_err(|e| PromptError::Unsupported(format!("tokenizer.json cannot be read: {e}")))?;
    check_model(&file.model)?;
    let mut plan = Plan::default();
    file.normalizer.iter().try_for_each(|stage| plan.normalizer(stage))?;
    file.pre_tokenizer.iter().try_for_each(|stage| plan.pre_tokenizer(stage))?;
    let spelling = match (plan.bytes, file.model.byte_fallback) {
        (true, false) => Spelling::Letters,
        (false, true) => Spelling::Pieces,
        _ => return unsupported("neither byte-level nor SentencePiece BPE with byte fallback".into()),
    };
    let (mut names, mut kinds) = tokens(&file, beside.vocabulary, spelling == Spelling::Pieces)?;
    check_names(names.iter().map(String::as_str), file.model.merges.0.len())?;
    let ids: BTreeMap<&str, u32> = names.iter().enumerate().map(|(id, n)| (n.as_str(), id as u32)).collect();
    let named = |name: &String| ids.get(name.as_str()).copied();
    let mut ends = beside.ends.clone();
    ends.extend(beside.end_names.iter().filter_map(named));
    let bos = beside.bos.as_ref().and_then(named);
    let unknown = file.model.unk_token.as_ref().and_then(named);
    drop(ids);
    // An end or a beginning is control even where it stands for the unknown too.
    for id in ends.iter().chain(&bos) {
        if let Some(kind @ Kind::Unknown) = kinds.get_mut(*id as usize) {
            *kind = Kind::Control;
        }
    }
    Parts {
        merges: file.model.merges.0.into_iter().map(|Merge(l, r)| (l, r)).collect(),
        spelling,
        prefix: plan.prefix.unwrap_or(Prefix::Never),
        steps: plan.steps,
        ignore_merges: file.model.ignore_merges,
        unknown,
        ends,
        bos,
        add_bos: beside.add_bos,
        names: std::mem::take(&mut names),
        kinds,
    }
    .build(|_| None)
}
