//! What the batcher, and what follows the escrows, need of a chain. [`super::Chain`] is the real one; tests put a chain of their own in its place, with
//! outages, reorganisations and lost transactions by a seed.

use std::collections::BTreeSet;

use super::{Batch, ChainError, Head, PostedBatch, SignedTx, TxStatus};
use alloy::primitives::{Address, B256};
use infera_protocol::bytes::EvmSignature;

/// What a transaction offers, wei per gas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fees {
    /// The most that is paid in all.
    pub max: u128,
    /// Of it, what the block's maker gets.
    pub priority: u128,
}

/// Nodes take a replacement only if both fees rise by so many percent (geth's `PriceBump`).
pub const MIN_BUMP_PERCENT: u32 = 10;

impl Fees {
    /// Both raised by `percent`, and by 1 wei at least.
    #[must_use]
    pub fn raised(self, percent: u32) -> Self {
        let raise = |fee: u128| {
            let more = fee.saturating_mul(u128::from(percent)).div_ceil(100);
            fee.saturating_add(more.max(1))
        };
        Self { max: raise(self.max), priority: raise(self.priority) }
    }

    /// Of each fee the higher one.
    #[must_use]
    pub fn or_higher(self, other: Self) -> Self {
        Self { max: self.max.max(other.max), priority: self.priority.max(other.priority) }
    }

    /// What replaces a transaction that offers `stored`: the market's fees now, at least `percent` above what is stored,
    /// never more than `cap`. `None` if the cap leaves too little room: then the one that waits has to do.
    pub fn to_replace(stored: Self, market: Self, percent: u32, cap: u128) -> Option<Self> {
        let wanted = stored.raised(percent).or_higher(market).capped(cap);
        let least = stored.raised(MIN_BUMP_PERCENT);
        (wanted.max >= least.max && wanted.priority >= least.priority).then_some(wanted)
    }

    /// Neither above `cap`.
    #[must_use]
    pub fn capped(self, cap: u128) -> Self {
        Self { max: self.max.min(cap), priority: self.priority.min(cap) }
    }
}

/// What the settler can ask of the contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// `postBatch`.
    Post(Batch),
    /// `charge` for batch `sequence`, which must be the newest by then.
    Charge { sequence: u64, charges: Vec<Charge> },
    /// `queueRewards` for the newest batch. `total`: the sum of the reward tree's leaves, 10^-6 INFER.
    Queue { batch: Batch, total: u128 },
}

/// One account's part of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charge {
    pub account: Address,
    /// What it must have paid over its lifetime, 10^-6 INFER: the same again takes nothing.
    pub cumulative: u128,
    /// A voucher for at least that, where the contract has seen none.
    pub voucher: Option<(u128, EvmSignature)>,
}

/// A consumer's money in the contract, 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Escrow {
    /// Deposited and neither charged nor withdrawn.
    pub escrow: u128,
    /// Charged over the account's lifetime.
    pub charged: u128,
    /// The highest voucher that the contract has seen.
    pub authorized: u128,
    /// Asked to be withdrawn.
    pub withdrawal: u128,
    /// When that may be taken, seconds since 1970; 0 for never.
    pub withdrawable_secs: u64,
}

/// A block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef {
    pub number: u64,
    pub hash: B256,
}

/// The queue of reward roots, as the newest block has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rewards {
    /// Id of the newest root; 0 for none.
    pub last_id: u64,
    /// The batch that it stands in.
    pub last_sequence: u64,
    /// The sum of its leaves, 10^-6 INFER.
    pub last_total: u128,
    /// When it was queued, seconds since 1970.
    pub last_queued_secs: u64,
    /// What was ever charged and funded, 10^-6 INFER: no root's total may exceed it.
    pub funded: u128,
    /// How long a root waits, seconds.
    pub challenge_delay_secs: u64,
    /// Until when the queue is full, seconds since 1970; 0 if there is room.
    pub full_until_secs: u64,
    /// The newest block's time, seconds since 1970.
    pub now_secs: u64,
}

/// Which block counts as final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finality {
    /// So many blocks deep as `confirmations` says.
    #[default]
    Depth,
    /// The chain's own `safe` block.
    Safe,
    /// The chain's own `finalized` block. A devnet's stays at 0.
    Finalized,
}

/// Makes connections. Whatever is wrong with one, the next is new.
#[allow(async_fn_in_trait)] // used on one thread
pub trait Link {
    type Port: Port;

    /// Connects and makes sure that this is the network's chain and contract.
    ///
    /// # Errors
    /// [`ChainError`].
    async fn connect(&self) -> Result<Self::Port, ChainError>;
}

/// A chain with the settlement contract, for its settler. Every call may fail with [`ChainError::Unreachable`].
#[allow(async_fn_in_trait)] // used on one thread
pub trait Port {
    /// The newest batch, in the newest block.
    async fn head(&self) -> Result<Head, ChainError>;
    /// The receipts root of batch `sequence`.
    async fn batch_root(&self, sequence: u64) -> Result<Option<B256>, ChainError>;
    /// The settler's next nonce in the newest block: what waits in the pool does not count.
    async fn next_nonce(&self) -> Result<u64, ChainError>;
    /// What a transaction should offer now.
    async fn fees(&self) -> Result<Fees, ChainError>;
    /// Signs a transaction that makes all these calls or none; sends nothing. [`ChainError::Reverted`] if the contract
    /// would refuse it now.
    async fn sign(&self, calls: &[Call], nonce: u64, fees: Fees) -> Result<SignedTx, ChainError>;
    /// Sends stored bytes; again is no error.
    async fn send_raw(&self, raw: &[u8]) -> Result<(), ChainError>;
    /// Where a transaction stands.
    async fn status(&self, tx: B256) -> Result<TxStatus, ChainError>;
    /// A batch from the chain's log.
    async fn posted(&self, sequence: u64, from_block: u64) -> Result<Option<PostedBatch>, ChainError>;
    /// The newest block that counts as final.
    async fn final_block(&self, finality: Finality, confirmations: u64) -> Result<u64, ChainError>;
    /// The queue of reward roots.
    async fn rewards(&self) -> Result<Rewards, ChainError>;
    /// How long an announced withdrawal waits, seconds. It never changes.
    async fn withdrawal_delay(&self) -> Result<u64, ChainError>;
    /// The newest block.
    async fn newest(&self) -> Result<BlockRef, ChainError>;
    /// The hash of a block; `None` if there is none with this number.
    async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError>;
    /// The accounts whose escrow, withdrawal, charges or voucher changed in these blocks, both ends included.
    async fn touched(&self, from: u64, to: u64) -> Result<BTreeSet<Address>, ChainError>;
    /// An account's money as of the end of a block.
    async fn escrow(&self, account: Address, block: u64) -> Result<Escrow, ChainError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fees(max: u128, priority: u128) -> Fees {
        Fees { max, priority }
    }

    #[test]
    fn a_replacement_offers_enough_more_or_is_not_made() {
        let stored = fees(1_000, 100);
        let replace = |market, percent, cap| Fees::to_replace(stored, market, percent, cap);
        assert_eq!(replace(fees(1, 1), 25, 10_000), Some(fees(1_250, 125)));
        assert_eq!(replace(fees(5_000, 1), 25, 10_000), Some(fees(5_000, 125)), "the market rose");
        assert_eq!(replace(fees(9_999, 9_999), 25, 1_100), Some(fees(1_100, 1_100)), "no more than the cap");
        assert_eq!(replace(fees(9_999, 9_999), 25, 1_099), None, "nodes would not take it");
        assert_eq!(Fees::to_replace(fees(0, 0), fees(0, 0), 10, 10), Some(fees(1, 1)));
    }
}
