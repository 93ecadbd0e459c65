//! The gateway as a process of its own: `infera-gateway [CONFIG.toml]`.

use std::process::ExitCode;

#[actix_rt::main]
async fn main() -> ExitCode {
    let file = std::env::args_os().nth(1).map(std::path::PathBuf::from);
    match infera_gateway::start(file.as_deref()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infera-gateway: {error}");
            ExitCode::FAILURE
        }
    }
}
