//! `infera down`, and what a killed `infera up` left behind.

use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use infera_runtime::shutdown;
use infera_settlement::chain::devnet::Devnet;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use super::{devnet, servers::cluster_script};
use crate::{cli::DataArgs, layout::Layout, say, services::Ports};

/// How long `infera down` waits for the end.
const END: Duration = Duration::from_secs(60);
/// How long a child that a killed run left behind may take to drain.
const LEFTOVER_GRACE: Duration = Duration::from_secs(10);

pub fn down(args: &DataArgs) -> Result<ExitCode, String> {
    let Ok(layout) = Layout::existing(&args.data) else {
        say("down: nothing runs here");
        return Ok(ExitCode::SUCCESS);
    };
    crate::block_on(async {
        if let Some(pid) = layout.running().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM)
                .map_err(|e| format!("cannot end process {}: {e}", pid.as_raw_nonzero()))?;
            say("down: ending; open requests are finished or kept for the next start");
            let began = Instant::now();
            while layout.running().is_some() {
                if began.elapsed() > END {
                    return Err(format!(
                        "process {} does not end; see {}",
                        pid.as_raw_nonzero(),
                        layout.log("up").display()
                    ));
                }
                sleep(Duration::from_millis(50)).await;
            }
        } else {
            say("down: nothing runs here");
        }
        end_leftovers(&layout).await;
        Devnet::end_leftover(&devnet(&layout, Ports::new(0))).await;
        if layout.cluster().exists() {
            cluster_script("stop", layout.cluster()).await?;
        }
        Ok(ExitCode::SUCCESS)
    })?
}

/// Ends children that a killed `infera up` left behind. A process id is only believed if the process still
/// says that it belongs to this folder or supervisor.
pub(super) async fn end_leftovers(layout: &Layout) {
    let Ok(entries) = fs::read_dir(layout.root().join("pids")) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let ours = pid.is_some_and(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
                environ.split(|b| *b == 0).any(|entry| entry.starts_with(shutdown::SUPERVISOR.as_bytes()))
            }) && fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&*layout.root().to_string_lossy()))
        });
        if let Some(pid) = pid.and_then(Pid::from_raw).filter(|_| ours) {
            let _ = kill_process(pid, Signal::TERM);
            let began = Instant::now();
            while rustix::process::test_kill_process(pid).is_ok() {
                if began.elapsed() > LEFTOVER_GRACE {
                    let _ = kill_process(pid, Signal::KILL);
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
        let _ = fs::remove_file(path);
    }
}
