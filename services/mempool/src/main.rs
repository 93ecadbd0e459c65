//! `infera-mempool [CONFIG.toml]`

use std::path::PathBuf;

use infera_mempool::{Config, Deps, run};
use infera_runtime::{shutdown, telemetry};

#[actix_rt::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::load(std::env::args_os().nth(1).map(PathBuf::from).as_deref())?;
    let common = &config.common;
    let guard = telemetry::init("infera-mempool", common.otlp_endpoint.as_deref(), &common.log_filter, true)?;
    let deps = Deps::connect(common).await?;
    let result = run(config, deps, shutdown::on_signals()).await;
    guard.shutdown().await;
    Ok(result?)
}
