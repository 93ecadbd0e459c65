//! Journal -> batch: one transaction that chooses the leaves, adds up the rewards and writes the batch.

use std::collections::BTreeMap;

use infera_protocol::{
    bytes::{Address, Hash32},
    merkle::MerkleTree,
};
use infera_runtime::{clock, planned};
use sea_orm::{DatabaseTransaction, DbErr, TransactionTrait};

use super::{Batcher, StepError};
use crate::{
    chain::Batch,
    domain::reward_root,
    store::{
        batches::{self, Moved},
        corrupt, rewards,
    },
};

impl<L> Batcher<L> {
    /// Makes a batch of the waiting receipts; `false` if somebody else did.
    pub(super) async fn form(&self) -> Result<bool, StepError> {
        planned::pause("settlement.batch.before_form").await;
        let tx = self.db.begin().await?;
        let Some(batch) = fill(&tx, self.config.batch.limit).await? else {
            tx.rollback().await?;
            return Ok(false);
        };
        planned::pause("settlement.batch.in_form").await;
        tx.commit().await?;
        self.metrics.batches("formed", 1);
        tracing::info!(sequence = batch.sequence, receipts = batch.count, "batch formed");
        planned::pause("settlement.batch.after_form").await;
        Ok(true)
    }
}

/// Fills the next batch from the journal; `None` if nothing waits or somebody else was faster: roll back.
///
/// # Errors
/// The database's; a stored value that is none of ours.
pub async fn fill(tx: &DatabaseTransaction, limit: u64) -> Result<Option<Batch>, DbErr> {
    let last = batches::local(tx, 0).await?.last;
    let (sequence, previous_hash) = last.map_or((1, Hash32::ZERO), |last| (last.sequence + 1, last.hash));
    let leaves = batches::take(tx, sequence, limit).await?;
    let Some(tree) = MerkleTree::new(&leaves) else { return Ok(None) };
    let moved = batches::moved(tx, sequence).await?;
    if moved.len() != leaves.len() {
        return Err(corrupt("journal", "a leaf has no receipt"));
    }
    let rewards = rewards::add(tx, sequence, &earned(&moved)?).await?;
    let reward_total = rewards
        .iter()
        .try_fold(0_u64, |sum, (_, cumulative)| sum.checked_add(*cumulative))
        .ok_or_else(|| corrupt("rewards.cumulative_micro", "their sum overflows"))?;
    let batch = Batch {
        sequence,
        previous_hash: previous_hash.0.into(),
        receipts_root: tree.root().0.into(),
        count: leaves.len() as u64,
        reward_root: reward_root(&rewards).0.into(),
        total: moved.iter().map(|receipt| u128::from(receipt.charged_micro)).sum(),
    };
    let formed = batches::form(tx, &batch, reward_total, clock::now_ms()).await?;
    Ok(formed.then_some(batch))
}

/// What each operator earns by these receipts.
fn earned(receipts: &[Moved]) -> Result<BTreeMap<Address, i64>, DbErr> {
    let mut earned = BTreeMap::new();
    for payment in receipts.iter().flat_map(|receipt| &receipt.payments) {
        let sum: &mut i64 = earned.entry(payment.operator).or_default();
        *sum = i64::try_from(payment.amount_micro)
            .ok()
            .and_then(|amount| sum.checked_add(amount))
            .ok_or_else(|| corrupt("receipts.receipt", "the payments overflow"))?;
    }
    Ok(earned)
}
