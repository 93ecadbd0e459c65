//! The keeper of the registry: what the holders decided on the chain becomes the registry in force, here and in every
//! service that follows the same files ([`infera_runtime::network::Live`]).
//!
//! ```text
//! ModelRegistry at a final block ─┐
//! entries of executed proposals ──┴─> protocol::governed ─> models.json, registries/<hash>.json ─> network.json
//! ```
//!
//! One keeper writes the files of a deployment. A change that can't be followed (a model whose entry nobody published, a
//! calibration that is not known here) leaves that as it is and is tried again; the log says so once, and
//! `infera_settlement_registry_unmet` counts it.
//!
//! An entry counts once its proposal was carried out, and the newest one counts: what anybody proposed, nobody voted for.

use std::path::PathBuf;
use std::time::Duration;

use infera_protocol::governed::{self, Unmet};
use infera_protocol::registry::{History, Manifest, Model};
use infera_runtime::network::{self, Live, NetworkError};
use infera_runtime::{CancellationToken, clock};
use prometheus::IntGauge;

use crate::chain::governance::{Action, Executed, Governance, ProposalLog, RegistryCall};
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
    Network(#[from] NetworkError),
    #[error("the registry can't be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl Keeper {
    /// Follows the chain until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut seen = Seen::new(&self);
        loop {
            if let Err(error) = self.look(&mut seen).await {
                seen.governance = None;
                tracing::warn!(%error, "the registry's contract is not read, trying again");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.poll) => {}
            }
        }
    }

    /// Takes over what was decided since the last look.
    async fn look(&self, seen: &mut Seen) -> Result<(), KeeperError> {
        let governance = match seen.governance.take() {
            Some(governance) => governance,
            None => Governance::connect(&self.rpc_url, self.contracts).await?,
        };
        let governance = seen.governance.insert(governance);
        let last = governance.final_block(self.finality, self.confirmations).await?;
        let state = governance.registry_state(Some(last)).await?;
        if seen.followed == Some(state.revision) {
            return Ok(());
        }
        let executed = governance.executed(&mut seen.log, last).await?;
        let revision = state.revision;
        let now = self.live.now();
        let cards = published(&executed, &now.registries);
        let (registry, unmet) = governed::registry(&state.decided(), now.registries.current(), &cards);
        // What is not changed is not written: somebody may be putting the file right just now.
        let current = now.registries.current();
        let same = registry.models == current.models && registry.releases == current.releases;
        if !same || registry.calibration != current.calibration {
            let registry = network::replace(&self.registry_path, &registry, clock::now_ms())?;
            let registry_hash = registry.hash()?;
            let manifest = Manifest { registry_hash, ..now.manifest.clone() };
            network::write_json(&self.manifest_path, &manifest)?;
            tracing::info!(revision, registry = %registry_hash, "the holders' decision is in force");
        }
        self.unmet.set(i64::try_from(unmet.len()).unwrap_or(i64::MAX));
        seen.note(revision, unmet);
        Ok(())
    }
}

/// What the keeper remembers between looks.
struct Seen {
    governance: Option<Governance>,
    log: ProposalLog,
    /// Which revision is in force here, all of it.
    followed: Option<u64>,
    /// What could not be followed at the last look.
    unmet: Vec<Unmet>,
}

impl Seen {
    fn new(keeper: &Keeper) -> Self {
        let log = ProposalLog::new(keeper.from_block, keeper.finality, keeper.confirmations);
        Self { governance: None, log, followed: None, unmet: Vec::new() }
    }

    /// What can't be followed is said once, and tried again: a file that is put right is no new revision.
    fn note(&mut self, revision: u64, unmet: Vec<Unmet>) {
        self.followed = unmet.is_empty().then_some(revision);
        if self.unmet != unmet {
            for reason in &unmet {
                tracing::error!(revision, %reason, "what the holders decided is not followed");
            }
            self.unmet = unmet;
        }
    }
}

/// The entries that were published, in the order in which they count: with what was carried out, the newest first. Then,
/// for the models that a network began with: where the price in force may only be a cap that was voted, the entry before;
/// the oldest where that may be said of all, as after a vote that left the cap at the price.
fn published(executed: &[Executed], registries: &History) -> Vec<Model> {
    let mut cards: Vec<Model> =
        executed.iter().flat_map(Executed::entries).filter_map(|(_, entry)| entry.ok()).collect();
    let actions = || executed.iter().flat_map(|one| &one.actions);
    let capped = |model: &Model| {
        actions().any(|action| match action {
            Action::Registry(RegistryCall::SetTerms { id, price_cap_micro, .. }) => {
                *id == model.id && *price_cap_micro == model.price_micro
            }
            _ => false,
        })
    };
    for model in registries.current().models.iter().filter(|model| capped(model)) {
        let former: Vec<&Model> = registries
            .in_force(i64::MIN, i64::MAX)
            .filter_map(|version| version.by_id(&model.id))
            .filter(|former| former.weights_root == model.weights_root)
            .collect();
        let before = former.iter().find(|one| !capped(one)).or(former.last());
        cards.extend(before.copied().cloned());
    }
    cards
}
