//! The whole model registry at one block.

use alloy::{
    eips::{BlockId, BlockNumberOrTag},
    providers::Provider,
};
use infera_protocol::{
    bytes::Hash32,
    governed::{Decided, ListedModel},
};
use serde::{Deserialize, Serialize};

use super::Governance;
use crate::chain::{ChainError, ModelRegistry, call};

/// How often it is begun anew: an endpoint that keeps no history forgets a block's state when the next one comes.
const ATTEMPTS: usize = 8;

/// Everything that the registry says, as of the end of one block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryState {
    pub block: u64,
    pub block_hash: Hash32,
    /// The block's time, seconds since 1970.
    pub time_secs: u64,
    /// Grows by one with every change.
    pub revision: u64,
    /// Every model that was ever listed, in the contract's order; withdrawn ones are not `active`.
    pub models: Vec<ListedModel>,
    /// Approved releases.
    pub releases: Vec<Hash32>,
    pub calibration_hash: Hash32,
}

impl RegistryState {
    /// What [`infera_protocol::governed::registry`] makes a registry of.
    pub fn decided(&self) -> Decided {
        Decided {
            models: self.models.clone(),
            releases: self.releases.clone(),
            calibration_hash: self.calibration_hash,
        }
    }
}

impl Governance {
    /// The registry as of the end of block `at`; of the newest one without a number. All of it is read at that block's
    /// hash, so that a change or a reorganisation in between mixes nothing.
    ///
    /// # Errors
    /// [`ChainError`]; `Refused` also if the endpoint has no state of that block.
    pub async fn registry_state(&self, at: Option<u64>) -> Result<RegistryState, ChainError> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.state_once(at).await {
                Err(error @ ChainError::Refused { .. }) if at.is_none() => last = Some(error),
                other => return other,
            }
        }
        Err(last.unwrap_or_else(|| ChainError::Unreachable("no block stayed long enough to read it".into())))
    }

    async fn state_once(&self, at: Option<u64>) -> Result<RegistryState, ChainError> {
        let provider = self.reader.provider();
        let number = at.map_or(BlockNumberOrTag::Latest, BlockNumberOrTag::Number);
        let block =
            call("eth_getBlockByNumber", async { provider.get_block_by_number(number).await }).await?;
        let block = block.ok_or_else(|| ChainError::Refused {
            what: "eth_getBlockByNumber",
            message: format!("the endpoint has no block {number}"),
        })?;
        let at = BlockId::hash(block.header.hash);
        let registry = ModelRegistry::new(self.contracts.registry, provider);
        let revision = call("revision", async { registry.revision().block(at).call().await }).await?;
        let ids = call("modelIds", async { registry.modelIds().block(at).call().await }).await?;
        let mut models = Vec::with_capacity(ids.len());
        for id in ids {
            let model = call("model", async { registry.model(id.clone()).block(at).call().await }).await?;
            models.push(ListedModel { id, terms: model.into() });
        }
        let releases = call("releases", async { registry.releases().block(at).call().await }).await?;
        let calibration =
            call("calibrationHash", async { registry.calibrationHash().block(at).call().await }).await?;
        Ok(RegistryState {
            block: block.header.number,
            block_hash: Hash32(block.header.hash.0),
            time_secs: block.header.timestamp,
            revision,
            models,
            releases: releases.into_iter().map(|release| Hash32(release.0)).collect(),
            calibration_hash: Hash32(calibration.0),
        })
    }
}
