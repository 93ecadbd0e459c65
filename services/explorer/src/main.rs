//! The explorer as a process of its own.

use infera_explorer::{Config, serve};

fn main() -> std::process::ExitCode {
    let file = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    let result = Config::load(file.as_deref())
        .map_err(|error| error.to_string())
        .and_then(|config| actix_rt::System::new().block_on(serve(config)).map_err(|e| e.to_string()));
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infera-explorer: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
