//! Evidence against an operator: two contradicting statements for one slot, which `InferaStaking` checks itself.

use alloy::{
    primitives::{Bytes, U256},
    providers::Provider,
    sol_types::SolEvent,
};
use infera_protocol::{
    commitment::Slot,
    slashing::{AccusedCommitment, AccusedReveal, Contradiction, SignedBinding},
};
use serde::Serialize;

use super::{Address, B256, ChainError, InferaStaking, call, operator::Operator};

/// What a slashing took, 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Slashed {
    pub tx: B256,
    pub operator: Address,
    pub amount_micro: u128,
    /// Of it, what the reporter got; the rest was burned.
    pub reward_micro: u128,
}

impl From<Slot> for InferaStaking::Slot {
    fn from(slot: Slot) -> Self {
        Self { requestHash: slot.request_hash.0.into(), attempt: slot.attempt, node: slot.node.0.into() }
    }
}

impl From<SignedBinding> for InferaStaking::Binding {
    fn from(bound: SignedBinding) -> Self {
        Self {
            signer: bound.binding.signer.0.into(),
            expiryMs: U256::from(u64::try_from(bound.binding.expiry_ms).unwrap_or(0)),
            signature: Bytes::copy_from_slice(&bound.signature.0),
        }
    }
}

impl From<AccusedCommitment> for InferaStaking::Commitment {
    fn from(signed: AccusedCommitment) -> Self {
        Self {
            commitment: signed.commitment.0.into(),
            signature: Bytes::copy_from_slice(&signed.signature.0),
            binding: signed.bound.into(),
        }
    }
}

impl From<AccusedReveal> for InferaStaking::Reveal {
    fn from(signed: AccusedReveal) -> Self {
        Self {
            tokensRoot: signed.tokens_root.0.into(),
            fingerprintRoot: signed.fingerprint_root.0.into(),
            finish: signed.finish,
            salt: signed.salt.0.into(),
            signature: Bytes::copy_from_slice(&signed.signature.0),
            binding: signed.bound.into(),
        }
    }
}

impl Operator {
    /// Reports evidence; a tenth of what it costs the operator goes to this key.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] with the contract's reason, before anything is sent: no contradiction, a forged signature,
    /// a slot that was paid for.
    pub async fn slash(&self, evidence: &Contradiction) -> Result<Slashed, ChainError> {
        let staking = self.contracts().staking;
        let tx = match *evidence {
            Contradiction::TwoCommitments { slot, first, second } => {
                let slash = InferaStaking::slashTwoCommitmentsCall {
                    slot: slot.into(),
                    first: first.into(),
                    second: second.into(),
                };
                self.transact("slash", staking, &slash).await?
            }
            Contradiction::TwoReveals { slot, first, second } => {
                let slash = InferaStaking::slashTwoRevealsCall {
                    slot: slot.into(),
                    first: first.into(),
                    second: second.into(),
                };
                self.transact("slash", staking, &slash).await?
            }
            Contradiction::FalseReveal { slot, committed, revealed } => {
                let slash = InferaStaking::slashFalseRevealCall {
                    slot: slot.into(),
                    committed: committed.into(),
                    revealed: revealed.into(),
                };
                self.transact("slash", staking, &slash).await?
            }
        };
        self.slashed(tx).await
    }

    /// What the transaction's log says.
    async fn slashed(&self, tx: B256) -> Result<Slashed, ChainError> {
        let provider = self.reader().provider();
        let receipt =
            call("eth_getTransactionReceipt", async { provider.get_transaction_receipt(tx).await }).await?;
        let event = receipt
            .iter()
            .flat_map(|receipt| receipt.inner.logs())
            .find_map(|log| InferaStaking::Slashed::decode_log(&log.inner).ok());
        let event = event.ok_or_else(|| ChainError::Refused {
            what: "slash",
            message: format!("transaction {tx} has no record of it; look again when it is in a block"),
        })?;
        let micro = |value: U256| u128::try_from(value).unwrap_or(u128::MAX);
        Ok(Slashed {
            tx,
            operator: event.operator,
            amount_micro: micro(event.amount),
            reward_micro: micro(event.reward),
        })
    }
}
