//! The servers that the cluster profile runs on, started by the same script as in production-like runs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::{cache_dir, workspace_root};

/// Addresses of the servers. They are shared by all tests of this machine and stay up afterwards
/// (`deploy/cluster stop DIR` ends them), so name everything with [`crate::unique`].
#[derive(Debug, Clone)]
pub struct Cluster {
    /// `amqp://USER:PASSWORD@127.0.0.1:PORT/...`
    pub amqp_url: String,
    /// `redis://127.0.0.1:PORT/...`
    pub redis_url: String,
    /// `postgres://USER:PASSWORD@127.0.0.1:PORT/NAME`
    pub pg_url: String,
    dir: PathBuf,
}

/// The cluster of `~/.cache/infera/test-cluster`, started when it is not running. Blocks for up to
/// about 15 s the first time.
///
/// # Panics
/// With what the script says when it cannot start.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| Cluster::start(cache_dir().join("test-cluster")))
}

impl Cluster {
    /// Starts a cluster in `dir`, for tests that stop servers and must not disturb others.
    pub fn start(dir: PathBuf) -> Self {
        script("start", &dir, None);
        let path = dir.join("cluster.env");
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{} cannot be read: {error}", path.display()));
        let vars = parse_env(&text);
        let get = |name: &str| {
            vars.get(name).cloned().unwrap_or_else(|| panic!("{} has no {name}", path.display()))
        };
        Self { amqp_url: get("AMQP_URL"), redis_url: get("REDIS_URL"), pg_url: get("PG_URL"), dir }
    }

    /// Ends one server in good order (`rabbit`, `redis` or `postgres`) and starts it on the same port.
    pub fn restart(&self, server: &str) {
        script("restart", &self.dir, Some(server));
    }

    /// `kill -9` of one server; [`Cluster::revive`] brings it back.
    pub fn kill(&self, server: &str) {
        script("kill", &self.dir, Some(server));
    }

    /// Starts whatever is not running, on the same ports.
    pub fn revive(&self) {
        script("start", &self.dir, None);
    }

    /// Ends all servers; their data stays.
    pub fn stop(&self) {
        script("stop", &self.dir, None);
    }
}

fn script(command: &str, dir: &std::path::Path, server: Option<&str>) {
    let script = workspace_root().join("deploy/cluster");
    // To a file and not to a pipe: the servers inherit it, and a pipe would stay open as long as they live.
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let out = |log: &tempfile::NamedTempFile| Stdio::from(log.reopen().expect("the log can be opened again"));
    let status = Command::new(&script)
        .arg(command)
        .arg(dir)
        .args(server)
        .stdin(Stdio::null())
        .stdout(out(&log))
        .stderr(out(&log))
        .status()
        .unwrap_or_else(|error| panic!("{} cannot be run: {error}", script.display()));
    if !status.success() {
        let said = std::fs::read_to_string(log.path()).unwrap_or_default();
        panic!("{} {command} {} failed ({status}): {said}", script.display(), dir.display());
    }
}

/// Lines `NAME=VALUE`, optionally after `export` and with quotes.
fn parse_env(text: &str) -> HashMap<String, String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("export ").unwrap_or(line.trim()).split_once('='))
        .filter(|(name, _)| !name.starts_with('#'))
        .map(|(name, value)| (name.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_quoted_and_exported_lines() {
        let vars =
            parse_env("# a comment = x\nexport A='1'\n B=\"amqp://u:p@h/%2f?x=y\" \n\nC=3\nnonsense\n");
        let get = |name: &str| vars.get(name).map(String::as_str);
        assert_eq!((get("A"), get("B"), get("C")), (Some("1"), Some("amqp://u:p@h/%2f?x=y"), Some("3")));
        assert_eq!(vars.len(), 3);
    }
}
