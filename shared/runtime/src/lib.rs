//! What every Infera service starts with.
//!
//! A service's `main` is a handful of lines because the parts live here:
//!
//! ```text
//! config::load ──> telemetry::init ──> db::connect, kv::Kv, jwt::Verifier
//!                                             │
//! shutdown::on_signals ──> CancellationToken ─┴─> run(config, deps, token)
//!                                                     └─ http::serve + health::routes
//! ```
//!
//! - [`config`]: embedded defaults, then a TOML file, then the environment; secrets are redacted.
//! - [`telemetry`] and [`trace`]: one trace per request over every hop, W3C `traceparent`.
//! - [`health`]: `/livez`, `/readyz`, `/metrics` of one service.
//! - [`http`]: the server, OpenAI's error body, request ids, one root span per request.
//! - [`jwt`]: EdDSA keys and tokens. [`kv`]: short-lived counters and values.
//! - [`db`]: SQLite or PostgreSQL behind one sea-orm connection.
//! - [`network`]: the network's manifest and model registries.
//! - [`planned`]: planned failures for tests. [`clock`]: the wall clock. [`shutdown`]: signals.

pub mod clock;
pub mod config;
pub mod db;
pub mod health;
pub mod http;
pub mod jwt;
pub mod kv;
pub mod models;
pub mod network;
pub mod planned;
pub mod shutdown;
pub mod telemetry;
pub mod trace;

/// Re-exported so that every crate cancels with the same token type.
pub use tokio_util::sync::CancellationToken;
