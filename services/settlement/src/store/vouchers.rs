//! The highest voucher of each account, with its signature: the contract wants to see it.

use infera_protocol::bytes::{Address, EvmSignature};
use sea_orm::{
    ConnectionTrait, DbErr, EntityTrait, QueryTrait, Set,
    sea_query::{Expr, ExprTrait, OnConflict},
};

use super::{corrupt, signed, tables::vouchers, unsigned};

/// What an account allows to be charged over its lifetime, 10^-6 INFER, and its word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signed {
    pub cumulative_micro: u64,
    pub signature: EvmSignature,
}

/// Keeps a checked voucher, unless a higher one is there. Returns the highest.
///
/// # Errors
/// The database's.
pub async fn keep<C: ConnectionTrait>(
    db: &C,
    account: &Address,
    voucher: &Signed,
    now_ms: i64,
) -> Result<u64, DbErr> {
    let cumulative = signed("vouchers.cumulative_micro", voucher.cumulative_micro)?;
    let row = vouchers::ActiveModel {
        address: Set(account.to_string()),
        cumulative_micro: Set(cumulative),
        signature: Set(voucher.signature.to_vec()),
        at_ms: Set(now_ms),
    };
    let known = Expr::col((vouchers::Entity, vouchers::Column::CumulativeMicro));
    let insert = vouchers::Entity::insert(row).on_conflict(
        OnConflict::column(vouchers::Column::Address)
            .update_columns([
                vouchers::Column::CumulativeMicro,
                vouchers::Column::Signature,
                vouchers::Column::AtMs,
            ])
            .action_and_where(known.lt(cumulative))
            .to_owned(),
    );
    db.execute(&insert.into_query()).await?;
    let highest = find(db, account).await?;
    Ok(highest.map_or(voucher.cumulative_micro, |highest| highest.cumulative_micro))
}

/// The highest voucher of an account.
///
/// # Errors
/// The database's.
pub async fn find<C: ConnectionTrait>(db: &C, account: &Address) -> Result<Option<Signed>, DbErr> {
    let row = vouchers::Entity::find_by_id(account.to_string()).one(db).await?;
    row.map(|row| {
        let signature = EvmSignature::try_from(row.signature.as_slice())
            .map_err(|error| corrupt("vouchers.signature", &error.to_string()))?;
        Ok(Signed {
            cumulative_micro: unsigned("vouchers.cumulative_micro", row.cumulative_micro)?,
            signature,
        })
    })
    .transpose()
}
