//! One token that ends a process.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process that a second signal ended while it was still draining.
const IMPATIENT_EXIT: i32 = 130;

/// A token that SIGINT or SIGTERM cancels. A second signal ends the process at once, for operators
/// who do not want to wait for the drain. Call it once, inside a tokio runtime (an actix System is one).
pub fn on_signals() -> CancellationToken {
    let token = CancellationToken::new();
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(interrupt), Ok(terminate)) => {
            tokio::spawn(watch(interrupt, terminate, token.clone()));
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "cannot listen for signals; the process will not drain when it is stopped");
        }
    }
    token
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, token: CancellationToken) {
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
        }
    };
    let signal = next().await;
    tracing::info!(signal, "shutting down");
    token.cancel();
    let signal = next().await;
    tracing::warn!(signal, "second signal, ending without draining");
    std::process::exit(IMPATIENT_EXIT);
}
