//! What a final block has of an account, into the ledger: each change once, whatever is read again.

use infera_protocol::{bytes::Address, ids::message_id};
use sea_orm::DatabaseTransaction;
use uuid::Uuid;

use crate::{
    chain::Escrow,
    ledger::{self, Account, Kind, LedgerError, Posted, Transfer},
    store::{corrupt, escrows, unsigned},
};

/// What a reading moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Came in; below zero: went out. 10^-6 INFER.
    pub micro: i64,
    /// Of what went out, what was spent already: the account owes it now.
    pub short_micro: i64,
}

/// Takes over what the final block `block` has of an account. What the chain and these books each have of it are the same
/// after that, to the last unit.
///
/// # Errors
/// [`LedgerError`]; an account that was never marked.
pub async fn settle(
    tx: &DatabaseTransaction,
    account: &Address,
    state: &Escrow,
    block: u64,
    now_ms: i64,
) -> Result<Moved, LedgerError> {
    let missing = || corrupt("escrows.address", "the account has no row");
    let mut row = escrows::lock(tx, account).await?.ok_or_else(missing)?;
    let amount = |micro: u128| ledger::amount(u64::try_from(micro).unwrap_or(u64::MAX));
    let (escrow, charged) = (amount(state.escrow)?, amount(state.charged)?);
    let had = row.escrow_micro + row.charged_micro - row.before_micro;
    // Charged by a settler that these books do not know: before they began, or before they were restored.
    let unknown = (charged - row.owed_micro).max(0);
    row.before_micro += unknown;
    row.owed_micro += unknown;
    let micro = escrow + charged - row.before_micro - had;
    let mut moved = Moved { micro, short_micro: 0 };
    if micro != 0 {
        moved.short_micro = post(tx, account, micro, &row, now_ms).await?;
        row.movements += 1;
    }
    escrows::set_final(tx, &row, state, block).await?;
    Ok(moved)
}

/// Posts what came in or went out; returns what the account owes more than before.
async fn post(
    tx: &DatabaseTransaction,
    account: &Address,
    micro: i64,
    row: &escrows::EscrowRow,
    now_ms: i64,
) -> Result<i64, LedgerError> {
    let name = account.to_string();
    let (escrow, debt) = (Account::Escrow(name.clone()), Account::EscrowDebt(name.clone()));
    // What comes in pays first what is owed; what goes out beyond what is free is owed.
    let to_debt = if micro > 0 {
        ledger::balance(tx, &debt).await?.saturating_neg().clamp(0, micro)
    } else {
        (micro + ledger::balance(tx, &escrow).await?).min(0)
    };
    let kind = if micro > 0 { Kind::Deposit } else { Kind::Withdraw };
    let number = unsigned("escrows.movements", row.movements)?;
    let id = message_id(&format!("transfer.escrow.{name}"), Uuid::nil(), number);
    let transfer = Transfer::new(id, kind, None)
        .with(&Account::Deposits, -micro)
        .with(&debt, to_debt)
        .with(&escrow, micro - to_debt);
    match ledger::post(tx, &transfer, now_ms).await? {
        Posted::Now => Ok((-to_debt).max(0)),
        Posted::Before => Err(corrupt("escrows.movements", "its transfer was posted before").into()),
    }
}
