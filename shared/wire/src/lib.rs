//! Every message that crosses a process: prost types from `proto/`, their conversion into
//! validated domain types, and the names of exchanges, queues and routing keys.
//!
//! A service decodes bytes with [`decode`], converts with [`convert`] and works on domain types
//! only; what does not convert is garbage and goes to the dead letters.

pub mod convert;
pub mod topology;

/// Generated from `proto/infera/v1`.
#[allow(clippy::all, missing_docs)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/infera.v1.rs"));
}

pub use prost::Message;

/// Largest message on the bus, bytes (architecture: `ResultsCollected` 4 MiB).
pub const MAX_BUS_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Largest WebSocket frame, bytes.
pub const MAX_FRAME_BYTES: usize = 1024 * 1024;
/// Largest reveal, bytes.
pub const MAX_REVEAL_BYTES: usize = 512 * 1024;

/// A message that can't be used, with the field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("not a {kind} message: {reason}")]
    Decode { kind: &'static str, reason: String },
    #[error("field `{field}` is missing")]
    Missing { field: &'static str },
    #[error("field `{field}` is invalid: {reason}")]
    Invalid { field: &'static str, reason: String },
}

impl WireError {
    /// The field is there but its value can't be used.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

/// Decodes one message; `kind` names it in the error.
pub fn decode<M: Message + Default>(kind: &'static str, bytes: &[u8]) -> Result<M, WireError> {
    M::decode(bytes).map_err(|error| WireError::Decode { kind, reason: error.to_string() })
}
