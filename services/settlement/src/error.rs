//! Why the service cannot start or go on.

use infera_runtime::{
    config::ConfigError, db::DbError, http::HttpError, jwt::KeyError, network::NetworkError,
};

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
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("`governance.contracts_path` {} can't be used: {reason}", path.display())]
    Contracts { path: std::path::PathBuf, reason: String },
}
