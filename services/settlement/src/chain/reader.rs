//! Reading the contract: no key needed, nothing changed.

use alloy::{
    eips::BlockNumberOrTag,
    primitives::{Address, B256},
    providers::{Provider, ProviderBuilder, RootProvider},
    rpc::types::Filter,
    sol_types::SolEvent,
};

use super::{Batch, ChainError, Head, InferaSettlement, PostedBatch, call};

/// The settlement contract on one chain, for reading.
#[derive(Debug, Clone)]
pub struct ChainReader {
    provider: RootProvider,
    contract: Address,
    chain_id: u64,
}

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
        let chain_id = call("eth_chainId", async { provider.get_chain_id().await }).await?;
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
}
