//! Proposals as the chain's log and the governor tell them.

use std::collections::BTreeMap;

use alloy::{
    primitives::{Address, B256, U256},
    providers::Provider,
    rpc::types::{Filter, Log},
    sol_types::SolEvent,
};
use infera_protocol::registry::Model;
use serde::{Serialize, Serializer};

use super::{
    super::{ChainError, InferaGovernor, call},
    Governance, GovernanceError,
    call::{Action, RawCall, RegistryCall},
    entry::{self, EntryError},
};

/// Blocks that one look into the log covers: endpoints limit it, many to 10,000.
pub const LOG_RANGE: u64 = 5_000;

/// A proposal's id. Shown as 0x and 64 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposalId(pub U256);

impl std::fmt::Display for ProposalId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#066x}", self.0)
    }
}

impl Serialize for ProposalId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// OpenZeppelin's `ProposalState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Voting has not begun.
    Pending,
    /// Votes are cast.
    Active,
    Canceled,
    /// Too few votes, or more against than for.
    Defeated,
    /// May be queued.
    Succeeded,
    /// Waits in the timelock, or may be executed.
    Queued,
    Expired,
    Executed,
}

impl State {
    fn of(code: u8) -> Option<Self> {
        use State as S;
        let all = [
            S::Pending,
            S::Active,
            S::Canceled,
            S::Defeated,
            S::Succeeded,
            S::Queued,
            S::Expired,
            S::Executed,
        ];
        all.get(usize::from(code)).copied()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Canceled => "canceled",
            Self::Defeated => "defeated",
            Self::Succeeded => "succeeded",
            Self::Queued => "queued",
            Self::Expired => "expired",
            Self::Executed => "executed",
        }
    }
}

/// Votes, 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Tally {
    #[serde(rename = "for_micro")]
    pub for_: u128,
    #[serde(rename = "against_micro")]
    pub against: u128,
    #[serde(rename = "abstain_micro")]
    pub abstain: u128,
}

/// Where something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Place {
    pub block: u64,
    pub tx: B256,
}

/// A proposal and where it stands. Times in seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proposal {
    pub id: ProposalId,
    pub state: State,
    pub proposer: Address,
    pub description: String,
    pub actions: Vec<Action>,
    pub votes: Tally,
    /// Votes for and abstentions that are needed, 10^-6 INFER. Before voting begins: as of now.
    pub quorum_micro: u128,
    /// Whose balance of votes counts then may vote afterwards.
    pub snapshot_secs: u64,
    /// Voting ends.
    pub deadline_secs: u64,
    /// From when on it may be executed; 0 before it is queued.
    pub eta_secs: u64,
    pub proposed: Place,
    pub queued: Option<Place>,
    pub executed: Option<Place>,
    pub canceled: Option<Place>,
    #[serde(skip)]
    pub(super) calls: Vec<RawCall>,
}

impl Proposal {
    /// The first line of the description.
    pub fn title(&self) -> &str {
        self.description.lines().next().unwrap_or_default().trim()
    }

    /// The registry entries of the models that this admits, each checked against its call.
    pub fn entries(&self) -> Vec<(&str, Result<Model, EntryError>)> {
        let admitted = self.actions.iter().filter_map(|action| match action {
            Action::Registry(RegistryCall::AdmitModel { id, terms }) => Some((id, terms)),
            _ => None,
        });
        admitted.map(|(id, terms)| (id.as_str(), entry::entry(&self.description, id, terms))).collect()
    }
}

/// What the log says of a proposal, before the governor is asked.
struct Logged {
    created: InferaGovernor::ProposalCreated,
    proposed: Place,
    queued: Option<Place>,
    executed: Option<Place>,
    canceled: Option<Place>,
}

impl Governance {
    /// The proposals that were made in block `from_block` or later, oldest first.
    ///
    /// # Errors
    /// [`GovernanceError::Chain`].
    pub async fn proposals(&self, from_block: u64) -> Result<Vec<Proposal>, GovernanceError> {
        let logged = self.logged(from_block).await?;
        let mut proposals = Vec::with_capacity(logged.len());
        for one in logged.into_values() {
            proposals.push(self.complete(one).await?);
        }
        proposals.sort_by_key(|proposal| (proposal.proposed.block, proposal.snapshot_secs, proposal.id));
        Ok(proposals)
    }

    /// One proposal, by its id (decimal, or hex with 0x) or by the first digits of its hex id if no other begins so.
    ///
    /// # Errors
    /// [`GovernanceError::NoProposal`], [`GovernanceError::Ambiguous`].
    pub async fn proposal(&self, text: &str, from_block: u64) -> Result<Proposal, GovernanceError> {
        let wanted = text.trim().to_ascii_lowercase();
        let mut logged = self.logged(from_block).await?;
        let whole: Option<U256> = wanted.parse().ok();
        let matching: Vec<U256> = logged
            .keys()
            .filter(|id| {
                whole == Some(**id)
                    || (wanted.len() > 2
                        && wanted.starts_with("0x")
                        && ProposalId(**id).to_string().starts_with(&wanted))
            })
            .copied()
            .collect();
        match matching.as_slice() {
            [] => Err(GovernanceError::NoProposal(text.to_owned())),
            [id] => match logged.remove(id) {
                Some(one) => self.complete(one).await,
                None => Err(GovernanceError::NoProposal(text.to_owned())),
            },
            many => Err(GovernanceError::Ambiguous { text: text.to_owned(), count: many.len() }),
        }
    }

    async fn logged(&self, from_block: u64) -> Result<BTreeMap<U256, Logged>, ChainError> {
        let newest = self.reader.block_number().await?;
        let mut found = BTreeMap::new();
        let mut from = from_block;
        while from <= newest {
            let to = from.saturating_add(LOG_RANGE - 1).min(newest);
            let filter = Filter::new()
                .address(self.contracts.governor)
                .event_signature(vec![
                    InferaGovernor::ProposalCreated::SIGNATURE_HASH,
                    InferaGovernor::ProposalQueued::SIGNATURE_HASH,
                    InferaGovernor::ProposalExecuted::SIGNATURE_HASH,
                    InferaGovernor::ProposalCanceled::SIGNATURE_HASH,
                ])
                .from_block(from)
                .to_block(to);
            let logs = call("eth_getLogs", async { self.reader.provider().get_logs(&filter).await }).await?;
            for log in logs.iter().filter(|log| !log.removed) {
                note(&mut found, log)?;
            }
            from = to + 1;
        }
        Ok(found)
    }

    async fn complete(&self, logged: Logged) -> Result<Proposal, GovernanceError> {
        let Logged { created, proposed, queued, executed, canceled } = logged;
        let governor = self.governor();
        let id = created.proposalId;
        let code = call("state", async { governor.state(id).call().await }).await?;
        let state = State::of(code).ok_or_else(|| ChainError::Refused {
            what: "state",
            message: format!("a proposal has the state {code}"),
        })?;
        let votes = call("proposalVotes", async { governor.proposalVotes(id).call().await }).await?;
        let eta = call("proposalEta", async { governor.proposalEta(id).call().await }).await?;
        let now_secs = self.reader.time().await?;
        let snapshot_secs = secs(created.voteStart);
        // The contract answers for the past only.
        let at = U256::from(snapshot_secs.min(now_secs.saturating_sub(1)));
        let quorum = call("quorum", async { governor.quorum(at).call().await }).await?;
        let calls: Vec<RawCall> = created
            .targets
            .iter()
            .zip(&created.values)
            .zip(&created.calldatas)
            .map(|((target, value), data)| RawCall { target: *target, value: *value, data: data.clone() })
            .collect();
        Ok(Proposal {
            id: ProposalId(id),
            state,
            proposer: created.proposer,
            description: created.description,
            actions: calls.iter().map(|call| Action::of(self.contracts.registry, call)).collect(),
            votes: Tally {
                for_: micro(votes.forVotes),
                against: micro(votes.againstVotes),
                abstain: micro(votes.abstainVotes),
            },
            quorum_micro: micro(quorum),
            snapshot_secs,
            deadline_secs: secs(created.voteEnd),
            eta_secs: secs(eta),
            proposed,
            queued,
            executed,
            canceled,
            calls,
        })
    }
}

fn note(found: &mut BTreeMap<U256, Logged>, log: &Log) -> Result<(), ChainError> {
    let (Some(block), Some(tx), Some(topic)) = (log.block_number, log.transaction_hash, log.topic0()) else {
        return Ok(());
    };
    let place = Place { block, tx };
    let bad =
        |e: alloy::sol_types::Error| ChainError::Refused { what: "eth_getLogs", message: e.to_string() };
    if *topic == InferaGovernor::ProposalCreated::SIGNATURE_HASH {
        let created = InferaGovernor::ProposalCreated::decode_log(&log.inner).map_err(bad)?.data;
        let logged = Logged { proposed: place, created, queued: None, executed: None, canceled: None };
        found.insert(logged.created.proposalId, logged);
    } else if *topic == InferaGovernor::ProposalQueued::SIGNATURE_HASH {
        let id = InferaGovernor::ProposalQueued::decode_log(&log.inner).map_err(bad)?.proposalId;
        found.entry(id).and_modify(|logged| logged.queued = Some(place));
    } else if *topic == InferaGovernor::ProposalExecuted::SIGNATURE_HASH {
        let id = InferaGovernor::ProposalExecuted::decode_log(&log.inner).map_err(bad)?.proposalId;
        found.entry(id).and_modify(|logged| logged.executed = Some(place));
    } else {
        let id = InferaGovernor::ProposalCanceled::decode_log(&log.inner).map_err(bad)?.proposalId;
        found.entry(id).and_modify(|logged| logged.canceled = Some(place));
    }
    Ok(())
}

fn secs(value: U256) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

pub(super) fn micro(value: U256) -> u128 {
    u128::try_from(value).unwrap_or(u128::MAX)
}
