//! Load on a running network, as ratios of two things measured in one run.
//!
//! `load`: one client against many. Rounds of both kinds alternate, so that whatever else the machine does falls on both.
//! Every answer is streamed and must be verified; one that is not fails the run. `audits`: see [`audits`].

mod audits;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::{StreamExt, future::try_join_all};
use reqwest::Client;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Tokens asked for.
const MAX_TOKENS: u32 = 24;

#[derive(Parser)]
enum Command {
    /// Answers and first tokens, of one client and of many
    Load(Args),
    /// What a referee adds to the time of an answer
    Audits(audits::Args),
}

#[derive(clap::Args)]
struct Args {
    /// `up.json` of the network
    #[arg(long, default_value = ".infera/up.json")]
    up: PathBuf,
    /// Rounds of each kind
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Clients at once in the crowded rounds
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=256))]
    clients: u32,
    /// Where the report goes
    #[arg(long, default_value = "target/reports/bench-load.json")]
    out: PathBuf,
}

#[derive(Deserialize)]
struct Up {
    base_url: String,
    api_key: String,
    model: String,
    profile: String,
    settlement_url: String,
}

/// One line of a report.
#[derive(Serialize)]
struct Metric {
    metric: String,
    value: f64,
    unit: &'static str,
    baseline: f64,
    ratio: f64,
    command: String,
}

/// One answer: time to its first token and to its end, milliseconds.
struct Answer {
    first_ms: f64,
    whole_ms: f64,
    tokens: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Load(args) => run(&args).await,
        Command::Audits(args) => audits::run(&args).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("infera-loadtest: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), String> {
    let (up, client) = connect(&args.up)?;
    ask(&client, &up, 0).await?;
    let (mut alone, mut crowded) = (Side::default(), Side::default());
    let mut number = 1;
    for _ in 0..args.rounds {
        alone.round(&client, &up, 1, &mut number).await?;
        crowded.round(&client, &up, args.clients, &mut number).await?;
    }
    publish(&report(args, &up, &alone, &crowded), &args.out)
}

/// The network that `path` is about, and a client for it.
fn connect(path: &Path) -> Result<(Up, Client), String> {
    let text = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let up: Up = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    let client = Client::builder().no_proxy().timeout(TIMEOUT).build().map_err(|e| e.to_string())?;
    Ok((up, client))
}

/// Prints a report and writes it.
fn publish(report: &[Metric], out: &Path) -> Result<(), String> {
    for row in report {
        eprintln!(
            "{:28} {:10.2} {:9} {:10.2} {:7.2}",
            row.metric, row.value, row.unit, row.baseline, row.ratio
        );
    }
    let bytes = serde_json::to_vec_pretty(report).map_err(|e| e.to_string())?;
    fs::write(out, bytes).map_err(|e| format!("cannot write {}: {e}", out.display()))
}

/// All rounds of one kind.
#[derive(Default)]
struct Side {
    answers: Vec<Answer>,
    secs: f64,
}

impl Side {
    async fn round(
        &mut self,
        client: &Client,
        up: &Up,
        clients: u32,
        number: &mut u32,
    ) -> Result<(), String> {
        let began = Instant::now();
        let first = *number;
        *number += clients;
        let answers = try_join_all((first..first + clients).map(|n| ask(client, up, n))).await?;
        self.secs += began.elapsed().as_secs_f64();
        self.answers.extend(answers);
        Ok(())
    }

    fn per_second(&self, of: impl Fn(&Answer) -> f64) -> f64 {
        self.answers.iter().map(of).sum::<f64>() / self.secs
    }

    fn quantile(&self, q: f64, of: impl Fn(&Answer) -> f64) -> f64 {
        quantile(q, self.answers.iter().map(of).collect())
    }
}

/// The value that a share `q` of all is not above; 0 of none.
fn quantile(q: f64, mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    // An index below the count of values.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let place = (q * last as f64).round() as usize;
    values.get(place).copied().unwrap_or_default()
}

fn report(args: &Args, up: &Up, alone: &Side, crowded: &Side) -> Vec<Metric> {
    let command = format!("make bench-load PROFILE={} CLIENTS={}", up.profile, args.clients);
    let row = |metric: &str, unit, value: f64, baseline: f64| Metric {
        metric: format!("{metric}_c{}", args.clients),
        value,
        unit,
        baseline,
        ratio: value / baseline,
        command: command.clone(),
    };
    let first = |a: &Answer| a.first_ms;
    let whole = |a: &Answer| a.whole_ms;
    vec![
        row("answers_per_s", "1/s", crowded.per_second(|_| 1.0), alone.per_second(|_| 1.0)),
        row("tokens_per_s", "tokens/s", crowded.per_second(|a| a.tokens), alone.per_second(|a| a.tokens)),
        row("first_token_p50", "ms", crowded.quantile(0.5, first), alone.quantile(0.5, first)),
        row("first_token_p99", "ms", crowded.quantile(0.99, first), alone.quantile(0.99, first)),
        row("answer_p50", "ms", crowded.quantile(0.5, whole), alone.quantile(0.5, whole)),
        row("answer_p99", "ms", crowded.quantile(0.99, whole), alone.quantile(0.99, whole)),
    ]
}

async fn ask(client: &Client, up: &Up, number: u32) -> Result<Answer, String> {
    let body = json!({
        "model": up.model, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": true,
        "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": format!("Tell me something about the number {number}.")}],
    });
    let began = Instant::now();
    let response = client
        .post(format!("{}/chat/completions", up.base_url))
        .bearer_auth(&up.api_key)
        .json(&body)
        .send()
        .await
        .map_err(|e| e.to_string())?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("{status}: {}", response.text().await.unwrap_or_default()));
    }
    let mut stream = response.bytes_stream();
    let (mut text, mut first_ms) = (String::new(), None);
    while let Some(chunk) = stream.next().await {
        text.push_str(&String::from_utf8_lossy(&chunk.map_err(|e| e.to_string())?));
        if first_ms.is_none() && events(&text).any(|event| content(&event).is_some_and(|c| !c.is_empty())) {
            first_ms = Some(millis(began));
        }
    }
    let verified = events(&text).any(|event| event.pointer("/infera/verdict") == Some(&json!("verified")));
    if !verified {
        return Err(format!("answer {number} is not verified"));
    }
    let tokens = events(&text)
        .find_map(|event| event.pointer("/usage/completion_tokens").and_then(Value::as_f64))
        .ok_or("the stream has no usage")?;
    Ok(Answer { first_ms: first_ms.unwrap_or_else(|| millis(began)), whole_ms: millis(began), tokens })
}

fn millis(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1_000.0
}

/// The complete events of a stream so far.
fn events(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.split("\n\n").filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok())
}

fn content(event: &Value) -> Option<&str> {
    event.pointer("/choices/0/delta/content").and_then(Value::as_str)
}
