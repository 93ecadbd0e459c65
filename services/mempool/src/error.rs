//! Why the mempool does not start, or ends.

use infera_bus::BusError;
use infera_runtime::config::ConfigError;
use infera_runtime::db::DbError;
use infera_runtime::http::HttpError;

/// One sentence each, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("the pending requests cannot be read: {0}")]
    Load(#[from] sea_orm::DbErr),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    /// Nothing is lost: the set is in the database.
    #[error("an actor ended unexpectedly: start the service again")]
    ActorEnded,
}
