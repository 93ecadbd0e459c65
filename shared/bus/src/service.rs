//! What the `main` of a deployed service does: configuration, telemetry, the shared ports, then the
//! service until a signal ends it. `infera up` does the same for all services in one process.

use std::{fmt::Display, future::Future, path::PathBuf, process::ExitCode};

use infera_runtime::{
    CancellationToken,
    config::{self, Common},
    kv::Kv,
    shutdown, telemetry,
};
use serde::de::DeserializeOwned;

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

/// Runs `body` with what `<service> [--config FILE]` gives; 0 after a clean drain, 1 after an error,
/// 2 for wrong arguments.
pub fn main<C, F, Fut, E>(service: &'static str, defaults_toml: &'static str, body: F) -> ExitCode
where
    C: DeserializeOwned + AsRef<Common>,
    F: FnOnce(C, Ports, CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Display,
{
    shutdown::end_with_supervisor();
    let file = match config_file(std::env::args().skip(1)) {
        Ok(file) => file,
        Err(usage) => {
            eprintln!("infera-{service}: {usage}");
            return ExitCode::from(2);
        }
    };
    let outcome = actix_rt::System::new().block_on(async {
        let config: C = config::load(service, defaults_toml, file.as_deref()).map_err(|e| e.to_string())?;
        let common = config.as_ref().clone();
        let guard = telemetry::init(
            &format!("infera-{service}"),
            common.otlp_endpoint.as_deref(),
            &common.log_filter,
            true,
        )
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

fn config_file(mut args: impl Iterator<Item = String>) -> Result<Option<PathBuf>, String> {
    match (args.next().as_deref(), args.next(), args.next()) {
        (None, _, _) => Ok(None),
        (Some("--config"), Some(path), None) => Ok(Some(PathBuf::from(path))),
        _ => Err("usage: --config FILE (TOML); without it, defaults and the environment".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::config_file;

    #[test]
    fn arguments() {
        let parse = |args: &[&str]| config_file(args.iter().map(ToString::to_string));
        assert_eq!(parse(&[]), Ok(None));
        assert_eq!(parse(&["--config", "a.toml"]), Ok(Some("a.toml".into())));
        for bad in [&["--config"][..], &["a.toml"], &["--config", "a", "b"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
