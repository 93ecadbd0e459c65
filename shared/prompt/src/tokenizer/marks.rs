//! Texts that stand for one token as a whole.

use std::collections::BTreeSet;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::error::PromptError;

/// Most bytes of all control tokens, or of all user-defined ones, together.
pub const MAX_MARK_BYTES: usize = 512 << 10;

/// Spellings and their tokens.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    leftmost: Option<AhoCorasick>,
    /// Finds spellings inside of each other too.
    all: Option<AhoCorasick>,
    ids: Vec<u32>,
    /// Letters that follow another letter of a spelling.
    after: BTreeSet<char>,
    /// Letters that another letter of a spelling follows.
    before: BTreeSet<char>,
}

impl Marks {
    pub(super) fn new(marks: &[(&str, u32)]) -> Result<Self, PromptError> {
        let bytes: usize = marks.iter().map(|(text, _)| text.len()).sum();
        if bytes > MAX_MARK_BYTES {
            let text = format!("special tokens of {bytes} bytes, the limit is {MAX_MARK_BYTES}");
            return Err(PromptError::Unsupported(text));
        }
        if marks.is_empty() {
            return Ok(Self::default());
        }
        let build = |kind| {
            AhoCorasick::builder()
                .match_kind(kind)
                .build(marks.iter().map(|(text, _)| text))
                .map(Some)
                .map_err(|e| PromptError::Unsupported(format!("special tokens: {e}")))
        };
        Ok(Self {
            leftmost: build(MatchKind::LeftmostLongest)?,
            all: build(MatchKind::Standard)?,
            ids: marks.iter().map(|(_, id)| *id).collect(),
            after: marks.iter().flat_map(|(text, _)| text.chars().skip(1)).collect(),
            before: marks.iter().flat_map(|(text, _)| text.chars().rev().skip(1)).collect(),
        })
    }

    /// The first mark in `text`: (start, end, token); the longest of those that begin there.
    pub(crate) fn first(&self, text: &str) -> Option<(usize, usize, u32)> {
        let found = self.leftmost.as_ref()?.find(text)?;
        Some((found.start(), found.end(), self.ids[found.pattern().as_usize()]))
    }

    /// Where the marks in `text` begin, those inside of others too.
    pub(crate) fn starts(&self, text: &str) -> BTreeSet<usize> {
        let found = self.all.as_ref().map(|all| all.find_overlapping_iter(text));
        found.into_iter().flatten().map(|m| m.start()).collect()
    }

    /// Whether a mark can continue with a text that begins with `c`.
    pub(crate) fn continues_with(&self, c: char) -> bool {
        self.after.contains(&c)
    }

    /// Whether a text that ends with `c` can be continued to a mark.
    pub(crate) fn continues_after(&self, c: char) -> bool {
        self.before.contains(&c)
    }
}
