//! Why the dispatcher does not start, or ends.

use std::path::PathBuf;

use infera_bus::BusError;
use infera_protocol::bytes::VrfKey;
use infera_runtime::config::ConfigError;
use infera_runtime::db::DbError;
use infera_runtime::http::HttpError;
use infera_runtime::network::NetworkError;

/// One sentence each, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("the key {} cannot be read: {reason}", path.display())]
    Key { path: PathBuf, reason: String },
    #[error("the key {} can be read by others: chmod 600 it", path.display())]
    KeyExposed { path: PathBuf },
    #[error(
        "the manifest {} does not name this dispatcher: add {key} to its `dispatchers`, or set key_path to a key that it names",
        path.display()
    )]
    UnknownDispatcher { path: PathBuf, key: VrfKey },
    #[error("metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    /// State in memory is lost; offers are delivered again after a restart.
    #[error("an actor ended unexpectedly: start the service again")]
    ActorEnded,
}
