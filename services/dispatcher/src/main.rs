//! The dispatcher as a process of its own: `infera-dispatcher [CONFIG.toml]`.

use std::process::ExitCode;

use infera_bus::service;
use infera_dispatcher::{Config, Deps, run};

fn main() -> ExitCode {
    service::main(
        "dispatcher",
        Config::load,
        |config| &config.common,
        |config, ports, stop| run(config, Deps { bus: ports.bus, kv: ports.kv, bound: None }, stop),
    )
}
