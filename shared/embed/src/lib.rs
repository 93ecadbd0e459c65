//! Text to vector to index: how near two answers are in meaning (protocol section 7), and the
//! semantic search over what the network answered.
//!
//! ```text
//! text -> Embedder (all-MiniLM-L6-v2) -> 384 numbers of length 1 -> Index: Exact | Qdrant
//!                                                                   upsert: verifier
//!                                                                   search: explorer
//! ```
//!
//! An [`Index`] holds vectors and public facts (request, model, time), never a text. Two adapters:
//! [`Exact`] scans vectors in a database, [`Qdrant`] talks to a server. [`serve`] offers any
//! index over Qdrant's own gRPC: there is no Qdrant server in the package registries, so this is
//! what the client adapter is tested against, and what a cluster without one can use.

mod bert;
mod embedder;
mod error;
mod index;
pub mod serve;

pub use embedder::{DIMENSIONS, Embedder, MAX_TOKENS, cosine, similarity_millionths};
pub use error::{EmbedError, IndexError};
pub use index::{Exact, Hit, Index, IndexConfig, Migrator, Point, Qdrant, open};
