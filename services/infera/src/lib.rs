//! The `infera` command: runs a network on one machine, runs a node, makes API keys, and checks receipts.
//!
//! `infera up` is a supervisor. Its children are the local chain, the services and the nodes:
//!
//! ```text
//!  infera up ── anvil
//!            ├─ infera network         all services in one process (embedded)
//!            │  or infera-gateway, infera-mempool, ... one process each (cluster)
//!            └─ infera node × 4        each of its own operator
//! ```
//!
//! A child that ends is started again; what it had accepted is in its database or its outbox. The
//! services are the same in both profiles: only what their `run` is given differs.

use std::process::ExitCode;

use clap::Parser;

mod account;
mod cli;
mod client;
mod contracts;
mod dead;
mod epoch;
mod govern;
mod holds;
mod keys;
mod layout;
mod ledger;
mod models;
mod network;
mod operator;
mod services;
mod slash;
mod up;
mod verify;

use cli::{Cli, Command, RunNodeArgs};

/// Something went wrong; one sentence was printed.
const FAILURE: u8 = 1;

/// Parses the command line and runs the command.
pub fn main() -> ExitCode {
    infera_runtime::shutdown::end_with_supervisor();
    let outcome = run(Cli::parse().command);
    match outcome {
        Ok(code) => code,
        Err(message) => {
            eprintln!("infera: {message}");
            ExitCode::from(FAILURE)
        }
    }
}

/// Runs one command.
fn run(command: Command) -> Result<ExitCode, String> {
    match command {
        Command::Up(args) => up::up(args),
        Command::Down(args) => up::down(&args),
        Command::Node(RunNodeArgs::Run(args)) => Ok(infera_node::main(args)),
        Command::Node(RunNodeArgs::Operator(command)) => operator::operator(&command),
        Command::Pause(args) => node(infera_node::pause(&args.data)),
        Command::Resume(args) => node(infera_node::resume(&args.data)),
        Command::Keys(args) => keys::keys(args),
        Command::Account(args) => account::account(&args),
        Command::Models(args) => models::models(&args),
        Command::Verify(args) => verify::verify(&args),
        Command::History(args) => client::history(&args),
        Command::Dead(args) => dead::dead(&args),
        Command::Holds(args) => holds::holds(&args),
        Command::Ledger(args) => ledger::ledger(&args),
        Command::Operator(args) => operator::operator(&args.command),
        Command::Govern(args) => govern::govern(&args),
        Command::Config(args) => services::dump(&args),
        Command::Network(args) => network::network(&args),
    }
}

fn node(outcome: Result<(), infera_node::Error>) -> Result<ExitCode, String> {
    outcome.map(|()| ExitCode::SUCCESS).map_err(|e| e.to_string())
}

/// Prints a line to standard output; a reader that went away is no error.
pub(crate) fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A small runtime for commands that wait for something: one thread, this one, because the kernel ties the
/// death signal of a child to the thread that started it.
pub(crate) fn block_on<F: Future>(future: F) -> Result<F::Output, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map(|runtime| runtime.block_on(future))
        .map_err(|e| format!("cannot start a runtime: {e}"))
}
