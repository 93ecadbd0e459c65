//! Votes of INFER holders: proposals, delegation, voting, the timelock, and the registry that they govern.
//!
//! [`Governance`] reads and needs no key; [`Voter`] acts. Every refusal that the contracts would give is found before
//! anything is sent and said with what to do ([`GovernanceError`]).

mod call;
mod entry;
mod log;
mod proposal;
mod state;

use alloy::{
    primitives::{Address, B256, Bytes, U256, keccak256},
    providers::RootProvider,
};
use infera_protocol::registry::Model;

use super::port::Finality;
use super::{
    ChainError, ChainReader, Contracts, InferToken, InferaGovernor, InferaTimelock, call as rpc,
    operator::{self, Operator},
};
use proposal::micro;

pub use call::{Action, RegistryCall};
pub use entry::{EntryError, MAX_ENTRY_BYTES, MAX_TITLE_BYTES, describe, entry};
pub use log::{Executed, ProposalLog};
pub use proposal::{Place, Proposal, ProposalId, State, Tally};
pub use state::RegistryState;

/// Why something about votes cannot be done. Times in seconds of the chain's clock.
#[derive(Debug, thiserror::Error)]
pub enum GovernanceError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error("there is no proposal {0}: see `infera govern list`")]
    NoProposal(String),
    #[error("{count} proposals begin with {text}: write more digits")]
    Ambiguous { text: String, count: usize },
    #[error("this was proposed already: proposal {0}; another title makes another proposal")]
    Proposed(ProposalId),
    #[error(
        "{address} has {tokens_micro} micro-INFER that do not vote: delegate them first, to itself or to another"
    )]
    NotDelegated { address: Address, tokens_micro: u128 },
    #[error("{address} has {votes_micro} micro-INFER of votes, a proposal needs {needed_micro}")]
    BelowThreshold { address: Address, votes_micro: u128, needed_micro: u128 },
    #[error("{address} had no votes when voting began: only tokens that were delegated before then count")]
    NoVotes { address: Address },
    #[error("voting has not begun: it opens in {left_secs} s")]
    NotOpen { left_secs: u64 },
    #[error("voting is over: the proposal is {}", .state.name())]
    Closed { state: State },
    #[error("{address} has voted already")]
    Voted { address: Address },
    #[error("votes are still cast: voting ends in {left_secs} s")]
    Voting { left_secs: u64 },
    #[error(
        "the proposal was defeated: {for_micro} micro-INFER for, {against_micro} against, a quorum of {quorum_micro}"
    )]
    Defeated { for_micro: u128, against_micro: u128, quorum_micro: u128 },
    #[error("the proposal is not queued, it is {}: queue it first", .state.name())]
    NotQueued { state: State },
    #[error("the proposal is {} already", .state.name())]
    Done { state: State },
    #[error("the timelock runs: the proposal can be executed in {left_secs} s")]
    Timelock { left_secs: u64 },
}

/// What the governor asks. Times in seconds, votes in 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    pub voting_delay_secs: u64,
    pub voting_period_secs: u64,
    pub timelock_delay_secs: u64,
    pub proposal_threshold_micro: u128,
}

/// What somebody votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    Against,
    For,
    Abstain,
}

/// The governor, the timelock and the model registry of a network, for reading.
#[derive(Debug, Clone)]
pub struct Governance {
    reader: ChainReader,
    contracts: Contracts,
}

impl Governance {
    /// # Errors
    /// [`ChainError::Setting`] for a bad URL or contract; [`ChainError::Unreachable`].
    pub async fn connect(rpc_url: &str, contracts: Contracts) -> Result<Self, ChainError> {
        let reader = ChainReader::connect(rpc_url, contracts.governor).await?;
        Ok(Self { reader, contracts })
    }

    pub fn contracts(&self) -> &Contracts {
        &self.contracts
    }

    /// The newest block that counts as final.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn final_block(&self, finality: Finality, confirmations: u64) -> Result<u64, ChainError> {
        self.reader.final_block(finality, confirmations).await
    }

    fn governor(&self) -> InferaGovernor::InferaGovernorInstance<&RootProvider> {
        InferaGovernor::new(self.contracts.governor, self.reader.provider())
    }

    /// Lets time pass on an anvil and makes a block, as [`Operator::devnet_pass`].
    ///
    /// # Errors
    /// [`ChainError::Refused`] by any other chain.
    pub async fn devnet_pass(&self, secs: u64) -> Result<(), ChainError> {
        operator::devnet_pass(&self.reader, secs).await
    }

    /// The newest block's time: the clock of all votes.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn time(&self) -> Result<u64, ChainError> {
        self.reader.time().await
    }

    /// # Errors
    /// [`ChainError`].
    pub async fn rules(&self) -> Result<Rules, ChainError> {
        let governor = self.governor();
        let timelock = InferaTimelock::new(self.contracts.timelock, self.reader.provider());
        let delay = rpc("votingDelay", async { governor.votingDelay().call().await }).await?;
        let period = rpc("votingPeriod", async { governor.votingPeriod().call().await }).await?;
        let threshold = rpc("proposalThreshold", async { governor.proposalThreshold().call().await }).await?;
        let waits = rpc("getMinDelay", async { timelock.getMinDelay().call().await }).await?;
        let secs = |value: U256| u64::try_from(value).unwrap_or(u64::MAX);
        Ok(Rules {
            voting_delay_secs: secs(delay),
            voting_period_secs: secs(period),
            timelock_delay_secs: secs(waits),
            proposal_threshold_micro: micro(threshold),
        })
    }

    /// The votes that somebody has now, by own and others' tokens, 10^-6 INFER.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn votes(&self, of: Address) -> Result<u128, ChainError> {
        let token = InferToken::new(self.contracts.token, self.reader.provider());
        rpc("getVotes", async { token.getVotes(of).call().await }).await.map(micro)
    }

    /// To whom somebody's tokens are delegated; `None` if they do not vote.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn delegate(&self, of: Address) -> Result<Option<Address>, ChainError> {
        let token = InferToken::new(self.contracts.token, self.reader.provider());
        let to = rpc("delegates", async { token.delegates(of).call().await }).await?;
        Ok((!to.is_zero()).then_some(to))
    }

    /// Whether somebody has voted on a proposal.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn has_voted(&self, id: ProposalId, who: Address) -> Result<bool, ChainError> {
        rpc("hasVoted", async { self.governor().hasVoted(id.0, who).call().await }).await
    }
}

/// A token holder's key at a network's governor.
#[derive(Debug, Clone)]
pub struct Voter {
    governance: Governance,
    key: Operator,
}

impl Voter {
    /// # Errors
    /// [`ChainError::Setting`] for a bad key, URL or contract; [`ChainError::Unreachable`].
    pub async fn connect(rpc_url: &str, key: &str, contracts: Contracts) -> Result<Self, ChainError> {
        let key = Operator::connect(rpc_url, key, contracts).await?;
        Ok(Self { governance: Governance::connect(rpc_url, contracts).await?, key })
    }

    pub fn governance(&self) -> &Governance {
        &self.governance
    }

    /// The same key for everything else.
    pub fn key(&self) -> &Operator {
        &self.key
    }

    pub fn address(&self) -> Address {
        self.key.address()
    }

    /// Lets this holder's tokens vote by `to`, from the next second on. The transaction.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn delegate(&self, to: Address) -> Result<B256, ChainError> {
        let delegate = InferToken::delegateCall { delegatee: to };
        self.key.transact("delegate", self.governance.contracts.token, &delegate).await
    }

    /// Proposes one change of the registry; `entry` is the model that it admits.
    ///
    /// # Errors
    /// [`GovernanceError::NotDelegated`], [`GovernanceError::BelowThreshold`], [`GovernanceError::Proposed`],
    /// [`GovernanceError::Entry`].
    pub async fn propose(
        &self,
        title: &str,
        change: &RegistryCall,
        entry: Option<&Model>,
    ) -> Result<(ProposalId, B256), GovernanceError> {
        let (governance, me) = (&self.governance, self.address());
        let description = describe(title, me, change, entry)?;
        self.may_propose().await?;
        let (targets, values) = (vec![governance.contracts.registry], vec![U256::ZERO]);
        let calldatas: Vec<Bytes> = vec![change.encode()];
        let hash = keccak256(&description);
        let governor = governance.governor();
        let id = rpc("hashProposal", async {
            governor.hashProposal(targets.clone(), values.clone(), calldatas.clone(), hash).call().await
        })
        .await?;
        let snapshot = rpc("proposalSnapshot", async { governor.proposalSnapshot(id).call().await }).await?;
        if !snapshot.is_zero() {
            return Err(GovernanceError::Proposed(ProposalId(id)));
        }
        let propose = InferaGovernor::proposeCall { targets, values, calldatas, description };
        let tx = self.key.transact("propose", governance.contracts.governor, &propose).await?;
        Ok((ProposalId(id), tx))
    }

    /// The votes of a second ago count, so that nobody borrows them for one transaction.
    async fn may_propose(&self) -> Result<(), GovernanceError> {
        let (governance, address) = (&self.governance, self.address());
        let at = U256::from(governance.time().await?.saturating_sub(1));
        let needed_micro = governance.rules().await?.proposal_threshold_micro;
        let votes =
            rpc("getVotes", async { governance.governor().getVotes(address, at).call().await }).await?;
        let votes_micro = micro(votes);
        if votes_micro >= needed_micro {
            return Ok(());
        }
        let tokens_micro = self.key.tokens(address).await?;
        if tokens_micro > 0 && governance.delegate(address).await?.is_none() {
            return Err(GovernanceError::NotDelegated { address, tokens_micro });
        }
        Err(GovernanceError::BelowThreshold { address, votes_micro, needed_micro })
    }

    /// Casts this holder's votes. The transaction, and how many votes, 10^-6 INFER.
    ///
    /// # Errors
    /// [`GovernanceError::NotOpen`], [`GovernanceError::Closed`], [`GovernanceError::Voted`],
    /// [`GovernanceError::NoVotes`].
    pub async fn vote(&self, proposal: &Proposal, support: Support) -> Result<(B256, u128), GovernanceError> {
        let (governance, address) = (&self.governance, self.address());
        match proposal.state {
            State::Pending => {
                let left_secs = (proposal.snapshot_secs + 1).saturating_sub(governance.time().await?);
                return Err(GovernanceError::NotOpen { left_secs });
            }
            State::Active => {}
            state => return Err(GovernanceError::Closed { state }),
        }
        if governance.has_voted(proposal.id, address).await? {
            return Err(GovernanceError::Voted { address });
        }
        let at = U256::from(proposal.snapshot_secs);
        let votes =
            rpc("getVotes", async { governance.governor().getVotes(address, at).call().await }).await?;
        if votes.is_zero() {
            return Err(GovernanceError::NoVotes { address });
        }
        let support = match support {
            Support::Against => 0,
            Support::For => 1,
            Support::Abstain => 2,
        };
        let vote = InferaGovernor::castVoteCall { proposalId: proposal.id.0, support };
        let tx = self.key.transact("vote", governance.contracts.governor, &vote).await?;
        Ok((tx, micro(votes)))
    }

    /// Puts a proposal that won into the timelock. Anybody may.
    ///
    /// # Errors
    /// [`GovernanceError::Voting`], [`GovernanceError::Defeated`], [`GovernanceError::Done`].
    pub async fn queue(&self, proposal: &Proposal) -> Result<B256, GovernanceError> {
        match proposal.state {
            State::Pending | State::Active => {
                // Votes count through the last second.
                let left_secs = (proposal.deadline_secs + 1).saturating_sub(self.governance.time().await?);
                return Err(GovernanceError::Voting { left_secs });
            }
            State::Defeated => {
                return Err(GovernanceError::Defeated {
                    for_micro: proposal.votes.for_,
                    against_micro: proposal.votes.against,
                    quorum_micro: proposal.quorum_micro,
                });
            }
            State::Succeeded => {}
            state => return Err(GovernanceError::Done { state }),
        }
        let (targets, values, calldatas) = parts(proposal);
        let queue = InferaGovernor::queueCall {
            targets,
            values,
            calldatas,
            descriptionHash: keccak256(&proposal.description),
        };
        Ok(self.key.transact("queue", self.governance.contracts.governor, &queue).await?)
    }

    /// Carries a proposal out when the timelock has let it. Anybody may.
    ///
    /// # Errors
    /// [`GovernanceError::NotQueued`], [`GovernanceError::Timelock`], [`GovernanceError::Done`]; what the call itself says
    /// as [`ChainError::Reverted`].
    pub async fn execute(&self, proposal: &Proposal) -> Result<B256, GovernanceError> {
        match proposal.state {
            State::Queued => {}
            State::Pending | State::Active | State::Succeeded => {
                return Err(GovernanceError::NotQueued { state: proposal.state });
            }
            state => return Err(GovernanceError::Done { state }),
        }
        let left_secs = proposal.eta_secs.saturating_sub(self.governance.time().await?);
        if left_secs > 0 {
            return Err(GovernanceError::Timelock { left_secs });
        }
        let (targets, values, calldatas) = parts(proposal);
        let execute = InferaGovernor::executeCall {
            targets,
            values,
            calldatas,
            descriptionHash: keccak256(&proposal.description),
        };
        Ok(self.key.transact("execute", self.governance.contracts.governor, &execute).await?)
    }
}

fn parts(proposal: &Proposal) -> (Vec<Address>, Vec<U256>, Vec<Bytes>) {
    (
        proposal.calls.iter().map(|call| call.target).collect(),
        proposal.calls.iter().map(|call| call.value).collect(),
        proposal.calls.iter().map(|call| call.data.clone()).collect(),
    )
}
