//! The gateway as a process of its own: `infera-gateway [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_gateway::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "gateway",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps { bus: ports.bus, kv: ports.kv, bound: None }, stop),
    )
}
