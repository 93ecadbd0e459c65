//! The ledger: double entry in integers of 10^-6 INFER.
//!
//! Invariants, each one checked by [`audit`]:
//! - the entries of a transfer sum to zero, so all entries do;
//! - a balance is the sum of its entries;
//! - no account of a consumer or operator is below zero; what a wallet owes beyond its escrow has an account of its own;
//! - what the books have of a wallet's escrow, with what was charged to it, is what the chain's final block has;
//! - a transfer's id is unique: posting it again changes nothing.
//!
//! [`post`] takes the rows of a transfer in the order of their names, so that two transfers never wait for each other.

use std::collections::BTreeMap;

use infera_protocol::bytes::Address;
use infera_runtime::db::begin_snapshot;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, EntityTrait, QueryFilter,
    QueryTrait, Set, Statement,
    sea_query::{Expr, ExprTrait, OnConflict},
};
use serde::Serialize;
use uuid::Uuid;

use crate::store::tables::{balances, entries, transfers};

/// Largest amount of one entry and largest balance, 10^-6 INFER: a million million INFER, far below an i64's end.
pub const MAX_MICRO: i64 = 1_000_000_000_000_000_000;

/// Whose money it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Account {
    /// What a consumer can spend.
    Consumer(String),
    /// What is held for a consumer's open requests.
    Held(String),
    /// What a wallet has in the contract's escrow, neither spent nor held. Says nothing of its voucher.
    Escrow(String),
    /// What is held of it for open requests.
    EscrowHeld(String),
    /// What a wallet spent and its escrow does not have any more: never above zero. What comes into escrow pays it first.
    EscrowDebt(String),
    /// The contract: as far below zero as deposits exceed withdrawals.
    Deposits,
    /// What an operator has earned.
    Operator(Address),
    /// Where prepaid credit comes from; as far below zero as credit was given.
    Issuance,
    /// The network's own: pays replicas beyond a hold. Below zero = the network's debt.
    Reserve,
}

impl Account {
    /// The name in the tables.
    pub fn name(&self) -> String {
        match self {
            Self::Consumer(name) => format!("consumer:{name}"),
            Self::Held(name) => format!("held:{name}"),
            Self::Escrow(name) => format!("escrow:{name}"),
            Self::EscrowHeld(name) => format!("escrow-held:{name}"),
            Self::EscrowDebt(name) => format!("escrow-debt:{name}"),
            Self::Deposits => "deposits".to_owned(),
            Self::Operator(address) => format!("operator:{address}"),
            Self::Issuance => "issuance".to_owned(),
            Self::Reserve => "reserve".to_owned(),
        }
    }

    fn floor(&self) -> i64 {
        match self {
            Self::Issuance | Self::Reserve | Self::Deposits | Self::EscrowDebt(_) => -MAX_MICRO,
            Self::Consumer(_) | Self::Held(_) | Self::Escrow(_) | Self::EscrowHeld(_) | Self::Operator(_) => {
                0
            }
        }
    }
}

/// Why a transfer was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Credit,
    Hold,
    Settle,
    Release,
    /// Came into escrow on the chain.
    Deposit,
    /// Left it.
    Withdraw,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Credit => "credit",
            Self::Hold => "hold",
            Self::Settle => "settle",
            Self::Release => "release",
            Self::Deposit => "deposit",
            Self::Withdraw => "withdraw",
        }
    }
}

/// Money that moves at once or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    id: Uuid,
    kind: Kind,
    request: Option<Uuid>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    amount: i64,
    floor: i64,
}

/// Why a transfer was not posted.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("the entries of transfer {0} do not sum to zero")]
    Unbalanced(Uuid),
    #[error("an amount of {0} micro-INFER is beyond the limit of {MAX_MICRO}")]
    TooLarge(i128),
    /// Nothing was changed.
    #[error("{account} has not enough for transfer {id}")]
    Overdraft { id: Uuid, account: String },
    /// More than the replicas beyond those asked for can cost.
    #[error("the reserve would pay {needed} micro-INFER for one request, at most {cap} are allowed")]
    Reserve { needed: u64, cap: u64 },
    #[error(transparent)]
    Db(#[from] DbErr),
}

/// What [`post`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    Now,
    /// A transfer with this id is there already; nothing was changed.
    Before,
}

impl Transfer {
    /// A transfer without entries. The same `id` is posted once.
    pub fn new(id: Uuid, kind: Kind, request: Option<Uuid>) -> Self {
        Self { id, kind, request, entries: BTreeMap::new() }
    }

    /// Adds `amount` to an account; negative takes. Entries of one account are added up.
    #[must_use]
    pub fn with(mut self, account: &Account, amount: i64) -> Self {
        let floor = account.floor();
        let entry = self.entries.entry(account.name()).or_insert(Entry { amount: 0, floor });
        // A sum out of range is refused by `check`, as is every amount beyond MAX_MICRO.
        entry.amount = entry.amount.saturating_add(amount);
        self
    }

    /// Takes `amount` from one account and gives it to another.
    #[must_use]
    pub fn moving(self, from: &Account, to: &Account, amount: i64) -> Self {
        self.with(from, amount.saturating_neg()).with(to, amount)
    }

    /// What the transfer adds to an account.
    pub fn amount_of(&self, account: &Account) -> i64 {
        self.entries.get(&account.name()).map_or(0, |entry| entry.amount)
    }

    fn check(&self) -> Result<(), LedgerError> {
        let amounts = || self.entries.values().map(|entry| i128::from(entry.amount));
        if let Some(large) = amounts().find(|amount| amount.abs() > i128::from(MAX_MICRO)) {
            return Err(LedgerError::TooLarge(large));
        }
        if amounts().sum::<i128>() != 0 {
            return Err(LedgerError::Unbalanced(self.id));
        }
        Ok(())
    }
}

/// An amount as entries have it.
///
/// # Errors
/// [`LedgerError::TooLarge`].
pub fn amount(micro: u64) -> Result<i64, LedgerError> {
    i64::try_from(micro)
        .ok()
        .filter(|amount| *amount <= MAX_MICRO)
        .ok_or(LedgerError::TooLarge(i128::from(micro)))
}

/// Posts a transfer in the caller's transaction. After [`LedgerError::Overdraft`] the transaction is as it was before and
/// may go on.
///
/// # Errors
/// [`LedgerError`].
pub async fn post(tx: &DatabaseTransaction, transfer: &Transfer, now_ms: i64) -> Result<Posted, LedgerError> {
    transfer.check()?;
    let row = transfers::ActiveModel {
        id: Set(transfer.id),
        kind: Set(transfer.kind.name().to_owned()),
        request_id: Set(transfer.request),
        at_ms: Set(now_ms),
    };
    let insert = transfers::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    if tx.execute(&insert.into_query()).await?.rows_affected() == 0 {
        return Ok(Posted::Before);
    }
    let moving: Vec<_> = transfer.entries.iter().filter(|(_, entry)| entry.amount != 0).collect();
    for (index, (account, entry)) in moving.iter().enumerate() {
        if !add(tx, account, **entry).await? {
            for (account, entry) in &moving[..index] {
                shift(tx, account, -entry.amount).await?;
            }
            transfers::Entity::delete_by_id(transfer.id).exec(tx).await?;
            return Err(LedgerError::Overdraft { id: transfer.id, account: (*account).clone() });
        }
    }
    let rows = moving.iter().map(|(account, entry)| entries::ActiveModel {
        transfer_id: Set(transfer.id),
        account: Set((*account).clone()),
        amount_micro: Set(entry.amount),
        at_ms: Set(now_ms),
    });
    if !moving.is_empty() {
        entries::Entity::insert_many(rows).exec_without_returning(tx).await?;
    }
    Ok(Posted::Now)
}

/// Adds to a balance unless it would leave its bounds.
async fn add(tx: &DatabaseTransaction, account: &str, entry: Entry) -> Result<bool, DbErr> {
    let column = || Expr::col((balances::Entity, balances::Column::AmountMicro));
    let Entry { amount, floor } = entry;
    let lowest = floor.saturating_sub(amount);
    let highest = MAX_MICRO.saturating_sub(amount);
    if amount < floor {
        // There must be a row to take from.
        let update = balances::Entity::update_many()
            .col_expr(balances::Column::AmountMicro, column().add(amount))
            .filter(balances::Column::Account.eq(account))
            .filter(column().gte(lowest));
        return Ok(update.exec(tx).await?.rows_affected == 1);
    }
    let row = balances::ActiveModel { account: Set(account.to_owned()), amount_micro: Set(amount) };
    let insert = balances::Entity::insert(row).on_conflict(
        OnConflict::column(balances::Column::Account)
            .value(balances::Column::AmountMicro, column().add(amount))
            .action_and_where(column().gte(lowest).and(column().lte(highest)))
            .to_owned(),
    );
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

async fn shift(tx: &DatabaseTransaction, account: &str, amount: i64) -> Result<(), DbErr> {
    balances::Entity::update_many()
        .col_expr(balances::Column::AmountMicro, Expr::col(balances::Column::AmountMicro).add(amount))
        .filter(balances::Column::Account.eq(account))
        .exec(tx)
        .await
        .map(drop)
}

/// A balance; 0 for an account that nobody has paid into.
///
/// # Errors
/// The database's.
pub async fn balance<C: ConnectionTrait>(db: &C, account: &Account) -> Result<i64, DbErr> {
    let row = balances::Entity::find_by_id(account.name()).one(db).await?;
    Ok(row.map_or(0, |row| row.amount_micro))
}

/// Gives prepaid credit once per `id`.
///
/// # Errors
/// [`LedgerError`].
pub async fn credit(
    tx: &DatabaseTransaction,
    id: Uuid,
    account: &str,
    micro: u64,
    now_ms: i64,
) -> Result<Posted, LedgerError> {
    let to = Account::Consumer(account.to_owned());
    let transfer = Transfer::new(id, Kind::Credit, None).moving(&Account::Issuance, &to, amount(micro)?);
    post(tx, &transfer, now_ms).await
}

/// What [`audit`] counts. Amounts are in 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Every invariant holds.
    pub ok: bool,
    pub transfers: i64,
    pub entries: i64,
    /// Sum of all entries: 0.
    pub sum_micro: i64,
    /// Transfers whose entries do not sum to zero: 0.
    pub unbalanced: i64,
    /// Accounts whose balance is not the sum of their entries: 0.
    pub mismatched: i64,
    /// Accounts of consumers and operators below zero: 0.
    pub negative: i64,
    /// Open holds less what is held: 0.
    pub holds_difference_micro: i64,
    pub consumers_micro: i64,
    pub held_micro: i64,
    pub operators_micro: i64,
    pub issuance_micro: i64,
    pub reserve_micro: i64,
    /// Open holds of escrow less what is held of it: 0.
    pub escrow_holds_difference_micro: i64,
    /// Wallets whose escrow in the books, with what was charged to it, is not the chain's: 0.
    pub escrow_mismatched: i64,
    /// Wallets whose charges are not the sum of their requests': 0.
    pub charges_mismatched: i64,
    /// Wallets from which the chain took more than the books charged, or that were charged more than they signed: 0.
    pub overcharged: i64,
    /// In escrow, neither spent nor held.
    pub escrow_micro: i64,
    pub escrow_held_micro: i64,
    /// Spent, and not in escrow any more; as far below zero.
    pub escrow_debt_micro: i64,
    /// What the contract has of deposits, below zero.
    pub deposits_micro: i64,
    /// Charged to escrows over their lifetime.
    pub escrow_owed_micro: i64,
    /// Of it, what a final block has charged.
    pub escrow_charged_micro: i64,
}

/// Checks every invariant over all rows, as of one moment.
///
/// # Errors
/// The database's.
pub async fn audit(db: &DatabaseConnection) -> Result<Audit, DbErr> {
    let tx = begin_snapshot(db).await?;
    let sum = async |table: &str, condition: &str| {
        value(
            &tx,
            &format!(
                "SELECT CAST(COALESCE(SUM(amount_micro), 0) AS BIGINT) AS value FROM {table} {condition}"
            ),
        )
        .await
    };
    let of = async |sum: &str, table: &str| {
        let sql = format!("SELECT CAST(COALESCE(SUM({sum}), 0) AS BIGINT) AS value FROM {table}");
        value(&tx, &sql).await
    };
    let held_micro = sum("balances", "WHERE account LIKE 'held:%'").await?;
    let escrow_held_micro = sum("balances", "WHERE account LIKE 'escrow-held:%'").await?;
    let open = of("held_micro", "requests WHERE state = 'open'").await?;
    let open_escrow = of("held_escrow_micro", "requests WHERE state = 'open'").await?;
    let mut audit = Audit {
        ok: false,
        transfers: value(&tx, "SELECT COUNT(*) AS value FROM transfers").await?,
        entries: value(&tx, "SELECT COUNT(*) AS value FROM entries").await?,
        sum_micro: sum("entries", "").await?,
        unbalanced: value(&tx, UNBALANCED).await?,
        mismatched: value(&tx, MISMATCHED).await? + value(&tx, WITHOUT_BALANCE).await?,
        negative: value(&tx, NEGATIVE).await?,
        holds_difference_micro: open - held_micro - escrow_held_micro,
        consumers_micro: sum("balances", "WHERE account LIKE 'consumer:%'").await?,
        held_micro,
        operators_micro: sum("balances", "WHERE account LIKE 'operator:%'").await?,
        issuance_micro: sum("balances", "WHERE account = 'issuance'").await?,
        reserve_micro: sum("balances", "WHERE account = 'reserve'").await?,
        escrow_holds_difference_micro: open_escrow - escrow_held_micro,
        escrow_mismatched: value(&tx, ESCROW_MISMATCHED).await?,
        charges_mismatched: value(&tx, CHARGES_MISMATCHED).await?,
        overcharged: value(&tx, OVERCHARGED).await?,
        escrow_micro: sum("balances", "WHERE account LIKE 'escrow:%'").await?,
        escrow_held_micro,
        escrow_debt_micro: sum("balances", "WHERE account LIKE 'escrow-debt:%'").await?,
        deposits_micro: sum("balances", "WHERE account = 'deposits'").await?,
        escrow_owed_micro: of("owed_micro", "escrows").await?,
        escrow_charged_micro: of("charged_micro", "escrows").await?,
    };
    tx.commit().await?;
    audit.ok = audit.sum_micro == 0
        && audit.unbalanced == 0
        && audit.mismatched == 0
        && audit.negative == 0
        && audit.holds_difference_micro == 0
        && audit.escrow_holds_difference_micro == 0
        && audit.escrow_mismatched == 0
        && audit.charges_mismatched == 0
        && audit.overcharged == 0;
    Ok(audit)
}

const UNBALANCED: &str = "SELECT COUNT(*) AS value FROM (SELECT transfer_id FROM entries GROUP BY transfer_id \
     HAVING SUM(amount_micro) <> 0) AS wrong";
const MISMATCHED: &str = "SELECT COUNT(*) AS value FROM (SELECT b.account FROM balances b LEFT JOIN entries e \
     ON e.account = b.account GROUP BY b.account, b.amount_micro \
     HAVING b.amount_micro <> COALESCE(SUM(e.amount_micro), 0)) AS wrong";
const WITHOUT_BALANCE: &str = "SELECT COUNT(DISTINCT e.account) AS value FROM entries e LEFT JOIN balances b \
     ON b.account = e.account WHERE b.account IS NULL";
const NEGATIVE: &str = "SELECT COUNT(*) AS value FROM balances WHERE (amount_micro < 0 \
     AND account NOT IN ('issuance', 'reserve', 'deposits') AND account NOT LIKE 'escrow-debt:%') \
     OR (amount_micro > 0 AND (account = 'deposits' OR account LIKE 'escrow-debt:%'))";
/// What is in escrow and what was charged on the chain, less what these books do not know of, is what they have: free,
/// held, owed beyond it, and charged.
const ESCROW_MISMATCHED: &str = "SELECT COUNT(*) AS value FROM escrows WHERE escrow_micro + charged_micro <> \
     owed_micro + COALESCE((SELECT SUM(amount_micro) FROM balances WHERE account IN \
     ('escrow:' || address, 'escrow-held:' || address, 'escrow-debt:' || address)), 0)";
const CHARGES_MISMATCHED: &str = "SELECT COUNT(*) AS value FROM escrows WHERE owed_micro - before_micro <> \
     COALESCE((SELECT SUM(charged_escrow_micro) FROM requests WHERE account = address), 0)";
const OVERCHARGED: &str = "SELECT COUNT(*) AS value FROM escrows e LEFT JOIN vouchers v ON v.address = e.address \
     WHERE e.charged_micro > e.owed_micro OR (e.owed_micro > e.before_micro AND e.owed_micro > e.authorized_micro \
     AND e.owed_micro > COALESCE(v.cumulative_micro, 0))";

async fn value(tx: &DatabaseTransaction, sql: &str) -> Result<i64, DbErr> {
    let statement = Statement::from_string(tx.get_database_backend(), sql);
    match tx.query_one_raw(statement).await? {
        Some(row) => row.try_get("", "value"),
        None => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_must_balance_and_stay_in_bounds() {
        let alice = Account::Consumer("alice".into());
        let transfer = || Transfer::new(Uuid::nil(), Kind::Credit, None);
        assert!(transfer().moving(&Account::Issuance, &alice, 5).check().is_ok());
        assert!(matches!(transfer().with(&alice, 5).check(), Err(LedgerError::Unbalanced(_))));
        let large = transfer().moving(&Account::Issuance, &alice, MAX_MICRO + 1);
        assert!(matches!(large.check(), Err(LedgerError::TooLarge(_))));
        let overflowing =
            transfer().with(&alice, i64::MAX).with(&alice, i64::MAX).with(&Account::Issuance, i64::MIN);
        assert!(matches!(overflowing.check(), Err(LedgerError::TooLarge(_))));
        assert!(matches!(amount(u64::MAX), Err(LedgerError::TooLarge(_))));
    }

    #[test]
    fn names_do_not_run_together() {
        assert_ne!(Account::Consumer("held:a".into()).name(), Account::Held("a".into()).name());
        assert_ne!(Account::Consumer("issuance".into()).name(), Account::Issuance.name());
        assert_ne!(Account::EscrowHeld("a".into()).name(), Account::Escrow("held:a".into()).name());
    }
}
