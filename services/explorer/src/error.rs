//! Why the explorer does not start or stops. One sentence each, with a remedy.

/// What [`crate::run`] fails with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] infera_runtime::config::ConfigError),
    #[error(transparent)]
    Network(#[from] infera_runtime::network::NetworkError),
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
    #[error("no HTTP client can be made: {0}")]
    Client(reqwest::Error),
    #[error("a thread was lost: {0}")]
    Thread(String),
}
