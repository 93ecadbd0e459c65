//! Proposals as the chain's log ([`super::log`]) and the governor tell them.

use alloy::primitives::{Address, B256, U256};
use futures::{StreamExt, TryStreamExt, stream};
use infera_protocol::registry::Model;
use serde::{Serialize, Serializer};

use super::{
    super::{ChainError, call},
    Governance, GovernanceError,
    call::{Action, RawCall, RegistryCall},
    entry::{self, EntryError},
    log::Logged,
};

/// Proposals that the governor is asked about at a time.
const AT_A_TIME: usize = 16;

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
    /// The log entry's place in the block.
    #[serde(skip)]
    pub(super) index: u64,
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
        entries(&self.actions, &self.description)
    }
}

/// The registry entries of the models that `actions` admit, each checked against its call.
pub(super) fn entries<'a>(
    actions: &'a [Action],
    description: &str,
) -> Vec<(&'a str, Result<Model, EntryError>)> {
    let admitted = actions.iter().filter_map(|action| match action {
        Action::Registry(RegistryCall::AdmitModel { id, terms }) => Some((id, terms)),
        _ => None,
    });
    admitted.map(|(id, terms)| (id.as_str(), entry::entry(description, id, terms))).collect()
}

impl Governance {
    /// The proposals that were made in block `from_block` or later, oldest first.
    ///
    /// # Errors
    /// [`GovernanceError::Chain`].
    pub async fn proposals(&self, from_block: u64) -> Result<Vec<Proposal>, GovernanceError> {
        let mut logged: Vec<Logged> = self.logged(from_block).await?.into_values().collect();
        logged.sort_by_key(Logged::order);
        self.complete_all(logged).await
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
                Some(one) => self.complete(one, self.reader.time().await?).await,
                None => Err(GovernanceError::NoProposal(text.to_owned())),
            },
            many => Err(GovernanceError::Ambiguous { text: text.to_owned(), count: many.len() }),
        }
    }

    /// What the governor says of them now, in their order; some calls at a time.
    pub(super) async fn complete_all(&self, logged: Vec<Logged>) -> Result<Vec<Proposal>, GovernanceError> {
        let now_secs = self.reader.time().await?;
        let completing = logged.into_iter().map(|one| self.complete(one, now_secs));
        stream::iter(completing).buffered(AT_A_TIME).try_collect().await
    }

    async fn complete(&self, logged: Logged, now_secs: u64) -> Result<Proposal, GovernanceError> {
        let calls = logged.calls();
        let Logged { created, proposed, queued, executed, canceled, .. } = logged;
        let governor = self.governor();
        let id = created.proposalId;
        let code = call("state", async { governor.state(id).call().await }).await?;
        let state = State::of(code).ok_or_else(|| ChainError::Refused {
            what: "state",
            message: format!("a proposal has the state {code}"),
        })?;
        let votes = call("proposalVotes", async { governor.proposalVotes(id).call().await }).await?;
        let eta = call("proposalEta", async { governor.proposalEta(id).call().await }).await?;
        let snapshot_secs = secs(created.voteStart);
        // The contract answers for the past only.
        let at = U256::from(snapshot_secs.min(now_secs.saturating_sub(1)));
        let quorum = call("quorum", async { governor.quorum(at).call().await }).await?;
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

fn secs(value: U256) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

pub(super) fn micro(value: U256) -> u128 {
    u128::try_from(value).unwrap_or(u128::MAX)
}
