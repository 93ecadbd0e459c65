//! Commands that ask a running network.

use std::{fs, process::ExitCode};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{cli::HistoryArgs, layout::Layout, say};

/// What `up.json` says of a running network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpFile {
    /// For OpenAI clients; ends in `/v1`.
    pub base_url: String,
    pub api_key: String,
    pub explorer_url: String,
    pub rpc_url: String,
    pub profile: String,
    pub settlement_url: String,
    pub mempool_url: String,
    pub dispatcher_url: String,
    pub verifier_url: String,
    pub model: String,
}

impl UpFile {
    pub fn read(layout: &Layout) -> Result<Self, String> {
        let text = fs::read(layout.up_json()).map_err(|_| {
            format!("no network runs in {}: start one with `make up`", layout.root().display())
        })?;
        serde_json::from_slice(&text).map_err(|e| format!("{} is damaged: {e}", layout.up_json().display()))
    }
}

/// 10^-6 INFER as INFER.
pub fn infer(micro: u64) -> String {
    format!("{}.{:06} INFER", micro / 1_000_000, micro % 1_000_000)
}

/// `infera history`: the newest verified requests, or the nearest to a text.
pub fn history(args: &HistoryArgs) -> Result<ExitCode, String> {
    let layout = Layout::existing(&args.data.data)?;
    let up = UpFile::read(&layout)?;
    let limit = args.limit.to_string();
    let (path, query) = match &args.search {
        Some(text) => ("search", vec![("q", text.as_str()), ("limit", &limit)]),
        None => ("history", vec![("limit", limit.as_str())]),
    };
    let answer = crate::block_on(get(&format!("{}/v1/{path}", up.explorer_url), &query))??;
    let rows = answer.get("data").and_then(Value::as_array).cloned().unwrap_or_default();
    for row in &rows {
        say(row);
    }
    if rows.is_empty() {
        say("nothing yet");
    }
    Ok(ExitCode::SUCCESS)
}

/// One GET whose answer is JSON.
pub async fn get(url: &str, query: &[(&str, &str)]) -> Result<Value, String> {
    let url = reqwest::Url::parse_with_params(url, query).map_err(|e| e.to_string())?;
    let client = reqwest::Client::builder().no_proxy().build().map_err(|e| e.to_string())?;
    let response = client.get(url).send().await.map_err(|e| format!("the service does not answer: {e}"))?;
    let status = response.status();
    let body: Value = response.json().await.map_err(|e| format!("the answer is not JSON: {e}"))?;
    if status.is_success() {
        Ok(body)
    } else {
        Err(body.pointer("/error/message").and_then(Value::as_str).unwrap_or(status.as_str()).to_owned())
    }
}
