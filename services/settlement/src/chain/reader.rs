//! Reading the contract: no key needed, nothing changed.

use std::collections::BTreeSet;

use alloy::{
    eips::BlockNumberOrTag,
    primitives::{Address, B256},
    providers::{Provider, ProviderBuilder, RootProvider},
    rpc::types::Filter,
    sol_types::SolEvent,
};

use super::{
    Batch, ChainError, Head, InferaSettlement, PostedBatch, call,
    port::{BlockRef, Escrow, Finality, Rewards},
};

/// The settlement contract on one chain, for reading.
#[derive(Debug, Clone)]
pub struct ChainReader {
    provider: RootProvider,
    contract: Address,
    chain_id: u64,
}

/// A reward root in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RewardRoot {
    pub id: u64,
    pub root: B256,
    /// Sum of the leaves, 10^-6 INFER.
    pub total: u128,
    /// The batch that it stands in.
    pub sequence: u64,
    /// From when on it pays, seconds since 1970.
    pub matures_secs: u64,
}

/// Most reward roots that wait at a time (`MAX_PENDING` of InferaSettlement.sol).
const MAX_PENDING: u64 = 128;

/// A provider without fillers: nonces, gas and fees are set by hand.
pub(super) fn provider(rpc_url: &str) -> Result<RootProvider, ChainError> {
    let setting = |message: String| ChainError::Setting { field: "chain.rpc_url", message };
    if !rpc_url.starts_with("http://") {
        // The workspace builds alloy without TLS.
        return Err(setting(format!(
            "{rpc_url:?} must begin with http://; put a TLS proxy before an https endpoint"
        )));
    }
    let url = rpc_url.parse().map_err(|e| setting(format!("{rpc_url:?} is not a URL: {e}")))?;
    Ok(ProviderBuilder::new().disable_recommended_fillers().connect_http(url))
}

impl ChainReader {
    /// Connects and makes sure that a contract is at `contract`.
    ///
    /// # Errors
    /// [`ChainError::Setting`] if the URL is none or nothing is deployed there; else [`ChainError::Unreachable`].
    pub async fn connect(rpc_url: &str, contract: Address) -> Result<Self, ChainError> {
        let provider = provider(rpc_url)?;
        let chain_id = Self::chain_id_of(&provider).await?;
        let code = call("eth_getCode", async { provider.get_code_at(contract).await }).await?;
        if code.is_empty() {
            return Err(ChainError::Setting {
                field: "chain.contract",
                message: format!(
                    "there is no contract at {contract} on chain {chain_id}; check the network's manifest"
                ),
            });
        }
        Ok(Self { provider, contract, chain_id })
    }

    pub(super) async fn chain_id_of(provider: &RootProvider) -> Result<u64, ChainError> {
        call("eth_chainId", async { provider.get_chain_id().await }).await
    }

    pub fn chain_id(&self) -> u64 {
        self.chain_id
    }

    pub fn contract(&self) -> Address {
        self.contract
    }

    pub(super) fn provider(&self) -> &RootProvider {
        &self.provider
    }

    pub(super) fn instance(&self) -> InferaSettlement::InferaSettlementInstance<&RootProvider> {
        InferaSettlement::new(self.contract, &self.provider)
    }

    /// The newest batch.
    pub async fn head(&self) -> Result<Head, ChainError> {
        let head = call("head", async { self.instance().head().call().await }).await?;
        Ok(Head { sequence: head.sequence, hash: head.batchHash })
    }

    /// The receipts root of batch `sequence`; `None` if it was not posted.
    pub async fn batch(&self, sequence: u64) -> Result<Option<B256>, ChainError> {
        let root = call("batches", async { self.instance().batches(sequence).call().await }).await?;
        Ok((root != B256::ZERO).then_some(root))
    }

    /// Asks the contract whether `leaf` is in batch `sequence`.
    pub async fn verify_receipt(
        &self,
        sequence: u64,
        leaf: B256,
        proof: Vec<B256>,
    ) -> Result<bool, ChainError> {
        call("verifyReceipt", async { self.instance().verifyReceipt(sequence, leaf, proof).call().await })
            .await
    }

    /// The newest block's number.
    pub async fn block_number(&self) -> Result<u64, ChainError> {
        call("eth_blockNumber", async { self.provider.get_block_number().await }).await
    }

    /// The newest block that counts as final; 0 if none does.
    pub async fn final_block(&self, finality: Finality, confirmations: u64) -> Result<u64, ChainError> {
        let tag = match finality {
            Finality::Depth => {
                let newest = self.block_number().await?;
                return Ok((newest + 1).saturating_sub(confirmations));
            }
            Finality::Safe => BlockNumberOrTag::Safe,
            Finality::Finalized => BlockNumberOrTag::Finalized,
        };
        let block =
            call("eth_getBlockByNumber", async { self.provider.get_block_by_number(tag).await }).await?;
        Ok(block.map_or(0, |block| block.header.number))
    }

    /// The newest block's time, seconds since 1970.
    pub async fn time(&self) -> Result<u64, ChainError> {
        let newest = call("eth_getBlockByNumber", async {
            self.provider.get_block_by_number(BlockNumberOrTag::Latest).await
        })
        .await?;
        Ok(newest.map_or(0, |block| block.header.timestamp))
    }

    /// The queue of reward roots.
    pub async fn rewards(&self) -> Result<Rewards, ChainError> {
        let contract = self.instance();
        let last_id = call("lastRewardId", async { contract.lastRewardId().call().await }).await?;
        let last = call("rewards", async { contract.rewards(last_id).call().await }).await?;
        let funded = call("totalFunded", async { contract.totalFunded().call().await }).await?;
        let delay = call("CHALLENGE_DELAY", async { contract.CHALLENGE_DELAY().call().await }).await?;
        let delay = u64::try_from(delay).unwrap_or(u64::MAX);
        let now_secs = self.time().await?;
        let mut full_until_secs = 0;
        if last_id >= MAX_PENDING {
            let oldest =
                call("rewards", async { contract.rewards(last_id + 1 - MAX_PENDING).call().await }).await?;
            if now_secs < oldest.maturesAt {
                full_until_secs = oldest.maturesAt;
            }
        }
        Ok(Rewards {
            last_id,
            last_sequence: last.sequence,
            last_total: last.total,
            last_queued_secs: last.maturesAt.saturating_sub(delay),
            funded,
            challenge_delay_secs: delay,
            full_until_secs,
            now_secs,
        })
    }

    /// How long an announced withdrawal waits, seconds.
    pub async fn withdrawal_delay(&self) -> Result<u64, ChainError> {
        let delay =
            call("WITHDRAWAL_DELAY", async { self.instance().WITHDRAWAL_DELAY().call().await }).await?;
        Ok(u64::try_from(delay).unwrap_or(u64::MAX))
    }

    /// A reward root of the queue; all zero if there is none.
    pub async fn reward_root(&self, id: u64) -> Result<RewardRoot, ChainError> {
        let root = call("rewards", async { self.instance().rewards(id).call().await }).await?;
        Ok(RewardRoot {
            id,
            root: root.root,
            total: root.total,
            sequence: root.sequence,
            matures_secs: root.maturesAt,
        })
    }

    /// The newest reward root that pays now; 0 if none does.
    pub async fn claimable_id(&self) -> Result<u64, ChainError> {
        call("claimableId", async { self.instance().claimableId().call().await }).await
    }

    /// What an operator was paid so far, 10^-6 INFER.
    pub async fn claimed(&self, operator: Address) -> Result<u128, ChainError> {
        let claimed = call("claimed", async { self.instance().claimed(operator).call().await }).await?;
        Ok(u128::try_from(claimed).unwrap_or(u128::MAX))
    }

    /// What was ever claimed out of the pool, 10^-6 INFER.
    pub async fn total_claimed(&self) -> Result<u128, ChainError> {
        call("totalClaimed", async { self.instance().totalClaimed().call().await }).await
    }

    /// Everything about batch `sequence`, from the chain's log, looking from block `from_block` on (endpoints limit the
    /// range); `None` if it is not there.
    pub async fn posted(&self, sequence: u64, from_block: u64) -> Result<Option<PostedBatch>, ChainError> {
        let filter = Filter::new()
            .address(self.contract)
            .event_signature(InferaSettlement::BatchPosted::SIGNATURE_HASH)
            .topic1(B256::from(alloy::primitives::U256::from(sequence)))
            .from_block(from_block)
            .to_block(BlockNumberOrTag::Latest);
        let logs = call("eth_getLogs", async { self.provider.get_logs(&filter).await }).await?;
        let Some(log) = logs.first() else {
            return Ok(None);
        };
        let (Some(block), Some(tx)) = (log.block_number, log.transaction_hash) else {
            return Ok(None);
        };
        let event = InferaSettlement::BatchPosted::decode_log(&log.inner)
            .map_err(|e| ChainError::Refused { what: "eth_getLogs", message: e.to_string() })?;
        let batch = Batch {
            sequence: event.sequence,
            previous_hash: event.previousHash,
            receipts_root: event.receiptsRoot,
            count: event.count,
            reward_root: event.rewardRoot,
            total: event.total,
        };
        Ok(Some(PostedBatch { batch, batch_hash: event.batchHash, block, tx }))
    }

    /// The newest block.
    pub async fn newest(&self) -> Result<BlockRef, ChainError> {
        let block = call("eth_getBlockByNumber", async {
            self.provider.get_block_by_number(BlockNumberOrTag::Latest).await
        })
        .await?
        .ok_or_else(|| ChainError::Unreachable("the endpoint has no newest block".into()))?;
        Ok(BlockRef { number: block.header.number, hash: block.header.hash })
    }

    /// The hash of a block; `None` if there is none with this number.
    pub async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError> {
        let block = call("eth_getBlockByNumber", async {
            self.provider.get_block_by_number(BlockNumberOrTag::Number(number)).await
        })
        .await?;
        Ok(block.map(|block| block.header.hash))
    }

    /// The hash of a block that is there: an endpoint that lags behind the others may not have it yet.
    ///
    /// # Errors
    /// [`ChainError`]; `Unreachable` if the endpoint has no such block.
    pub async fn existing_hash(&self, number: u64) -> Result<B256, ChainError> {
        self.block_hash(number).await?.ok_or_else(|| ChainError::no_block(number))
    }

    /// The accounts whose escrow, withdrawal, charges or voucher changed in these blocks, both ends included.
    pub async fn touched(&self, from: u64, to: u64) -> Result<BTreeSet<Address>, ChainError> {
        let events = [
            InferaSettlement::Deposited::SIGNATURE_HASH,
            InferaSettlement::WithdrawalRequested::SIGNATURE_HASH,
            InferaSettlement::WithdrawalCancelled::SIGNATURE_HASH,
            InferaSettlement::Withdrawn::SIGNATURE_HASH,
            InferaSettlement::VoucherRecorded::SIGNATURE_HASH,
            InferaSettlement::Charged::SIGNATURE_HASH,
            InferaSettlement::ChargedShort::SIGNATURE_HASH,
        ];
        let filter = Filter::new()
            .address(self.contract)
            .event_signature(events.to_vec())
            .from_block(from)
            .to_block(to);
        let logs = call("eth_getLogs", async { self.provider.get_logs(&filter).await }).await?;
        // Charges name their batch first.
        let second =
            [InferaSettlement::Charged::SIGNATURE_HASH, InferaSettlement::ChargedShort::SIGNATURE_HASH];
        let account = |log: &alloy::rpc::types::Log| {
            let topics = log.inner.data.topics();
            let place = if second.contains(topics.first()?) { 2 } else { 1 };
            topics.get(place).map(|topic| Address::from_word(*topic))
        };
        Ok(logs.iter().filter(|log| !log.removed).filter_map(account).collect())
    }

    /// An account's money as of the end of a block; the newest one's without a number.
    pub async fn escrow(&self, account: Address, block: Option<u64>) -> Result<Escrow, ChainError> {
        let at = block.map_or(BlockNumberOrTag::Latest, BlockNumberOrTag::Number);
        let found =
            call("account", async { self.instance().account(account).block(at.into()).call().await }).await?;
        Ok(Escrow {
            escrow: found.escrow,
            charged: found.charged,
            authorized: found.authorized,
            withdrawal: found.withdrawal,
            withdrawable_secs: found.withdrawableAt,
        })
    }

    /// Everything that was ever charged and funded, 10^-6 INFER: the pool before claims.
    pub async fn total_funded(&self) -> Result<u128, ChainError> {
        call("totalFunded", async { self.instance().totalFunded().call().await }).await
    }
}
