//! The explorer as a process of its own: `infera-explorer [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_explorer::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "explorer",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps::new(ports.bus), stop),
    )
}
