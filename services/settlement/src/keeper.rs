//! The keeper of the registry: what the holders decided on the chain becomes the registry in force, here and in every
//! service that follows the same files ([`infera_runtime::network::Live`]).
//!
//! ```text
//! ModelRegistry at a final block ─┐
//! proposals' registry entries ────┴─> protocol::governed ─> models.json, registries/<hash>.json ─> network.json
//! ```
//!
//! One keeper writes the files of a deployment. A change that can't be followed (a model whose entry nobody published, a
//! calibration that is not known here) leaves that as it is; the log says so, and `infera_settlement_registry_unmet` counts it.

use std::path::PathBuf;
use std::time::Duration;

use infera_protocol::governed::{self, Decided, Unmet};
use infera_protocol::registry::{Manifest, Model};
use infera_runtime::network::{self, Live, NetworkError};
use infera_runtime::{CancellationToken, clock};
use prometheus::IntGauge;

use crate::chain::governance::{Governance, GovernanceError};
use crate::chain::port::Finality;
use crate::chain::{ChainError, Contracts};

/// What it works with.
pub struct Keeper {
    pub rpc_url: String,
    pub contracts: Contracts,
    pub live: Live,
    pub manifest_path: PathBuf,
    pub registry_path: PathBuf,
    /// Where the search for proposals begins.
    pub from_block: u64,
    pub finality: Finality,
    pub confirmations: u64,
    pub poll: Duration,
    /// Decisions that can't be followed.
    pub unmet: IntGauge,
}

/// Why a look was in vain.
#[derive(Debug, thiserror::Error)]
enum KeeperError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Governance(#[from] GovernanceError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("the registry can't be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Keeper {
    /// Follows the chain until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Which revision is followed, and what of it could not be.
        let mut followed: Option<u64> = None;
        loop {
            match self.look(followed).await {
                Ok(Some((revision, unmet))) => {
                    followed = Some(revision);
                    self.unmet.set(i64::try_from(unmet.len()).unwrap_or(i64::MAX));
                    for reason in unmet {
                        tracing::error!(revision, %reason, "what the holders decided is not followed");
                    }
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "the registry's contract is not read, trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.poll) => {}
            }
        }
    }

    /// Takes over what was decided since `followed`. The revision, and what can't be followed; `None`: nothing is new.
    async fn look(&self, followed: Option<u64>) -> Result<Option<(u64, Vec<Unmet>)>, KeeperError> {
        let governance = Governance::connect(&self.rpc_url, self.contracts).await?;
        let last = governance.final_block(self.finality, self.confirmations).await?;
        let state = governance.registry_state(Some(last)).await?;
        if followed == Some(state.revision) {
            return Ok(None);
        }
        let cards: Vec<Model> = governance
            .proposals(self.from_block)
            .await?
            .iter()
            .flat_map(|proposal| proposal.entries())
            .filter_map(|(_, entry)| entry.ok())
            .collect();
        let decided = Decided {
            models: state.models,
            releases: state.releases,
            calibration_hash: state.calibration_hash,
        };
        let now = self.live.now();
        let (registry, unmet) = governed::registry(&decided, now.registries.current(), &cards);
        let registry = network::replace(&self.registry_path, &registry, clock::now_ms())?;
        let registry_hash = registry.hash()?;
        if registry_hash != now.manifest.registry_hash {
            let manifest = Manifest { registry_hash, ..now.manifest.clone() };
            network::write_json(&self.manifest_path, &manifest)?;
            tracing::info!(revision = state.revision, registry = %registry_hash, "the holders' decision is in force");
        }
        Ok(Some((state.revision, unmet)))
    }
}
