//! Commands that ask a running network.

use std::{fs, process::ExitCode, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{cli::HistoryArgs, layout::Layout, say};

/// Longest wait that a 429 may ask for: quotas count by the minute.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Waits for one answer.
const MOST_WAITS: u32 = 3;

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

/// This program's HTTP clients speak no TLS: an address that needs it is refused with the remedy.
pub fn without_tls(url: &str) -> Result<(), String> {
    if !url.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://")) {
        return Ok(());
    }
    Err(format!(
        "{url} needs TLS, which this program does not speak: run a proxy on this machine that does, and name it as \
         http://127.0.0.1:PORT"
    ))
}

/// One GET whose answer is JSON. Who is asked too often is given the time that it names, [`MOST_WAITS`] times.
pub async fn get(url: &str, query: &[(&str, &str)]) -> Result<Value, String> {
    without_tls(url)?;
    let url = reqwest::Url::parse_with_params(url, query).map_err(|e| e.to_string())?;
    let client = reqwest::Client::builder().no_proxy().build().map_err(|e| e.to_string())?;
    let mut waits = 0;
    let response = loop {
        let response =
            client.get(url.clone()).send().await.map_err(|e| format!("the service does not answer: {e}"))?;
        match wait_of(&response).filter(|_| waits < MOST_WAITS) {
            Some(wait) => tokio::time::sleep(wait).await,
            None => break response,
        }
        waits += 1;
    };
    let status = response.status();
    let body: Value = response.json().await.map_err(|e| format!("the answer is not JSON: {e}"))?;
    if status.is_success() {
        Ok(body)
    } else {
        Err(body.pointer("/error/message").and_then(Value::as_str).unwrap_or(status.as_str()).to_owned())
    }
}

/// How long a 429 says to wait.
fn wait_of(response: &reqwest::Response) -> Option<Duration> {
    let limited = response.status() == reqwest::StatusCode::TOO_MANY_REQUESTS;
    let secs = response.headers().get("retry-after").filter(|_| limited)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(secs)).filter(|wait| *wait <= LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Answers one connection after the other.
    async fn serving(answers: &'static [&'static str]) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for answer in answers {
                let (mut socket, _) = listener.accept().await.unwrap();
                assert!(socket.read(&mut [0; 4096]).await.unwrap() > 0);
                let answer =
                    format!("HTTP/1.1 {answer}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}");
                socket.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        url
    }

    #[tokio::test]
    async fn who_asks_too_often_waits() {
        let limited = "429 Too Many Requests\r\nretry-after: 0";
        let url = serving(Box::leak(Box::new([limited, limited, "200 OK"]))).await;
        assert_eq!(get(&url, &[]).await, Ok(serde_json::json!({})));
        // For what does not pass in a minute, nobody waits.
        let url = serving(&["429 Too Many Requests\r\nretry-after: 3600"]).await;
        assert_eq!(get(&url, &[]).await, Err("429".to_owned()));
        let url = serving(&["429 Too Many Requests"]).await;
        assert_eq!(get(&url, &[]).await, Err("429".to_owned()));
    }

    #[tokio::test]
    async fn tls_is_refused_with_the_remedy() {
        for url in ["https://gateway.example.org/v1/x", "HTTPS://gateway.example.org"] {
            let error = get(url, &[]).await.unwrap_err();
            assert!(error.contains("TLS") && error.contains("http://127.0.0.1:PORT"), "{error}");
        }
        assert_eq!(without_tls("http://gateway.example.org"), Ok(()));
    }
}
