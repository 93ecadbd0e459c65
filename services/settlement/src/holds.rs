//! Holds that stand longer than they should. A request is decided by its deadline, so a hold that outlives it by the
//! configured grace means that its verdict was lost, most likely among the dead letters.
//!
//! Nothing here gives money back by itself: a verdict that is tried again (`infera dead replay`) settles as it should
//! have. Only where that can't help, an operator releases the hold (`infera holds release`).

use std::time::Duration;

use infera_runtime::{CancellationToken, clock};
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait};
use uuid::Uuid;

use crate::{
    config::HoldsConfig,
    domain::{self, State},
    escrow::spend,
    ledger::{self, LedgerError},
    metrics::Metrics,
    store::{
        requests::{self, Close, RequestRow},
        unsigned,
    },
};

/// Requests that a warning names at most.
const NAMED: u64 = 5;
/// What a request that an operator released says.
const OPERATOR_CODE: &str = "released_by_operator";

/// Why a hold can't be released.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error("there is no request {0}")]
    Unknown(Uuid),
    #[error("request {request} is {state}, it holds nothing")]
    Closed { request: Uuid, state: String },
    #[error("request {0} is before its deadline, or not long enough past it: a verdict may still come")]
    Early(Uuid),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("the database failed: {0}")]
    Db(#[from] DbErr),
}

/// Open requests whose deadline passed more than `grace_secs` ago, the oldest deadline first.
///
/// # Errors
/// The database's.
pub async fn overdue(db: &DatabaseConnection, grace_secs: u32, limit: u64) -> Result<Vec<RequestRow>, DbErr> {
    requests::overdue(db, before(grace_secs), limit).await
}

/// Gives an overdue hold back to its account and closes the request as released; a verdict that comes later changes
/// nothing. Returns what was given back, 10^-6 INFER.
///
/// # Errors
/// [`HoldError`]; nothing is changed then.
pub async fn release(db: &DatabaseConnection, request: Uuid, grace_secs: u32) -> Result<u64, HoldError> {
    let tx = db.begin().await?;
    let row = requests::find(&tx, request).await?.ok_or(HoldError::Unknown(request))?;
    let closed = |state: &str| HoldError::Closed { request, state: state.to_owned() };
    if row.state != State::Open.name() {
        return Err(closed(&row.state));
    }
    let before_ms = before(grace_secs);
    if row.deadline_ms >= before_ms || row.funded_at_ms >= before_ms {
        return Err(HoldError::Early(request));
    }
    let message = "its verdict was lost; the operator gave the hold back";
    if !give_back(&tx, &row, OPERATOR_CODE, message, clock::now_ms()).await? {
        return Err(closed("being closed"));
    }
    tx.commit().await?;
    Ok(unsigned("requests.held_micro", row.held_micro)?)
}

/// Closes an open request as released and moves its whole hold back; `false`: somebody else closed it.
pub(crate) async fn give_back(
    tx: &DatabaseTransaction,
    row: &RequestRow,
    code: &str,
    message: &str,
    now_ms: i64,
) -> Result<bool, LedgerError> {
    let close = Close { state: State::Released, charged_micro: 0, code, message };
    if !requests::close(tx, row.id, &close, now_ms).await? {
        return Ok(false);
    }
    let hold = spend::take(tx, row).await?;
    ledger::post(tx, &domain::release_transfer(row.id, &row.account, hold)?, now_ms).await?;
    Ok(true)
}

fn before(grace_secs: u32) -> i64 {
    clock::now_ms().saturating_sub(i64::from(grace_secs) * 1_000)
}

/// Counts overdue holds until `stop`, and warns when there are more than before.
pub(crate) async fn watch(
    db: DatabaseConnection,
    config: HoldsConfig,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut every = tokio::time::interval(Duration::from_secs(config.check_secs.into()));
    let mut known = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        match look(&db, config.grace_secs, known).await {
            Ok((holds, micro)) => {
                metrics.overdue(holds, micro);
                known = holds;
            }
            Err(error) => tracing::warn!(%error, "overdue holds are not counted"),
        }
    }
}

async fn look(db: &DatabaseConnection, grace_secs: u32, known: i64) -> Result<(i64, i64), DbErr> {
    let (holds, micro) = requests::overdue_total(db, before(grace_secs)).await?;
    if holds > known {
        let rows = overdue(db, grace_secs, NAMED).await?;
        let requests: Vec<String> = rows.iter().map(|row| row.id.to_string()).collect();
        tracing::warn!(
            holds,
            micro,
            oldest = requests.join(" "),
            "holds are past their deadline: their verdicts may be dead letters"
        );
    }
    Ok((holds, micro))
}
