//! `make bench-trust`: how well the network tells honest answers from others. See docs/src/trust.md.

mod record;
mod sets;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use infera_node::engine::Class;

use record::{Setup, engine};
use sets::{Engines, Sets, say};

const PROMPTS: &str = include_str!("../prompts.txt");

#[derive(Parser)]
struct Args {
    /// The model file, GGUF
    #[arg(long)]
    model: PathBuf,
    /// Another model's file, GGUF
    #[arg(long)]
    other: PathBuf,
    /// Folder of all-MiniLM-L6-v2
    #[arg(long)]
    embedder: PathBuf,
    /// Where recordings are kept
    #[arg(long, default_value = "target/trust")]
    recordings: PathBuf,
    /// Prompts of the list
    #[arg(long, default_value_t = 646)]
    prompts: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 24)]
    tokens: u32,
}

fn run(args: &Args) -> Result<(), String> {
    let setup = Setup::new(&args.model, PROMPTS, args.prompts, args.tokens)?;
    let engines = Engines {
        exact: engine(&args.model, Class::Exact, None)?,
        fast: engine(&args.model, Class::Fast, None)?,
    };
    let sets = Sets::record(&setup, &args.recordings, &args.model, &args.other, &engines)?;
    say(&format!("{} answers", sets.fast.len()));
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&message);
            ExitCode::FAILURE
        }
    }
}
