//! A whole network, started and ended by the command that users start it with.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, MutexGuard, Once, PoisonError},
    time::Duration,
};

use infera_testkit::{TempDir, cache_dir};
use serde_json::Value;

/// Two networks at once would only take each other's cores.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How long an answer or its anchor may take: a service that dies at each of its steps is away for up to
/// five seconds each time, and settlement alone at fifteen of them.
pub const PATIENCE: Duration = Duration::from_secs(150);

pub struct Network {
    _turn: MutexGuard<'static, ()>,
    dir: TempDir,
    profile: &'static str,
    port_base: u16,
    extra: Vec<String>,
    env: Vec<(&'static str, String)>,
    pub http: reqwest::Client,
}

/// The `infera` program of this build.
pub fn infera() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_infera"))
}

/// Ten free ports in a row. The ranges below the ephemeral ports are only used by these tests.
fn free_ports() -> u16 {
    let start = u16::try_from(std::process::id() % 700).unwrap() * 10 + 12_000;
    (start..19_000)
        .step_by(10)
        .chain((12_000..start).step_by(10))
        .find(|base| (*base..base + 10).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()))
        .expect("ten free ports")
}

/// The services' own programs: cargo builds those of this package alone for its tests.
fn build_services() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--workspace", "--bins"]).current_dir(infera_testkit::workspace_root());
        // Beside the program under test.
        command.env("CARGO_TARGET_DIR", infera().parent().unwrap().parent().unwrap());
        assert!(command.status().unwrap().success());
    });
}

impl Network {
    pub fn new(profile: &'static str, extra: &[&str]) -> Self {
        // Sockets and the database servers want a short path that other users can enter.
        let dir = tempfile_in_tmp();
        let extra = extra.iter().map(ToString::to_string).collect();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _turn: turn, dir, profile, port_base: free_ports(), extra, env: Vec::new(), http }
    }

    pub fn start(profile: &'static str, extra: &[&str]) -> Self {
        let network = Self::new(profile, extra);
        network.up();
        network
    }

    /// Sets an environment variable of everything that [`Network::up`] starts.
    pub fn set_env(&mut self, name: &'static str, value: String) {
        self.env.push((name, value));
    }

    pub fn data(&self) -> &Path {
        self.dir.path()
    }

    pub fn up(&self) {
        if self.profile == "cluster" {
            build_services();
        }
        let output = Command::new(infera())
            .args(["up", "--detach", "--profile", self.profile, "--data"])
            .arg(self.data())
            .args(["--port-base", &self.port_base.to_string()])
            .args(&self.extra)
            .envs(self.env.iter().cloned())
            .output()
            .unwrap();
        assert!(output.status.success(), "infera up: {}\n{}", text(&output), self.logs());
        assert!(text(&output).contains("/chat/completions"), "no request to paste: {}", text(&output));
    }

    /// `infera up` in the foreground, as a terminal runs it; what it says goes to the file `terminal`.
    pub fn foreground(&self, extra: &[&str]) -> Child {
        let said = std::fs::File::create(self.data().join("terminal")).unwrap();
        Command::new(infera())
            .args(["up", "--profile", self.profile, "--data"])
            .arg(self.data())
            .args(["--port-base", &self.port_base.to_string()])
            .args(&self.extra)
            .args(extra)
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .spawn()
            .unwrap()
    }

    /// What [`Network::foreground`] has said so far.
    pub fn terminal(&self) -> String {
        std::fs::read_to_string(self.data().join("terminal")).unwrap_or_default()
    }

    pub fn port_base(&self) -> u16 {
        self.port_base
    }

    /// Command lines of all processes that belong to this network: its folder or its chain's port is in them.
    pub fn processes(&self) -> Vec<String> {
        let folder = self.data().to_string_lossy().into_owned();
        let chain = format!("--port {} ", self.port_base + 9);
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| line.contains(&folder) || line.contains(&chain))
            .collect()
    }

    pub fn down(&self) {
        let output = Command::new(infera()).args(["down", "--data"]).arg(self.data()).output().unwrap();
        assert!(output.status.success(), "infera down: {}", text(&output));
    }

    /// `up.json`, as scripts read it.
    pub fn up_file(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.data().join("up.json")).unwrap()).unwrap()
    }

    pub fn url(&self, name: &str) -> String {
        self.up_file()[name].as_str().unwrap().to_owned()
    }

    pub fn key(&self) -> String {
        self.url("api_key")
    }

    pub fn pid(&self, name: &str) -> Option<i32> {
        std::fs::read_to_string(self.data().join("pids").join(format!("{name}.pid")))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// SIGKILL for one process of the network.
    pub fn kill9(&self, name: &str) {
        let pid = self.pid(name).unwrap_or_else(|| panic!("{name} has no process"));
        let status = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        assert!(status.success());
    }

    pub async fn get(&self, url: &str) -> Value {
        let response = self.http.get(url).bearer_auth(self.key()).send().await.unwrap();
        assert!(response.status().is_success(), "{url}: {}", response.status());
        response.json().await.unwrap()
    }

    /// `infera` with the network's folder: exit status and what it printed.
    pub fn command(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(infera()).args(arguments).arg("--data").arg(self.data()).output().unwrap();
        (output.status.code(), text(&output))
    }

    /// The same where it must not fail: what it printed.
    pub fn succeeds(&self, arguments: &[&str]) -> String {
        let (status, printed) = self.command(arguments);
        assert_eq!(status, Some(0), "{arguments:?}: {printed}");
        printed
    }

    /// Asks without stream; `Err` where the connection or the answer failed.
    pub async fn ask(&self, question: &str, idempotency_key: &str) -> Result<Value, String> {
        let body = serde_json::json!({
            "model": self.url("model"), "temperature": 0, "max_tokens": 12,
            "messages": [{"role": "user", "content": question}],
        });
        let response = self
            .http
            .post(format!("{}/chat/completions", self.url("base_url")))
            .bearer_auth(self.key())
            .header("Idempotency-Key", idempotency_key)
            .json(&body)
            .send()
            .await
            .map_err(|e| e.to_string())?;
        let status = response.status();
        let answer: Value = response.json().await.map_err(|e| e.to_string())?;
        if status.is_success() { Ok(answer) } else { Err(format!("{status}: {answer}")) }
    }

    /// The receipt document's bytes once it is anchored.
    pub async fn anchored_receipt(&self, id: &str) -> Vec<u8> {
        let url = format!("{}/receipts/{id}", self.url("base_url"));
        infera_testkit::eventually(PATIENCE, || async {
            let response = self.http.get(&url).bearer_auth(self.key()).send().await.ok()?;
            let bytes = response.bytes().await.ok()?;
            let document: Value = serde_json::from_slice(&bytes).ok()?;
            (document["status"] == "anchored").then(|| bytes.to_vec())
        })
        .await
    }

    /// `infera verify` on these bytes: its exit status and what it printed.
    pub fn verify(&self, receipt: &[u8]) -> (Option<i32>, String) {
        let file = self.data().join("receipt.json");
        std::fs::write(&file, receipt).unwrap();
        let output =
            Command::new(infera()).arg("verify").arg(&file).arg("--data").arg(self.data()).output().unwrap();
        (output.status.code(), text(&output))
    }

    /// The second implementation of the format (docs/src/receipts.md), which needs python3 alone.
    pub fn verify_in_python(&self, receipt: &[u8], options: &[&str]) -> (Option<i32>, String) {
        let file = self.data().join("receipt.json");
        std::fs::write(&file, receipt).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/protocol/tests/golden");
        let output = Command::new("python3")
            .args(["-B".as_ref(), golden.join("receipts.py").as_os_str(), "check".as_ref(), file.as_os_str()])
            .arg("--manifest")
            .arg(self.data().join("network.json"))
            .arg("--registry")
            .arg(self.data().join("models.json"))
            .args(options)
            .output()
            .unwrap();
        (output.status.code(), text(&output))
    }

    /// The pip client's script; its JSON.
    pub fn openai_client(&self) -> Value {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/client.py");
        let output = Command::new(cache_dir().join("venv/bin/python"))
            .arg(script)
            .args([self.url("base_url"), self.key(), self.url("model")])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}\n{}", text(&output), self.logs());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The ends of all logs, for a failed assertion.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for entry in std::fs::read_dir(self.data().join("logs")).into_iter().flatten().flatten() {
            let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(15)..].join("\n");
            all.push_str(&format!("--- {}\n{end}\n", entry.path().display()));
        }
        all
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = Command::new(infera()).args(["down", "--data"]).arg(self.data()).output();
    }
}

fn tempfile_in_tmp() -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::with_prefix_in("infera-e2e-", "/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
