//! `infera up` and `infera down`.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    process::{Command as Process, ExitCode, Stdio},
    time::{Duration, Instant},
};

use infera_runtime::{CancellationToken, shutdown};
use infera_settlement::chain::devnet::{Devnet, DevnetConfig};
use rustix::process::{Pid, Signal, kill_process, setsid};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet, time::sleep};

mod bootstrap;
mod children;
mod nodes;
mod registry;

use crate::{
    cli::{DataArgs, Profile, UpArgs},
    client::{UpFile, get},
    layout::{Layout, SERVICES, cache, write_secret},
    models::DEFAULT_MODEL,
    say,
    services::{Ports, Setting, chat_model, embedder},
};
use children::ChildSpec;

/// How long services and nodes may take until they answer.
const READY: Duration = Duration::from_secs(120);
/// How long `infera down` waits for the end.
const END: Duration = Duration::from_secs(60);
/// How long a child that a killed run left behind may take to drain.
const LEFTOVER_GRACE: Duration = Duration::from_secs(10);
/// Free space below which a network is not started, bytes.
const MIN_FREE_BYTES: u64 = 512 * 1024 * 1024;
/// Steps that take longer say so.
const SLOW: Duration = Duration::from_secs(2);

pub fn up(args: UpArgs) -> Result<ExitCode, String> {
    let layout = Layout::new(&args.data).map_err(|e| format!("cannot write {}: {e}", args.data.display()))?;
    if args.detach {
        return detach(&layout, &args);
    }
    if args.detached {
        setsid().map_err(|e| format!("cannot leave the terminal: {e}"))?;
    }
    crate::block_on(run(&layout, &args))?
}

/// Everything that must hold before anything is started, one sentence each.
fn preflight(layout: &Layout, args: &UpArgs) -> Result<(), String> {
    for file in [chat_model(), embedder().join("model.safetensors"), anvil()] {
        if !file.exists() {
            return Err(format!("{} is not there: run deploy/setup up", file.display()));
        }
    }
    let disk = rustix::fs::statvfs(layout.root()).map_err(|e| e.to_string())?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < MIN_FREE_BYTES {
        return Err(format!(
            "the disk that holds {} has {} MiB free, {} are needed: free some space or choose another folder with --data",
            layout.root().display(),
            free / 1_048_576,
            MIN_FREE_BYTES / 1_048_576
        ));
    }
    for (port, service) in Ports::new(args.port_base).all() {
        std::net::TcpListener::bind(("127.0.0.1", port)).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => format!(
                "port {port} ({service}) is taken: end what listens there, or choose ten others with --port-base (INFERA_PORT_BASE)"
            ),
            _ => format!("cannot listen on port {port} ({service}): {error}"),
        })?;
    }
    Ok(())
}

async fn run(layout: &Layout, args: &UpArgs) -> Result<ExitCode, String> {
    let began = Instant::now();
    let token = shutdown::on_signals();
    let lock = layout.lock()?;
    let devnet = devnet(layout, Ports::new(args.port_base));
    end_leftovers(layout).await;
    Devnet::end_leftover(&devnet).await;
    preflight(layout, args)?;
    fs::write(layout.pid("up"), std::process::id().to_string()).map_err(|e| e.to_string())?;
    let _ = fs::remove_file(layout.up_json());
    let outcome = network(layout, args, &token, began, &devnet).await;
    let _ = fs::remove_file(layout.up_json());
    let _ = fs::remove_file(layout.pid("up"));
    drop(lock);
    outcome.map(|()| ExitCode::SUCCESS)
}

fn devnet(layout: &Layout, ports: Ports) -> DevnetConfig {
    DevnetConfig {
        anvil: anvil(),
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
        Profile::Cluster => step("RabbitMQ, Redis and PostgreSQL", start_servers(layout.cluster())).await,
    };
    let outcome = match servers {
        Ok(servers) => with_chain(layout, args, token, began, servers, config).await,
        Err(error) => Err(error),
    };
    outcome.and(cluster_script("stop", layout.cluster()).await)
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
            ready = ready(layout, args, ports) => ready?,
            () = token.cancelled() => return Ok(()),
        }
        announce(layout, args, ports, &keys.api_key, began)?;
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

/// Waits until every service is ready and every node has its session.
async fn ready(layout: &Layout, args: &UpArgs, ports: Ports) -> Result<(), String> {
    let services = async {
        for service in SERVICES {
            let url = format!("{}/readyz", ports.url(service));
            wait(|| async { get(&url, &[]).await.map(|_| ()) }).await.map_err(|last| {
                format!(
                    "{service} is not ready after {} s: {last}; see {}",
                    READY.as_secs(),
                    layout.root().join("logs").display()
                )
            })?;
        }
        Ok::<(), String>(())
    };
    step("the services", services).await?;
    let wanted = usize::from(args.nodes);
    let url = format!("{}/v1/nodes", ports.url("dispatcher"));
    let nodes = async {
        wait(|| async {
            let answer = get(&url, &[]).await?;
            let connected = answer.get("nodes").and_then(Value::as_array).map_or(0, Vec::len);
            if connected >= wanted {
                Ok(())
            } else {
                Err(format!("{connected} of {wanted} nodes are connected"))
            }
        })
        .await
        .map_err(|last| {
            format!("{last} after {} s; see {}", READY.as_secs(), layout.root().join("logs").display())
        })
    };
    step(&format!("{wanted} nodes of {wanted} operators"), nodes).await
}

async fn wait<F, Fut>(mut probe: F) -> Result<(), String>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), String>>,
{
    let deadline = Instant::now() + READY;
    loop {
        match probe().await {
            Ok(()) => return Ok(()),
            Err(last) if Instant::now() > deadline => return Err(last),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Says what is being done once it takes long, and how long it took.
async fn step<T>(what: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let began = Instant::now();
    tokio::pin!(work);
    say(format_args!("up: starting {what}"));
    loop {
        tokio::select! {
            done = &mut work => {
                if done.is_ok() && began.elapsed() >= SLOW {
                    say(format_args!("up: {what}: ready after {:.1} s", began.elapsed().as_secs_f32()));
                }
                return done;
            }
            () = sleep(SLOW) => say(format_args!("up: {what} ... {} s", began.elapsed().as_secs())),
        }
    }
}

fn announce(
    layout: &Layout,
    args: &UpArgs,
    ports: Ports,
    api_key: &str,
    began: Instant,
) -> Result<(), String> {
    let up = UpFile {
        base_url: format!("{}/v1", ports.url("gateway")),
        api_key: api_key.to_owned(),
        explorer_url: ports.url("explorer"),
        rpc_url: ports.rpc_url(),
        profile: args.profile.name().to_owned(),
        settlement_url: ports.url("settlement"),
        mempool_url: ports.url("mempool"),
        dispatcher_url: ports.url("dispatcher"),
        verifier_url: ports.url("verifier"),
        model: DEFAULT_MODEL.to_owned(),
    };
    let bytes = serde_json::to_vec_pretty(&up).map_err(|e| e.to_string())?;
    // Before the file that says it: `--detach` ends with the file.
    say(banner(layout, &up, began.elapsed()));
    write_secret(&layout.up_json(), &bytes).map_err(|e| format!("cannot write up.json: {e}"))
}

fn banner(layout: &Layout, up: &UpFile, took: Duration) -> String {
    let UpFile { base_url, api_key, explorer_url, settlement_url, model, .. } = up;
    let python = cache().join("venv/bin/python");
    let python = if python.exists() { python.display().to_string() } else { "python3".into() };
    let infera = std::env::current_exe().map_or_else(|_| "infera".into(), |p| p.display().to_string());
    let question = "What is the capital of France?";
    let data = layout.root().display();
    format!(
        "
The network is up ({profile}, {took:.1} s).

  base URL   {base_url}
  API key    {api_key}
  explorer   {explorer_url}

Ask with curl:

  curl -s {base_url}/chat/completions -H 'Authorization: Bearer {api_key}' -H 'Content-Type: application/json' -d '{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{question}\"}}],\"temperature\":0}}'

Ask with Python (pip install openai), streamed, with the verdict:

  {python} -c 'from openai import OpenAI; c=OpenAI(base_url=\"{base_url}\", api_key=\"{api_key}\"); [print(x.choices[0].delta.content or getattr(x, \"infera\", \"\") or \"\", end=\"\", flush=True) for x in c.chat.completions.create(model=\"{model}\", messages=[dict(role=\"user\", content=\"{question}\")], temperature=0, stream=True)]; print()'

Check an answer's receipt (RECEIPT is the id under `infera`):

  curl -s {settlement_url}/v1/receipts/RECEIPT -H 'Authorization: Bearer {api_key}' -o receipt.json && {infera} verify receipt.json --data {data}

{end}",
        profile = up.profile,
        took = took.as_secs_f32(),
        end = "Ctrl-C or `make down` ends it; the data stays.",
    )
}

/// Starts a copy that outlives the terminal, shows what it says until it is ready.
fn detach(layout: &Layout, args: &UpArgs) -> Result<ExitCode, String> {
    drop(layout.lock()?);
    let own = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let log_path = layout.log("up");
    // The banner has the API key.
    let _ = fs::remove_file(&log_path);
    let log = fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|e| format!("cannot write {}: {e}", log_path.display()))?;
    let errors = log.try_clone().map_err(|e| e.to_string())?;
    let mut command = Process::new(own);
    command.args(["up", "--detached", "--profile", args.profile.name()]);
    command.arg("--data").arg(layout.root());
    command.args(["--nodes", &args.nodes.to_string(), "--port-base", &args.port_base.to_string()]);
    command.args(args.node_faults.iter().flat_map(|fault| ["--node-fault", fault]));
    command.args(args.otlp.iter().flat_map(|otlp| ["--otlp", otlp]));
    command.args(args.qdrant.iter().flat_map(|qdrant| ["--qdrant", qdrant]));
    let _ = fs::remove_file(layout.up_json());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .map_err(|e| format!("cannot start the network: {e}"))?;
    crate::block_on(async {
        let token = shutdown::on_signals();
        let mut shown = 0;
        loop {
            // Looked at first: what is said until then is in the log that is read next.
            let ready = layout.up_json().exists();
            let ended = child.try_wait().map_err(|e| e.to_string())?;
            let text = fs::read_to_string(&log_path).unwrap_or_default();
            if let Some(new) = text.get(shown..).filter(|new| !new.is_empty()) {
                say(new.trim_end_matches('\n'));
                shown = text.len();
            }
            if ended.is_some() {
                return Ok(ExitCode::FAILURE);
            }
            if ready {
                return Ok(ExitCode::SUCCESS);
            }
            if token.is_cancelled() {
                say("up: interrupted; ending what was started");
                if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::TERM);
                }
                let _ = child.wait();
                return Ok(ExitCode::FAILURE);
            }
            sleep(Duration::from_millis(50)).await;
        }
    })?
}

pub fn down(args: &DataArgs) -> Result<ExitCode, String> {
    let Ok(layout) = Layout::existing(&args.data) else {
        say("down: nothing runs here");
        return Ok(ExitCode::SUCCESS);
    };
    crate::block_on(async {
        if let Some(pid) = layout.running().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM)
                .map_err(|e| format!("cannot end process {}: {e}", pid.as_raw_nonzero()))?;
            say("down: ending; open requests are finished or kept for the next start");
            let began = Instant::now();
            while layout.running().is_some() {
                if began.elapsed() > END {
                    return Err(format!(
                        "process {} does not end; see {}",
                        pid.as_raw_nonzero(),
                        layout.log("up").display()
                    ));
                }
                sleep(Duration::from_millis(50)).await;
            }
        } else {
            say("down: nothing runs here");
        }
        end_leftovers(&layout).await;
        Devnet::end_leftover(&devnet(&layout, Ports::new(0))).await;
        if layout.cluster().exists() {
            cluster_script("stop", layout.cluster()).await?;
        }
        Ok(ExitCode::SUCCESS)
    })?
}

/// Ends children that a killed `infera up` left behind. A process id is only believed if the process still
/// says that it belongs to this folder or supervisor.
async fn end_leftovers(layout: &Layout) {
    let Ok(entries) = fs::read_dir(layout.root().join("pids")) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i32>().ok());
        let ours = pid.is_some_and(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
                environ.split(|b| *b == 0).any(|entry| entry.starts_with(shutdown::SUPERVISOR.as_bytes()))
            }) && fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&*layout.root().to_string_lossy()))
        });
        if let Some(pid) = pid.and_then(Pid::from_raw).filter(|_| ours) {
            let _ = kill_process(pid, Signal::TERM);
            let began = Instant::now();
            while rustix::process::test_kill_process(pid).is_ok() {
                if began.elapsed() > LEFTOVER_GRACE {
                    let _ = kill_process(pid, Signal::KILL);
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
        let _ = fs::remove_file(path);
    }
}

fn anvil() -> PathBuf {
    cache().join("npm/node_modules/.bin/anvil")
}

async fn start_servers(dir: PathBuf) -> Result<BTreeMap<String, String>, String> {
    cluster_script("start", dir.clone()).await?;
    let path = dir.join("cluster.env");
    let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("export ").unwrap_or(line).split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect())
}

/// deploy/cluster of the source tree that this program was built from.
async fn cluster_script(action: &str, dir: PathBuf) -> Result<(), String> {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/cluster");
    let status = tokio::process::Command::new(&script)
        .arg(action)
        .arg(&dir)
        .stdin(Stdio::null())
        // A second Ctrl-C must not interrupt the end of the servers.
        .process_group(0)
        .status()
        .await
        .map_err(|e| format!("cannot run {}: {e}", script.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the private servers: deploy/cluster {action} failed"))
    }
}
