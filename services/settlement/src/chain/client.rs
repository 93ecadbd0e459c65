//! Posting batches: explicit nonces, and signed bytes that are stored before they are sent.

use std::{collections::BTreeSet, time::Duration};

use alloy::{
    consensus::{SignableTransaction, TxEip1559, TxEnvelope},
    eips::{BlockNumberOrTag, eip2718::Encodable2718},
    network::{TransactionBuilder, TxSignerSync},
    primitives::{Address, B256, Bytes, TxKind},
    providers::{Provider, RootProvider},
    rpc::types::TransactionRequest,
    signers::local::PrivateKeySigner,
    sol_types::SolCall,
};
use infera_runtime::config::Secret;

use super::{
    Batch, ChainError, ChainReader, Head, InferaSettlement, PostedBatch, call,
    port::{BlockRef, Call, Charge, Escrow, Fees, Finality, Link, Port, Rewards},
};

/// The settlement contract on one chain, for a settler.
#[derive(Debug, Clone)]
pub struct Chain {
    reader: ChainReader,
    signer: PrivateKeySigner,
}

/// A signed transaction: store it, then [`Chain::send_raw`] its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedTx {
    pub hash: B256,
    pub nonce: u64,
    pub fees: Fees,
    /// The EIP-2718 envelope.
    pub raw: Vec<u8>,
}

/// Where a transaction stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxStatus {
    /// Not in a block (perhaps in the pool, perhaps lost).
    Unknown,
    /// In a block, this many blocks deep (1 = in the newest block).
    Included { block: u64, depth: u64, gas_used: u64 },
    /// In a block, and failed.
    Failed { block: u64 },
}

/// Reads a secp256k1 key in hex, with or without 0x. The error does not repeat the key.
///
/// # Errors
/// [`ChainError::Setting`] naming `field`.
pub fn parse_key(field: &'static str, hex: &str) -> Result<PrivateKeySigner, ChainError> {
    hex.trim().parse().map_err(|_| ChainError::Setting {
        field,
        message: "is not a private key; write 0x and 64 hex digits".to_string(),
    })
}

impl Chain {
    /// Connects to the contract as the settler whose key is `settler_key` (hex).
    ///
    /// # Errors
    /// [`ChainError::Setting`] for a bad key, URL or address; [`ChainError::Unreachable`] if nobody answers.
    pub async fn connect(rpc_url: &str, settler_key: &str, contract: Address) -> Result<Self, ChainError> {
        let signer = parse_key("chain.settler_key", settler_key)?;
        let reader = ChainReader::connect(rpc_url, contract).await?;
        Ok(Self { reader, signer })
    }

    pub fn reader(&self) -> &ChainReader {
        &self.reader
    }

    /// The settler's address.
    pub fn settler(&self) -> Address {
        self.signer.address()
    }

    /// The newest batch.
    pub async fn head(&self) -> Result<Head, ChainError> {
        self.reader.head().await
    }

    /// The settler's next nonce in the newest block. Transactions still in the pool do not count, so that a lost one
    /// leaves no gap.
    pub async fn next_nonce(&self) -> Result<u64, ChainError> {
        nonce(self.reader.provider(), self.signer.address()).await
    }

    /// Signs `postBatch` with the nonce given and the market's fees; sends nothing.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if the contract would refuse the batch now (another sequence or predecessor).
    pub async fn sign_batch(&self, batch: &Batch, nonce: u64) -> Result<SignedTx, ChainError> {
        let fees = fees(self.reader.provider()).await?;
        self.sign(&[Call::Post(*batch)], nonce, fees).await
    }

    /// Sends stored bytes. Sending them again is no error.
    pub async fn send_raw(&self, raw: &[u8]) -> Result<(), ChainError> {
        send(self.reader.provider(), raw).await
    }

    /// Where a transaction stands.
    pub async fn status(&self, tx: B256) -> Result<TxStatus, ChainError> {
        status(self.reader.provider(), tx).await
    }
}

/// The settlement contract at an endpoint, as the settler's configuration names it.
#[derive(Debug, Clone)]
pub struct RpcLink {
    pub rpc_url: String,
    pub settler_key: Secret,
    pub contract: Address,
    pub chain_id: u64,
}

impl Link for RpcLink {
    type Port = Chain;

    async fn connect(&self) -> Result<Chain, ChainError> {
        let chain = Chain::connect(&self.rpc_url, self.settler_key.expose(), self.contract).await?;
        let actual = chain.reader.chain_id();
        if actual == self.chain_id {
            return Ok(chain);
        }
        Err(ChainError::Setting {
            field: "chain.rpc_url",
            message: format!("the endpoint serves chain {actual}, the manifest names {}", self.chain_id),
        })
    }
}

impl Port for Chain {
    async fn head(&self) -> Result<Head, ChainError> {
        self.reader.head().await
    }

    async fn batch_root(&self, sequence: u64) -> Result<Option<B256>, ChainError> {
        self.reader.batch(sequence).await
    }

    async fn next_nonce(&self) -> Result<u64, ChainError> {
        Self::next_nonce(self).await
    }

    async fn fees(&self) -> Result<Fees, ChainError> {
        fees(self.reader.provider()).await
    }

    async fn sign(&self, calls: &[Call], nonce: u64, fees: Fees) -> Result<SignedTx, ChainError> {
        let to = TxKind::Call(self.reader.contract());
        let input = input(calls);
        let gas = gas(self.reader.provider(), self.signer.address(), to, &input).await?;
        sign(&self.signer, self.reader.chain_id(), Draft { to, input, nonce, gas, fees })
    }

    async fn send_raw(&self, raw: &[u8]) -> Result<(), ChainError> {
        Self::send_raw(self, raw).await
    }

    async fn status(&self, tx: B256) -> Result<TxStatus, ChainError> {
        Self::status(self, tx).await
    }

    async fn posted(&self, sequence: u64, from_block: u64) -> Result<Option<PostedBatch>, ChainError> {
        self.reader.posted(sequence, from_block).await
    }

    async fn final_block(&self, finality: Finality, confirmations: u64) -> Result<u64, ChainError> {
        self.reader.final_block(finality, confirmations).await
    }

    async fn rewards(&self) -> Result<Rewards, ChainError> {
        self.reader.rewards().await
    }

    async fn withdrawal_delay(&self) -> Result<u64, ChainError> {
        self.reader.withdrawal_delay().await
    }

    async fn newest(&self) -> Result<BlockRef, ChainError> {
        self.reader.newest().await
    }

    async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError> {
        self.reader.block_hash(number).await
    }

    async fn touched(&self, from: u64, to: u64) -> Result<BTreeSet<Address>, ChainError> {
        self.reader.touched(from, to).await
    }

    async fn escrow(&self, account: Address, block: u64) -> Result<Escrow, ChainError> {
        self.reader.escrow(account, Some(block)).await
    }
}

/// What the contract is sent: one call, or a `multicall` of several.
fn input(calls: &[Call]) -> Bytes {
    let mut data: Vec<Bytes> = calls.iter().map(one).collect();
    match data.pop() {
        Some(only) if data.is_empty() => only,
        Some(last) => {
            data.push(last);
            InferaSettlement::multicallCall { data }.abi_encode().into()
        }
        None => Bytes::new(),
    }
}

fn one(call: &Call) -> Bytes {
    match call {
        Call::Post(batch) => InferaSettlement::postBatchCall {
            sequence: batch.sequence,
            previousHash: batch.previous_hash,
            receiptsRoot: batch.receipts_root,
            count: batch.count,
            rewardRoot: batch.reward_root,
            total: batch.total,
        }
        .abi_encode(),
        Call::Charge { sequence, charges } => InferaSettlement::chargeCall {
            sequence: *sequence,
            charges: charges.iter().map(charge).collect(),
        }
        .abi_encode(),
        Call::Queue { batch, total } => {
            let batch = InferaSettlement::Batch {
                sequence: batch.sequence,
                previousHash: batch.previous_hash,
                receiptsRoot: batch.receipts_root,
                count: batch.count,
                rewardRoot: batch.reward_root,
                total: batch.total,
            };
            InferaSettlement::queueRewardsCall { batch, total: *total }.abi_encode()
        }
    }
    .into()
}

fn charge(one: &Charge) -> InferaSettlement::Charge {
    let (voucher, signature) = match one.voucher {
        Some((cumulative, signature)) => (cumulative, Bytes::copy_from_slice(signature.as_bytes())),
        None => (0, Bytes::new()),
    };
    InferaSettlement::Charge { account: one.account, cumulative: one.cumulative, voucher, signature }
}

pub(super) async fn nonce(provider: &RootProvider, address: Address) -> Result<u64, ChainError> {
    call("eth_getTransactionCount", async {
        provider.get_transaction_count(address).block_id(BlockNumberOrTag::Latest.into()).await
    })
    .await
}

/// What the endpoint thinks that a transaction should offer.
pub(super) async fn fees(provider: &RootProvider) -> Result<Fees, ChainError> {
    let fees = call("eth_feeHistory", async { provider.estimate_eip1559_fees().await }).await?;
    Ok(Fees { max: fees.max_fee_per_gas, priority: fees.max_priority_fee_per_gas })
}

/// Estimated gas, a fifth more.
pub(super) async fn gas(
    provider: &RootProvider,
    from: Address,
    to: TxKind,
    input: &Bytes,
) -> Result<u64, ChainError> {
    let mut request = TransactionRequest::default().with_from(from).with_input(input.clone());
    request.to = Some(to);
    // The nonce is left out and the block is named: an estimate asks what happens on top of the newest block, whatever
    // waits in the pool, such as the transaction that this one replaces.
    let latest = BlockNumberOrTag::Latest.into();
    let gas = call("eth_estimateGas", async { provider.estimate_gas(request).block(latest).await }).await?;
    Ok(gas + gas / 5)
}

/// What is signed.
pub(super) struct Draft {
    pub to: TxKind,
    pub input: Bytes,
    pub nonce: u64,
    pub gas: u64,
    pub fees: Fees,
}

pub(super) fn sign(signer: &PrivateKeySigner, chain_id: u64, draft: Draft) -> Result<SignedTx, ChainError> {
    let Draft { to, input, nonce, gas, fees } = draft;
    let mut tx = TxEip1559 {
        chain_id,
        nonce,
        gas_limit: gas,
        max_fee_per_gas: fees.max,
        max_priority_fee_per_gas: fees.priority,
        to,
        input,
        ..Default::default()
    };
    let signature = signer
        .sign_transaction_sync(&mut tx)
        .map_err(|e| ChainError::Setting { field: "chain.settler_key", message: e.to_string() })?;
    let envelope = TxEnvelope::from(tx.into_signed(signature));
    Ok(SignedTx { hash: *envelope.tx_hash(), nonce, fees, raw: envelope.encoded_2718() })
}

pub(super) async fn send(provider: &RootProvider, raw: &[u8]) -> Result<(), ChainError> {
    let sent =
        call("eth_sendRawTransaction", async { provider.send_raw_transaction(raw).await.map(|_| ()) }).await;
    match sent {
        // Geth, anvil and others say it in these words when they hold the very same bytes.
        Err(ChainError::Refused { message, .. })
            if message.contains("already known") || message.contains("already imported") =>
        {
            Ok(())
        }
        // "replacement transaction underpriced", "transaction underpriced", "fee too low to replace".
        Err(ChainError::Refused { message, .. }) if message.contains("underpriced") => {
            Err(ChainError::Underpriced(message))
        }
        other => other,
    }
}

/// How often a pending transaction is looked at, and how long.
const POLL: Duration = Duration::from_millis(50);
/// When the same bytes are sent again: they may not have arrived, or be forgotten.
const RESEND: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(120);

/// Sends one call as `signer` and waits until it is in a block. Returns the transaction.
///
/// # Errors
/// [`ChainError::Reverted`] with the contract's reason, mostly before anything is sent.
pub(super) async fn transact(
    reader: &ChainReader,
    signer: &PrivateKeySigner,
    what: &'static str,
    to: Address,
    request: &impl SolCall,
) -> Result<B256, ChainError> {
    let provider = reader.provider();
    let (to, input) = (TxKind::Call(to), request.abi_encode().into());
    let gas = gas(provider, signer.address(), to, &input).await.map_err(|error| match error {
        ChainError::Reverted { reason, .. } => ChainError::Reverted { what, reason },
        other => other,
    })?;
    let fees = fees(provider).await?;
    let nonce = nonce(provider, signer.address()).await?;
    let signed = sign(signer, reader.chain_id(), Draft { to, input, nonce, gas, fees })?;
    match send(provider, &signed.raw).await {
        // It may have arrived all the same.
        Ok(()) | Err(ChainError::Unreachable(_)) => {}
        Err(error) => return Err(error),
    }
    included(provider, what, &signed, tokio::time::Instant::now() + TIMEOUT).await
}

/// Waits until what was sent is in a block. Whatever the endpoint does meanwhile, whoever sent it learns its hash: what
/// is repeated without looking for it is done twice.
async fn included(
    provider: &RootProvider,
    what: &'static str,
    signed: &SignedTx,
    deadline: tokio::time::Instant,
) -> Result<B256, ChainError> {
    let mut sent = tokio::time::Instant::now();
    loop {
        let seen = match status(provider, signed.hash).await {
            Ok(TxStatus::Included { .. }) => return Ok(signed.hash),
            Ok(TxStatus::Failed { .. }) => {
                let reason = format!("transaction {} failed", signed.hash);
                return Err(ChainError::Reverted { what, reason });
            }
            Ok(TxStatus::Unknown) => {
                if sent.elapsed() >= RESEND {
                    sent = tokio::time::Instant::now();
                    // Whatever is answered: only a block says what became of it.
                    if let Err(error) = send(provider, &signed.raw).await {
                        tracing::debug!(%error, tx = %signed.hash, "not sent again");
                    }
                }
                "it is in no block".to_owned()
            }
            Err(ChainError::Unreachable(reason)) => reason,
            Err(error) => return Err(error),
        };
        if tokio::time::Instant::now() >= deadline {
            return Err(ChainError::Unreachable(format!(
                "{what}: the transaction {} was sent, and may still be carried out: look for it before you try again \
                 ({seen}, after {} s)",
                signed.hash,
                TIMEOUT.as_secs()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

pub(super) async fn status(provider: &RootProvider, tx: B256) -> Result<TxStatus, ChainError> {
    let receipt =
        call("eth_getTransactionReceipt", async { provider.get_transaction_receipt(tx).await }).await?;
    let Some(receipt) = receipt else {
        return Ok(TxStatus::Unknown);
    };
    let Some(block) = receipt.block_number else {
        return Ok(TxStatus::Unknown);
    };
    if !receipt.status() {
        return Ok(TxStatus::Failed { block });
    }
    let newest = call("eth_blockNumber", async { provider.get_block_number().await }).await?;
    Ok(TxStatus::Included { block, depth: (newest + 1).saturating_sub(block), gas_used: receipt.gas_used })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_sent_something_learns_its_hash_whatever_the_endpoint_does() {
        // Nobody listens there.
        let provider = super::super::reader::provider("http://127.0.0.1:9").unwrap();
        let hash = B256::repeat_byte(7);
        let signed = SignedTx { hash, nonce: 1, fees: Fees { max: 1, priority: 1 }, raw: Vec::new() };
        let error = included(&provider, "deposit", &signed, tokio::time::Instant::now()).await.unwrap_err();
        let said = error.to_string();
        assert!(error.is_unreachable() && said.contains(&hash.to_string()), "{said}");
        assert!(said.contains("look for it before you try again"), "{said}");
    }
}
