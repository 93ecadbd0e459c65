use thiserror::Error;

use crate::gguf::GgufError;

/// Why a prompt cannot be made.
#[derive(Debug, Error)]
pub enum PromptError {
    /// The model file's header is unusable.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A file of a model directory is unusable.
    #[error("{path} {problem}")]
    File {
        /// Which file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The model asks for something that this crate does not do.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// A chat without messages.
    #[error("messages must not be empty")]
    NoMessages,
    /// A role that no chat template knows.
    #[error("messages[{index}].role must be system, user, assistant or tool, got {role:?}")]
    Role {
        /// Which message.
        index: usize,
        /// Its role.
        role: String,
    },
    /// The template refused the messages or is broken.
    #[error("the model's chat template refused these messages: {0}")]
    Template(String),
    /// The tokenizer library failed.
    #[error("cannot tokenise: {0}")]
    Tokenize(String),
}
