//! What an operator does on the chain: claims what was earned, stakes, takes stake out.

use alloy::{
    primitives::{Address, B256, U256},
    providers::Provider,
    signers::local::PrivateKeySigner,
    sol_types::SolCall,
};

use super::{
    ChainError, ChainReader, Contracts, InferToken, InferaSettlement, InferaStaking, call,
    client::{self, parse_key},
};

/// An operator's key at a network's contracts.
#[derive(Debug, Clone)]
pub struct Operator {
    reader: ChainReader,
    signer: PrivateKeySigner,
    contracts: Contracts,
}

/// An operator's stake, 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stake {
    pub active: u128,
    /// On its way out, slashable like the rest.
    pub unbonding: u128,
    /// When that may be withdrawn, seconds since 1970; 0 for never.
    pub withdrawable_secs: u64,
    /// Operators with less get no work.
    pub minimum: u128,
}

impl Operator {
    /// Connects as the operator whose key is `key` (hex).
    ///
    /// # Errors
    /// [`ChainError::Setting`] for a bad key, URL or contract; [`ChainError::Unreachable`].
    pub async fn connect(rpc_url: &str, key: &str, contracts: Contracts) -> Result<Self, ChainError> {
        let signer = parse_key("operator key", key)?;
        let reader = ChainReader::connect(rpc_url, contracts.settlement).await?;
        Ok(Self { reader, signer, contracts })
    }

    pub fn address(&self) -> Address {
        self.signer.address()
    }

    pub fn contracts(&self) -> &Contracts {
        &self.contracts
    }

    pub fn reader(&self) -> &ChainReader {
        &self.reader
    }

    /// Claims by reward root `id`; whose reward it is need not be the key's. Returns the transaction.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] with the contract's reason, before anything is sent.
    pub async fn claim(
        &self,
        id: u64,
        operator: Address,
        cumulative: u128,
        proof: Vec<B256>,
    ) -> Result<B256, ChainError> {
        let claim = InferaSettlement::claimCall { id, operator, cumulative: U256::from(cumulative), proof };
        self.transact("claim", self.contracts.settlement, &claim).await
    }

    /// Stakes for this operator, out of its own tokens: an approval of exactly that, then the stake.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if it has too few tokens.
    pub async fn stake(&self, amount: u128) -> Result<B256, ChainError> {
        let value = U256::from(amount);
        let approve = InferToken::approveCall { spender: self.contracts.staking, value };
        self.transact("approve", self.contracts.token, &approve).await?;
        let stake = InferaStaking::stakeCall { operator: self.address(), amount: value };
        self.transact("stake", self.contracts.staking, &stake).await
    }

    /// Begins to take stake out.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if less is staked.
    pub async fn unstake(&self, amount: u128) -> Result<B256, ChainError> {
        let unstake = InferaStaking::unstakeCall { amount: U256::from(amount) };
        self.transact("unstake", self.contracts.staking, &unstake).await
    }

    /// Takes what has come out.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if it is too early, or nothing was taken out.
    pub async fn withdraw(&self) -> Result<B256, ChainError> {
        self.transact("withdraw", self.contracts.staking, &InferaStaking::withdrawCall {}).await
    }

    /// Sends tokens.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if there are too few.
    pub async fn transfer(&self, to: Address, amount: u128) -> Result<B256, ChainError> {
        let transfer = InferToken::transferCall { to, value: U256::from(amount) };
        self.transact("transfer", self.contracts.token, &transfer).await
    }

    /// Strikes a reward root that is not claimable yet, and all after it; for a guardian's key. `root` is what stands at
    /// `id`, so that a veto that arrives late strikes nothing else.
    ///
    /// # Errors
    /// [`ChainError::Reverted`] if the key is no guardian's or the root pays already.
    pub async fn veto(&self, id: u64, root: B256) -> Result<B256, ChainError> {
        self.transact("veto", self.contracts.settlement, &InferaSettlement::vetoCall { id, root }).await
    }

    /// An operator's stake.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn staked(&self, operator: Address) -> Result<Stake, ChainError> {
        let staking = InferaStaking::new(self.contracts.staking, self.reader.provider());
        let position = call("position", async { staking.position(operator).call().await }).await?;
        let minimum = call("minimumStake", async { staking.minimumStake().call().await }).await?;
        Ok(Stake {
            active: position.active,
            unbonding: position.unbonding,
            withdrawable_secs: position.withdrawableAt,
            minimum: u128::try_from(minimum).unwrap_or(u128::MAX),
        })
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

    /// What somebody has for gas, wei.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn gas_money(&self, of: Address) -> Result<U256, ChainError> {
        call("eth_getBalance", async { self.reader.provider().get_balance(of).await }).await
    }

    /// Gives an address money for gas on an anvil; no other chain can.
    ///
    /// # Errors
    /// [`ChainError::Refused`] by any other chain.
    pub async fn devnet_gas(&self, to: Address, wei: U256) -> Result<(), ChainError> {
        let provider = self.reader.provider();
        call("anvil_setBalance", async {
            provider.raw_request::<_, ()>("anvil_setBalance".into(), (to, wei)).await
        })
        .await
    }

    /// Lets time pass on an anvil and makes a block: without transactions a devnet's time stands still, and with it every
    /// delay. With 0 seconds its time becomes the time of day.
    ///
    /// # Errors
    /// [`ChainError::Refused`] by any other chain.
    pub async fn devnet_pass(&self, secs: u64) -> Result<(), ChainError> {
        devnet_pass(&self.reader, secs).await
    }

    /// Sends one call and waits until it is in a block.
    pub(super) async fn transact(
        &self,
        what: &'static str,
        to: Address,
        request: &impl SolCall,
    ) -> Result<B256, ChainError> {
        client::transact(&self.reader, &self.signer, what, to, request).await
    }
}

pub(super) async fn devnet_pass(reader: &ChainReader, secs: u64) -> Result<(), ChainError> {
    let provider = reader.provider();
    if secs > 0 {
        let passed: Result<serde_json::Value, _> = call("evm_increaseTime", async {
            provider.raw_request("evm_increaseTime".into(), (secs,)).await
        })
        .await;
        passed?;
    }
    let mined: Result<String, _> =
        call("evm_mine", async { provider.raw_request("evm_mine".into(), ()).await }).await;
    mined.map(drop)
}
