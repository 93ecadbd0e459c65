//! A node as a program of its own; `infera node` is the same.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    infera_node::main(infera_node::Args::parse())
}
