//! `infera up`: starts the chain, the services and the nodes in this order, and supervises them.

use std::{collections::BTreeMap, fs, path::PathBuf, process::ExitCode, time::Instant};

use infera_runtime::{CancellationToken, shutdown};
use infera_settlement::chain::devnet::{Devnet, DevnetConfig};
use rustix::process::setsid;
use tokio::{sync::mpsc, task::JoinSet};

mod announce;
mod bootstrap;
mod children;
mod detach;
mod down;
mod logs;
mod nodes;
mod preflight;
mod ready;
mod registry;
mod servers;

use crate::{
    cli::{Profile, UpArgs},
    layout::{Layout, SERVICES},
    say,
    services::{Ports, Setting},
};
use children::ChildSpec;
pub use down::down;
use ready::step;

pub fn up(args: UpArgs) -> Result<ExitCode, String> {
    let layout = Layout::new(&args.data).map_err(|e| format!("cannot write {}: {e}", args.data.display()))?;
    if args.detach {
        return detach::detach(&layout, &args);
    }
    if args.detached {
        setsid().map_err(|e| format!("cannot leave the terminal: {e}"))?;
    }
    crate::block_on(run(&layout, &args))?
}

async fn run(layout: &Layout, args: &UpArgs) -> Result<ExitCode, String> {
    let began = Instant::now();
    let token = shutdown::on_signals();
    let lock = layout.lock()?;
    let devnet = devnet(layout, Ports::new(args.port_base));
    down::end_leftovers(layout).await;
    Devnet::end_leftover(&devnet).await;
    preflight::check(layout, args)?;
    link_program(layout)?;
    fs::write(layout.pid("up"), std::process::id().to_string()).map_err(|e| e.to_string())?;
    let _ = fs::remove_file(layout.up_json());
    let outcome = network(layout, args, &token, began, &devnet).await;
    let _ = fs::remove_file(layout.up_json());
    let _ = fs::remove_file(layout.pid("up"));
    drop(lock);
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Makes this program reachable under one name, which the documentation uses.
fn link_program(layout: &Layout) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let link = layout.program();
    let new = link.with_extension("new");
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(own, &new)
        .and_then(|()| fs::rename(&new, &link))
        .map_err(|e| format!("cannot write {}: {e}", link.display()))
}

fn devnet(layout: &Layout, ports: Ports) -> DevnetConfig {
    DevnetConfig {
        anvil: preflight::anvil(),
        port: ports.chain(),
        chain_id: bootstrap::CHAIN_ID,
        state_file: layout.chain_state(),
        block_time: None,
    }
}

async fn network(
    layout: &Layout,
    args: &UpArgs,
    token: &CancellationToken,
    began: Instant,
    config: &DevnetConfig,
) -> Result<(), String> {
    let servers = match args.profile {
        Profile::Embedded => return with_chain(layout, args, token, began, BTreeMap::new(), config).await,
        Profile::Cluster => step("RabbitMQ, Redis and PostgreSQL", servers::start(layout.cluster())).await,
    };
    let outcome = match servers {
        Ok(servers) => with_chain(layout, args, token, began, servers, config).await,
        Err(error) => Err(error),
    };
    outcome.and(servers::cluster_script("stop", layout.cluster()).await)
}

/// Starts the chain, then everything that needs it; a chain that ends by itself is started again from its
/// saved state.
async fn with_chain(
    layout: &Layout,
    args: &UpArgs,
    token: &CancellationToken,
    began: Instant,
    servers: BTreeMap<String, String>,
    config: &DevnetConfig,
) -> Result<(), String> {
    let start = async { Devnet::start(config).await.map_err(|e| e.to_string()) };
    let mut chain = step("the local chain", start).await?;
    if let Some(warning) = chain.warning() {
        say(format_args!("up: {warning}"));
    }
    let keys = bootstrap::keys(layout)?;
    bootstrap::chain(layout, &keys, chain.rpc_url()).await?;
    chain.save().await.map_err(|e| e.to_string())?;
    let outcome = {
        let running = children(layout, args, token, began, servers, &keys);
        tokio::pin!(running);
        loop {
            tokio::select! {
                outcome = &mut running => break outcome,
                status = chain.ended() => {
                    let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
                    say(format_args!("up: the local chain ended ({status}); starting it again from its saved state"));
                    match Devnet::start(config).await {
                        Ok(again) => chain = again,
                        Err(error) => {
                            token.cancel();
                            let _ = (&mut running).await;
                            break Err(error.to_string());
                        }
                    }
                }
            }
        }
    };
    let stopped = chain.stop().await.map_err(|e| e.to_string());
    outcome.and(stopped)
}

/// The services and nodes, until `token`.
async fn children(
    layout: &Layout,
    args: &UpArgs,
    token: &CancellationToken,
    began: Instant,
    servers: BTreeMap<String, String>,
    keys: &bootstrap::Keys,
) -> Result<(), String> {
    let ports = Ports::new(args.port_base);
    let setting = Setting {
        layout,
        ports,
        profile: args.profile,
        otlp: args.otlp.as_deref(),
        qdrant: args.qdrant.as_deref(),
        servers,
    };
    setting.write_services(&keys.settler)?;
    let nodes = nodes::specs(&setting, args)?;

    let (notices, mut heard) = mpsc::unbounded_channel();
    let services_token = CancellationToken::new();
    let nodes_token = CancellationToken::new();
    let mut services = JoinSet::new();
    for spec in service_specs(layout, args.profile)? {
        services.spawn(spec.supervise(services_token.clone(), notices.clone()));
    }
    let mut node_tasks = JoinSet::new();
    for spec in nodes {
        node_tasks.spawn(spec.supervise(nodes_token.clone(), notices.clone()));
    }
    let serving = async {
        tokio::select! {
            ready = ready::ready(layout, args, ports) => ready?,
            () = token.cancelled() => return Ok(()),
        }
        announce::announce(layout, args, ports, &keys.api_key, began)?;
        token.cancelled().await;
        say("up: ending; open requests are finished or kept for the next start");
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = serving => outcome,
        Some(Ok(Err(error))) = services.join_next() => Err(error),
        Some(Ok(Err(error))) = node_tasks.join_next(), if !node_tasks.is_empty() => Err(error),
        () = async { while let Some(notice) = heard.recv().await { say(format_args!("up: {notice}")); } } => Ok(()),
    };
    // Nodes first: they decline what they can't finish, and the dispatcher hears it.
    nodes_token.cancel();
    while node_tasks.join_next().await.is_some() {}
    services_token.cancel();
    while services.join_next().await.is_some() {}
    outcome
}

fn service_specs(layout: &Layout, profile: Profile) -> Result<Vec<ChildSpec>, String> {
    let own = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let spec = |name: &str, program: PathBuf, args: Vec<String>| ChildSpec {
        name: name.to_owned(),
        program,
        args,
        env: Vec::new(),
        log: layout.log(name),
        pid_file: layout.pid(name),
    };
    Ok(match profile {
        Profile::Embedded => {
            let args = vec!["network".into(), "--data".into(), layout.root().to_string_lossy().into_owned()];
            vec![spec("network", own, args)]
        }
        Profile::Cluster => SERVICES
            .iter()
            .map(|service| {
                let config = layout.config(service).to_string_lossy().into_owned();
                spec(service, own.with_file_name(format!("infera-{service}")), vec![config])
            })
            .collect(),
    })
}
