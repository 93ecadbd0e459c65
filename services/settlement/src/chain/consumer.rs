//! What a consumer with a wallet does on the chain: deposits, signs vouchers, withdraws.

use alloy::{
    primitives::{Address, B256, U256, keccak256},
    signers::{SignerSync, local::PrivateKeySigner},
    sol_types::SolValue,
};
use infera_protocol::{
    bytes::EvmSignature,
    identity::{Domain, IdentityError},
    voucher::Voucher,
};

use super::{
    ChainError, ChainReader, Contracts, Escrow, InferToken, InferaSettlement, call,
    client::{self, parse_key},
};

/// How long a permit can be used, seconds.
const PERMIT_SECS: u64 = 3_600;

/// A consumer's key at a network's contracts.
#[derive(Debug, Clone)]
pub struct Consumer {
    reader: ChainReader,
    signer: PrivateKeySigner,
    contracts: Contracts,
}

impl Consumer {
    /// Connects as the consumer whose key is `key` (hex).
    ///
    /// # Errors
    /// [`ChainError::Setting`] for a bad key, URL or contract; [`ChainError::Unreachable`].
    pub async fn connect(rpc_url: &str, key: &str, contracts: Contracts) -> Result<Self, ChainError> {
        let signer = parse_key("wallet key", key)?;
        let reader = ChainReader::connect(rpc_url, contracts.settlement).await?;
        Ok(Self { reader, signer, contracts })
    }

    pub fn address(&self) -> Address {
        self.signer.address()
    }

    /// The name of this wallet's account: what its API keys say.
    pub fn account_name(&self) -> String {
        self.account_address().to_string()
    }

    fn account_address(&self) -> infera_protocol::bytes::Address {
        infera_protocol::bytes::Address(self.address().into())
    }

    pub fn reader(&self) -> &ChainReader {
        &self.reader
    }

    /// The domain of what is signed for these contracts.
    pub fn domain(&self) -> Domain {
        Domain {
            chain_id: self.contracts.chain_id,
            contract: infera_protocol::bytes::Address(self.contracts.settlement.into()),
        }
    }

    /// Allows to be charged `cumulative_micro` over this account's lifetime, 10^-6 INFER.
    ///
    /// # Errors
    /// The key cannot sign.
    pub fn voucher(&self, cumulative_micro: u64) -> Result<EvmSignature, IdentityError> {
        let voucher = Voucher { account: self.account_address(), cumulative_micro };
        voucher.sign(&self.domain(), self.signer.credential())
    }

    /// Moves tokens of this wallet into its escrow, 10^-6 INFER: one transaction, with an ERC-2612 permit for exactly
    /// that.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if it has too few tokens, or deposits are paused.
    pub async fn deposit(&self, amount: u128) -> Result<B256, ChainError> {
        self.deposit_for(self.address(), amount).await
    }

    /// Moves tokens of this wallet into another account's escrow, as [`Consumer::deposit`].
    ///
    /// # Errors
    /// As [`Consumer::deposit`].
    pub async fn deposit_for(&self, account: Address, amount: u128) -> Result<B256, ChainError> {
        let deadline = U256::from(self.reader.time().await?.saturating_add(PERMIT_SECS));
        let amount = U256::from(amount);
        let digest = self.permit_digest(amount, deadline).await?;
        let signature = self
            .signer
            .sign_hash_sync(&digest)
            .map_err(|error| ChainError::Setting { field: "wallet key", message: error.to_string() })?;
        let deposit = InferaSettlement::depositWithPermitCall {
            consumer: account,
            amount,
            deadline,
            v: 27 + u8::from(signature.v()),
            r: signature.r().into(),
            s: signature.s().into(),
        };
        self.transact("deposit", &deposit).await
    }

    /// EIP-2612: the token's domain, the wallet's next nonce.
    async fn permit_digest(&self, amount: U256, deadline: U256) -> Result<B256, ChainError> {
        let token = InferToken::new(self.contracts.token, self.reader.provider());
        let separator = call("DOMAIN_SEPARATOR", async { token.DOMAIN_SEPARATOR().call().await }).await?;
        let nonce = call("nonces", async { token.nonces(self.address()).call().await }).await?;
        let type_hash =
            keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)");
        let message = (type_hash, self.address(), self.contracts.settlement, amount, nonce, deadline);
        let message = keccak256(message.abi_encode());
        Ok(keccak256([b"\x19\x01".as_slice(), separator.as_slice(), message.as_slice()].concat()))
    }

    /// Announces that `amount` is to come out of escrow; it may be taken when the contract's delay has passed. Replaces an
    /// earlier announcement.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if less is in escrow.
    pub async fn request_withdrawal(&self, amount: u128) -> Result<B256, ChainError> {
        let request = InferaSettlement::requestWithdrawalCall { amount: U256::from(amount) };
        self.transact("requestWithdrawal", &request).await
    }

    /// Takes the announcement back.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if there is none.
    pub async fn cancel_withdrawal(&self) -> Result<B256, ChainError> {
        self.transact("cancelWithdrawal", &InferaSettlement::cancelWithdrawalCall {}).await
    }

    /// Takes what was announced, as far as escrow still has it.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if it is too early, or nothing was announced.
    pub async fn withdraw(&self) -> Result<B256, ChainError> {
        self.transact("withdraw", &InferaSettlement::withdrawCall {}).await
    }

    /// Anybody's money in the contract, as the newest block has it.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn account(&self, of: Address) -> Result<Escrow, ChainError> {
        self.reader.escrow(of, None).await
    }

    /// How many tokens somebody has, 10^-6 INFER.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn tokens(&self, of: Address) -> Result<u128, ChainError> {
        let token = InferToken::new(self.contracts.token, self.reader.provider());
        let balance = call("balanceOf", async { token.balanceOf(of).call().await }).await?;
        Ok(u128::try_from(balance).unwrap_or(u128::MAX))
    }

    async fn transact(
        &self,
        what: &'static str,
        request: &impl alloy::sol_types::SolCall,
    ) -> Result<B256, ChainError> {
        client::transact(&self.reader, &self.signer, what, self.contracts.settlement, request).await
    }
}
