//! `infera up --detach`.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use infera_runtime::shutdown;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use crate::{cli::UpArgs, layout::Layout, say};

/// Starts a copy that outlives the terminal, shows what it says until it is ready.
pub(super) fn detach(layout: &Layout, args: &UpArgs) -> Result<ExitCode, String> {
    drop(layout.lock()?);
    let own = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let log_path = layout.log("up");
    // The banner has the API key.
    let _ = fs::remove_file(&log_path);
    let log = fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|e| format!("cannot write {}: {e}", log_path.display()))?;
    let errors = log.try_clone().map_err(|e| e.to_string())?;
    let mut command = Command::new(own);
    command.args(["up", "--detached", "--profile", args.profile.name()]);
    command.arg("--data").arg(layout.root());
    command.args(["--nodes", &args.nodes.to_string(), "--port-base", &args.port_base.to_string()]);
    command.args(args.node_faults.iter().flat_map(|fault| ["--node-fault", fault]));
    command.args(args.otlp.iter().flat_map(|otlp| ["--otlp", otlp]));
    command.args(args.qdrant.iter().flat_map(|qdrant| ["--qdrant", qdrant]));
    let _ = fs::remove_file(layout.up_json());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .map_err(|e| format!("cannot start the network: {e}"))?;
    crate::block_on(async {
        let token = shutdown::on_signals();
        let mut shown = 0;
        loop {
            // Looked at first: what is said until then is in the log that is read next.
            let ready = layout.up_json().exists();
            let ended = child.try_wait().map_err(|e| e.to_string())?;
            let text = fs::read_to_string(&log_path).unwrap_or_default();
            if let Some(new) = text.get(shown..).filter(|new| !new.is_empty()) {
                say(new.trim_end_matches('\n'));
                shown = text.len();
            }
            if ended.is_some() {
                return Ok(ExitCode::FAILURE);
            }
            if ready {
                return Ok(ExitCode::SUCCESS);
            }
            if token.is_cancelled() {
                say("up: interrupted; ending what was started");
                if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::TERM);
                }
                let _ = child.wait();
                return Ok(ExitCode::FAILURE);
            }
            sleep(Duration::from_millis(50)).await;
        }
    })?
}
