//! The port: vectors with public facts about them, found by nearness.

mod exact;
mod qdrant;

use std::sync::Arc;

use async_trait::async_trait;
use infera_runtime::config::Secret;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::embedder::DIMENSIONS;
use crate::error::IndexError;

pub use exact::{Exact, Migrator};
pub use qdrant::Qdrant;

/// Names of a point's payload in Qdrant.
pub(crate) mod payload {
    pub(crate) const REQUEST_ID: &str = "request_id";
    pub(crate) const MODEL: &str = "model";
    pub(crate) const DECIDED_AT_MS: &str = "decided_at_ms";
}

/// Most hits of one search.
pub const MAX_LIMIT: usize = 200;

/// A vector and what may be known about it: no text.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The id of the point as well: a request has one vector.
    pub request_id: Uuid,
    /// Registry id of the model.
    pub model: String,
    pub decided_at_ms: i64,
    /// [`DIMENSIONS`] numbers of length 1.
    pub vector: Vec<f32>,
}

/// A point that is near.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hit {
    pub request_id: Uuid,
    pub model: String,
    pub decided_at_ms: i64,
    /// Cosine, -1 to 1.
    pub score: f32,
}

/// Where the verifier writes and the explorer reads.
#[async_trait]
pub trait Index: Send + Sync {
    /// Writes a point; one with the same request id is replaced. Visible to searches when this returns.
    ///
    /// # Errors
    /// [`IndexError`]; repeating it does no harm.
    async fn upsert(&self, point: &Point) -> Result<(), IndexError>;

    /// The nearest points with a cosine of at least `min_score`, best first; at most `limit`, and
    /// never more than [`MAX_LIMIT`].
    ///
    /// # Errors
    /// [`IndexError`].
    async fn search(&self, vector: &[f32], limit: usize, min_score: f32) -> Result<Vec<Hit>, IndexError>;

    /// Whether it answers.
    ///
    /// # Errors
    /// [`IndexError`] says why not.
    async fn ping(&self) -> Result<(), IndexError>;
}

/// Which index to use: Qdrant where `qdrant_url` is set, otherwise the exact one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexConfig {
    /// gRPC address, as `http://127.0.0.1:6334`.
    pub qdrant_url: Option<String>,
    pub qdrant_api_key: Option<Secret>,
    /// Collection of Qdrant.
    pub collection: Option<String>,
    /// Database of the exact index. Verifier and explorer name the same one.
    pub database_url: Secret,
    /// Its PostgreSQL schema.
    pub database_schema: Option<String>,
}

/// The collection unless the configuration names another.
pub const DEFAULT_COLLECTION: &str = "infera_answers";

/// Opens what `config` names and creates its table or collection.
///
/// # Errors
/// [`IndexError`] when it names nothing, or what it names is away.
pub async fn open(config: &IndexConfig) -> Result<Arc<dyn Index>, IndexError> {
    if let Some(url) = &config.qdrant_url {
        let collection = config.collection.as_deref().unwrap_or(DEFAULT_COLLECTION);
        let key = config.qdrant_api_key.as_ref().map(Secret::expose);
        return Ok(Arc::new(Qdrant::connect(url, key, collection)?));
    }
    if config.database_url.is_empty() {
        return Err(IndexError::NotConfigured);
    }
    let exact = Exact::open(config.database_url.expose(), config.database_schema.as_deref()).await?;
    Ok(Arc::new(exact))
}

/// Refuses what no index could compare.
fn check(vector: &[f32]) -> Result<(), IndexError> {
    if vector.len() != DIMENSIONS {
        return Err(IndexError::Vector(format!("{} numbers, expected {DIMENSIONS}", vector.len())));
    }
    if vector.iter().any(|x| !x.is_finite()) {
        return Err(IndexError::Vector("it has a value that is no number".to_owned()));
    }
    Ok(())
}
