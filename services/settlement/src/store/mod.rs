//! The database of this service: plain functions that take a connection or a transaction.

pub mod batches;
pub mod escrows;
pub mod listing;
mod migrations;
pub mod requests;
pub mod rewards;
pub mod tables;
pub mod txs;
pub mod usage;
pub mod vouchers;

pub use migrations::Migrator;

use infera_protocol::bytes::Hash32;
use sea_orm::DbErr;

/// A stored hash.
pub(crate) fn hash(column: &'static str, bytes: &[u8]) -> Result<Hash32, DbErr> {
    Hash32::try_from(bytes).map_err(|error| corrupt(column, &error.to_string()))
}

/// A stored number that can't be negative.
pub(crate) fn unsigned(column: &'static str, value: i64) -> Result<u64, DbErr> {
    u64::try_from(value).map_err(|_| corrupt(column, "it is negative"))
}

/// A number as the tables have it.
pub(crate) fn signed(column: &'static str, value: u64) -> Result<i64, DbErr> {
    i64::try_from(value).map_err(|_| corrupt(column, "it is too large"))
}

/// A value in the database that none of ours could have written.
pub(crate) fn corrupt(column: &'static str, reason: &str) -> DbErr {
    DbErr::Custom(format!("`{column}` in the database is not usable: {reason}"))
}
