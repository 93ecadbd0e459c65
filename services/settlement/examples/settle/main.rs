//! What settling costs: receipts hashed, batched and proved on one core; batches formed out of a database; ledger
//! postings on SQLite and PostgreSQL; gas on a real anvil.

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use serde::Serialize;

mod books;
mod chain;
mod receipts;

#[derive(Parser)]
pub struct Args {
    /// Receipts of a batch
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    receipts: u32,
    /// Transfers posted to each database
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    postings: u32,
    /// Rounds of each; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where the report goes
    #[arg(long, default_value = "target/reports/bench-settlement.json")]
    out: PathBuf,
}

/// One line of a report. `baseline` is the goal where there is one.
#[derive(Serialize)]
pub struct Metric {
    metric: &'static str,
    value: f64,
    unit: &'static str,
    baseline: Option<f64>,
    ratio: Option<f64>,
    command: &'static str,
}

/// The report so far.
#[derive(Default)]
pub struct Report(Vec<Metric>);

impl Report {
    pub fn add(&mut self, metric: &'static str, unit: &'static str, value: f64, baseline: Option<f64>) {
        let ratio = baseline.map(|baseline| value / baseline);
        let shown = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"));
        let (goal, over) = (shown(baseline), shown(ratio));
        eprintln!("{metric:34} {value:12.2} {unit:18} {goal:>10} {over:>7}");
        self.0.push(Metric { metric, value, unit, baseline, ratio, command: "make bench-settlement" });
    }
}

/// How often per second, by the median round.
pub fn per_second(count: u32, mut secs: Vec<f64>) -> f64 {
    secs.sort_by(f64::total_cmp);
    f64::from(count) / secs[secs.len() / 2]
}

/// Seconds that `work` takes.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed().as_secs_f64())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench-settlement: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), String> {
    let mut report = Report::default();
    receipts::run(args, &mut report)?;
    books::run(args, &mut report).await?;
    chain::run(args, &mut report).await?;
    let bytes = serde_json::to_vec_pretty(&report.0).map_err(|e| e.to_string())?;
    fs::write(&args.out, bytes).map_err(|e| format!("cannot write {}: {e}", args.out.display()))
}

/// One sentence for whatever failed.
pub fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
