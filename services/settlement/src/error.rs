//! Why the service cannot start or go on.

use std::path::PathBuf;

use infera_runtime::{config::ConfigError, db::DbError, http::HttpError, jwt::KeyError};

/// One sentence each, with a remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Database(#[from] DbError),
    #[error("the database failed: {0}")]
    Query(#[from] sea_orm::DbErr),
    #[error(transparent)]
    Bus(#[from] infera_bus::BusError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Ledger(#[from] crate::ledger::LedgerError),
    #[error("metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("{what} {} cannot be read: {reason}", path.display())]
    File { what: &'static str, path: PathBuf, reason: String },
    #[error(
        "the registry's hash is {actual}, the manifest names {expected}: both must come from the same network"
    )]
    Registry { actual: String, expected: String },
}
