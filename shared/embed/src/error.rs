//! What can go wrong, with a remedy where there is one.

use std::path::PathBuf;

/// Why a text has no vector.
#[derive(Debug, thiserror::Error)]
pub enum EmbedError {
    /// A file of the model is missing or not what it should be.
    #[error("the embedder's file {} is not usable: {reason}; run deploy/setup to fetch it again", path.display())]
    File { path: PathBuf, reason: String },
    /// The tokenizer refused the text.
    #[error("the text cannot be tokenised: {0}")]
    Tokenize(String),
    /// libtorch failed.
    #[error("the embedder failed: {0}")]
    Compute(#[from] tch::TchError),
    /// The thread that computes was lost.
    #[error("the embedder's thread ended before it answered")]
    Lost,
}

/// Why an index does not answer.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// A vector of the wrong size or with a value that is no number.
    #[error("the vector is not usable: {0}")]
    Vector(String),
    /// The database of the exact index.
    #[error("the index's database failed: {0}")]
    Database(#[from] sea_orm::DbErr),
    /// The database of the exact index cannot be opened.
    #[error(transparent)]
    Open(#[from] infera_runtime::db::DbError),
    /// Qdrant is away or refuses.
    #[error("qdrant failed: {0}; is it running, and is qdrant_url its gRPC address?")]
    Qdrant(String),
    /// The collection holds something that this network did not write.
    #[error("the collection `{collection}` holds a point that is not ours: {reason}")]
    Foreign { collection: String, reason: String },
    /// The configuration names no index.
    #[error("no index is configured: set qdrant_url or database_url in the vectors table")]
    NotConfigured,
}

impl From<qdrant_client::QdrantError> for IndexError {
    fn from(error: qdrant_client::QdrantError) -> Self {
        Self::Qdrant(error.to_string())
    }
}
