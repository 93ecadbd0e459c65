//! One token that ends a process.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a process that a second signal ended while it was still draining.
const IMPATIENT_EXIT: i32 = 130;

/// A token that SIGINT, SIGTERM or SIGHUP (the terminal was closed) cancels. A second signal ends the process at once, for operators
/// who do not want to wait for the drain. Call it once, inside a tokio runtime (an actix System is one).
pub fn on_signals() -> CancellationToken {
    let token = CancellationToken::new();
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    match kinds.map(signal) {
        [Ok(interrupt), Ok(terminate), Ok(hangup)] => {
            tokio::spawn(watch(interrupt, terminate, hangup, token.clone()));
        }
        [Err(error), ..] | [_, Err(error), _] | [.., Err(error)] => {
            tracing::warn!(%error, "cannot listen for signals; the process will not drain when it is stopped");
        }
    }
    token
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, mut hangup: Signal, token: CancellationToken) {
    let mut next = async || {
        tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            _ = hangup.recv() => "SIGHUP",
        }
    };
    let signal = next().await;
    tracing::info!(signal, "shutting down");
    token.cancel();
    let signal = next().await;
    tracing::warn!(signal, "second signal, ending without draining");
    std::process::exit(IMPATIENT_EXIT);
}

/// Runs one part of a service; when it ends, for whatever reason, the others are told to end too.
///
/// # Errors
/// Those of `part`.
pub async fn ends_all<T, E>(
    stop: &CancellationToken,
    part: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    // Also when it is dropped or panics.
    let _stops = stop.clone().drop_guard();
    part.await
}

/// Set by `infera up` for its children: the process id that must outlive them.
pub const SUPERVISOR: &str = "INFERA_SUPERVISOR_PID";

/// Under a supervisor ([`SUPERVISOR`]), asks the kernel for a SIGTERM when that process dies, so that a
/// killed `infera up` leaves nothing behind. Call it first in `main`; does nothing elsewhere.
pub fn end_with_supervisor() {
    let Some(supervisor) = std::env::var(SUPERVISOR).ok().and_then(|pid| pid.parse::<i32>().ok()) else {
        return;
    };
    let asked = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if asked.is_err() || parent != supervisor {
        eprintln!("the supervising process {supervisor} is gone");
        std::process::exit(1);
    }
}
