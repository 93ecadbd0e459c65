//! A local chain for development: one anvil process whose state survives restarts and kills.
//!
//! anvil's own `--state` loses everything on SIGKILL and a truncated file keeps it from starting. So the state is dumped
//! over RPC to a temporary file, synced and renamed, whenever a new block is there, and loaded over RPC at the start. A
//! state file that anvil does not take is set aside, and [`Devnet::warning`] says so.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use alloy::{
    primitives::Bytes,
    providers::{Provider, RootProvider},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::Mutex,
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::{call, reader};

/// How long anvil may take to answer its first call, and to end after SIGTERM.
const START_TIMEOUT: Duration = Duration::from_secs(20);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a taken port is tried again.
const PORT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the saver looks for a new block.
const SAVE_INTERVAL: Duration = Duration::from_millis(200);

/// What a devnet needs.
#[derive(Debug, Clone)]
pub struct DevnetConfig {
    /// The anvil executable. npm's wrapper (`node_modules/.bin/anvil`) is replaced by the executable that it starts,
    /// because it dies of SIGTERM before its child does.
    pub anvil: PathBuf,
    /// Port on 127.0.0.1.
    pub port: u16,
    pub chain_id: u64,
    /// Where the state is kept. A `.pid` and a `.log` file lie beside it.
    pub state_file: PathBuf,
    /// Seconds between blocks; `None` = a block for each transaction.
    pub block_time: Option<u64>,
}

/// Why a devnet did not start or its state was not saved.
#[derive(Debug, thiserror::Error)]
pub enum DevnetError {
    #[error("devnet: cannot start {path}: {source}; run deploy/setup, which installs anvil", path = .path.display())]
    Spawn { path: PathBuf, source: io::Error },
    #[error("devnet: port {0} is taken; end what listens there or choose another port")]
    PortTaken(u16),
    #[error("devnet: anvil ended at once ({status}); see {log}", log = .log.display())]
    Ended { status: String, log: PathBuf },
    #[error("devnet: anvil gave no answer in {} s; see {log}", START_TIMEOUT.as_secs(), log = .log.display())]
    Silent { log: PathBuf },
    #[error("devnet: cannot write {path}: {source}", path = .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Chain(#[from] super::ChainError),
}

/// A running devnet. Dropping it kills anvil, which loses nothing that was saved.
#[derive(Debug)]
pub struct Devnet {
    child: Child,
    saver: Saver,
    saving: JoinHandle<()>,
    rpc_url: String,
    pid_file: PathBuf,
    warning: Option<String>,
}

impl Devnet {
    /// Starts anvil, loads the state file if there is one and keeps it up to date from then on. An anvil that a killed
    /// predecessor left behind (named by the `.pid` file) is ended first.
    ///
    /// # Errors
    /// [`DevnetError`].
    pub async fn start(config: &DevnetConfig) -> Result<Self, DevnetError> {
        let anvil = executable(&config.anvil);
        let pid_file = config.state_file.with_extension("pid");
        let log = config.state_file.with_extension("log");
        let write = |path: &Path| {
            let path = path.to_path_buf();
            move |source| DevnetError::Write { path, source }
        };
        if let Some(folder) = config.state_file.parent() {
            fs::create_dir_all(folder).map_err(write(folder))?;
        }
        end_leftover(&pid_file, &anvil).await;
        wait_port(config.port).await?;

        let log_file = File::create(&log).map_err(write(&log))?;
        let errors = log_file.try_clone().map_err(write(&log))?;
        let mut child = command(&anvil, config)
            .stdout(log_file)
            .stderr(errors)
            .spawn()
            .map_err(|source| DevnetError::Spawn { path: anvil.clone(), source })?;
        if let Some(pid) = child.id() {
            fs::write(&pid_file, pid.to_string()).map_err(write(&pid_file))?;
        }

        let rpc_url = format!("http://127.0.0.1:{}", config.port);
        let saver = Saver {
            provider: reader::provider(&rpc_url)?,
            path: config.state_file.clone(),
            turn: Arc::default(),
        };
        wait_ready(&saver.provider, &mut child, &log).await?;
        let warning = saver.load().await?;
        let saving = tokio::spawn(saver.clone().follow());
        Ok(Self { child, saver, saving, rpc_url, pid_file, warning })
    }

    pub fn rpc_url(&self) -> &str {
        &self.rpc_url
    }

    /// Ends the anvil of a killed run on this state file, if one is left.
    pub async fn end_leftover(config: &DevnetConfig) {
        end_leftover(&config.state_file.with_extension("pid"), &config.anvil).await;
    }

    /// What the user should know: that an unreadable state file was set aside and the chain starts anew.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// Writes the state now. Returns once it is on disk.
    pub async fn save(&self) -> Result<(), DevnetError> {
        self.saver.save().await
    }

    /// anvil's process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Resolves when anvil ends by itself.
    pub async fn ended(&mut self) -> io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Saves the state and ends anvil: SIGTERM, and SIGKILL after 5 s.
    ///
    /// # Errors
    /// If the state was not saved; anvil is ended all the same.
    pub async fn stop(mut self) -> Result<(), DevnetError> {
        self.saving.abort();
        let saved = self.saver.save().await;
        if let Some(pid) = self.child.id().and_then(pid) {
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
        let _ = fs::remove_file(&self.pid_file);
        saved
    }
}

impl Drop for Devnet {
    fn drop(&mut self) {
        self.saving.abort();
    }
}

fn command(anvil: &Path, config: &DevnetConfig) -> Command {
    let mut command = Command::new(anvil);
    command
        .args(["--host", "127.0.0.1", "--prune-history", "--quiet", "--no-request-size-limit"])
        .args(["--port", &config.port.to_string()])
        .args(["--chain-id", &config.chain_id.to_string()])
        .stdin(Stdio::null())
        // A Ctrl-C in the terminal is for us: the state is saved before anvil ends.
        .process_group(0)
        .kill_on_drop(true);
    if let Some(seconds) = config.block_time {
        command.args(["--block-time", &seconds.to_string()]);
    }
    command
}

/// The executable behind npm's wrapper script, if `anvil` is one.
fn executable(anvil: &Path) -> PathBuf {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let behind = fs::canonicalize(anvil)
        .ok()
        .filter(|path| path.extension().is_some_and(|e| e == "mjs"))
        .and_then(|path| Some(path.parent()?.parent()?.join(format!("anvil-linux-{arch}/bin/anvil"))));
    match behind {
        Some(path) if path.exists() => path,
        _ => anvil.to_path_buf(),
    }
}

fn pid(raw: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(raw).ok()?)
}

/// Ends the anvil named in the pid file, if that process still runs our anvil.
async fn end_leftover(pid_file: &Path, anvil: &Path) {
    let anvil = executable(anvil);
    let Some(raw) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<u32>().ok()) else {
        return;
    };
    let Ok(anvil) = fs::canonicalize(&anvil) else { return };
    // A process that has ended has no executable, even while nobody has waited for it.
    let runs = || fs::read_link(format!("/proc/{raw}/exe")).is_ok_and(|exe| exe == anvil);
    let Some(pid) = pid(raw).filter(|_| runs()) else { return };
    tracing::warn!(pid = raw, "ending the devnet that an earlier run left behind");
    let _ = kill_process(pid, Signal::TERM);
    let deadline = Instant::now() + STOP_TIMEOUT;
    while runs() && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
}

/// A process that was just killed may hold its port for a moment.
async fn wait_port(port: u16) -> Result<(), DevnetError> {
    let deadline = Instant::now() + PORT_TIMEOUT;
    while tokio::net::TcpListener::bind(("127.0.0.1", port)).await.is_err() {
        if Instant::now() >= deadline {
            return Err(DevnetError::PortTaken(port));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn wait_ready(provider: &RootProvider, child: &mut Child, log: &Path) -> Result<(), DevnetError> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if provider.get_block_number().await.is_ok() {
            return Ok(());
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(DevnetError::Ended { status: status.to_string(), log: log.to_path_buf() });
        }
        if Instant::now() >= deadline {
            return Err(DevnetError::Silent { log: log.to_path_buf() });
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Writes and reads the state file.
#[derive(Debug, Clone)]
struct Saver {
    provider: RootProvider,
    path: PathBuf,
    /// One save at a time: they share the temporary file.
    turn: Arc<Mutex<()>>,
}

impl Saver {
    async fn save(&self) -> Result<(), DevnetError> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let state: Bytes =
            call("anvil_dumpState", async { self.provider.raw_request("anvil_dumpState".into(), ()).await })
                .await?;
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || {
            // Held by the writing thread, which goes on when this future is dropped.
            let _turn = turn;
            write_synced(&path, &state)
        })
        .await;
        written
            .unwrap_or_else(|e| Err(io::Error::other(e)))
            .map_err(|source| DevnetError::Write { path: self.path.clone(), source })
    }

    /// Loads the file if it is there. Returns a warning if it was set aside.
    async fn load(&self) -> Result<Option<String>, DevnetError> {
        let state = match fs::read(&self.path) {
            Ok(state) => Bytes::from(state),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(DevnetError::Write { path: self.path.clone(), source });
            }
        };
        let loaded: Result<bool, _> = call("anvil_loadState", async {
            self.provider.raw_request("anvil_loadState".into(), (state,)).await
        })
        .await;
        let reason = match loaded {
            Ok(true) => return Ok(None),
            Ok(false) => "anvil refused it".to_string(),
            Err(error) if error.is_unreachable() => return Err(error.into()),
            Err(error) => error.to_string(),
        };
        let aside = self.path.with_extension(format!("broken-{}", infera_runtime::clock::now_ms()));
        fs::rename(&self.path, &aside)
            .map_err(|source| DevnetError::Write { path: self.path.clone(), source })?;
        let warning = format!(
            "the devnet's state file could not be read ({reason}); it was set aside as {} and the chain starts anew",
            aside.display()
        );
        tracing::warn!(file = %aside.display(), reason, "devnet state set aside, the chain starts anew");
        Ok(Some(warning))
    }

    /// Saves whenever the chain has a new block.
    async fn follow(self) {
        let mut saved = None;
        loop {
            if let Ok(block) = self.provider.get_block_number().await
                && saved != Some(block)
            {
                match self.save().await {
                    Ok(()) => saved = Some(block),
                    Err(error) => tracing::warn!(%error, "devnet state not saved"),
                }
            }
            sleep(SAVE_INTERVAL).await;
        }
    }
}

/// Writes beside the file, syncs, renames over it and syncs the folder.
fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}
