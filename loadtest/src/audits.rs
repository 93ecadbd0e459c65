//! What a referee adds to the time of an answer. One client asks one question after the other of a network that is new:
//! at first every answer is refereed, then, as operators become trusted, one in twenty. The receipts tell which were, so
//! that both kinds are measured in one run.

use std::{path::PathBuf, time::Instant};

use reqwest::Client;
use serde_json::{Value, json};

use crate::{MAX_TOKENS, Metric, Up, connect, millis, publish, quantile};

#[derive(clap::Args)]
pub struct Args {
    /// `up.json` of the network
    #[arg(long, default_value = ".infera/up.json")]
    up: PathBuf,
    /// Questions
    #[arg(long, default_value_t = 240, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    questions: u32,
    /// Where the report goes
    #[arg(long, default_value = "target/reports/bench-audits.json")]
    out: PathBuf,
}

pub async fn run(args: &Args) -> Result<(), String> {
    let (up, client) = connect(&args.up)?;
    ask(&client, &up, 0).await?;
    let mut answers = Vec::new();
    for number in 1..=args.questions {
        answers.push(ask(&client, &up, number).await?);
    }
    let (mut refereed, mut alone) = (Vec::new(), Vec::new());
    for (receipt, ms) in answers {
        let times = if referees(&client, &up, &receipt).await? > 0 { &mut refereed } else { &mut alone };
        times.push(ms);
    }
    if refereed.is_empty() || alone.is_empty() {
        return Err(format!(
            "{} answers were refereed and {} were not: ask more questions of a new network",
            refereed.len(),
            alone.len()
        ));
    }
    let row = |metric: &str, unit, value: f64, baseline: f64| Metric {
        metric: metric.to_owned(),
        value,
        unit,
        baseline,
        ratio: value / baseline,
        command: "make bench-audits".to_owned(),
    };
    // Counts of answers fit an f64.
    #[allow(clippy::cast_precision_loss)]
    let counts = (refereed.len() as f64, alone.len() as f64);
    let both = |q| (quantile(q, refereed.clone()), quantile(q, alone.clone()));
    let (p50, p95) = (both(0.5), both(0.95));
    let report = [
        row("refereed_answers", "answers", counts.0, counts.1),
        row("refereed_answer_p50", "ms", p50.0, p50.1),
        row("refereed_answer_p95", "ms", p95.0, p95.1),
    ];
    publish(&report, &args.out)
}

/// Asks; the receipt's id and the milliseconds that the answer took.
async fn ask(client: &Client, up: &Up, number: u32) -> Result<(String, f64), String> {
    let body = json!({
        "model": up.model, "temperature": 0, "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": format!("Tell me something about the number {number}.")}],
    });
    let began = Instant::now();
    let sent = client.post(format!("{}/chat/completions", up.base_url)).bearer_auth(&up.api_key).json(&body);
    let answer: Value = read(sent).await?;
    let ms = millis(began);
    let receipt = answer.pointer("/infera/receipt").and_then(Value::as_str);
    receipt.map(|id| (id.to_owned(), ms)).ok_or_else(|| format!("answer {number} is not verified: {answer}"))
}

/// How many referees reported about the answer.
async fn referees(client: &Client, up: &Up, receipt: &str) -> Result<usize, String> {
    let document: Value = read(client.get(format!("{}/v1/receipts/{receipt}", up.settlement_url))).await?;
    let referees = document.pointer("/receipt/referees").and_then(Value::as_array);
    referees.map(Vec::len).ok_or_else(|| format!("receipt {receipt} lists no referees"))
}

async fn read(request: reqwest::RequestBuilder) -> Result<Value, String> {
    let response = request.send().await.map_err(|e| e.to_string())?;
    let status = response.status();
    let text = response.text().await.map_err(|e| e.to_string())?;
    if !status.is_success() {
        return Err(format!("{status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|e| e.to_string())
}
