//! The settlement service as a process of its own: `infera-settlement [CONFIG.toml]`.

use std::{path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let file = std::env::args_os().nth(1).map(PathBuf::from);
    match actix_rt::System::new().block_on(infera_settlement::process(file.as_deref())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infera-settlement: {error}");
            ExitCode::FAILURE
        }
    }
}
