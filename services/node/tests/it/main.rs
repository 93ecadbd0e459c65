#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dispatcher;
mod engine;
mod session;

use std::path::PathBuf;

use tokio::sync::Mutex;

/// Threads of libtorch are a setting of the process: one engine at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn model_path() -> PathBuf {
    std::env::var_os("INFERA_MODEL").map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/infera/models/smollm2-135m-instruct-q4_1.gguf")
        },
        PathBuf::from,
    )
}
