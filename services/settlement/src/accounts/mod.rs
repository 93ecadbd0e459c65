//! What an account's owner asks, with an API key of the account.
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/balance` | [`Balance`] |
//! | `POST /v1/vouchers` | `{account, voucher_micro}`: the highest voucher, for accounts that are a wallet's address |
//! | `GET /v1/usage` | [`usage::Page`]: requests, the newest first; as CSV all of the period |
//! | `GET /v1/statement` | [`statement::Page`]: what moved the account's money; as CSV all of the period |

mod csv;
mod period;
pub mod statement;
pub mod usage;

use actix_web::{HttpRequest, HttpResponse, web};
use infera_protocol::{
    bytes::{Address, EvmSignature},
    voucher::Voucher,
};
use infera_runtime::{clock, db::begin_snapshot, http::ApiError, jwt::Claims};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbErr};
use serde::{Deserialize, Serialize};

pub use period::Place;

use crate::{
    escrow::{self, spend},
    http::{State, claims},
    ledger::{self, Account, MAX_MICRO},
    store::{escrows, usage as store, vouchers},
};

/// A balance, 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Balance {
    pub account: String,
    /// What a new request may hold: prepaid credit, and what escrow and voucher both leave.
    pub available_micro: i64,
    /// Of it, prepaid credit.
    pub prepaid_micro: i64,
    /// What open requests hold.
    pub held_micro: i64,
    /// Charged over the account's lifetime.
    pub charged_micro: i64,
    /// For accounts that are a wallet's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub escrow: Option<EscrowBalance>,
}

/// What a wallet has on the chain, as of the final block `block_number`, 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EscrowBalance {
    /// Deposited and neither charged nor withdrawn on the chain.
    pub escrow_micro: i64,
    /// Announced to be withdrawn, as of the newest block.
    pub withdrawal_micro: i64,
    /// When a final announcement may be taken, seconds since 1970; 0 for never.
    pub withdrawable_at_secs: i64,
    /// The highest voucher.
    pub voucher_micro: i64,
    /// Charged to escrow over the lifetime, on the chain or not yet.
    pub charged_micro: i64,
    /// Of it, on the chain.
    pub charged_on_chain_micro: i64,
    /// What escrow leaves for new requests; below zero if a withdrawal took what was spent.
    pub escrow_leaves_micro: i64,
    /// What the voucher leaves.
    pub voucher_leaves_micro: i64,
    pub block_number: i64,
}

/// The key's claims; 401 without one.
fn owner(state: &State, request: &HttpRequest) -> Result<Claims, ApiError> {
    claims(state, request)?.ok_or_else(|| {
        ApiError::unauthorized("missing_api_key", "send an API key: Authorization: Bearer KEY")
    })
}

/// `GET /v1/balance`.
pub(crate) async fn balance(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let account = owner(&state, &request)?.sub;
    let balance = at_one_moment(&state.db, account).await.map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().json(balance))
}

async fn at_one_moment(db: &DatabaseConnection, account: String) -> Result<Balance, DbErr> {
    let tx = begin_snapshot(db).await?;
    let balance = of(&tx, account).await?;
    tx.commit().await?;
    Ok(balance)
}

async fn of<C: ConnectionTrait>(db: &C, account: String) -> Result<Balance, DbErr> {
    let micro = async |of: Account| ledger::balance(db, &of).await;
    let prepaid_micro = micro(Account::Consumer(account.clone())).await?;
    let held = micro(Account::Held(account.clone())).await?;
    let held_escrow = micro(Account::EscrowHeld(account.clone())).await?;
    let (escrow, free) = match escrow::wallet(&account) {
        Some(address) => of_wallet(db, &address).await?,
        None => (None, 0),
    };
    Ok(Balance {
        available_micro: prepaid_micro + free,
        prepaid_micro,
        held_micro: held + held_escrow,
        charged_micro: store::charged(db, &account).await?,
        account,
        escrow,
    })
}

async fn of_wallet<C: ConnectionTrait>(
    db: &C,
    address: &Address,
) -> Result<(Option<EscrowBalance>, i64), DbErr> {
    let row = escrows::find(db, address).await?;
    let standing = spend::standing(db, address, row.as_ref()).await?;
    let balance = EscrowBalance {
        escrow_micro: standing.settled.escrow,
        withdrawal_micro: standing.withdrawal(),
        withdrawable_at_secs: row.as_ref().map_or(0, |row| row.withdrawable_at_secs),
        voucher_micro: standing.voucher,
        charged_micro: standing.owed,
        charged_on_chain_micro: standing.settled.charged,
        escrow_leaves_micro: standing.by_escrow(),
        voucher_leaves_micro: standing.by_voucher(),
        block_number: row.as_ref().map_or(0, |row| row.block_number),
    };
    Ok((Some(balance), i64::try_from(standing.free()).unwrap_or(i64::MAX)))
}

/// The body of `POST /v1/vouchers`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewVoucher {
    /// A number, or a string of digits: JavaScript's numbers end at 2^53.
    cumulative_micro: serde_json::Value,
    signature: String,
}

#[derive(Debug, Serialize)]
struct Kept {
    account: String,
    voucher_micro: u64,
}

/// `POST /v1/vouchers`: keeps the highest. The same or a lower one again changes nothing.
pub(crate) async fn voucher(
    state: web::Data<State>,
    request: HttpRequest,
    body: web::Json<NewVoucher>,
) -> Result<HttpResponse, ApiError> {
    let account = owner(&state, &request)?.sub;
    let Some(address) = escrow::wallet(&account) else {
        return Err(ApiError::bad_request(
            None,
            "this account is no wallet's address, so it has no vouchers: sign in with the wallet, or use prepaid credit",
        )
        .with_code("not_a_wallet"));
    };
    let cumulative_micro = cumulative(&body.cumulative_micro)?;
    let signature: EvmSignature = body.signature.parse().map_err(|_| {
        ApiError::bad_request(
            "signature",
            "`signature` must be 65 bytes (r, s, v) in lowercase hex with 0x in front",
        )
    })?;
    let voucher = Voucher { account: address, cumulative_micro };
    if voucher.check(&state.domain, &signature).is_err() {
        let message = format!(
            "`signature` is not {account}'s for {cumulative_micro} on chain {} and contract {}: sign the EIP-712 message \
             Voucher(address account,uint256 cumulative) in the domain {{name \"Infera\", version \"1\", chainId, \
             verifyingContract}}, with low s and v 27 or 28",
            state.domain.chain_id, state.domain.contract
        );
        return Err(ApiError::bad_request("signature", message).with_code("bad_voucher"));
    }
    let signed = vouchers::Signed { cumulative_micro, signature };
    let voucher_micro =
        vouchers::keep(&state.db, &address, &signed, clock::now_ms()).await.map_err(ApiError::internal)?;
    tracing::info!(account, cumulative_micro, voucher_micro, "voucher");
    Ok(HttpResponse::Ok().json(Kept { account, voucher_micro }))
}

fn cumulative(value: &serde_json::Value) -> Result<u64, ApiError> {
    let given = match value {
        serde_json::Value::String(text) if text.bytes().all(|digit| digit.is_ascii_digit()) => {
            text.parse().ok()
        }
        number => number.as_u64(),
    };
    given
        .filter(|micro| *micro > 0 && i64::try_from(*micro).is_ok_and(|micro| micro <= MAX_MICRO))
        .ok_or_else(|| {
            ApiError::bad_request(
                "cumulative_micro",
                format!("`cumulative_micro` must be a whole number of 10^-6 INFER, 1 to {MAX_MICRO}"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_amount_is_a_number_or_digits() {
        assert_eq!(cumulative(&json!(5)), Ok(5));
        assert_eq!(cumulative(&json!("1000000000000000000")), Ok(1_000_000_000_000_000_000));
        let refused = [
            json!(0),
            json!(-1),
            json!(1.5),
            json!("+5"),
            json!("5.0"),
            json!(""),
            json!("0x5"),
            json!(null),
            json!("1000000000000000001"),
            json!("99999999999999999999999"),
            json!([5]),
        ];
        for value in refused {
            let error = cumulative(&value).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("cumulative_micro"), "{value}");
        }
    }
}
