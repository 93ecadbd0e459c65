//! Helpers for tests of every crate; a dev-dependency only.
//!
//! - [`cluster`]: RabbitMQ, Redis and PostgreSQL of our own on loopback, started once and shared; keep
//!   tests apart with [`unique`] names.
//! - [`evidence`]: requests answered and signed with real keys, up to verdicts and receipts.
//! - [`otlp::Receiver`]: receives traces as a collector does.
//! - [`synthetic::SyntheticNode`]: speaks the protocol of nodes over a real WebSocket.
//! - [`process::Process`], [`anvil::Anvil`]: child processes that end with the test.
//! - [`eventually`]: polls with a deadline instead of sleeping for luck.
//!
//! Helpers panic with a message that says what was expected: that is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod anvil;
mod cluster;
pub mod evidence;
pub mod otlp;
pub mod process;
pub mod synthetic;
mod wait;

pub use cluster::{Cluster, cluster};
pub use process::Process;
pub use tempfile::TempDir;
pub use wait::{Ready, eventually};

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// The repository's root.
pub fn workspace_root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Where `deploy/setup` puts what it fetches: `INFERA_CACHE`, or `~/.cache/infera`.
pub fn cache_dir() -> PathBuf {
    match std::env::var_os("INFERA_CACHE") {
        Some(dir) => dir.into(),
        None => PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/infera"),
    }
}

/// The chat model, a GGUF file.
pub fn model_path() -> PathBuf {
    fetched("models/smollm2-135m-instruct-q4_1.gguf")
}

/// The folder of the embedder: `config.json`, `tokenizer.json`, `model.safetensors`.
pub fn embedder_path() -> PathBuf {
    fetched("models/all-minilm-l6-v2")
}

fn fetched(name: &str) -> PathBuf {
    let path = cache_dir().join(name);
    assert!(path.exists(), "{} is missing: run deploy/setup", path.display());
    path
}

/// `prefix_` and 32 hex digits: usable as a PostgreSQL schema, a queue prefix and a key prefix.
/// `prefix` has at most 30 of a-z, 0-9 and _, not starting with a digit.
pub fn unique(prefix: &str) -> String {
    assert!(prefix.len() <= 30, "`{prefix}` is too long: PostgreSQL would cut the name");
    format!("{prefix}_{}", Uuid::now_v7().simple())
}

/// The URL of a SQLite file `test.db` in `dir`.
pub fn sqlite_url(dir: &TempDir) -> String {
    sqlite_url_named(dir, "test")
}

/// The URL of a SQLite file `name.db` in `dir`, for tests with several services.
pub fn sqlite_url_named(dir: &TempDir, name: &str) -> String {
    format!("sqlite://{}?mode=rwc", dir.path().join(format!("{name}.db")).display())
}

/// A loopback port that is free now. Another process may take it before you do: prefer port 0 where
/// the listener can say what it got.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a listener has an address").port()
}
