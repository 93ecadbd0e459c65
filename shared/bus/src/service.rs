//! What the `main` of a deployed service does: configuration, telemetry, the shared ports, then the
//! service until a signal ends it. `infera up` does the same for all services in one process.

use std::{
    fmt::Display,
    future::Future,
    path::{Path, PathBuf},
    process::ExitCode,
};

use infera_runtime::{
    CancellationToken,
    config::{Common, ConfigError},
    kv::Kv,
    shutdown, telemetry,
};

use crate::{Bus, Topology};

/// The ports that services share.
#[derive(Clone)]
pub struct Ports {
    pub bus: Bus,
    pub kv: Kv,
}

impl Ports {
    /// Connects to the servers that a deployed service's configuration names.
    ///
    /// # Errors
    /// One sentence that names the setting.
    pub async fn connect(common: &Common) -> Result<Self, String> {
        if common.bus_url.is_empty() {
            return Err(
                "`bus_url` is not set: give the RabbitMQ url as amqp://user:password@host:port/%2f".into()
            );
        }
        let bus =
            Bus::rabbit(common.bus_url.expose(), &common.bus_prefix).await.map_err(|e| e.to_string())?;
        bus.declare(&Topology::network()).await.map_err(|e| e.to_string())?;
        let kv = match &common.kv_url {
            Some(url) => Kv::redis(url.expose()).await.map_err(|e| e.to_string())?,
            None => Kv::memory(),
        };
        Ok(Self { bus, kv })
    }
}

/// Runs `body` with what `infera-<service> [FILE]` gives (FILE is a TOML configuration); 0 after a clean
/// drain, 1 after an error, 2 for wrong arguments. `common` is the shared part of the configuration.
pub fn main<C, F, Fut, E>(
    service: &'static str,
    load: fn(Option<&Path>) -> Result<C, ConfigError>,
    common: fn(&C) -> &Common,
    body: F,
) -> ExitCode
where
    F: FnOnce(C, Ports, CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Display,
{
    shutdown::end_with_supervisor();
    let mut args = std::env::args_os().skip(1);
    let file = args.next().map(PathBuf::from);
    if args.next().is_some() || file.as_ref().is_some_and(|f| f.to_string_lossy().starts_with('-')) {
        eprintln!(
            "usage: infera-{service} [FILE]: a TOML configuration; without it, defaults and the environment"
        );
        return ExitCode::from(2);
    }
    let outcome = actix_rt::System::new().block_on(async {
        let config = load(file.as_deref()).map_err(|e| e.to_string())?;
        let common = common(&config).clone();
        let name = format!("infera-{service}");
        let guard = telemetry::init(&name, common.otlp_endpoint.as_deref(), &common.log_filter, true)
            .map_err(|e| e.to_string())?;
        let token = shutdown::on_signals();
        let result = match Ports::connect(&common).await {
            Ok(ports) => {
                let bus = ports.bus.clone();
                let result = body(config, ports, token).await.map_err(|e| e.to_string());
                bus.close().await;
                result
            }
            Err(error) => Err(error),
        };
        guard.shutdown().await;
        result
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("infera-{service}: {error}");
            ExitCode::FAILURE
        }
    }
}
