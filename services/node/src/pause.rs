//! The owner wants the machine: a pause by signal.

use std::{fs::File, io, path::Path};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::Error;

/// True from SIGUSR1 to SIGUSR2.
///
/// # Errors
/// The handlers can't be installed.
pub fn on_signals() -> io::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let (mut stop, mut go) = (signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?);
    tokio::spawn(async move {
        loop {
            let paused = tokio::select! {
                Some(()) = stop.recv() => true,
                Some(()) = go.recv() => false,
                else => return,
            };
            tracing::info!(paused, "the owner's signal");
            sender.send_replace(paused);
        }
    });
    Ok(receiver)
}

/// Returns when `pauses` has this value; never if nobody can change it any more.
pub async fn until(pauses: &mut watch::Receiver<bool>, value: bool) {
    if pauses.wait_for(|paused| *paused == value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Asks the node of a data folder to pause: it stops computing and frees its memory.
///
/// # Errors
/// No node runs there.
pub fn pause(data: &Path) -> Result<(), Error> {
    tell(data, Signal::USR1)
}

/// Asks the node of a data folder to work again.
///
/// # Errors
/// No node runs there.
pub fn resume(data: &Path) -> Result<(), Error> {
    tell(data, Signal::USR2)
}

fn tell(data: &Path, signal: Signal) -> Result<(), Error> {
    let none = || Error::NotRunning { data: data.display().to_string() };
    let path = data.join("node.lock");
    // The number is the owner's only while the file is locked.
    let file = File::open(&path).map_err(|_| none())?;
    if file.try_lock_shared().is_ok() {
        return Err(none());
    }
    let text = std::fs::read_to_string(&path).map_err(|_| none())?;
    let pid = text.parse().ok().and_then(Pid::from_raw).ok_or_else(none)?;
    kill_process(pid, signal).map_err(|_| none())
}
