//! The runtime through its real adapters: sockets, files, signals, SQLite, PostgreSQL, Redis, OTLP.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod config;
mod db;
mod http;
mod jwt;
mod kv;
mod network;
mod process;
mod telemetry;

use std::path::Path;
use std::time::Duration;

use infera_testkit::process::{Process, Spec};

/// Longer than anything here takes on a busy machine; a test that waits that long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

/// A run of the ignored test `name` of this binary: what touches a whole process (environment, signals,
/// aborts) happens in a child.
fn child(name: &str, log: &Path) -> Spec {
    Process::spec(std::env::current_exe().unwrap(), log).args(["--exact", name, "--ignored", "--nocapture"])
}
