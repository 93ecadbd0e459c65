//! What a verifier trusts before it looks: the network's manifest and the model registry.

use crate::{
    bytes::{Hash32, VrfKey},
    calibration::Calibration,
    hash::keccak,
    identity::Domain,
};
use serde::{Deserialize, Serialize};

/// The network's trusted roots (protocol section 1). Never taken from the thing being checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name of the network, such as `infera-devnet`.
    pub network: String,
    pub domain: Domain,
    /// A JSON-RPC endpoint to start with; `infera verify --rpc` overrides it.
    pub rpc_url: String,
    /// Keys of the dispatchers whose draws count.
    pub dispatchers: Vec<VrfKey>,
    /// [`Registry::hash`] of the registry in force; through it, of all before it ([`History`]).
    pub registry_hash: Hash32,
}

/// A model that the network serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name that clients ask for.
    pub id: String,
    /// BLAKE3 of the model's file, or of its folder's files as one string (decision 0014).
    pub weights_root: Hash32,
    /// Its length in bytes, from which a node is asked for ranges (section 2).
    pub weights_bytes: u64,
    /// BLAKE3 of the tokenizer and of the chat template, as `infera_prompt` computes them.
    pub tokenizer_hash: Hash32,
    pub template_hash: Hash32,
    pub end_tokens: Vec<u32>,
    pub vocab_size: u32,
    /// Prompt and answer together, tokens.
    pub context_length: u32,
    /// Cosine of the answers' embeddings below which two answers disagree, in millionths.
    pub similarity_threshold_millionths: u32,
    /// Per token and replica, 10^-6 INFER.
    pub price_micro: u64,
    /// When the model was admitted, for `GET /v1/models`, seconds since 1970.
    pub created_secs: i64,
}

/// The models and the calibration of one version (a file for now; governed later).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    pub models: Vec<Model>,
    /// BLAKE3 of the executables that may work as nodes; empty: any.
    pub releases: Vec<Hash32>,
    pub calibration: Calibration,
    /// Left out of the first version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<Replaced>,
}

/// The version that another one took the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replaced {
    /// [`Registry::hash`] of the version before.
    pub registry_hash: Hash32,
    /// Since when the new one is in force, ms since 1970.
    pub at_ms: i64,
}

impl Registry {
    pub fn by_id(&self, id: &str) -> Option<&Model> {
        self.models.iter().find(|m| m.id == id)
    }

    pub fn by_root(&self, root: &Hash32) -> Option<&Model> {
        self.models.iter().find(|m| m.weights_root == *root)
    }

    /// keccak-256 of the canonical JSON.
    ///
    /// # Errors
    /// Only if the registry can't be written as JSON.
    pub fn hash(&self) -> Result<Hash32, serde_json::Error> {
        Ok(keccak(&[&serde_json::to_vec(self)?]))
    }
}

/// Most former versions that are followed back.
pub const MAX_VERSIONS: usize = 4_096;

/// The registry in force and the versions before it. Each names the one before by its hash, so that whoever trusts
/// the manifest's one hash can take the former versions from anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    current: Registry,
    /// Newest first.
    former: Vec<Registry>,
}

/// Former versions that are not what the later ones name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("what is given as the registry {named} is another one, or none: it hashes to {actual}")]
    Forged { named: Hash32, actual: Hash32 },
    #[error("the registry {named} is no registry: {reason}")]
    Content { named: Hash32, reason: String },
    #[error("the registry {named} cannot be read: {reason}")]
    Read { named: Hash32, reason: String },
    #[error("the registry {named} came into force after the one that replaced it")]
    Order { named: Hash32 },
    #[error("the registry has more than {MAX_VERSIONS} former versions")]
    TooMany,
}

impl History {
    /// Follows `current` back through what `find` has under a hash: the canonical JSON of that version, or nothing.
    /// The first version that is not found ends it; [`History::unknown_before`] tells what that leaves open.
    ///
    /// # Errors
    /// [`HistoryError`] for a version that is found and is not the one that is named.
    pub fn follow(
        current: Registry,
        mut find: impl FnMut(&Hash32) -> Result<Option<Vec<u8>>, String>,
    ) -> Result<Self, HistoryError> {
        let mut history = Self::from(current);
        while let Some(Replaced { registry_hash: named, at_ms }) = history.oldest().replaces {
            if history.former.len() == MAX_VERSIONS {
                return Err(HistoryError::TooMany);
            }
            let Some(bytes) = find(&named).map_err(|reason| HistoryError::Read { named, reason })? else {
                break;
            };
            let actual = keccak(&[&bytes]);
            if actual != named {
                return Err(HistoryError::Forged { named, actual });
            }
            let former: Registry = serde_json::from_slice(&bytes)
                .map_err(|error| HistoryError::Content { named, reason: error.to_string() })?;
            if former.replaces.is_some_and(|before| before.at_ms >= at_ms) {
                return Err(HistoryError::Order { named });
            }
            history.former.push(former);
        }
        Ok(history)
    }

    /// The version in force.
    pub fn current(&self) -> &Registry {
        &self.current
    }

    fn oldest(&self) -> &Registry {
        self.former.last().unwrap_or(&self.current)
    }

    /// The known versions that were in force at some moment from `first_ms` to `last_ms`, newest first.
    pub fn in_force(&self, first_ms: i64, last_ms: i64) -> impl Iterator<Item = &Registry> {
        let mut ended_ms = i64::MAX;
        std::iter::once(&self.current).chain(&self.former).filter(move |version| {
            let since_ms = version.replaces.map_or(i64::MIN, |former| former.at_ms);
            let until_ms = std::mem::replace(&mut ended_ms, since_ms);
            since_ms <= last_ms && first_ms < until_ms
        })
    }

    /// The version that is missing to know what was in force at `at_ms`.
    pub fn unknown_before(&self, at_ms: i64) -> Option<Hash32> {
        let former = self.oldest().replaces?;
        (at_ms < former.at_ms).then_some(former.registry_hash)
    }
}

impl From<Registry> for History {
    /// This version alone.
    fn from(current: Registry) -> Self {
        Self { current, former: Vec::new() }
    }
}
