//! The mempool as a process of its own: `infera-mempool [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_mempool::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "mempool",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps { bus: ports.bus, bound: None }, stop),
    )
}
