//! The verifier as a process of its own: `infera-verifier [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_verifier::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "verifier",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps::new(ports.bus), stop),
    )
}
