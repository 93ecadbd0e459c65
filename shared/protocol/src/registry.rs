//! What a verifier trusts before it looks: the network's manifest and the model registry.

use crate::{
    agreement::Calibration,
    bytes::{Hash32, NodeId},
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
    pub dispatchers: Vec<NodeId>,
    /// [`Registry::hash`] of the registry in force.
    pub registry_hash: Hash32,
}

/// A model that the network serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name that clients ask for.
    pub id: String,
    /// BLAKE3 of the weights file.
    pub weights_root: Hash32,
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

/// The models and the calibration in force (a file for now; governed later).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    pub models: Vec<Model>,
    pub calibration: Calibration,
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
