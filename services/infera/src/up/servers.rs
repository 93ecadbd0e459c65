//! The private RabbitMQ, Redis and PostgreSQL of the cluster profile.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Stdio};

pub(super) async fn start(dir: PathBuf) -> Result<BTreeMap<String, String>, String> {
    cluster_script("start", dir.clone()).await?;
    let path = dir.join("cluster.env");
    let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("export ").unwrap_or(line).split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect())
}

/// deploy/cluster of the source tree that this program was built from.
pub(super) async fn cluster_script(action: &str, dir: PathBuf) -> Result<(), String> {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/cluster");
    let status = tokio::process::Command::new(&script)
        .arg(action)
        .arg(&dir)
        .stdin(Stdio::null())
        // A second Ctrl-C must not interrupt the end of the servers.
        .process_group(0)
        .status()
        .await
        .map_err(|e| format!("cannot run {}: {e}", script.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the private servers: deploy/cluster {action} failed"))
    }
}
