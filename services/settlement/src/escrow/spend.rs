//! Holding, and closing what is held: prepaid credit first, then escrow.

use infera_protocol::bytes::Address;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr};
use uuid::Uuid;

use super::{AtBlock, Freshness, Standing, wallet};
use crate::{
    domain::{self, Hold, Rejection},
    ledger::{self, Account, LedgerError},
    store::{
        escrows::{self, EscrowRow},
        requests::{self, RequestRow},
        unsigned, vouchers,
    },
};

/// How a wallet stands; of a `row` that is locked nobody can change it before the transaction ends.
///
/// # Errors
/// The database's.
pub async fn standing<C: ConnectionTrait>(
    db: &C,
    account: &Address,
    row: Option<&EscrowRow>,
) -> Result<Standing, DbErr> {
    let signed = vouchers::find(db, account).await?.map_or(0, |voucher| voucher.cumulative_micro);
    let signed = i64::try_from(signed).unwrap_or(i64::MAX);
    let Some(row) = row else { return Ok(Standing { voucher: signed, ..Standing::default() }) };
    let head = match (row.head_escrow_micro, row.head_charged_micro, row.head_withdrawal_micro) {
        (Some(escrow), Some(charged), Some(withdrawal)) => Some(AtBlock { escrow, charged, withdrawal }),
        _ => None,
    };
    Ok(Standing {
        settled: AtBlock {
            escrow: row.escrow_micro,
            charged: row.charged_micro,
            withdrawal: row.withdrawal_micro,
        },
        head,
        voucher: signed.max(row.authorized_micro),
        owed: row.owed_micro,
        held: ledger::balance(db, &Account::EscrowHeld(row.address.clone())).await?,
    })
}

/// Holds `micro` for a request that is open until `deadline_ms`; the inner error is the client's, and nothing was moved then.
///
/// # Errors
/// [`LedgerError`].
pub async fn hold(
    tx: &DatabaseTransaction,
    request: Uuid,
    account: &str,
    micro: u64,
    freshness: &Freshness,
    deadline_ms: i64,
    now_ms: i64,
) -> Result<Result<(), Rejection>, LedgerError> {
    let hold = match wallet(account) {
        None => micro.into(),
        Some(address) => {
            match of_wallet(tx, &address, micro, freshness.rejection(now_ms, deadline_ms)).await? {
                Ok(hold) => hold,
                Err(rejection) => return Ok(Err(rejection)),
            }
        }
    };
    match ledger::post(tx, &domain::hold_transfer(request, account, hold)?, now_ms).await {
        Ok(_) if hold.escrow_micro > 0 => {
            requests::set_held_escrow(tx, request, hold.escrow_micro).await?;
            Ok(Ok(()))
        }
        Ok(_) => Ok(Ok(())),
        Err(LedgerError::Overdraft { .. }) => {
            let available = ledger::balance(tx, &Account::Consumer(account.to_owned())).await?;
            Ok(Err(domain::insufficient(micro, available)))
        }
        Err(error) => Err(error),
    }
}

async fn of_wallet(
    tx: &DatabaseTransaction,
    address: &Address,
    micro: u64,
    late: Option<Rejection>,
) -> Result<Result<Hold, Rejection>, LedgerError> {
    // First the lock: then nobody else holds for this account.
    let row = escrows::lock(tx, address).await?;
    let prepaid = ledger::balance(tx, &Account::Consumer(address.to_string())).await?;
    let hold = Hold::of(micro, u64::try_from(prepaid).unwrap_or(0));
    if hold.escrow_micro == 0 {
        return Ok(Ok(hold));
    }
    let standing = standing(tx, address, row.as_ref()).await?;
    if standing.free() < hold.escrow_micro {
        return Ok(Err(standing.rejection(micro, hold.escrow_micro)));
    }
    Ok(late.map_or(Ok(hold), Err))
}

/// What an open request's hold is made of. Takes the account's escrow first if some of it is held, so that the hold can
/// be closed.
///
/// # Errors
/// The database's.
pub async fn take(tx: &DatabaseTransaction, row: &RequestRow) -> Result<Hold, DbErr> {
    let held = unsigned("requests.held_micro", row.held_micro)?;
    let escrow_micro = unsigned("requests.held_escrow_micro", row.held_escrow_micro)?;
    let mut hold = Hold { prepaid_micro: held.saturating_sub(escrow_micro), escrow_micro, debt_micro: 0 };
    if let Some(address) = wallet(&row.account).filter(|_| escrow_micro > 0) {
        escrows::lock(tx, &address).await?;
        let debt = ledger::balance(tx, &Account::EscrowDebt(row.account.clone())).await?;
        hold.debt_micro = debt.min(0).unsigned_abs();
    }
    Ok(hold)
}

/// Notes what a settled request's escrow owes.
///
/// # Errors
/// The database's.
pub async fn charge(
    tx: &DatabaseTransaction,
    row: &RequestRow,
    completion_tokens: u32,
    charged: &Hold,
) -> Result<(), DbErr> {
    requests::set_settled(tx, row.id, completion_tokens, charged.escrow_micro).await?;
    match wallet(&row.account).filter(|_| charged.escrow_micro > 0) {
        Some(address) => escrows::owe(tx, &address, charged.escrow_micro).await,
        None => Ok(()),
    }
}
