//! Bringing a transaction into a block: the same bytes again and again, and after a while others that pay more.

use std::time::{Duration, Instant};

use infera_protocol::bytes::Hash32;
use infera_runtime::{clock, planned};

use super::{Batcher, StepError, Work};
use crate::{
    chain::{Call, ChainError, Fees, Link, Port, TxStatus},
    store::{
        batches,
        txs::{self, Job, Purpose, Variant},
    },
};

/// Wei in a gwei.
const GWEI: u128 = 1_000_000_000;

/// A point for planned failures.
async fn point(job: Job, name: &str) {
    let of = match job.purpose {
        Purpose::Post => "batch",
        Purpose::Charge => "charges",
        Purpose::Queue => "rewards",
    };
    planned::pause(&format!("settlement.{of}.{name}")).await;
}

impl<L: Link<Port: Clone>> Batcher<L> {
    /// Brings the transaction of the chain's next batch on its way, with what escrows owe, and with its rewards if they can
    /// be queued now.
    pub(super) async fn post(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        sequence: u64,
    ) -> Result<(), StepError> {
        let Some(row) = batches::find(&self.db, sequence).await? else { return Ok(()) };
        let batch = batches::batch(&row)?;
        let job = Job { sequence, purpose: Purpose::Post };
        let charges = self.charges().await?;
        let mut calls = vec![Call::Post(batch)];
        calls.extend(charges.call(sequence));
        if let Some(total) = self.queueable(port, &row, charges.micro).await? {
            calls.push(Call::Queue { batch, total });
        }
        loop {
            match self.drive(port, work, job, &calls).await {
                // The batch matters more than its rewards and charges, which can come later.
                Err(StepError::Chain(ChainError::Reverted { reason, .. })) if calls.len() > 1 => {
                    let without =
                        if matches!(calls.pop(), Some(Call::Queue { .. })) { "rewards" } else { "charges" };
                    tracing::warn!(sequence, reason, "the batch is posted without its {without}");
                }
                other => return other,
            }
        }
    }

    /// Signs what `calls` say, or sends again what was signed before, or replaces it by one that pays more.
    pub(super) async fn drive(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        job: Job,
        calls: &[Call],
    ) -> Result<(), StepError> {
        // The nonce first: a transaction that is mined in between is then seen as included.
        let nonce = port.next_nonce().await?;
        let variants = txs::of(&self.db, job).await?;
        // The charges of one batch may be several transactions: those in blocks have done their part.
        let again = job.purpose == Purpose::Charge;
        for variant in variants.iter().filter(|variant| !again || variant.nonce == nonce) {
            if let TxStatus::Included { .. } = port.status(variant.hash.0.into()).await? {
                return Ok(());
            }
        }
        let waiting = variants.iter().filter(|variant| variant.nonce == nonce).max_by_key(|v| v.fees);
        let Some(waiting) = waiting else {
            if let Some(old) = variants.last().filter(|_| !again) {
                tracing::warn!(?job, nonce, old = old.nonce, "the transaction is void, signing anew");
            }
            let fees = self.first_fees(port, nonce).await?;
            return self.sign(port, work, job, calls, nonce, fees).await;
        };
        let age_ms = clock::now_ms().saturating_sub(waiting.signed_at_ms);
        if work.underpriced.remove(&job) || age_ms >= self.config.chain.bump_ms {
            let market = port.fees().await?;
            let (percent, cap) = (self.config.chain.bump_percent, self.cap());
            if let Some(fees) = Fees::to_replace(waiting.fees, market, percent, cap) {
                tracing::info!(?job, nonce, old = waiting.fees.max, new = fees.max, "replacing what waits");
                self.metrics.batches("bumped", 1);
                match self.sign(port, work, job, calls, nonce, fees).await {
                    // In a block by now, or the endpoint counts what waits: what is signed is still good.
                    Err(StepError::Chain(ChainError::Reverted { reason, .. })) => {
                        tracing::debug!(?job, reason, "no replacement");
                    }
                    other => return other,
                }
            }
        }
        self.send(port, work, job, waiting).await
    }

    fn cap(&self) -> u128 {
        u128::from(self.config.chain.max_fee_gwei).saturating_mul(GWEI)
    }

    /// The market's fees; more if something with the same nonce may wait in the pool.
    async fn first_fees(&self, port: &L::Port, nonce: u64) -> Result<Fees, StepError> {
        let market = port.fees().await?;
        let cap = self.cap();
        let Some(offered) = txs::offered(&self.db, nonce).await? else { return Ok(market.capped(cap)) };
        let replacing = Fees::to_replace(offered, market, self.config.chain.bump_percent, cap);
        Ok(replacing.unwrap_or_else(|| market.or_higher(offered).capped(cap)))
    }

    async fn sign(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        job: Job,
        calls: &[Call],
        nonce: u64,
        fees: Fees,
    ) -> Result<(), StepError> {
        point(job, "before_sign").await;
        let signed = port.sign(calls, nonce, fees).await?;
        point(job, "in_sign").await;
        let now_ms = clock::now_ms();
        txs::add(&self.db, job, &signed, now_ms).await?;
        if job.purpose == Purpose::Post {
            batches::set_signed(&self.db, job.sequence).await?;
        }
        point(job, "after_sign").await;
        let hash = Hash32(signed.hash.0);
        let variant = Variant { hash, nonce, fees, raw: signed.raw, signed_at_ms: now_ms };
        self.send(port, work, job, &variant).await
    }

    async fn send(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        job: Job,
        variant: &Variant,
    ) -> Result<(), StepError> {
        let pause = Duration::from_millis(u64::try_from(self.config.chain.resend_ms).unwrap_or(0));
        if work.sent.get(&variant.hash).is_some_and(|sent| sent.elapsed() < pause) {
            return Ok(());
        }
        point(job, "before_send").await;
        match port.send_raw(&variant.raw).await {
            Ok(()) => {}
            // Something with this nonce waits that is not known here, or not by this endpoint: offer more next time.
            Err(ChainError::Underpriced(reason)) => {
                tracing::warn!(?job, reason, "the transaction pays too little, it will be replaced");
                work.underpriced.insert(job);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        work.sent.retain(|_, sent| sent.elapsed() < pause);
        work.sent.insert(variant.hash, Instant::now());
        self.metrics.batches("sent", 1);
        tracing::info!(?job, nonce = variant.nonce, tx = %variant.hash, "sent");
        point(job, "after_send").await;
        Ok(())
    }
}
