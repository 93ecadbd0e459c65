//! The logs of governor and timelock: which proposals there are, and what became of them.

use std::collections::BTreeMap;

use alloy::{
    primitives::{Address, B256, U256, keccak256},
    providers::Provider,
    rpc::types::{Filter, Log},
    sol_types::{SolEvent, SolValue},
};
use infera_protocol::registry::Model;

use super::{
    super::{ChainError, InferaGovernor, InferaTimelock, call},
    Governance, GovernanceError,
    call::{Action, RawCall},
    entry::EntryError,
    proposal::{Place, Proposal, entries},
};
use crate::chain::{
    port::Finality,
    progress::{LOG_RANGE, Progress},
};

/// What the log says of a proposal, before the governor is asked.
#[derive(Clone)]
pub(super) struct Logged {
    pub created: InferaGovernor::ProposalCreated,
    /// What the timelock calls it.
    operation: B256,
    pub proposed: Place,
    pub queued: Option<Place>,
    pub executed: Option<Place>,
    pub canceled: Option<Place>,
}

impl Logged {
    fn new(governor: Address, created: InferaGovernor::ProposalCreated, proposed: Place) -> Self {
        let operation = operation(governor, &created);
        Self { created, operation, proposed, queued: None, executed: None, canceled: None }
    }

    /// Older proposals first.
    pub fn order(&self) -> (u64, u64, U256) {
        (self.proposed.block, self.proposed.index, self.created.proposalId)
    }

    pub fn calls(&self) -> Vec<RawCall> {
        let created = &self.created;
        created
            .targets
            .iter()
            .zip(&created.values)
            .zip(&created.calldatas)
            .map(|((target, value), data)| RawCall { target: *target, value: *value, data: data.clone() })
            .collect()
    }
}

/// A proposal that was carried out.
#[derive(Debug, Clone)]
pub struct Executed {
    pub actions: Vec<Action>,
    pub description: String,
}

impl Executed {
    /// The registry entries of the models that this admitted, each checked against its call.
    pub fn entries(&self) -> Vec<(&str, Result<Model, EntryError>)> {
        entries(&self.actions, &self.description)
    }
}

/// What the log's final blocks say, kept between readings: each block is read once. Should the chain be reorganised
/// beyond them, all of it is read again.
pub struct ProposalLog {
    progress: Progress,
    finality: Finality,
    confirmations: u64,
    found: BTreeMap<U256, Logged>,
}

impl ProposalLog {
    /// Nothing is read yet. `from_block`: where the governor was deployed; the rest says which blocks are final.
    pub fn new(from_block: u64, finality: Finality, confirmations: u64) -> Self {
        Self { progress: Progress::new(from_block), finality, confirmations, found: BTreeMap::new() }
    }

    /// Reads on up to the final block `until`. What was read stays, also if it fails in the middle.
    async fn read(&mut self, governance: &Governance, until: u64) -> Result<(), ChainError> {
        let reader = &governance.reader;
        if self.progress.begins_anew(reader).await? {
            self.found.clear();
        }
        while let Some(range) = self.progress.next(reader, until).await? {
            governance.scan(range.from, range.to, &mut self.found).await?;
            self.progress.read(&range);
        }
        Ok(())
    }
}

impl Governance {
    /// The newest proposals, at most `most`, the newest first; those in blocks that are not final too.
    ///
    /// # Errors
    /// [`GovernanceError::Chain`].
    pub async fn newest(&self, log: &mut ProposalLog, most: usize) -> Result<Vec<Proposal>, GovernanceError> {
        let last_final = self.final_block(log.finality, log.confirmations).await?;
        log.read(self, last_final).await?;
        let mut found = log.found.clone();
        let newest = self.reader.block_number().await?;
        self.scan(log.progress.next_block(), newest, &mut found).await?;
        let mut logged: Vec<Logged> = found.into_values().collect();
        logged.sort_by_key(|one| std::cmp::Reverse(one.order()));
        logged.truncate(most);
        self.complete_all(logged).await
    }

    /// What was carried out up to the final block `last`, the newest first.
    ///
    /// # Errors
    /// [`ChainError`].
    pub async fn executed(&self, log: &mut ProposalLog, last: u64) -> Result<Vec<Executed>, ChainError> {
        log.read(self, last).await?;
        let executed = |one: &Logged| one.executed.filter(|place| place.block <= last);
        let mut logged: Vec<(Place, &Logged)> =
            log.found.values().filter_map(|one| Some((executed(one)?, one))).collect();
        logged.sort_by_key(|(place, _)| std::cmp::Reverse((place.block, place.index)));
        let carried = logged.into_iter().map(|(_, one)| Executed {
            actions: one.calls().iter().map(|call| Action::of(self.contracts.registry, call)).collect(),
            description: one.created.description.clone(),
        });
        Ok(carried.collect())
    }

    /// Everything from block `from_block` on.
    pub(super) async fn logged(&self, from_block: u64) -> Result<BTreeMap<U256, Logged>, ChainError> {
        let mut found = BTreeMap::new();
        self.scan(from_block, self.reader.block_number().await?, &mut found).await?;
        Ok(found)
    }

    /// Notes what these blocks say, both ends included.
    async fn scan(
        &self,
        mut from: u64,
        until: u64,
        found: &mut BTreeMap<U256, Logged>,
    ) -> Result<(), ChainError> {
        while from <= until {
            let to = from.saturating_add(LOG_RANGE - 1).min(until);
            let filter = Filter::new()
                .address(vec![self.contracts.governor, self.contracts.timelock])
                .event_signature(vec![
                    InferaGovernor::ProposalCreated::SIGNATURE_HASH,
                    InferaGovernor::ProposalQueued::SIGNATURE_HASH,
                    InferaGovernor::ProposalCanceled::SIGNATURE_HASH,
                    // Anybody may execute on the timelock itself, and the governor's log says nothing of that.
                    InferaTimelock::CallExecuted::SIGNATURE_HASH,
                ])
                .from_block(from)
                .to_block(to);
            let logs = call("eth_getLogs", async { self.reader.provider().get_logs(&filter).await }).await?;
            for log in logs.iter().filter(|log| !log.removed) {
                note(self.contracts.governor, found, log)?;
            }
            from = to + 1;
        }
        Ok(())
    }
}

/// `hashOperationBatch` of the timelock, with the salt of OpenZeppelin's `GovernorTimelockControl`.
fn operation(governor: Address, created: &InferaGovernor::ProposalCreated) -> B256 {
    let mut salt = keccak256(&created.description);
    salt.iter_mut().zip(governor).for_each(|(salt, byte)| *salt ^= byte);
    let InferaGovernor::ProposalCreated { targets, values, calldatas, .. } = created.clone();
    keccak256((targets, values, calldatas, B256::ZERO, salt).abi_encode_params())
}

fn note(governor: Address, found: &mut BTreeMap<U256, Logged>, log: &Log) -> Result<(), ChainError> {
    let (Some(block), Some(tx), Some(topic)) = (log.block_number, log.transaction_hash, log.topic0()) else {
        return Ok(());
    };
    let place = Place { block, tx, index: log.log_index.unwrap_or(0) };
    let bad =
        |e: alloy::sol_types::Error| ChainError::Refused { what: "eth_getLogs", message: e.to_string() };
    if *topic == InferaGovernor::ProposalCreated::SIGNATURE_HASH {
        let created = InferaGovernor::ProposalCreated::decode_log(&log.inner).map_err(bad)?.data;
        found.insert(created.proposalId, Logged::new(governor, created, place));
    } else if *topic == InferaGovernor::ProposalQueued::SIGNATURE_HASH {
        let id = InferaGovernor::ProposalQueued::decode_log(&log.inner).map_err(bad)?.proposalId;
        found.entry(id).and_modify(|logged| logged.queued = Some(place));
    } else if *topic == InferaTimelock::CallExecuted::SIGNATURE_HASH {
        let id = InferaTimelock::CallExecuted::decode_log(&log.inner).map_err(bad)?.id;
        if let Some(logged) = found.values_mut().find(|logged| logged.operation == id) {
            logged.executed = Some(place);
        }
    } else {
        let id = InferaGovernor::ProposalCanceled::decode_log(&log.inner).map_err(bad)?.proposalId;
        found.entry(id).and_modify(|logged| logged.canceled = Some(place));
    }
    Ok(())
}
