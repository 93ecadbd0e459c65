//! API keys: the gateway owns them. A key is a JWT of `infera_runtime::jwt`; what is stored is only which
//! keys were revoked.

use infera_runtime::clock;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ConnectionTrait, DbErr, EntityTrait, QueryOrder, QueryTrait, Set};

use crate::store::revoked;

/// `aud` of every API key.
pub const AUDIENCE: &str = "infera";
/// The scope that asking for answers needs.
pub const SCOPE_CHAT: &str = "chat";
/// Longest account name, bytes: what fits every message of the bus.
pub const MAX_ACCOUNT: usize = infera_wire::convert::MAX_NAME_BYTES;

/// Revokes the key with the id `jti` (its claim of that name): from now on it gets 401. Repeating it
/// changes nothing. The tables must be there (`infera_runtime::db::migrate::<Migrator>`).
///
/// # Errors
/// The database's.
pub async fn revoke<C: ConnectionTrait>(db: &C, jti: &str) -> Result<(), DbErr> {
    let row = revoked::ActiveModel { jti: Set(jti.to_owned()), revoked_ms: Set(clock::now_ms()) };
    let once = OnConflict::column(revoked::Column::Jti).do_nothing().to_owned();
    let insert = revoked::Entity::insert(row).on_conflict(once);
    db.execute(&insert.into_query()).await.map(drop)
}

/// Whether the key with the id `jti` was revoked.
///
/// # Errors
/// The database's.
pub async fn is_revoked<C: ConnectionTrait>(db: &C, jti: &str) -> Result<bool, DbErr> {
    Ok(revoked::Entity::find_by_id(jti.to_owned()).one(db).await?.is_some())
}

/// Every revoked key: (jti, when in ms), oldest first.
///
/// # Errors
/// The database's.
pub async fn revoked<C: ConnectionTrait>(db: &C) -> Result<Vec<(String, i64)>, DbErr> {
    let rows = revoked::Entity::find().order_by_asc(revoked::Column::RevokedMs).all(db).await?;
    Ok(rows.into_iter().map(|row| (row.jti, row.revoked_ms)).collect())
}
