//! The chain: where batches of receipts are anchored.
//!
//! - [`ChainReader`] reads the contract; it needs no key. `infera verify` uses it.
//! - [`Chain`] also signs and sends batches. Nothing here picks a nonce by itself: the caller reads
//!   [`Chain::next_nonce`], gets the signed bytes from [`Port::sign`], stores them, and only then sends them with
//!   [`Chain::send_raw`]. Sending the same bytes again is harmless, and the contract refuses a sequence it already has.
//! - [`port`] is what the batcher needs of a chain, so that tests can put one of their own in its place.
//! - [`consumer`] deposits, signs vouchers and withdraws.
//! - [`operator`] claims rewards and stakes, [`slash`] reports who cheats, [`deploy`] sets up a network's contracts.
//! - [`governance`] reads and makes decisions of the token's holders, and the model registry that they govern.
//! - [`devnet`] runs a local anvil whose state survives restarts.
//!
//! Every call ends within [`CALL_TIMEOUT`].

pub mod client;
pub mod consumer;
pub mod deploy;
pub mod devnet;
pub mod governance;
pub mod operator;
pub mod port;
pub(crate) mod progress;
pub mod reader;
pub mod slash;
pub mod stakes;

use std::time::Duration;

pub use alloy::primitives::{Address, B256};
pub use client::{Chain, SignedTx, TxStatus, parse_key};
pub use deploy::{Contracts, Deployment};
pub use port::{BlockRef, Call, Charge, Escrow, Fees, Link, Port, Rewards};
pub use reader::ChainReader;

/// The longest that one call to the JSON-RPC endpoint may take.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

#[allow(clippy::too_many_arguments)] // the generated constructor of an event with seven fields
mod abi {
    alloy::sol!(
        #[sol(rpc)]
        InferaSettlement,
        "contracts/artifacts/InferaSettlement.json"
    );
    alloy::sol!(
        #[sol(rpc)]
        InferToken,
        "contracts/artifacts/InferToken.json"
    );
    alloy::sol!(
        #[sol(rpc)]
        InferaStaking,
        "contracts/artifacts/InferaStaking.json"
    );
    alloy::sol!(
        #[sol(rpc)]
        InferaGovernor,
        "contracts/artifacts/InferaGovernor.json"
    );
    alloy::sol!(
        #[sol(rpc)]
        InferaTimelock,
        "contracts/artifacts/InferaTimelock.json"
    );
    alloy::sol!(
        #[sol(rpc)]
        ModelRegistry,
        "contracts/artifacts/ModelRegistry.json"
    );
}
pub(crate) use abi::{
    InferToken, InferaGovernor, InferaSettlement, InferaStaking, InferaTimelock, ModelRegistry,
};

/// A batch of receipts as the contract takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Position in the chain of batches, from 1.
    pub sequence: u64,
    /// [`Batch::hash`] of the batch before; zero for the first.
    pub previous_hash: B256,
    /// Root of the Merkle tree over the receipts.
    pub receipts_root: B256,
    /// Receipts in the batch, at least 1.
    pub count: u64,
    /// Root over the operators' cumulative rewards.
    pub reward_root: B256,
    /// What the receipts charged together, in micro-INFER.
    pub total: u128,
}

impl Batch {
    /// The hash by which the next batch names this one: keccak of the ABI-encoded fields, as `hashBatch` computes it.
    pub fn hash(&self) -> B256 {
        use alloy::sol_types::SolValue;
        let encoded =
            (self.sequence, self.previous_hash, self.receipts_root, self.count, self.reward_root, self.total)
                .abi_encode();
        alloy::primitives::keccak256(encoded)
    }
}

/// The newest batch that the contract holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// 0 before the first batch.
    pub sequence: u64,
    /// Zero before the first batch.
    pub hash: B256,
}

/// A batch found in the chain's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostedBatch {
    pub batch: Batch,
    pub batch_hash: B256,
    pub block: u64,
    pub tx: B256,
}

/// Why a call to the chain failed.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The endpoint did not answer, or not in time. Try again later.
    #[error("chain: {0}")]
    Unreachable(String),
    /// Another transaction with this nonce waits, and pays as much or more.
    #[error("chain: the transaction pays too little to replace the one that waits: {0}")]
    Underpriced(String),
    /// The endpoint answered with an error, such as a nonce that is taken.
    #[error("chain: {what} was refused: {message}")]
    Refused { what: &'static str, message: String },
    /// The transaction would fail, or failed, in the contract.
    #[error("chain: {what} reverts: {reason}")]
    Reverted { what: &'static str, reason: String },
    /// A setting that cannot work; `field` names it.
    #[error("{field}: {message}")]
    Setting { field: &'static str, message: String },
}

impl ChainError {
    /// Whether the endpoint is down, rather than disagreeing.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable(_))
    }

    /// The endpoint has no block with this number: it lags behind, or another of its machines answered before.
    pub(crate) fn no_block(number: u64) -> Self {
        Self::Unreachable(format!("the endpoint has no block {number}"))
    }
}

/// Reads an address in hex, with or without 0x.
///
/// # Errors
/// [`ChainError::Setting`] naming `field`.
pub fn parse_address(field: &'static str, text: &str) -> Result<Address, ChainError> {
    text.parse().map_err(|_| ChainError::Setting {
        field,
        message: format!("{text:?} is not an address; write 0x and 40 hex digits"),
    })
}

/// Runs one call under [`CALL_TIMEOUT`] and sorts its failure.
async fn call<T, E: Into<Failure>>(
    what: &'static str,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, ChainError> {
    match tokio::time::timeout(CALL_TIMEOUT, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into().named(what)),
        Err(_) => {
            Err(ChainError::Unreachable(format!("{what} got no answer in {} s", CALL_TIMEOUT.as_secs())))
        }
    }
}

/// A failed call, before it is named.
enum Failure {
    Down(String),
    Refused(String),
    Reverted(String),
}

impl Failure {
    fn named(self, what: &'static str) -> ChainError {
        match self {
            Self::Down(message) => ChainError::Unreachable(format!("{what}: {message}")),
            Self::Refused(message) => ChainError::Refused { what, message },
            Self::Reverted(reason) => ChainError::Reverted { what, reason },
        }
    }
}

impl From<alloy::transports::TransportError> for Failure {
    fn from(error: alloy::transports::TransportError) -> Self {
        let Some(payload) = error.as_error_resp() else {
            return Self::Down(error.to_string());
        };
        if let Some(reverted) =
            payload.as_decoded_interface_error::<InferaSettlement::InferaSettlementErrors>()
        {
            return Self::Reverted(revert_reason(&reverted));
        }
        if let Some(reverted) = payload.as_decoded_interface_error::<InferaStaking::InferaStakingErrors>() {
            return Self::Reverted(staking_reason(&reverted));
        }
        if let Some(reverted) = payload.as_decoded_interface_error::<InferToken::InferTokenErrors>() {
            return Self::Reverted(token_reason(&reverted));
        }
        if let Some(reverted) = payload.as_decoded_interface_error::<ModelRegistry::ModelRegistryErrors>() {
            return Self::Reverted(registry_reason(&reverted));
        }
        if payload.message.contains("revert") {
            return Self::Reverted(payload.message.to_string());
        }
        Self::Refused(payload.message.to_string())
    }
}

impl From<alloy::contract::Error> for Failure {
    fn from(error: alloy::contract::Error) -> Self {
        match error {
            alloy::contract::Error::TransportError(error) => error.into(),
            other => Self::Refused(other.to_string()),
        }
    }
}

fn token_reason(error: &InferToken::InferTokenErrors) -> String {
    use InferToken::InferTokenErrors as E;
    use alloy::sol_types::SolInterface;
    match error {
        E::ERC20InsufficientBalance(e) => format!("{} has {}, not {}", e.sender, e.balance, e.needed),
        E::ERC20InsufficientAllowance(e) => {
            format!("{} may move {}, not {}; approve it or sign a permit", e.spender, e.allowance, e.needed)
        }
        other => format!("the token's error 0x{}", alloy::hex::encode(other.selector())),
    }
}

fn registry_reason(error: &ModelRegistry::ModelRegistryErrors) -> String {
    use ModelRegistry::ModelRegistryErrors as E;
    use alloy::sol_types::SolInterface;
    match error {
        E::BadValue(e) => format!("the registry does not take this `{}`", e.field),
        E::NoSuchModel(e) => format!("the registry serves no model {:?}", e.id),
        E::AlreadyApproved(e) => format!("the release {} is approved already", e.release),
        E::NotApproved(e) => format!("the release {} is not approved", e.release),
        other => format!("the registry's error 0x{}", alloy::hex::encode(other.selector())),
    }
}

fn staking_reason(error: &InferaStaking::InferaStakingErrors) -> String {
    use InferaStaking::InferaStakingErrors as E;
    use alloy::sol_types::SolInterface;
    match error {
        E::BeyondStake(e) => format!("{} is staked, not {}", e.active, e.requested),
        E::NothingUnbonding(_) => "nothing is on its way out".to_string(),
        E::NotBefore(e) => format!("too early: not before {} s", e.time),
        E::ZeroAmount(_) => "the amount is zero".to_string(),
        E::NotTheSigner(e) => format!("{} signed it, not the bound signer {}", e.actual, e.expected),
        E::OperatorsDiffer(e) => {
            format!("{} and {} signed the bindings, not one operator", e.first, e.second)
        }
        E::BindingTooOld(e) => format!("the binding expired too long ago, at {} ms", e.expiryMs),
        E::NoContradiction(_) => "the two statements say the same".to_string(),
        E::AlreadySlashed(_) => "the operator has paid for this slot".to_string(),
        E::NothingStaked(e) => format!("{} has nothing at stake", e.operator),
        other => format!("the contract's error 0x{}", alloy::hex::encode(other.selector())),
    }
}

fn revert_reason(error: &InferaSettlement::InferaSettlementErrors) -> String {
    use InferaSettlement::InferaSettlementErrors as E;
    use alloy::sol_types::SolInterface;
    match error {
        E::WrongSequence(e) => format!("sequence {} given, {} expected", e.given, e.expected),
        E::WrongPreviousHash(e) => {
            format!("previous hash {} given, {} expected", e.given, e.expected)
        }
        E::EmptyBatch(_) => "the batch is empty".to_string(),
        E::AccessControlUnauthorizedAccount(e) => format!("{} may not do this", e.account),
        E::EnforcedPause(_) => "the contract is paused; its guardian ends that".to_string(),
        E::BadVoucher(e) => format!("the voucher of {} is not signed by it for this contract", e.account),
        E::BeyondVoucher(e) => {
            format!("{} allowed {}, not {}", e.account, e.authorized, e.requested)
        }
        E::BeyondEscrow(e) => format!("{} is in escrow, not {}", e.escrow, e.requested),
        E::NoWithdrawal(_) => "no withdrawal was asked for".to_string(),
        E::ZeroAmount(_) => "the amount is zero".to_string(),
        E::NotTheHead(_) => "the batch is not the newest one".to_string(),
        E::AlreadyQueued(e) => format!("the rewards of batch {} are queued", e.sequence),
        E::TotalDecreases(e) => format!("the total {} is below the last one, {}", e.given, e.previous),
        E::Insolvent(e) => format!("the total {} is more than was charged and funded, {}", e.given, e.funded),
        E::QueueFull(e) => format!("too many reward roots wait; the oldest pays at {} s", e.until),
        E::NotBefore(e) => format!("too early: not before {} s", e.time),
        E::NoSuchRoot(e) => format!("there is no reward root {}", e.id),
        E::BadProof(_) => "the proof does not lead to the reward root".to_string(),
        E::BeyondTotal(e) => format!("the root's total is {}, {} would be claimed", e.total, e.claimed),
        E::NothingToClaim(e) => format!("{} is paid already", e.claimed),
        other => format!("the contract's error 0x{}", alloy::hex::encode(other.selector())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_forty_digits() {
        let error = parse_address("chain.contract", "0x12").unwrap_err().to_string();
        assert!(error.starts_with("chain.contract: "), "{error}");
        let text = "0x5FbDB2315678afecb367f032d93F642f64180aa3";
        assert_eq!(parse_address("chain.contract", text).unwrap().to_string(), text);
    }

    #[test]
    fn the_hash_depends_on_every_field() {
        let batch = Batch {
            sequence: 1,
            previous_hash: B256::ZERO,
            receipts_root: B256::repeat_byte(1),
            count: 2,
            reward_root: B256::ZERO,
            total: 3,
        };
        let others = [
            Batch { sequence: 2, ..batch },
            Batch { previous_hash: B256::repeat_byte(9), ..batch },
            Batch { receipts_root: B256::repeat_byte(9), ..batch },
            Batch { count: 9, ..batch },
            Batch { reward_root: B256::repeat_byte(9), ..batch },
            Batch { total: 9, ..batch },
        ];
        assert!(others.iter().all(|other| other.hash() != batch.hash()));
    }
}
