//! `explorer.receipt` and `explorer.anchored` into the read model.

use infera_bus::{Envelope, Reject};
use infera_protocol::bytes::Hash32;
use infera_protocol::identity::Domain;
use infera_protocol::receipt::Receipt;
use infera_wire::{Message, WireError, convert, v1};
use sea_orm::DatabaseTransaction;
use uuid::Uuid;

use crate::metrics::Metrics;
use crate::store::{self, Written, batches};

/// Most receipts of a batch that are read: what a message of 4 MiB can hold.
const MAX_BATCH: usize = 250_000;

/// What both consumers share.
pub(crate) struct Reader {
    pub domain: Domain,
    pub metrics: Metrics,
}

impl Reader {
    /// Handles `receipt`.
    pub async fn receipt(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let wire: v1::ReceiptIssued = self.decode("receipt", envelope)?;
        let model = convert::name("receipt.model", &wire.model).map_err(|e| self.refuse(e))?;
        let receipt: Receipt = serde_json::from_slice(&wire.receipt)
            .map_err(|e| self.refuse(format!("field `receipt.receipt` is no receipt: {e}")))?;
        // One encoding: what is shown is what was issued, byte by byte.
        if serde_json::to_vec(&receipt).ok().as_ref() != Some(&wire.receipt) {
            return Err(self.refuse("field `receipt.receipt` is not the canonical encoding"));
        }
        let domain = Domain { chain_id: receipt.chain_id, contract: receipt.contract };
        if domain != self.domain {
            return Err(self.refuse("the receipt is of another network"));
        }
        if receipt.verified.len() != receipt.payments.len() {
            return Err(self.refuse("verified nodes and payments do not belong together"));
        }
        match store::insert_receipt(tx, &receipt, wire.receipt, model).await? {
            Written::New => self.metrics.receipts.inc(),
            Written::Same => {}
            Written::Conflict => return Err(self.refuse("another receipt of this request is there")),
        }
        tracing::debug!(receipt_id = %receipt.id, "receipt stored");
        Ok(())
    }

    /// Handles `batch.anchored`.
    pub async fn anchored(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let wire: v1::BatchAnchored = self.decode("batch.anchored", envelope)?;
        let (batch, ids) = batch_of(&wire).map_err(|e| self.refuse(e))?;
        let sequence = batch.sequence;
        match store::insert_batch(tx, batch, &ids).await? {
            Written::New => self.metrics.batches.inc(),
            Written::Same => {}
            Written::Conflict => {
                return Err(self.refuse(format!("another batch {sequence} is there")));
            }
        }
        tracing::debug!(sequence, receipts = ids.len(), "batch stored");
        Ok(())
    }

    fn decode<M: Message + Default>(&self, kind: &'static str, envelope: &Envelope) -> Result<M, Reject> {
        infera_wire::decode(kind, &envelope.body).map_err(|e| self.refuse(e))
    }

    fn refuse(&self, reason: impl ToString) -> Reject {
        self.metrics.rejected.inc();
        Reject::DeadLetter(reason.to_string())
    }
}

fn batch_of(wire: &v1::BatchAnchored) -> Result<(batches::Model, Vec<Uuid>), WireError> {
    let whole = |field: &'static str, value: u64| {
        i64::try_from(value).map_err(|_| WireError::invalid(field, format!("{value} is too large")))
    };
    if wire.sequence == 0 {
        return Err(WireError::invalid("anchored.sequence", "batches count from 1"));
    }
    if wire.request_ids.is_empty() || wire.request_ids.len() > MAX_BATCH {
        let reason = format!("{} receipts, allowed are 1 to {MAX_BATCH}", wire.request_ids.len());
        return Err(WireError::invalid("anchored.request_ids", reason));
    }
    if wire.anchored_at_ms < 0 {
        return Err(WireError::invalid("anchored.anchored_at_ms", "before 1970"));
    }
    let ids = wire
        .request_ids
        .iter()
        .map(|id| convert::uuid("anchored.request_ids", id))
        .collect::<Result<Vec<_>, _>>()?;
    let batch = batches::Model {
        sequence: whole("anchored.sequence", wire.sequence)?,
        receipts_root: convert::fixed::<Hash32>("anchored.receipts_root", &wire.receipts_root)?.to_vec(),
        receipts: i64::try_from(ids.len()).unwrap_or(i64::MAX),
        transaction: convert::fixed::<Hash32>("anchored.transaction", &wire.transaction)?.to_vec(),
        block_number: whole("anchored.block_number", wire.block_number)?,
        anchored_at_ms: wire.anchored_at_ms,
    };
    Ok((batch, ids))
}
