//! The processes that `infera up` starts, watches and ends.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use infera_runtime::CancellationToken;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::mpsc::UnboundedSender,
    time::{Instant, sleep, timeout},
};

use super::logs;

/// A child that ran this long before it ended is started again at once.
const STEADY: Duration = Duration::from_secs(10);
/// Pause before the first and the longest pause before a further start.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a child may take to drain after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);

/// One process that should always run.
#[derive(Debug, Clone)]
pub struct ChildSpec {
    pub name: String,
    pub program: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub log: PathBuf,
    pub pid_file: PathBuf,
}

impl ChildSpec {
    fn spawn(&self) -> Result<Child, String> {
        logs::rotate(&self.log).map_err(|e| format!("cannot put {} aside: {e}", self.log.display()))?;
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(|e| format!("cannot write {}: {e}", self.log.display()))?;
        let errors = log.try_clone().map_err(|e| e.to_string())?;
        let child = Command::new(&self.program)
            .args(&self.args)
            .envs(self.env.iter().cloned())
            .env(infera_runtime::shutdown::SUPERVISOR, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C in the terminal reaches the supervisor alone, which then ends all in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", self.program.display()))?;
        if let Some(pid) = child.id() {
            fs::write(&self.pid_file, pid.to_string())
                .map_err(|e| format!("cannot write {}: {e}", self.pid_file.display()))?;
        }
        Ok(child)
    }

    /// Keeps the process running until `shutdown`, then ends it: SIGTERM, and SIGKILL after
    /// [`GRACE`]. What happens is told to `notices`, a sentence each.
    ///
    /// # Errors
    /// Only if it can't be started at all.
    pub async fn supervise(
        self,
        shutdown: CancellationToken,
        notices: UnboundedSender<String>,
    ) -> Result<(), String> {
        let mut pause = FIRST_PAUSE;
        loop {
            let mut child = self.spawn()?;
            let started = Instant::now();
            let status = tokio::select! {
                status = child.wait() => status,
                () = shutdown.cancelled() => {
                    end(&mut child).await;
                    let _ = fs::remove_file(&self.pid_file);
                    return Ok(());
                }
            };
            let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
            pause = if started.elapsed() >= STEADY { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            // The terminal may be gone; the children go on.
            let _ = notices.send(format!(
                "{} ended ({status}); starting it again (its log: {})",
                self.name,
                self.log.display()
            ));
            tokio::select! {
                () = sleep(pause) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(GRACE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}
