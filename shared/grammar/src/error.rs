use thiserror::Error;

/// Longest reason that is taken over from the grammar library, bytes.
const MAX_REASON: usize = 240;

/// Why a grammar cannot be used, or what does not keep to it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// The model's tokens cannot be prepared.
    #[error("the vocabulary is not fit for grammars: {0}")]
    Vocabulary(String),
    /// The grammar itself; the sentence goes to whoever asked.
    #[error("the grammar cannot be used: {0}")]
    Refused(String),
    /// Nothing can follow, or the next step is too expensive.
    #[error("the grammar allows no further token: {0}")]
    Stuck(String),
    /// An answer that does not keep to its grammar.
    #[error("token {position}: {reason}")]
    Violated {
        /// Of the first token that is wrong, from 0.
        position: usize,
        /// In words.
        reason: &'static str,
    },
}

pub(crate) fn vocabulary(reason: &str) -> GrammarError {
    GrammarError::Vocabulary(short(reason))
}

/// A library's message in one line, without the parser's state, cut: its first line and, of a regular expression's, the
/// one with the reason.
pub(crate) fn short(reason: &str) -> String {
    let mut lines = reason.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut line = lines.next().unwrap_or("no reason given").to_owned();
    if let Some(why) = lines.find_map(|line| line.strip_prefix("error:")) {
        line.push_str(why);
    }
    let mut end = line.len().min(MAX_REASON);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}
