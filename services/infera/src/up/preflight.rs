//! What must hold before a network is started.

use std::path::PathBuf;

use crate::{
    cli::UpArgs,
    layout::{Layout, cache},
    services::{Ports, chat_model, embedder},
};

/// Free space below which a network is not started, bytes.
const MIN_FREE_BYTES: u64 = 512 * 1024 * 1024;

/// Everything that must hold before anything is started, one sentence each.
pub(super) fn check(layout: &Layout, args: &UpArgs) -> Result<(), String> {
    for file in [chat_model(), embedder().join("model.safetensors"), anvil()] {
        if !file.exists() {
            return Err(format!("{} is not there: run deploy/setup up", file.display()));
        }
    }
    let disk = rustix::fs::statvfs(layout.root()).map_err(|e| e.to_string())?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < MIN_FREE_BYTES {
        return Err(format!(
            "the disk that holds {} has {} MiB free, {} are needed: free some space or choose another folder with --data",
            layout.root().display(),
            free / 1_048_576,
            MIN_FREE_BYTES / 1_048_576
        ));
    }
    for (port, service) in Ports::new(args.port_base).all() {
        std::net::TcpListener::bind(("127.0.0.1", port)).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => format!(
                "port {port} ({service}) is taken: end what listens there, or choose ten others with --port-base (INFERA_PORT_BASE)"
            ),
            _ => format!("cannot listen on port {port} ({service}): {error}"),
        })?;
    }
    Ok(())
}

pub(super) fn anvil() -> PathBuf {
    cache().join("npm/node_modules/.bin/anvil")
}
