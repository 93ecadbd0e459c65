//! Why the verifier does not start or stops. One sentence each, with a remedy.

/// What [`crate::run`] fails with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] infera_runtime::config::ConfigError),
    #[error(transparent)]
    Network(#[from] infera_runtime::network::NetworkError),
    #[error(
        "there is no file of the registry's model `{model}`: add it to [models], or as ID.gguf or folder ID to `model_folder`"
    )]
    NoModelFile { model: String },
    #[error("the tokenizer of model `{model}` cannot be read: {source}")]
    Prompt { model: String, source: infera_prompt::PromptError },
    #[error("the tokenizer in the file of model `{model}` is not the one that the registry lists")]
    WrongTokenizer { model: String },
    #[error("the tokens of model `{model}`: {source}")]
    Vocabulary { model: String, source: infera_grammar::GrammarError },
    #[error(transparent)]
    Embed(#[from] infera_embed::EmbedError),
    #[error("the index of answers cannot be opened: {0}")]
    Index(#[from] infera_embed::IndexError),
    #[error(transparent)]
    Database(#[from] infera_runtime::db::DbError),
    #[error(transparent)]
    Bus(#[from] infera_bus::BusError),
    #[error(transparent)]
    Http(#[from] infera_runtime::http::HttpError),
    #[error("a metric cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("a thread was lost: {0}")]
    Thread(String),
}
