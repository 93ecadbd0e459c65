//! The `infera` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    infera::main()
}
