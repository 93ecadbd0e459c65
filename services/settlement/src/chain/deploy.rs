//! Setting up a network's contracts in the order of contracts/README.md: all transactions are signed at once with
//! consecutive nonces, because every address follows from its nonce.

use std::time::Duration;

use alloy::{
    primitives::{Address, B256, Bytes, TxKind, U256, keccak256},
    providers::RootProvider,
    signers::local::PrivateKeySigner,
    sol_types::{SolCall, SolConstructor},
};
use infera_protocol::{governed::ModelTerms, registry::Registry};
use serde::{Deserialize, Serialize};

use super::{
    ChainError, InferToken, InferaGovernor, InferaSettlement, InferaStaking, InferaTimelock, ModelRegistry,
    TxStatus,
    client::{self, Draft, parse_key},
    port::Fees,
    reader::{self, ChainReader},
};

/// How often a pending transaction is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long the last of the transactions may take into a block.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Gas limits: nothing is estimated, because the contracts that a call needs are not there yet. The largest contract
/// takes 5 million, the largest call 0.3 million.
const CREATE_GAS: u64 = 8_000_000;
const CALL_GAS: u64 = 1_000_000;

/// What a network starts with. Times in seconds, amounts in 10^-6 INFER.
#[derive(Debug, Clone)]
pub struct Deployment {
    pub settler: Address,
    /// May veto rewards and pause; another hand than the settler's.
    pub guardian: Address,
    pub challenge_delay_secs: u64,
    pub withdrawal_delay_secs: u64,
    pub unbonding_secs: u64,
    pub minimum_stake_micro: u64,
    pub timelock_delay_secs: u64,
    pub voting_delay_secs: u64,
    pub voting_period_secs: u32,
    pub proposal_threshold_micro: u64,
    pub quorum_percent: u8,
    /// Moved from the deployer into the pool: what prepaid credit earns operators is paid out of it.
    pub pool_micro: u64,
}

impl Deployment {
    /// Delays long enough to be seen and short enough for a demonstration, a hundredth of the supply in the pool.
    pub fn devnet(settler: Address, guardian: Address) -> Self {
        Self {
            settler,
            guardian,
            challenge_delay_secs: 30,
            // Longer than a request's deadline, and all that comes until it is charged (`escrow.margin_secs`).
            withdrawal_delay_secs: 300,
            unbonding_secs: 60,
            // A node needs no tokens to join a demonstration.
            minimum_stake_micro: 0,
            timelock_delay_secs: 10,
            voting_delay_secs: 1,
            voting_period_secs: 30,
            proposal_threshold_micro: 100_000_000_000,
            quorum_percent: 4,
            pool_micro: 10_000_000_000_000,
        }
    }
}

/// Where a network's contracts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contracts {
    pub chain_id: u64,
    pub token: Address,
    pub timelock: Address,
    pub governor: Address,
    pub settlement: Address,
    pub staking: Address,
    pub registry: Address,
}

/// The transactions of one deployment, in their order.
struct Script {
    deployer: Address,
    first_nonce: u64,
    steps: Vec<(TxKind, Bytes)>,
}

impl Script {
    fn create(&mut self, bytecode: &Bytes, arguments: &[u8]) -> Address {
        let nonce = self.first_nonce + self.steps.len() as u64;
        self.steps.push((TxKind::Create, [bytecode.as_ref(), arguments].concat().into()));
        self.deployer.create(nonce)
    }

    fn call(&mut self, to: Address, call: &impl SolCall) {
        self.steps.push((TxKind::Call(to), call.abi_encode().into()));
    }
}

/// Deploys everything and hands it over to the timelock. The deployer gets the whole supply, less the pool.
///
/// # Errors
/// [`ChainError`]; `Unreachable` also if the last transaction is in no block after a minute.
pub async fn deploy(
    rpc_url: &str,
    deployer_key: &str,
    registry: &Registry,
    wanted: &Deployment,
) -> Result<Contracts, ChainError> {
    let signer = parse_key("chain.deployer_key", deployer_key)?;
    let provider = reader::provider(rpc_url)?;
    let chain_id = ChainReader::chain_id_of(&provider).await?;
    let first_nonce = client::nonce(&provider, signer.address()).await?;
    let fees = client::fees(&provider).await?;
    let mut script = Script { deployer: signer.address(), first_nonce, steps: Vec::new() };
    let contracts = creations(&mut script, chain_id, wanted);
    calls(&mut script, &contracts, registry, wanted);
    run(&provider, &signer, chain_id, fees, script).await?;
    Ok(contracts)
}

/// Steps 1 to 6 of the README.
fn creations(script: &mut Script, chain_id: u64, wanted: &Deployment) -> Contracts {
    let deployer = script.deployer;
    let timelock = InferaTimelock::constructorCall {
        minDelay: U256::from(wanted.timelock_delay_secs),
        proposers: vec![],
        executors: vec![Address::ZERO],
        admin: deployer,
    };
    let timelock = script.create(&InferaTimelock::BYTECODE, &timelock.abi_encode());
    let token = InferToken::constructorCall { holder: deployer };
    let token = script.create(&InferToken::BYTECODE, &token.abi_encode());
    let governor = InferaGovernor::constructorCall {
        token,
        timelock,
        votingDelay_: alloy::primitives::Uint::from(wanted.voting_delay_secs),
        votingPeriod_: wanted.voting_period_secs,
        proposalThreshold_: U256::from(wanted.proposal_threshold_micro),
        quorumPercent: U256::from(wanted.quorum_percent),
    };
    let governor = script.create(&InferaGovernor::BYTECODE, &governor.abi_encode());
    let settlement = InferaSettlement::constructorCall {
        token,
        admin: timelock,
        settler: wanted.settler,
        guardian: wanted.guardian,
        challengeDelay: U256::from(wanted.challenge_delay_secs),
        withdrawalDelay: U256::from(wanted.withdrawal_delay_secs),
    };
    let settlement = script.create(&InferaSettlement::BYTECODE, &settlement.abi_encode());
    let staking = InferaStaking::constructorCall {
        owner_: timelock,
        token,
        settlement,
        unbonding: U256::from(wanted.unbonding_secs),
        minimumStake_: U256::from(wanted.minimum_stake_micro),
    };
    let staking = script.create(&InferaStaking::BYTECODE, &staking.abi_encode());
    let registry = ModelRegistry::constructorCall { owner_: deployer };
    let registry = script.create(&ModelRegistry::BYTECODE, &registry.abi_encode());
    Contracts { chain_id, token, timelock, governor, settlement, staking, registry }
}

/// What the network starts with, then the hand-over: steps 6 to 8.
fn calls(script: &mut Script, contracts: &Contracts, registry: &Registry, wanted: &Deployment) {
    for model in &registry.models {
        let listed = ModelTerms::of(model).into();
        script.call(
            contracts.registry,
            &ModelRegistry::admitModelCall { id: model.id.clone(), model_: listed },
        );
    }
    let hash = B256::from(registry.calibration.hash().0);
    script.call(contracts.registry, &ModelRegistry::setCalibrationCall { hash });
    script.call(contracts.registry, &ModelRegistry::transferOwnershipCall { newOwner: contracts.timelock });
    if wanted.pool_micro > 0 {
        let amount = U256::from(wanted.pool_micro);
        script
            .call(contracts.token, &InferToken::approveCall { spender: contracts.settlement, value: amount });
        script.call(contracts.settlement, &InferaSettlement::fundCall { amount });
    }
    for role in ["PROPOSER_ROLE", "CANCELLER_ROLE"] {
        let role = keccak256(role);
        script.call(contracts.timelock, &InferaTimelock::grantRoleCall { role, account: contracts.governor });
    }
    let renounced =
        InferaTimelock::renounceRoleCall { role: B256::ZERO, callerConfirmation: script.deployer };
    script.call(contracts.timelock, &renounced);
}

/// Signs and sends all, then waits for the last and makes sure that none failed.
async fn run(
    provider: &RootProvider,
    signer: &PrivateKeySigner,
    chain_id: u64,
    fees: Fees,
    script: Script,
) -> Result<(), ChainError> {
    let mut hashes = Vec::with_capacity(script.steps.len());
    for (nonce, (to, input)) in (script.first_nonce..).zip(script.steps) {
        let gas = if to.is_create() { CREATE_GAS } else { CALL_GAS };
        let signed = client::sign(signer, chain_id, Draft { to, input, nonce, gas, fees })?;
        client::send(provider, &signed.raw).await?;
        hashes.push(signed.hash);
    }
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    for (step, hash) in hashes.into_iter().enumerate() {
        loop {
            match client::status(provider, hash).await? {
                TxStatus::Included { .. } => break,
                TxStatus::Failed { .. } => {
                    return Err(ChainError::Reverted {
                        what: "deploy",
                        reason: format!("transaction {} of the deployment failed: {hash}", step + 1),
                    });
                }
                TxStatus::Unknown if tokio::time::Instant::now() >= deadline => {
                    return Err(ChainError::Unreachable("deploy: not in a block after 60 s".to_string()));
                }
                TxStatus::Unknown => tokio::time::sleep(POLL).await,
            }
        }
    }
    Ok(())
}
