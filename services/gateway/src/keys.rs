//! API keys: the gateway owns them. A key is a JWT of `infera_runtime::jwt`. What is stored is which keys were revoked,
//! and of those that people made for themselves what they are for; never the key.

use infera_runtime::clock;
use infera_runtime::db::begin;
use infera_runtime::jwt::Claims;
pub use infera_runtime::jwt::SCOPE_RECEIPTS;
use sea_orm::sea_query::{OnConflict, Query, SelectStatement};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DbErr, EntityTrait, PaginatorTrait, QueryFilter,
    QueryOrder, QueryTrait, Select, Set,
};

use crate::store::{api_key, key_owner, revoked};

/// `aud` of every API key.
pub const AUDIENCE: &str = "infera";
/// The scope that asking for answers needs.
pub const SCOPE_CHAT: &str = "chat";
/// The scope that making and revoking keys needs: only a sign-in has it, so that a key cannot make another.
pub const SCOPE_KEYS: &str = "keys";
/// What keys that people make may have.
pub const KEY_SCOPES: [&str; 2] = [SCOPE_CHAT, SCOPE_RECEIPTS];
/// What the key of a sign-in has.
pub const SESSION_SCOPES: [&str; 3] = [SCOPE_CHAT, SCOPE_RECEIPTS, SCOPE_KEYS];
/// Live sign-ins of an account; one more revokes the oldest.
pub const MAX_SESSIONS: u64 = 20;
/// Longest account name, bytes: what fits every message of the bus.
pub const MAX_ACCOUNT: usize = infera_wire::convert::MAX_NAME_BYTES;
/// How long an expired key is still listed in the tables, ms: clocks differ, and JWTs have some leeway.
const KEEP_EXPIRED_MS: i64 = 86_400_000;

/// A key that an account makes for itself.
pub struct NewKey<'a> {
    pub claims: &'a Claims,
    pub name: &'a str,
    /// Made by a sign-in.
    pub session: bool,
}

/// What became of a [`NewKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    Stored,
    /// The account has as many live keys as it may.
    Full,
}

/// Stores what is known of a new key, in a transaction of its own that other replicas wait for. Sign-ins do not count
/// as keys: who has lost them all can still sign in and revoke some.
///
/// # Errors
/// The database's.
pub async fn add(db: &DatabaseConnection, new: &NewKey<'_>, max_keys: u64) -> Result<Added, DbErr> {
    let claims = new.claims;
    let now_ms = clock::now_ms();
    let tx = begin(db).await?;
    own(&tx, &claims.sub, now_ms).await?;
    let same = living(&claims.sub, now_ms).filter(api_key::Column::Session.eq(new.session));
    if new.session {
        let newest_first = same.order_by_desc(api_key::Column::CreatedMs).order_by_desc(api_key::Column::Jti);
        let rows = newest_first.all(&tx).await?;
        let kept = usize::try_from(MAX_SESSIONS.saturating_sub(1)).unwrap_or(0);
        for oldest in rows.iter().skip(kept) {
            revoke(&tx, &oldest.jti).await?;
        }
    } else if same.count(&tx).await? >= max_keys {
        tx.rollback().await?;
        return Ok(Added::Full);
    }
    let row = api_key::ActiveModel {
        jti: Set(claims.jti.clone()),
        account: Set(claims.sub.clone()),
        name: Set(new.name.to_owned()),
        scopes: Set(claims.scope.join(" ")),
        session: Set(new.session),
        created_ms: Set(now_ms),
        expires_ms: Set(claims.exp.saturating_mul(1000)),
    };
    tx.execute(&api_key::Entity::insert(row).into_query()).await?;
    tx.commit().await?;
    Ok(Added::Stored)
}

/// Writes the account's row first: whoever else adds a key to it waits for the end of this transaction, so that a limit
/// is a limit.
async fn own<C: ConnectionTrait>(tx: &C, account: &str, now_ms: i64) -> Result<(), DbErr> {
    let row = key_owner::ActiveModel { account: Set(account.to_owned()), touched_ms: Set(now_ms) };
    let again =
        OnConflict::column(key_owner::Column::Account).update_column(key_owner::Column::TouchedMs).to_owned();
    tx.execute(&key_owner::Entity::insert(row).on_conflict(again).into_query()).await.map(drop)
}

/// The account's keys that work, newest first; [`MAX_SESSIONS`] and the limit of keys bound them.
///
/// # Errors
/// The database's.
pub async fn live<C: ConnectionTrait>(
    db: &C,
    account: &str,
    now_ms: i64,
) -> Result<Vec<api_key::Model>, DbErr> {
    let rows = living(account, now_ms).order_by_desc(api_key::Column::CreatedMs);
    rows.order_by_desc(api_key::Column::Jti).all(db).await
}

/// Whether the account made the key for itself.
///
/// # Errors
/// The database's.
pub async fn is_of<C: ConnectionTrait>(db: &C, account: &str, jti: &str) -> Result<bool, DbErr> {
    let row = api_key::Entity::find_by_id(jti.to_owned()).one(db).await?;
    Ok(row.is_some_and(|row| row.account == account))
}

fn living(account: &str, now_ms: i64) -> Select<api_key::Entity> {
    let revoked: SelectStatement =
        Query::select().column(revoked::Column::Jti).from(revoked::Entity).to_owned();
    api_key::Entity::find()
        .filter(api_key::Column::Account.eq(account))
        .filter(api_key::Column::ExpiresMs.gt(now_ms))
        .filter(api_key::Column::Jti.not_in_subquery(revoked))
}

/// Forgets keys that expired a day before `now_ms`, and that they were revoked; returns how many.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, now_ms: i64) -> Result<u64, DbErr> {
    let before = now_ms.saturating_sub(KEEP_EXPIRED_MS);
    let expired: SelectStatement = Query::select()
        .column(api_key::Column::Jti)
        .from(api_key::Entity)
        .and_where(api_key::Column::ExpiresMs.lt(before))
        .to_owned();
    revoked::Entity::delete_many().filter(revoked::Column::Jti.in_subquery(expired)).exec(db).await?;
    key_owner::Entity::delete_many().filter(key_owner::Column::TouchedMs.lt(before)).exec(db).await?;
    let keys = api_key::Entity::delete_many().filter(api_key::Column::ExpiresMs.lt(before));
    Ok(keys.exec(db).await?.rows_affected)
}

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
