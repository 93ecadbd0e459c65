//! Consumers' escrows, and how far the chain was followed.

use infera_protocol::bytes::{Address, Hash32};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, QueryFilter,
    QueryOrder, QuerySelect, QueryTrait, Set, Statement,
    sea_query::{Expr, ExprTrait, OnConflict},
};

use super::{
    corrupt, hash, signed,
    tables::{escrow_cursor, escrows},
    unsigned,
};
use crate::chain::port::Escrow;

pub use escrows::Model as EscrowRow;

/// The only row of the cursor.
const CURSOR: i64 = 1;

/// How far the chain was followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The next final block to look at.
    pub next_block: u64,
    /// Hash of the block before it.
    pub hash: Hash32,
}

fn micro(column: &'static str, amount: u128) -> Result<i64, DbErr> {
    i64::try_from(amount).map_err(|_| corrupt(column, "the chain's amount is too large"))
}

/// How far the chain was followed; `None` at the beginning.
///
/// # Errors
/// The database's.
pub async fn cursor<C: ConnectionTrait>(db: &C) -> Result<Option<Cursor>, DbErr> {
    escrow_cursor::Entity::find_by_id(CURSOR).one(db).await?.map(as_cursor).transpose()
}

/// As [`cursor`]; nobody else moves it until the transaction ends. At the beginning there is nothing to hold.
///
/// # Errors
/// The database's.
pub async fn lock_cursor(tx: &DatabaseTransaction) -> Result<Option<Cursor>, DbErr> {
    // SQLite has one writer, and ignores it.
    let row = escrow_cursor::Entity::find_by_id(CURSOR).lock_exclusive().one(tx).await?;
    row.map(as_cursor).transpose()
}

fn as_cursor(row: escrow_cursor::Model) -> Result<Cursor, DbErr> {
    Ok(Cursor {
        next_block: unsigned("escrow_cursor.next_block", row.next_block)?,
        hash: hash("escrow_cursor.block_hash", &row.block_hash)?,
    })
}

/// Notes how far the chain was followed.
///
/// # Errors
/// The database's.
pub async fn set_cursor<C: ConnectionTrait>(tx: &C, cursor: &Cursor) -> Result<(), DbErr> {
    let row = escrow_cursor::ActiveModel {
        id: Set(CURSOR),
        next_block: Set(signed("escrow_cursor.next_block", cursor.next_block)?),
        block_hash: Set(cursor.hash.to_vec()),
        looked_at_ms: Set(0),
    };
    let insert = escrow_cursor::Entity::insert(row).on_conflict(
        OnConflict::column(escrow_cursor::Column::Id)
            .update_columns([escrow_cursor::Column::NextBlock, escrow_cursor::Column::BlockHash])
            .to_owned(),
    );
    tx.execute(&insert.into_query()).await.map(drop)
}

/// Forgets how far the chain was followed, and has every account read again.
///
/// # Errors
/// The database's.
pub async fn rewind(tx: &DatabaseTransaction) -> Result<(), DbErr> {
    escrow_cursor::Entity::delete_by_id(CURSOR).exec(tx).await?;
    escrows::Entity::update_many()
        .col_expr(escrows::Column::Unread, Expr::value(1_i64))
        .exec(tx)
        .await
        .map(drop)
}

async fn insert_missing<C: ConnectionTrait>(tx: &C, account: &Address) -> Result<(), DbErr> {
    let row = escrows::ActiveModel {
        address: Set(account.to_string()),
        escrow_micro: Set(0),
        charged_micro: Set(0),
        authorized_micro: Set(0),
        withdrawal_micro: Set(0),
        withdrawable_at_secs: Set(0),
        block_number: Set(0),
        unread: Set(0),
        head_escrow_micro: Set(None),
        head_charged_micro: Set(None),
        head_withdrawal_micro: Set(None),
        owed_micro: Set(0),
        before_micro: Set(0),
        movements: Set(0),
    };
    let insert = escrows::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    tx.execute(&insert.into_query()).await.map(drop)
}

/// Notes that something happened to these accounts in final blocks.
///
/// # Errors
/// The database's.
pub async fn mark<C: ConnectionTrait>(
    tx: &C,
    accounts: impl IntoIterator<Item = &Address>,
) -> Result<(), DbErr> {
    for account in accounts {
        insert_missing(tx, account).await?;
        escrows::Entity::update_many()
            .col_expr(escrows::Column::Unread, Expr::value(1_i64))
            .filter(escrows::Column::Address.eq(account.to_string()))
            .exec(tx)
            .await?;
    }
    Ok(())
}

/// Accounts to be read, at most `limit`.
///
/// # Errors
/// The database's.
pub async fn unread<C: ConnectionTrait>(db: &C, limit: u64) -> Result<Vec<Address>, DbErr> {
    let rows = escrows::Entity::find()
        .filter(escrows::Column::Unread.eq(1))
        .order_by_asc(escrows::Column::Address)
        .limit(limit)
        .all(db)
        .await?;
    rows.iter().map(address).collect()
}

/// The account of a row.
///
/// # Errors
/// A stored address that is none.
pub fn address(row: &EscrowRow) -> Result<Address, DbErr> {
    row.address.parse().map_err(|_| corrupt("escrows.address", "it is no address"))
}

/// An account's row, which nobody else changes until the transaction ends: whoever moves money in or out of an escrow
/// takes it first.
///
/// # Errors
/// The database's.
pub async fn lock(tx: &DatabaseTransaction, account: &Address) -> Result<Option<EscrowRow>, DbErr> {
    // SQLite has one writer, and ignores it.
    escrows::Entity::find_by_id(account.to_string()).lock_exclusive().one(tx).await
}

/// An account's row.
///
/// # Errors
/// The database's.
pub async fn find<C: ConnectionTrait>(db: &C, account: &Address) -> Result<Option<EscrowRow>, DbErr> {
    escrows::Entity::find_by_id(account.to_string()).one(db).await
}

/// Writes what the final block `block` has of a locked account.
///
/// # Errors
/// The database's.
pub async fn set_final(
    tx: &DatabaseTransaction,
    row: &EscrowRow,
    state: &Escrow,
    block: u64,
) -> Result<(), DbErr> {
    use escrows::Column as E;
    // Only a signature limits it.
    let authorized = i64::try_from(state.authorized).unwrap_or(i64::MAX);
    let secs = i64::try_from(state.withdrawable_secs).unwrap_or(i64::MAX);
    escrows::Entity::update_many()
        .col_expr(E::EscrowMicro, Expr::value(micro("escrows.escrow_micro", state.escrow)?))
        .col_expr(E::ChargedMicro, Expr::value(micro("escrows.charged_micro", state.charged)?))
        .col_expr(E::AuthorizedMicro, Expr::value(authorized))
        .col_expr(E::WithdrawalMicro, Expr::value(micro("escrows.withdrawal_micro", state.withdrawal)?))
        .col_expr(E::WithdrawableAtSecs, Expr::value(secs))
        .col_expr(E::BlockNumber, Expr::value(signed("escrows.block_number", block)?))
        .col_expr(E::Unread, Expr::value(0_i64))
        .col_expr(E::OwedMicro, Expr::value(row.owed_micro))
        .col_expr(E::BeforeMicro, Expr::value(row.before_micro))
        .col_expr(E::Movements, Expr::value(row.movements))
        .filter(E::Address.eq(row.address.clone()))
        .exec(tx)
        .await
        .map(drop)
}

/// Writes what the newest block has of the accounts to which something happened after the final block. All others are as
/// the final block has them.
///
/// # Errors
/// The database's.
pub async fn set_heads(tx: &DatabaseTransaction, heads: &[(Address, Escrow)]) -> Result<(), DbErr> {
    use escrows::Column as E;
    let none = || Expr::value(None::<i64>);
    escrows::Entity::update_many()
        .col_expr(E::HeadEscrowMicro, none())
        .col_expr(E::HeadChargedMicro, none())
        .col_expr(E::HeadWithdrawalMicro, none())
        .filter(E::HeadEscrowMicro.is_not_null())
        .exec(tx)
        .await?;
    for (account, state) in heads {
        insert_missing(tx, account).await?;
        escrows::Entity::update_many()
            .col_expr(E::HeadEscrowMicro, Expr::value(micro("escrows.head_escrow_micro", state.escrow)?))
            .col_expr(E::HeadChargedMicro, Expr::value(micro("escrows.head_charged_micro", state.charged)?))
            .col_expr(
                E::HeadWithdrawalMicro,
                Expr::value(micro("escrows.head_withdrawal_micro", state.withdrawal)?),
            )
            .filter(E::Address.eq(account.to_string()))
            .exec(tx)
            .await?;
    }
    Ok(())
}

/// Adds what a verdict charged to a locked account's escrow.
///
/// # Errors
/// The database's.
pub async fn owe(tx: &DatabaseTransaction, account: &Address, micro: u64) -> Result<(), DbErr> {
    let owed = Expr::col(escrows::Column::OwedMicro);
    escrows::Entity::update_many()
        .col_expr(escrows::Column::OwedMicro, owed.add(signed("escrows.owed_micro", micro)?))
        .filter(escrows::Column::Address.eq(account.to_string()))
        .exec(tx)
        .await
        .map(drop)
}

/// What was charged on the chain as of the newest block that was seen.
pub fn charged_at_head(row: &EscrowRow) -> i64 {
    row.head_charged_micro.unwrap_or(row.charged_micro)
}

/// What is in escrow as of the newest block that was seen.
pub fn escrow_at_head(row: &EscrowRow) -> i64 {
    row.head_escrow_micro.unwrap_or(row.escrow_micro)
}

/// Accounts that owe what the chain has not charged and could, by escrow and voucher, at most `limit`: first those that
/// withdraw, then by what they owe; of the others only those that owe `min_micro`.
///
/// # Errors
/// The database's.
pub async fn due<C: ConnectionTrait>(db: &C, limit: u64, min_micro: u64) -> Result<Vec<EscrowRow>, DbErr> {
    use escrows::Column as E;
    let at_head =
        |head: E, settled: E| sea_orm::sea_query::Func::coalesce([Expr::col(head), Expr::col(settled)]);
    let charged = Expr::expr(at_head(E::HeadChargedMicro, E::ChargedMicro));
    let withdrawal = Expr::expr(at_head(E::HeadWithdrawalMicro, E::WithdrawalMicro));
    let owes = Expr::col(E::OwedMicro).sub(charged.clone());
    let enough = Condition::any()
        .add(owes.clone().gte(signed("escrow.charge_min_micro", min_micro)?))
        .add(withdrawal.clone().gt(0));
    // Whoever signed for no more takes nobody's place.
    let voucher = Expr::cust(
        "(SELECT COALESCE(MAX(cumulative_micro), 0) FROM vouchers WHERE vouchers.address = escrows.address)",
    );
    let signed_more = Condition::any()
        .add(Expr::col(E::AuthorizedMicro).gt(charged.clone()))
        .add(voucher.gt(charged.clone()));
    escrows::Entity::find()
        .filter(
            Condition::all()
                .add(Expr::col(E::OwedMicro).gt(charged.clone()))
                .add(signed_more)
                .add(Expr::expr(at_head(E::HeadEscrowMicro, E::EscrowMicro)).gt(0))
                .add(enough),
        )
        .order_by_desc(Expr::expr(Expr::case(withdrawal.gt(0), 1).finally(0)))
        .order_by_desc(owes)
        .order_by_asc(E::Address)
        .limit(limit)
        .all(db)
        .await
}

/// What all accounts together owe, 10^-6 INFER.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owing {
    /// Charged by the books and not by a final block.
    pub uncharged_micro: i64,
    /// Of what was spent, what no escrow covers any more.
    pub short_micro: i64,
    /// How many accounts that is.
    pub short_accounts: i64,
}

/// Adds it up.
///
/// # Errors
/// The database's.
pub async fn owing<C: ConnectionTrait>(db: &C) -> Result<Owing, DbErr> {
    // By the key of each: names sort in a database's own way, so that no range of them is to be relied on.
    let sql = "SELECT CAST(COALESCE(SUM(e.owed_micro - e.charged_micro), 0) AS BIGINT) AS uncharged, \
         CAST(COALESCE(-SUM(b.amount_micro), 0) AS BIGINT) AS short, \
         COUNT(CASE WHEN b.amount_micro < 0 THEN 1 END) AS accounts \
         FROM escrows e LEFT JOIN balances b ON b.account = 'escrow-debt:' || e.address";
    let statement = Statement::from_string(db.get_database_backend(), sql);
    let Some(row) = db.query_one_raw(statement).await? else { return Ok(Owing::default()) };
    Ok(Owing {
        uncharged_micro: row.try_get("", "uncharged")?,
        short_micro: row.try_get("", "short")?,
        short_accounts: row.try_get("", "accounts")?,
    })
}
