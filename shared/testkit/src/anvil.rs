//! A local chain that ends with the test.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::process::Process;
use crate::{cache_dir, free_port};

const START: Duration = Duration::from_secs(20);
/// A free port may be taken before anvil has it.
const ATTEMPTS: usize = 5;

/// Private keys of anvil's first accounts, each with 10,000 ETH; known to everybody.
pub const DEV_KEYS: [&str; 4] = [
    "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
    "5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a",
    "7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6",
];

/// A running anvil; dropping it ends it.
#[derive(Debug)]
pub struct Anvil {
    process: Process,
    url: String,
    _dir: TempDir,
}

impl Anvil {
    /// Starts anvil on a free loopback port and waits until it answers. Each transaction makes a block.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// As [`Anvil::start`], with more arguments, as `--block-time 1`.
    ///
    /// # Panics
    /// When it does not start, with what it says.
    pub async fn start_with(args: &[&str]) -> Self {
        let mut said = String::new();
        for _ in 0..ATTEMPTS {
            match Self::attempt(args).await {
                Ok(anvil) => return anvil,
                Err(log) => said = log,
            }
        }
        panic!("anvil does not start: {said}");
    }

    async fn attempt(args: &[&str]) -> Result<Self, String> {
        let dir = TempDir::new().expect("a temporary folder");
        let port = free_port().to_string();
        let mut process = Process::spec(program(), dir.path().join("anvil.log"))
            .args(["--host", "127.0.0.1", "--port", &port, "--prune-history"])
            .args(args)
            .spawn();
        let url = format!("http://127.0.0.1:{port}");
        let start = Instant::now();
        while process.exited().is_none() && start.elapsed() < START {
            if answers(&url).await && process.exited().is_none() {
                return Ok(Self { process, url, _dir: dir });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(process.log())
    }

    /// The address of its JSON-RPC, `http://127.0.0.1:PORT`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

async fn answers(url: &str) -> bool {
    let call = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": [] });
    let answer = reqwest::Client::new().post(url).json(&call).timeout(Duration::from_secs(2)).send().await;
    matches!(answer, Ok(answer) if answer.status().is_success())
}

/// The binary itself: npm's `.bin/anvil` is a node script that starts it as its own child, which a kill
/// of the script would leave behind.
fn program() -> PathBuf {
    let modules = cache_dir().join("npm/node_modules");
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let path = modules.join(format!("@foundry-rs/anvil-linux-{arch}/bin/anvil"));
    assert!(path.exists(), "{} is missing: run deploy/setup", path.display());
    path
}
