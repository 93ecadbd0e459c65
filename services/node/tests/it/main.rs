#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod dispatcher;
mod engine;
mod families;
mod faults;
mod grammar;
mod proofs;
mod referee;
mod scoring;
mod session;
mod shapes;
mod torch;

use std::path::PathBuf;

use tokio::sync::Mutex;

/// Threads of libtorch are a setting of the process: one engine at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn model(variable: &str, file: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/infera").join(file)
        },
        PathBuf::from,
    )
}

fn model_path() -> PathBuf {
    model("INFERA_MODEL", "models/smollm2-135m-instruct-q4_1.gguf")
}

/// A base model of another family.
fn gemma_path() -> PathBuf {
    model("INFERA_GEMMA", "test-models/gemma-3-270m-q4_k_m.gguf")
}
