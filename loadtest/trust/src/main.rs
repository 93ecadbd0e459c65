//! `make bench-trust`: how well the network tells honest answers from others. See docs/src/trust.md.

mod attacks;
mod calibrate;
mod cells;
mod decision;
#[cfg(test)]
mod drift_tests;
mod entry;
mod honest;
mod judge;
mod network;
mod plot;
mod record;
mod report;
mod sets;
mod simulate;
mod stats;
mod weights;

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use infera_embed::Embedder;
use infera_node::engine::Class;
use infera_protocol::{calibration::Calibration, registry::Registry};
use serde::Serialize;

use calibrate::Measured;
use honest::{Again, Margins};
use judge::Court;
use record::{Setup, engine};
use report::Metric;
use sets::{Engines, Sets, say};

const PROMPTS: &str = include_str!("../prompts.txt");

#[derive(Parser)]
enum Command {
    /// Answers of honest nodes and of cheaters before every layer
    Content(Content),
    /// Trials of newcomers, honest and with cheaper weights
    Entry(Entry),
    /// A network of thousands under the rules of trust
    Network(Network),
}

#[derive(clap::Args)]
struct Entry {
    /// The model file, GGUF
    #[arg(long)]
    model: PathBuf,
    /// The registry, for the bounds
    #[arg(long, default_value = "deploy/models.json")]
    registry: PathBuf,
    /// Trials of each kind
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    trials: u32,
    /// The report
    #[arg(long, default_value = "target/reports/bench-trust.json")]
    out: PathBuf,
}

#[derive(clap::Args)]
struct Network {
    /// Operators, each with one node
    #[arg(long, default_value_t = 3_000)]
    operators: usize,
    /// Requests a day
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    per_day: u32,
    /// Requests before those that count
    #[arg(long, default_value_t = 10_000)]
    warm_up: u32,
    /// Requests that count
    #[arg(long, default_value_t = 100_000)]
    requests: u32,
    /// Wrong answers that an honest referee misses, 10^-6
    #[arg(long, default_value_t = 1_000)]
    missed_ppm: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs of each strategy of a colluding third, each with a seed of its own
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    seeds: u32,
    /// The report; every run is in bench-sim-runs.json beside it, and the metrics are also put into bench-trust.json there
    #[arg(long, default_value = "target/reports/bench-sim.json")]
    out: PathBuf,
}

#[derive(clap::Args)]
struct Content {
    /// The model file, GGUF
    #[arg(long)]
    model: PathBuf,
    /// Another model's file, GGUF
    #[arg(long)]
    other: PathBuf,
    /// Folder of all-MiniLM-L6-v2
    #[arg(long)]
    embedder: PathBuf,
    /// The registry, for the threshold of similarity
    #[arg(long, default_value = "deploy/models.json")]
    registry: PathBuf,
    /// Where recordings are kept
    #[arg(long, default_value = "target/trust")]
    recordings: PathBuf,
    /// The report; beside it calibration.json and an .svg
    #[arg(long, default_value = "target/reports/bench-trust.json")]
    out: PathBuf,
    /// Prompts of the list
    #[arg(long, default_value_t = 646)]
    prompts: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 24)]
    tokens: u32,
}

/// calibration.json: what was measured, and the bounds that follow.
#[derive(Serialize)]
struct Published {
    rule: String,
    measured: Vec<Measured>,
    calibration: Calibration,
}

fn registry(path: &Path) -> Result<Registry, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let bytes = fs::read(path).map_err(|e| failed(&e))?;
    serde_json::from_slice(&bytes).map_err(|e| failed(&e))
}

fn entry(args: &Entry) -> Result<(), String> {
    let metrics = entry::measure(&args.model, &registry(&args.registry)?, args.trials)?;
    report::merge(&args.out, &metrics)?;
    report::print(&metrics)
}

fn network(args: &Network) -> Result<(), String> {
    let setting = simulate::Setting {
        operators: args.operators,
        per_day: args.per_day,
        warm_up: args.warm_up,
        requests: args.requests,
        missed_ppm: args.missed_ppm,
        seed: args.seed,
        seeds: args.seeds,
    };
    let (runs, metrics) = simulate::all(&setting);
    report::json(&args.out, &metrics)?;
    report::json(&args.out.with_file_name("bench-sim-runs.json"), &runs)?;
    report::merge(&args.out.with_file_name("bench-trust.json"), &metrics)?;
    report::print(&metrics)
}

fn content(args: &Content) -> Result<(), String> {
    let began = Instant::now();
    let registry = registry(&args.registry)?;
    let model = registry.models.first().ok_or_else(|| format!("{}: no model", args.registry.display()))?;
    let threshold = model.similarity_threshold_millionths;
    let setup = Setup::new(&args.model, PROMPTS, args.prompts, args.tokens)?;
    let engines = Engines {
        exact: engine(&args.model, Class::Exact, None)?,
        fast: engine(&args.model, Class::Fast, None)?,
    };
    let sets = Sets::record(&setup, &args.recordings, &args.model, &args.other, &engines)?;
    let again = Again::record(&setup, &engines, &args.recordings)?;
    let embedder = Embedder::load(&args.embedder).map_err(|e| e.to_string())?;
    let nothing = Calibration { pairs: Vec::new() };
    let court = |calibration| Court {
        setup: &setup,
        sets: &sets,
        engines: &engines,
        calibration,
        threshold,
        embedder: &embedder,
        embedded: RefCell::default(),
    };
    let margins = Margins::find(&court(&nothing))?;
    let widest = entry::widest(&engines, model)?;
    let (measured, calibration) = honest::calibrate(&court(&nothing), &again, &margins, widest)?;
    let court = court(&calibration);
    let rule = format!(
        "{} x the largest value that honest nodes showed, at least {}",
        calibrate::SAFETY,
        calibrate::FLOOR
    );
    let published = Published { rule, measured, calibration: calibration.clone() };
    report::json(&args.out.with_file_name("calibration.json"), &published)?;
    let mut metrics = honest::cells(&court, &again, &margins)?;
    let attacks = attacks::build(&setup, &sets)?;
    let mut cells = cells::judge(&court, &attacks)?;
    metrics.append(&mut cells.metrics);
    let widest = |all: &Vec<f64>| all.iter().copied().fold(0.0, f64::max);
    let panels = cells::panels(&court, &cells, margins.of_fast.iter().map(widest).collect())?;
    report::write(&args.out.with_extension("svg"), plot::roc(&panels).as_bytes())?;
    metrics.push(Metric::new("judging_secs", began.elapsed().as_secs_f64().round(), "s"));
    report::merge(&args.out, &metrics)?;
    report::print(&metrics)
}

fn main() -> ExitCode {
    let outcome = match Command::parse() {
        Command::Content(args) => content(&args),
        Command::Entry(args) => entry(&args),
        Command::Network(args) => network(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&message);
            ExitCode::FAILURE
        }
    }
}
