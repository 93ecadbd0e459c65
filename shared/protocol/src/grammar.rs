//! What an answer must look like: a JSON schema or a regular expression (protocol sections 3 and 5).
//!
//! Here is the text alone, as it stands in the request and its hash. Which tokens it allows is computed by
//! `infera-grammar`; whoever draws or checks takes the set from there.

use serde::{Deserialize, Serialize};

/// Longest text of a grammar, bytes.
pub const MAX_GRAMMAR_BYTES: usize = 16 * 1024;

/// How a grammar's text is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrammarKind {
    /// A JSON schema, as JSON.
    JsonSchema,
    /// A regular expression that the whole answer matches, in the syntax of Rust's `regex` without anchors and
    /// look-around.
    Regex,
}

impl GrammarKind {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::JsonSchema => 1,
            Self::Regex => 2,
        }
    }
}

/// A grammar. Its text is hashed as it is: the order of a schema's properties is the order in the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grammar {
    pub kind: GrammarKind,
    pub text: String,
}
