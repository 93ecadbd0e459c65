//! The receipts of a batch, for everybody.

use sea_orm::{ConnectionTrait, DbErr, Statement};

use super::{signed, unsigned};

/// A batch's receipts in the order of its journal from place `from` on, at most `limit`: the place and the canonical JSON.
///
/// # Errors
/// The database's.
pub async fn receipts_of<C: ConnectionTrait>(
    db: &C,
    sequence: u64,
    from: u64,
    limit: u64,
) -> Result<Vec<(u64, Vec<u8>)>, DbErr> {
    let (sequence, from) = (signed("batches.sequence", sequence)?, signed("journal.batch_index", from)?);
    let limit = signed("limit", limit)?;
    let sql = format!(
        "SELECT journal.batch_index AS place, receipts.receipt AS receipt FROM journal \
         JOIN receipts ON receipts.request_id = journal.request_id \
         WHERE journal.batch_sequence = {sequence} AND journal.batch_index >= {from} \
         ORDER BY journal.batch_index LIMIT {limit}"
    );
    let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await?;
    rows.iter()
        .map(|row| {
            let place: i64 = row.try_get("", "place")?;
            Ok((unsigned("journal.batch_index", place)?, row.try_get("", "receipt")?))
        })
        .collect()
}
