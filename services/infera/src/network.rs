//! All services in one process, each on its own thread with its own actix system, on the in-process bus.

use std::{process::ExitCode, thread};

use infera_bus::{Bus, Topology};
use infera_embed::Embedder;
use infera_runtime::{CancellationToken, kv::Kv, shutdown, telemetry};

use crate::{cli::DataArgs, layout::Layout, services::embedder};

/// What the services of one process share.
#[derive(Clone)]
struct Shared {
    layout: Layout,
    bus: Bus,
    kv: Kv,
    embedder: Embedder,
    shutdown: CancellationToken,
}

/// Runs until a signal, or until a service fails: then all drain and the process ends with an error, to be
/// started again from what is durable.
pub fn network(args: &DataArgs) -> Result<ExitCode, String> {
    let layout = Layout::existing(&args.data)?;
    actix_rt::System::new().block_on(async move {
        let config = infera_gateway::Config::load(Some(&layout.config("gateway"))).map_err(said)?;
        let guard = telemetry::init(
            "infera",
            config.common.otlp_endpoint.as_deref(),
            &config.common.log_filter,
            true,
        )
        .map_err(said)?;
        let bus = Bus::in_process();
        bus.declare(&Topology::network()).await.map_err(|e| e.to_string())?;
        let embedder = Embedder::load(&embedder()).map_err(said)?;
        let shared = Shared { layout, bus, kv: Kv::memory(), embedder, shutdown: shutdown::on_signals() };
        let outcome = serve(&shared).await;
        shared.bus.close().await;
        guard.shutdown().await;
        outcome.map(|()| ExitCode::SUCCESS)
    })
}

async fn serve(shared: &Shared) -> Result<(), String> {
    let (failures, mut failed) = tokio::sync::mpsc::unbounded_channel();
    let mut threads = Vec::new();
    for service in crate::layout::SERVICES {
        let shared = shared.clone();
        let failures = failures.clone();
        let thread = thread::Builder::new()
            .name(service.to_owned())
            .spawn(move || {
                // A service that ends by itself, cleanly, by an error or by a panic, takes the others with it.
                let _stop = shared.shutdown.clone().drop_guard();
                let result = actix_rt::System::new().block_on(run(service, shared));
                if let Err(error) = result {
                    let _ = failures.send(format!("{service}: {error}"));
                }
            })
            .map_err(|e| format!("cannot start the thread of {service}: {e}"))?;
        threads.push(thread);
    }
    drop(failures);
    shared.shutdown.cancelled().await;
    let joined = tokio::task::spawn_blocking(move || {
        threads
            .into_iter()
            .filter_map(|thread| thread.join().err().map(|_| "a service panicked".to_owned()))
            .next()
    })
    .await
    .map_err(|e| e.to_string())?;
    match failed.recv().await.or(joined) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

async fn run(service: &'static str, shared: Shared) -> Result<(), String> {
    let Shared { layout, bus, kv, embedder, shutdown } = shared;
    let file = layout.config(service);
    let file = Some(file.as_path());
    match service {
        "gateway" => {
            let config = infera_gateway::Config::load(file).map_err(said)?;
            let deps = infera_gateway::Deps { bus, kv, bound: None };
            infera_gateway::run(config, deps, shutdown).await.map_err(said)
        }
        "settlement" => {
            let config = infera_settlement::Config::load(file).map_err(said)?;
            let deps = infera_settlement::Deps { bus, bound: None };
            infera_settlement::run(config, deps, shutdown).await.map_err(said)
        }
        "mempool" => {
            let config = infera_mempool::Config::load(file).map_err(said)?;
            let deps = infera_mempool::Deps { bus, bound: None };
            infera_mempool::run(config, deps, shutdown).await.map_err(said)
        }
        "dispatcher" => {
            let config = infera_dispatcher::Config::load(file).map_err(said)?;
            let deps = infera_dispatcher::Deps { bus, kv, bound: None };
            Box::pin(infera_dispatcher::run(config, deps, shutdown)).await.map_err(said)
        }
        "verifier" => {
            let config = infera_verifier::Config::load(file).map_err(said)?;
            let deps = infera_verifier::Deps { embedder: Some(embedder), ..infera_verifier::Deps::new(bus) };
            infera_verifier::run(config, deps, shutdown).await.map_err(said)
        }
        _ => {
            let config = infera_explorer::Config::load(file).map_err(said)?;
            let deps = infera_explorer::Deps { embedder: Some(embedder), ..infera_explorer::Deps::new(bus) };
            infera_explorer::run(config, deps, shutdown).await.map_err(said)
        }
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
