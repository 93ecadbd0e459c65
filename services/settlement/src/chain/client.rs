//! Posting batches: explicit nonces, and signed bytes that are stored before they are sent.

use std::time::Duration;

use alloy::{
    consensus::{SignableTransaction, TxEip1559, TxEnvelope},
    eips::{BlockNumberOrTag, eip2718::Encodable2718},
    network::{TransactionBuilder, TxSignerSync},
    primitives::{Address, B256, Bytes, TxKind, U256},
    providers::{Provider, RootProvider},
    rpc::types::TransactionRequest,
    signers::local::PrivateKeySigner,
    sol_types::{SolCall, SolConstructor},
};

use super::{Batch, ChainError, ChainReader, Head, InferToken, InferaSettlement, call, reader};

/// How often a pending transaction is looked at.
const POLL: Duration = Duration::from_millis(50);
/// How long [`Chain::deploy`] waits for each of its transactions.
const DEPLOY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long rewards and withdrawals wait on a devnet: long enough to be seen, short enough for a demonstration.
const DEVNET_DELAY: Duration = Duration::from_secs(30);

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

    /// Deploys a devnet's token and settlement contract and returns the latter's address. The deployer gets the whole
    /// supply and becomes admin and guardian, `settler` may post batches; contracts/README.md has the order for a real
    /// network, where a timelock is the admin.
    ///
    /// # Errors
    /// [`ChainError`]; `Unreachable` also if a transaction is in no block after a minute.
    pub async fn deploy(rpc_url: &str, deployer_key: &str, settler: Address) -> Result<Address, ChainError> {
        let signer = parse_key("chain.deployer_key", deployer_key)?;
        let provider = reader::provider(rpc_url)?;
        let deployer = signer.address();
        let holder = InferToken::constructorCall { holder: deployer }.abi_encode();
        let token = create(&provider, &signer, &InferToken::BYTECODE, &holder).await?;
        let arguments = InferaSettlement::constructorCall {
            token,
            admin: deployer,
            settler,
            guardian: deployer,
            challengeDelay: U256::from(DEVNET_DELAY.as_secs()),
            withdrawalDelay: U256::from(DEVNET_DELAY.as_secs()),
        };
        create(&provider, &signer, &InferaSettlement::BYTECODE, &arguments.abi_encode()).await
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

    /// Signs `postBatch` with the nonce given; sends nothing.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if the contract would refuse the batch now (another sequence or predecessor).
    pub async fn sign_batch(&self, batch: &Batch, nonce: u64) -> Result<SignedTx, ChainError> {
        let input = InferaSettlement::postBatchCall {
            sequence: batch.sequence,
            previousHash: batch.previous_hash,
            receiptsRoot: batch.receipts_root,
            count: batch.count,
            rewardRoot: batch.reward_root,
            total: batch.total,
        }
        .abi_encode();
        let to = TxKind::Call(self.reader.contract());
        sign(self.reader.provider(), &self.signer, to, input.into(), nonce).await
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

/// Deploys one contract and waits until it is in a block.
async fn create(
    provider: &RootProvider,
    signer: &PrivateKeySigner,
    bytecode: &Bytes,
    arguments: &[u8],
) -> Result<Address, ChainError> {
    let code = [bytecode.as_ref(), arguments].concat();
    let nonce = nonce(provider, signer.address()).await?;
    let signed = sign(provider, signer, TxKind::Create, code.into(), nonce).await?;
    send(provider, &signed.raw).await?;
    let deadline = tokio::time::Instant::now() + DEPLOY_TIMEOUT;
    loop {
        match status(provider, signed.hash).await? {
            TxStatus::Included { .. } => return Ok(signer.address().create(nonce)),
            TxStatus::Failed { .. } => {
                return Err(ChainError::Reverted {
                    what: "deploy",
                    reason: "the constructor failed".to_string(),
                });
            }
            TxStatus::Unknown if tokio::time::Instant::now() >= deadline => {
                return Err(ChainError::Unreachable("deploy: not in a block after 60 s".to_string()));
            }
            TxStatus::Unknown => tokio::time::sleep(POLL).await,
        }
    }
}

async fn nonce(provider: &RootProvider, address: Address) -> Result<u64, ChainError> {
    call("eth_getTransactionCount", async {
        provider.get_transaction_count(address).block_id(BlockNumberOrTag::Latest.into()).await
    })
    .await
}

/// Signs with estimated gas (a fifth more) and fees.
async fn sign(
    provider: &RootProvider,
    signer: &PrivateKeySigner,
    to: TxKind,
    input: Bytes,
    nonce: u64,
) -> Result<SignedTx, ChainError> {
    let chain_id = call("eth_chainId", async { provider.get_chain_id().await }).await?;
    let mut request = TransactionRequest::default().with_from(signer.address()).with_input(input.clone());
    request.to = Some(to);
    // The nonce is left out: an estimate asks what happens on top of the newest block.
    let gas = call("eth_estimateGas", async { provider.estimate_gas(request).await }).await?;
    let fees = call("eth_feeHistory", async { provider.estimate_eip1559_fees().await }).await?;
    let mut tx = TxEip1559 {
        chain_id,
        nonce,
        gas_limit: gas + gas / 5,
        max_fee_per_gas: fees.max_fee_per_gas,
        max_priority_fee_per_gas: fees.max_priority_fee_per_gas,
        to,
        input,
        ..Default::default()
    };
    let signature = signer
        .sign_transaction_sync(&mut tx)
        .map_err(|e| ChainError::Setting { field: "chain.settler_key", message: e.to_string() })?;
    let envelope = TxEnvelope::from(tx.into_signed(signature));
    Ok(SignedTx { hash: *envelope.tx_hash(), nonce, raw: envelope.encoded_2718() })
}

async fn send(provider: &RootProvider, raw: &[u8]) -> Result<(), ChainError> {
    let sent =
        call("eth_sendRawTransaction", async { provider.send_raw_transaction(raw).await.map(|_| ()) }).await;
    match sent {
        // Geth, anvil and others say it in these words when they hold the very same bytes.
        Err(ChainError::Refused { message, .. })
            if message.contains("already known") || message.contains("already imported") =>
        {
            Ok(())
        }
        other => other,
    }
}

async fn status(provider: &RootProvider, tx: B256) -> Result<TxStatus, ChainError> {
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
