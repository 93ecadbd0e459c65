//! The settlement as a process of its own: `infera-settlement [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_settlement::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "settlement",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps { bus: ports.bus, bound: None }, stop),
    )
}
